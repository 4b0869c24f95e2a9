"""Merges sorted spills into group after group, whatever their size: the read side of the shuffle.

The merge works by blocks. One frame of each spill is in memory; the smallest of the frames' last keys is the bound.
What lies strictly below it is complete, so it is cut off by bisection, joined and sorted at C speed. The bound's own
key may go on in later frames, so its values are streamed spill by spill: a giant group needs no memory here.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from mrcore.engine.disk_list import DiskGroup, sorted_group
from mrcore.engine.memory import MemoryWatch
from mrcore.engine.output import Parts
from mrcore.engine.records import Key, Value, canonical_key, describe, order_key, sort_keys, sort_values
from mrcore.engine.shuffler import Combine, note_combiner
from mrcore.engine.spills import Block, Segment, SpillWriter, frame_bytes_for, size_of
from mrcore.errors import JobFault

MAX_FAN_IN = 256  # also the number of files that a merge holds open
MERGE_SHARE = 0.5  # of the budget may be taken by the frames of one merge

Source = Segment | Parts
Group = tuple[Key, Iterable[list[Value]]]


def below(keys: list[Key], bound: Key, start: int = 0) -> int:
    """Return the index of the first key from `start` on that is not below `bound`."""
    try:
        return bisect_left(keys, bound, start)
    except TypeError:  # keys of several kinds
        return bisect_left(keys, order_key(bound), start, key=order_key)


class _Cursor:
    """The current block of one source: `keys[position:]` are still to come. `alive` turns False at the end."""

    def __init__(self, source: Source, low: list[Key] | None, high: list[Key] | None) -> None:
        self._blocks = source.blocks()
        self._low, self._high = low, high
        self.alive = True
        self.keys: list[Key] = []
        self.lists: list[list[Value]] = []
        self.position = 0
        self.load()

    def load(self) -> None:
        """Read the next block that has keys of the wanted range."""
        self.position, self.keys, self.lists = 0, [], []
        while not self.keys:
            block = next(self._blocks, None)
            if block is None:
                self.alive = False
                return
            self.keys, self.lists = block
            if self._low is not None:
                self.position = below(self.keys, self._low[0])
            if self._high is not None:
                del self.keys[below(self.keys, self._high[0]) :]
            if self.position >= len(self.keys):
                self.position, self.keys = 0, []

    def take_below(self, bound: Key) -> Block:
        """Cut off the groups strictly below `bound`; the block's last key never is among them."""
        start, self.position = self.position, below(self.keys, bound, self.position)
        return self.keys[start : self.position], self.lists[start : self.position]

    def stream(self, key: Key) -> Iterator[list[Value]]:
        """Yield the lists of values of `key`, block after block, if it comes next."""
        while self.alive and self.keys[self.position] == key:
            yield self.lists[self.position]
            self.position += 1
            if self.position >= len(self.keys):
                self.load()


def merge(sources: Iterable[Source], low: list[Key] | None = None, high: list[Key] | None = None) -> Iterator[Group]:
    """Merge sorted sources into groups in ascending key order.

    Yields `(key, lists of values)`; the lists must be used up before the next group is asked for. `low` and `high`
    (one-element lists, None for an open end) keep only keys with low ≤ key < high.
    """
    cursors = [cursor for cursor in (_Cursor(source, low, high) for source in sources) if cursor.alive]
    while cursors:
        last_keys = [cursor.keys[-1] for cursor in cursors]
        try:
            bound = min(last_keys)
        except TypeError:
            bound = min(last_keys, key=order_key)
        blocks = [block for block in (cursor.take_below(bound) for cursor in cursors) if block[0]]
        if len(blocks) == 1:
            for key, values in zip(*blocks[0], strict=True):
                yield key, (values,)
        elif blocks:
            joined = _join(blocks)
            for key in sort_keys(joined):
                yield key, (joined[key],)
        yield bound, (values for cursor in cursors for values in cursor.stream(bound))
        cursors = [cursor for cursor in cursors if cursor.alive]


def _join(blocks: list[Block]) -> dict[Key, list[Value]]:
    blocks.sort(key=lambda block: len(block[0]), reverse=True)  # the largest enters at C speed
    joined = dict(zip(*blocks[0], strict=True))
    for keys, lists in blocks[1:]:
        for key, values in zip(keys, lists, strict=True):
            if key in joined:
                joined[key].extend(values)
            else:
                joined[key] = values
    return joined


