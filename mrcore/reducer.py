"""The former place of `mrcore.engine.reducer`; `import mrcore` has all that users need."""

from mrcore.engine.reducer import Reduce as Reduce
