"""Groups items by key in memory and spills them to disk as sorted runs: the write side of every sort.

The caller may reach into `groups` and append there itself: one dict operation per item is what makes the map loop
fast. Keys and values that get in that way are checked when they are spilled, where a check costs one pass per
different key (`BadItem`); whoever needs to know the input line then looks for it again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mrcore import task
from mrcore.engine.memory import MemoryWatch
from mrcore.engine.records import (
    LARGE,
    Key,
    Snapshot,
    Value,
    canonical_key,
    check_item,
    describe,
    dumps,
    loads,
    partition_keys,
    sort_keys,
)
from mrcore.engine.spills import RunWriter, frame_bytes_for
from mrcore.errors import JobFault

Combine = Callable[[Key, list[Value]], list[Value]]
KEYS_PER_NOTE = 256
_ALREADY_CANONICAL = {str, int, type(None)}


def note_combiner(combine: Combine, keys: Sequence[Key]) -> None:
    """Note that a combiner gets groups of these keys next (see `task.in_hand`)."""
    name = getattr(combine, "__name__", "")
    task.in_hand(f"combiner {name}, {len(keys)} groups, the first of key {describe(keys[0])}")


class SpillSorter:
    """Collects items until `watch` says that memory is short, then writes one sorted run.

    Runs are named `<name>-<number>` in `folder`; `combine` gets a
    key and its values and gives the values to keep.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        watch: MemoryWatch,
        *,
        partitions: int = 1,
        combine: Combine | None = None,
        keep_first_keys: bool = False,
    ) -> None:
        self._told: list[str] = []  # as text: small objects that outlive a spill pin arenas of the allocator
        self.groups: defaultdict[Key, list[Value]] = defaultdict(list)
        self.large = False  # some value may be: frames are then sized before they are encoded
        self._folder, self._name, self._watch = folder, name, watch
        self._partitions, self._combine, self._keep_first_keys = partitions, combine, keep_first_keys
        self._snapshot = Snapshot()
        watch.watch_growth(self.groups)

    def add(self, item: Any) -> None:
        """Take one item of any shape, checked. Raises BadItem."""
        key, value = check_item(item, self._snapshot)
        self.groups[key].append(value)
        if self._snapshot.nodes > LARGE:
            self.large = True
            self._watch.look()  # a few of these are past the budget before its thread looks again

    @property
    def runs(self) -> list[dict[str, Any]]:
        """What `RunWriter.close` told of each run."""
        return [loads(text) for text in self._told]

    def spill(self) -> None:
        """Write what is held as one run and let go of it. Raises BadItem, or what `combine` raises."""
        if not self.groups:
            self._watch.release()
            return
        try:
            self._told.append(dumps(self._write_run()))
        except (ValueError, OverflowError, TypeError, JobFault):
            self._check_all()
            raise
        self.groups.clear()  # the same dict again: the map loop holds a reference to it
        self.large = False
        self._watch.release()

    def _write_run(self) -> dict[str, Any]:
        # A function of its own, so that nothing of the run is referred to when memory is given back.
        keys = self._keys()
        if self._combine is not None:
            self._combine_all(self._combine, keys)
        writer = RunWriter(
            self._folder,
            f"{self._name}-{len(self._told)}",
            frame_bytes_for(self._watch.budget_bytes),
            keep_first_keys=self._keep_first_keys,
        )
        for partition, dealt in enumerate(partition_keys(keys, self._partitions)):
            writer.write(partition, sort_keys(dealt), self.groups, self.large)
        return writer.close()

    def _keys(self) -> list[Key]:
        keys = list(self.groups)
        if set(map(type, keys)) <= _ALREADY_CANONICAL:
            return keys
        return [canonical_key(key) for key in keys]  # each equals the key that it stands for, so lookups still work

    def _combine_all(self, combine: Combine, keys: list[Key]) -> None:
        groups = self.groups
        for start in range(0, len(keys), KEYS_PER_NOTE):
            some = keys[start : start + KEYS_PER_NOTE]
            note_combiner(combine, some)
            for key in some:
                values = groups[key]
                if len(values) > 1:
                    groups[key] = combine(key, values)

    def _check_all(self) -> None:
        """Find the item that could not be written. Raises BadItem when there is one."""
        for key, values in self.groups.items():
            for value in values:
                check_item((key, value), self._snapshot)
