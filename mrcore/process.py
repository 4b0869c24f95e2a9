"""The former place of `mrcore.engine.process`; `import mrcore` has all that users need."""

from mrcore.engine.process import Process as Process
