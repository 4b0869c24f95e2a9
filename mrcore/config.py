"""The former place of `mrcore.settings.config`; `import mrcore` has all that users need."""

from mrcore.settings.config import Settings as Settings
from mrcore.settings.config import load_settings as load_settings