class DiskSort:
    """Sorts and groups more than fits in memory.

    Spills enter by `add_spill(segment)`; afterwards `next_group()` returns the groups one by one in ascending key
    order. `low` and `high` bound the keys as in `merge`. `combine` is applied whenever spills are merged into longer
    ones. Temporary files go to `folder`, which the caller removes.
    """

    def __init__(
        self,
        folder: Path,
        watch: MemoryWatch,
        *,
        combine: Combine | None = None,
        ascending_values: bool = False,
        low: list[Key] | None = None,
        high: list[Key] | None = None,
    ) -> None:
        self._folder, self._watch, self._combine = folder, watch, combine
        self._ascending_values = ascending_values
        # Keys that came as JSON are lists where they should be tuples.
        self._low, self._high = (bound and [canonical_key(bound[0])] for bound in (low, high))
        self._sources: list[Source] = []
        self._groups: Iterator[tuple[Key, list[Value] | DiskGroup]] | None = None
        self.merge_passes = 0

    def add_spill(self, source: Source) -> None:
        """Take a spill, the part of one that belongs here, or the earlier output."""
        if source.length:
            self._sources.append(source)

    @property
    def bytes_read(self) -> int:
        """How much of the sources that are left the merge has read so far; for any thread."""
        return sum(source.bytes_read for source in list(self._sources))

    def next_group(self, disk_based: bool = False) -> tuple[Key, list[Value] | DiskGroup] | None:
        """Return the next `(key, values)`, the values as a list or, `disk_based`, as a DiskGroup; None at the end.

        Raises JobFault when a group does not fit in memory and may not go to disk.
        """
        if self._groups is None:
            self._groups = self.groups(disk_based)
        return next(self._groups, None)

    def groups(self, disk_based: bool = False) -> Iterator[tuple[Key, list[Value] | DiskGroup]]:
        """Iterate over what `next_group` returns one by one."""
        self.prepare()
        for key, lists in merge(self._sources, self._low, self._high):
            if disk_based:
                yield key, self._disk_group(key, lists)
                continue
            values = self._in_memory(key, lists)
            if self._ascending_values:
                sort_values(values)
            yield key, values

    def prepare(self) -> None:
        """Merge spills into longer ones until what is left can be merged in one go within the budget."""
        while len(self._sources) > (fan_in := self._fan_in()):
            self._sources.sort(key=lambda source: source.length, reverse=True)
            # Only as many as needed in the first pass: the longest spills are then read once.
            count = min(fan_in, len(self._sources) - fan_in + 1)
            chosen = [self._sources.pop() for _ in range(max(2, count))]
            self._sources.append(self._merge_to_one(chosen))

    def _fan_in(self) -> int:
        largest = max((source.max_decoded for source in self._sources), default=1)
        room = int(MERGE_SHARE * (self._watch.budget_bytes - self._watch.floor_bytes))
        return max(2, min(MAX_FAN_IN, room // (2 * largest)))

    def _merge_to_one(self, sources: list[Source]) -> Segment:
        self.merge_passes += 1
        frame_bytes = frame_bytes_for(self._watch.budget_bytes)
        writer = SpillWriter(self._folder, f"merge-{self.merge_passes}", frame_bytes)
        batch: dict[Key, list[Value]] = {}
        held = 0

        def flush() -> None:
            nonlocal held
            if self._combine is not None and batch:
                note_combiner(self._combine, list(batch))
                for key, values in batch.items():
                    batch[key] = self._combine(key, values) if len(values) > 1 else values
            writer.write(0, list(batch), batch, held > frame_bytes)
            batch.clear()
            held = 0

        for key, lists in merge(sources, self._low, self._high):
            for number, values in enumerate(lists):
                if number and held > frame_bytes:  # a giant group goes on in a frame of its own
                    flush()
                if key in batch:
                    batch[key].extend(values)
                else:
                    batch[key] = list(values)
                held += size_of(key) + sum(map(size_of, values))
            if len(batch) >= 500 or held > frame_bytes:
                flush()
        flush()
        spill = writer.close()
        return Segment(writer.data_path(), 0, spill.bytes, spill.max_decoded)

    def _disk_group(self, key: Key, lists: Iterable[list[Value]]) -> DiskGroup:
        if self._ascending_values:
            return sorted_group(self._folder, key, lists, self._watch)
        group = DiskGroup(self._folder, key)
        group.extend_values(chain.from_iterable(lists))
        return group

    def _in_memory(self, key: Key, lists: Iterable[list[Value]]) -> list[Value]:
        if isinstance(lists, tuple):
            values: list[Value] = lists[0]
            return values
        values = []
        for more in lists:
            values.extend(more)
            if len(values) > 4096 and not self._watch.fits(0, 0.9):
                raise group_too_large(key, len(values), self._watch.budget_bytes)
        return values


def group_too_large(key: Key, count: int, budget_bytes: int) -> JobFault:
    """Describe a group that does not fit in memory, and what to set."""
    return JobFault(
        f"the group of key {describe(key)} does not fit in memory: {count:,} values so far, "
        f"budget {budget_bytes >> 20} MiB per server. Set disk_based_input: true (the reduce function then gets a "
        "DiskList), set a combine_function_name, or give the servers more memory (memory_bytes)",
        key=describe(key),
    )
