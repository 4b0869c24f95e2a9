"""The write side of the shuffle: items in, grouped in memory, spilled to disk as sorted frames by partition.

The caller may reach into `groups` and append there itself: one dict operation per item is what makes the map loop
fast. Keys and values that get in that way are checked when they are spilled, where a check costs one pass per
different key (`BadItem`); a caller that needs to know the input line then looks for it again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from mrcore import task
from mrcore.engine import records
from mrcore.engine.memory import MemoryWatch
from mrcore.engine.records import LARGE, Key, Snapshot, Value, check_item, describe
from mrcore.engine.spills import SpillWriter, frame_bytes_for
from mrcore.errors import JobFault
from mrcore.messages.kinds import decode
from mrcore.messages.tasks import Spill
from mrcore.system import forks

Combine = Callable[[Key, list[Value]], list[Value]]
KEYS_PER_NOTE = 256
_ALREADY_CANONICAL = {str, int, type(None)}


def note_combiner(combine: Combine, keys: Sequence[Key]) -> None:
    """Note that a combiner gets groups of these keys next (see `task.in_hand`)."""
    name = getattr(combine, "__name__", "")
    task.in_hand(f"combiner {name}, {len(keys)} groups, the first of key {describe(keys[0])}")


class Shuffle:
    """Takes a map task's items and publishes them as spills, named `<name>-<number>` in `folder`.

    `partitions` is the number of hash partitions; with `by_range`, spills are sorted by key alone and keep their first
    keys, and the ranges are cut later. `combine` takes a key and its values and returns the values to keep. `max_items`
    bounds the items held before a spill (None: memory alone); the map loop counts them.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        watch: MemoryWatch,
        *,
        partitions: int,
        by_range: bool = False,
        combine: Combine | None = None,
        max_items: int | None = None,
    ) -> None:
        self.groups: defaultdict[Key, list[Value]] = defaultdict(list)
        self.watch = watch
        self.max_items = max_items or 1 << 62
        self._folder, self._name, self._combine = folder, name, combine
        self._partitions, self._by_range = 1 if by_range else partitions, by_range
        self._spills: list[bytes] = []  # as JSON: small objects that outlive a spill pin arenas of the allocator
        self._large = False  # some value may be: frames are then sized before they are encoded
        self._snapshot = Snapshot()
        watch.watch_growth(self.groups)

    @property
    def spills(self) -> int:
        """How many spills are written so far."""
        return len(self._spills)

    def add(self, item: Any) -> None:
        """Take one item of any shape, checked. Raises BadItem."""
        key, value = check_item(item, self._snapshot)
        self.groups[key].append(value)
        if self._snapshot.nodes > LARGE:
            self._large = True
            self.watch.look()  # a few of these are past the budget before its thread looks again

    def append(self, key: Key, value: Value) -> None:
        """Take one item and spill when memory is short. Raises BadItem when it is not allowed."""
        self.add((key, value))
        if self.watch.due:
            self.spill()

    def shuffle(self) -> list[Spill]:
        """Seal: write what is left and return all spills."""
        self.spill()
        return [decode(Spill, spill) for spill in self._spills]

    def spill(self) -> None:
        """Write what is held as one spill and drop it. Raises BadItem, or what `combine` raises."""
        forks.check()
        if self.groups:
            try:
                self._spills.append(msgspec.json.encode(self._write_spill()))
            except (ValueError, OverflowError, TypeError, JobFault):
                self._check_all()
                raise
            self.groups.clear()  # the same dict again: the map loop holds a reference to it
            self._large = False
        self.watch.release()

    def _write_spill(self) -> Spill:
        # A function of its own, so that nothing of the spill is referred to when memory is given back.
        keys = list(self.groups)
        if not set(map(type, keys)) <= _ALREADY_CANONICAL:
            keys = list(
                map(records.canonical_key, keys)
            )  # each equals the key that it stands for, so lookups still work
        if self._combine is not None:
            self._combine_all(self._combine, keys)
        frame_bytes = frame_bytes_for(self.watch.budget_bytes)
        name = f"{self._name}-{len(self._spills)}"
        writer = SpillWriter(self._folder, name, frame_bytes, keep_first_keys=self._by_range)
        for partition, part in enumerate(records.partition_keys(keys, self._partitions)):
            writer.write(partition, records.sort_keys(part), self.groups, self._large)
        return writer.close()

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
