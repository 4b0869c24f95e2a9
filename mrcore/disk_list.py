"""The former place of `mrcore.engine.disk_list`; `import mrcore` has all that users need."""

from mrcore.engine.disk_list import DiskList as DiskList
