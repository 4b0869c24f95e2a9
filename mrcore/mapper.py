"""The former place of `mrcore.engine.mapper`; `import mrcore` has all that users need."""

from mrcore.engine.mapper import Map as Map
