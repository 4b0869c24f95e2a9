"""The former place of `mrcore.engine.disk_sort`; `import mrcore` has all that users need."""

from mrcore.engine.disk_sort import DiskSort as DiskSort
