"""The write side of the shuffle: items in, sorted runs by partition out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mrcore.engine.memory import MemoryWatch
from mrcore.engine.output import PartWriter
from mrcore.engine.records import Key, Snapshot, Value, check_item, nodes_of
from mrcore.engine.sorter import Combine, SpillSorter
from mrcore.system import forks

BATCH_ITEMS = 1000
BATCH_NODES = 1 << 15  # what large keys and values may add up to before a batch is written


class Shuffle:
    """Takes a map task's items and publishes them as spill runs for the reducing nodes.

    `partitions` is the number of hash partitions; with `by_range`, runs are sorted by key alone and keep their first
    keys, and the ranges are cut later. `max_items` bounds the items held before a spill (None: memory alone).
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
        self.sorter = SpillSorter(
            folder, name, watch, partitions=1 if by_range else partitions, combine=combine, keep_first_keys=by_range
        )
        self.watch = watch
        self.max_items = max_items or 1 << 62

    def append(self, key: Key, value: Value) -> None:
        """Take one item. Raises BadItem when it is not allowed."""
        self.sorter.add((key, value))
        if self.watch.due:
            self.spill()

    def spill(self) -> None:
        """Write what is held as one run."""
        forks.check()
        self.sorter.spill()

    def shuffle(self) -> list[dict[str, Any]]:
        """Seal: write what is left and give what `RunWriter.close` told of every run."""
        self.spill()
        return self.sorter.runs


class DirectOutput:
    """Stands where Shuffle stands in a job without a reduce function: items go to parts, unsorted."""

    def __init__(self, parts: PartWriter, watch: MemoryWatch) -> None:
        self._parts, self.watch = parts, watch
        self._nodes = 0
        self._snapshot = Snapshot()
        self._batch: list[tuple[Key, Value]] = []

    def add(self, item: Any) -> None:
        """Take one item of any shape. Raises BadItem."""
        checked = check_item(item, self._snapshot)
        self._batch.append(checked)
        self._nodes += self._snapshot.nodes + nodes_of(checked[0])
        if len(self._batch) >= BATCH_ITEMS or self._nodes > BATCH_NODES:
            self.flush()

    def flush(self) -> None:
        """Write what is held."""
        self._parts.write(self._batch)
        self._batch, self._nodes = [], 0
        self.watch.look()
        if self.watch.due:
            self.watch.release()

    def close(self) -> list[dict[str, Any]]:
        """Finish and give the parts."""
        self.flush()
        return self._parts.close()
