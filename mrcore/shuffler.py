"""The former place of `mrcore.engine.shuffler`; `import mrcore` has all that users need."""

from mrcore.engine.shuffler import Shuffle as Shuffle
