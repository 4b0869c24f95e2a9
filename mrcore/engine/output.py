"""Parts: the output files of a task, one JSON item a line; and how a later run reads them to merge them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from operator import eq
from pathlib import Path
from typing import Any, BinaryIO
from zlib import crc32

from xopen import xopen

from mrcore.engine.memory import MemoryWatch
from mrcore.engine.records import Key, Snapshot, Value, as_key, check_item, dumps, loads, nodes_of
from mrcore.engine.spills import Block, decoded_bytes
from mrcore.errors import JobFault
from mrcore.messages.tasks import Part, PlacedPart
from mrcore.system import forks
from mrcore.system.paths import PARTIAL, fsync_dir, fsync_file

Item = tuple[Key, Value]
BATCH_ITEMS = 1000
BATCH_NODES = 1 << 15  # what large keys and values may add up to before a batch is written
READ_BYTES = 64 * 1024  # of an earlier output are decoded at a time


def part_name(run: int, partition: int, sequence: int, compress: bool) -> str:
    """Return the final name of a part; the order of the names is the order of the parts."""
    return f"part-{run:06d}-{partition:05d}-{sequence:05d}.data" + (".gz" if compress else "")


def encode_items(items: Sequence[Item]) -> str:
    """Encode items as JSON lines, each `[key,value]` and a newline.

    One call encodes them all, three times faster than item by item; the text is then cut at `],[`, which is safe
    exactly when that occurs as often as there are borders between items.
    """
    if not items:
        return ""
    text = dumps(items)
    if text.count("],[") == len(items) - 1:
        return text[1:-1].replace("],[", "]\n[") + "\n"
    return "\n".join(map(dumps, items)) + "\n"


class PartWriter:
    """Writes one task's items into parts in `folder`, a new part after `max_items` items (None: one part).

    Unfinished files carry the try that writes them (`<name>.try<n>.partial`). `close()` returns what the
    manifest records of each part.
    """

    def __init__(
        self, folder: Path, *, run: int, partition: int, attempt_try: int, max_items: int | None, compress: bool
    ) -> None:
        self._folder, self._run, self._partition, self._try = folder, run, partition, attempt_try
        self._max_items, self._compress = max_items, compress
        self._parts: list[Part] = []
        self._stream: BinaryIO | None = None
        self._checksum = self._bytes = self._records = self._batch_bytes = self._max_decoded = 0

    def write(self, items: Sequence[Item]) -> None:
        """Append items. Raises ValueError, OverflowError or TypeError when one of them cannot be encoded."""
        forks.check()
        while items:
            if self._stream is None:
                self._open()
            assert self._stream is not None
            room = len(items) if self._max_items is None else self._max_items - self._records
            batch, items = items[:room], items[room:]
            text = encode_items(batch)
            content = text.encode()
            self._stream.write(content)
            self._checksum = crc32(content, self._checksum)
            self._bytes += len(content)
            self._records += len(batch)
            self._batch_bytes = max(self._batch_bytes, len(content))
            self._max_decoded = max(self._max_decoded, decoded_bytes(text, len(batch)))
            if self._records == self._max_items:
                self._finish()

    def _open(self) -> None:
        self._checksum = self._bytes = self._records = self._batch_bytes = self._max_decoded = 0
        self._name = part_name(self._run, self._partition, len(self._parts), self._compress)
        self._path = self._folder / self._name
        self._partial = self._folder / f"{self._name}.try{self._try}{PARTIAL}"
        # threads=0: a pool of compressing processes would outlive a killed task
        if self._compress:
            self._stream = xopen(self._partial, "wb", format="gz", threads=0)
        else:
            self._stream = open(self._partial, "wb", 1 << 20)

    def _finish(self) -> None:
        assert self._stream is not None
        self._stream.close()
        self._stream = None
        fsync_file(self._partial)
        os.replace(self._partial, self._path)
        self._parts.append(
            Part(
                name=self._name,
                partition=self._partition,
                records=self._records,
                bytes=self._path.stat().st_size,
                text_bytes=self._bytes,
                crc32=self._checksum,
                batch_bytes=self._batch_bytes,
                max_decoded=self._max_decoded,
            )
        )

    def close(self) -> list[Part]:
        """Finish the last part and return all of them."""
        if self._stream is not None:
            self._finish()
        fsync_dir(self._folder)
        return self._parts


class DirectOutput:
    """Stands where Shuffle stands in a job without a reduce function: items go to parts, unsorted."""

    spills = 0

    def __init__(self, parts: PartWriter, watch: MemoryWatch) -> None:
        self._parts, self.watch = parts, watch
        self._nodes = 0
        self._snapshot = Snapshot()
        self._batch: list[Item] = []

    def add(self, item: Any) -> None:
        """Take one item of any shape. Raises BadItem."""
        checked = check_item(item, self._snapshot)
        self._batch.append(checked)
        self._nodes += self._snapshot.nodes + nodes_of(checked[0])
        if len(self._batch) >= BATCH_ITEMS or self._nodes > BATCH_NODES:
            self._flush()

    def _flush(self) -> None:
        self._parts.write(self._batch)
        self._batch, self._nodes = [], 0
        self.watch.look()
        if self.watch.due:
            self.watch.release()

    def close(self) -> list[Part]:
        """Finish and return the parts, as `PartWriter.close` does."""
        self._flush()
        return self._parts.close()


@dataclass
class Parts:
    """The earlier output of one partition, which is merged as if it were a spill: its parts, in order of their keys."""

    paths: Sequence[Path]
    parts: Sequence[PlacedPart]
    bytes_read: int = 0  # by `blocks`, of `length`

    @property
    def length(self) -> int:
        """Bytes of text."""
        return sum(part.text_bytes for part in self.parts)

    @property
    def max_decoded(self) -> int:
        """As of a Segment. A block that is read is of two of the batches that were written at most."""
        return 2 * max((part.max_decoded for part in self.parts), default=0)

    def blocks(self) -> Iterator[Block]:
        """Read the parts block by block, as `Segment.blocks` reads frames.

        Raises JobFault for a part that is missing or damaged.
        """
        for path, part in zip(self.paths, self.parts, strict=True):
            checksum = 0
            try:
                with xopen(path, "rb", threads=0) as stream:
                    while block := stream.read(min(part.batch_bytes, READ_BYTES)):
                        block += stream.readline()
                        checksum = crc32(block, checksum)
                        self.bytes_read += len(block)
                        yield _grouped(loads(b"[" + block[:-1].replace(b"\n", b",") + b"]"))
                if checksum != part.crc32:
                    raise ValueError("its checksum is not the committed one")
            except MemoryError:
                raise
            except Exception as error:  # two formats with error classes of their own
                raise JobFault(
                    f"part {part.name} of the earlier output on {part.node} cannot be read ({error}): bring it "
                    "back, or have all inputs read again by `mrcore ledger forget JOB`",
                    code="ledger",
                ) from error


def _grouped(items: list[list[Any]]) -> Block:
    keys = [as_key(key) for key, _ in items]
    if not any(map(eq, keys, islice(keys, 1, None))):
        return keys, [[value] for _, value in items]
    groups = {key: [item[1] for item in group] for key, group in groupby(items, lambda item: as_key(item[0]))}
    return list(groups), list(groups.values())
