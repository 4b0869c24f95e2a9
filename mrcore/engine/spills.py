"""Spill runs: sorted data on disk, as frames, with an index by partition and key.

A run is a data file of frames ordered by partition, then key, and an index file written last, so that a run exists
exactly when its index does. A reducing node reads a range of frames: all of one partition, or all that may hold keys
of one key range. A group too large for one frame stands in several frames with the same key.
"""

from __future__ import annotations

import os
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from operator import eq
from pathlib import Path
from typing import Any, BinaryIO
from zlib import crc32

from xopen import xopen

from mrcore.engine.records import (
    FRAME_HEADER,
    LARGE,
    Key,
    Value,
    as_tuple,
    decode_payload,
    dumps,
    encode_frame,
    loads,
    order_key,
)
from mrcore.errors import JobFault
from mrcore.system.paths import PARTIAL

MAX_FRAME_GROUPS = 1000  # 300 to 1,000 measured best for encoding and for merging by blocks
MAX_FRAME_VALUES = 4096
PART_BLOCK_BYTES = 64 * 1024  # of an earlier output are decoded at a time
SAMPLES_PER_RUN = 256  # first keys that a run reports for range partitioning


def frame_bytes_for(budget_bytes: int) -> int:
    """Give the target size of a frame: small enough that a wide merge fits half of the budget."""
    return min(256 * 1024, max(16 * 1024, budget_bytes // 2048))


@dataclass(frozen=True)
class Segment:
    """A byte range of a file that holds whole frames in key order.

    `max_decoded` estimates the memory, in bytes, that the largest of its frames takes once decoded.
    """

    path: Path
    offset: int
    length: int
    max_decoded: int


@dataclass(frozen=True)
class Parts:
    """The earlier output of one partition, which is merged as if it were a run: its parts, in order of their keys.

    `told` is what `PartWriter.close` told of each.
    """

    paths: Sequence[Path]
    told: Sequence[Mapping[str, Any]]

    @property
    def length(self) -> int:
        """Bytes of text."""
        return sum(part["text_bytes"] for part in self.told)

    @property
    def max_decoded(self) -> int:
        """As of a Segment. A block that is read is of two of the batches that were written at most."""
        return 2 * max((part["max_decoded"] for part in self.told), default=0)


class RunWriter:
    """Writes one run. `write()` takes partitions in ascending order, each partition's keys sorted."""

    def __init__(self, folder: Path, name: str, frame_bytes: int, *, keep_first_keys: bool = False) -> None:
        self.folder, self.name = folder, name
        self._frame_bytes = frame_bytes
        self._keep_first_keys = keep_first_keys
        self._partitions, self._lengths = array("q"), array("q")
        self._first_keys: list[Key] = []
        self.groups = self.values = self._max_decoded = 0
        self._chunk = 256
        self._stream: BinaryIO = open(self.data_path(PARTIAL), "wb", buffering=1 << 18)

    def data_path(self, ending: str = "") -> Path:
        """The data file's path."""
        return self.folder / f"{self.name}.data{ending}"

    def write(self, partition: int, keys: Sequence[Key], groups: Mapping[Key, list[Value]], large_values: bool) -> None:
        """Write the groups of `keys` (sorted). `large_values`: some may be, so size all before encoding them."""
        position = 0
        while position < len(keys):
            chunk = keys[position : position + self._chunk]
            lists = [groups[key] for key in chunk]
            if large_values or any_large(chunk):
                chunk, lists = self._cut_to_size(chunk, lists, large_values)
            position += len(chunk)
            self._write_frames(partition, chunk, lists)

    def _cut_to_size(
        self, keys: Sequence[Key], lists: list[list[Value]], large_values: bool
    ) -> tuple[Sequence[Key], list[list[Value]]]:
        total = 0
        for count, (key, values) in enumerate(zip(keys, lists, strict=True)):
            total += size_of(key) + (sum(map(size_of, values)) if large_values else 8 * len(values))
            if total > self._frame_bytes and count:
                return keys[:count], lists[:count]
        return keys, lists

    def _write_frames(self, partition: int, keys: Sequence[Key], lists: list[list[Value]]) -> None:
        count = sum(map(len, lists))
        if len(keys) == 1 and count > MAX_FRAME_VALUES:
            for start in range(0, count, MAX_FRAME_VALUES):
                self._write_frames(partition, keys, [lists[0][start : start + MAX_FRAME_VALUES]])
            return
        if len(keys) == 1 and count > 1:
            if sum(map(size_of, lists[0])) > self._frame_bytes:  # halve a group until its pieces fit a frame
                self._write_frames(partition, keys, [lists[0][: count // 2]])
                self._write_frames(partition, keys, [lists[0][count // 2 :]])
                return
        elif len(keys) > 1 and count > MAX_FRAME_VALUES:
            self._write_halves(partition, keys, lists)
            return
        frame, decoded = encode_frame(keys, lists)
        if len(frame) > 2 * self._frame_bytes and len(keys) > 1:
            self._chunk = max(1, self._chunk // 2)
            self._write_halves(partition, keys, lists)
            return
        fitting = len(keys) * self._frame_bytes // len(frame)
        self._chunk = max(1, min(MAX_FRAME_GROUPS, 2 * self._chunk, fitting))
        self._stream.write(frame)
        self._partitions.append(partition)
        self._lengths.append(len(frame))
        if self._keep_first_keys:
            self._first_keys.append(keys[0])
        self._max_decoded = max(self._max_decoded, decoded)
        self.groups += len(keys)
        self.values += count

    def _write_halves(self, partition: int, keys: Sequence[Key], lists: list[list[Value]]) -> None:
        middle = len(keys) // 2
        self._write_frames(partition, keys[:middle], lists[:middle])
        self._write_frames(partition, keys[middle:], lists[middle:])

    def close(self) -> dict[str, Any]:
        """Publish the run: data first, index last. Give what others must know of it, JSON-able: "id", "bytes",
        "groups", "values", "max_decoded", "partitions": {p: bytes}, "samples": [[first key, bytes]…].

        Working files are not flushed to disk: a machine that loses power starts the attempt again.
        """
        self._stream.close()
        os.replace(self.data_path(PARTIAL), self.data_path())
        index = {
            "partitions": list(self._partitions),
            "lengths": list(self._lengths),
            "first_keys": self._first_keys if self._keep_first_keys else None,
        }
        path = self.folder / f"{self.name}.index"
        partial = self.folder / f"{self.name}.index{PARTIAL}"
        partial.write_text(dumps(index), encoding="utf-8")
        os.replace(partial, path)
        by_partition: dict[str, int] = {}
        for partition, length in zip(self._partitions, self._lengths, strict=True):
            by_partition[str(partition)] = by_partition.get(str(partition), 0) + length
        return {
            "id": self.name,
            "bytes": sum(self._lengths),
            "groups": self.groups,
            "values": self.values,
            "max_decoded": self._max_decoded,
            "partitions": by_partition,
            "samples": self._samples(),
        }

    def _samples(self) -> list[list[Any]]:
        if not self._keep_first_keys:
            return []
        step = -(-len(self._lengths) // SAMPLES_PER_RUN) or 1
        return [
            [self._first_keys[start], sum(self._lengths[start : start + step])]
            for start in range(0, len(self._lengths), step)
        ]


def size_of(value: Value) -> int:
    """Estimate a key's or value's encoded size in bytes, quickly for scalars."""
    kind = value.__class__
    if kind is str:
        return len(value) + 3 if value.isascii() else 3 * len(value)
    if kind is int:
        return 3 + int(value.bit_length() * 0.31)
    return len(dumps(value)) if kind in (list, dict, tuple) else 24


def any_large(keys: Sequence[Key]) -> bool:
    """Tell whether some key is so large that frames must be sized before they are encoded."""
    kinds = set(map(type, keys))
    if kinds <= {str}:
        return max(map(len, keys), default=0) > LARGE
    return any(size_of(key) > LARGE for key in keys) if kinds - {int, float} else False


def select(folder: Path, run_id: str, selector: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Give the byte ranges `(offset, length)` of a run's data file that hold what `selector` asks for.

    `{"partition": p}` asks for one hash partition, `{"low": key, "high": key}` for a range of keys (None: open end);
    frames at the borders may hold further keys, which the reader drops. FileNotFoundError: there is no such run.
    """
    index = loads((folder / f"{run_id}.index").read_text(encoding="utf-8"))
    lengths: list[int] = index["lengths"]
    if "partition" in selector:
        partitions = index["partitions"]
        first = bisect_left(partitions, selector["partition"])
        last = bisect_left(partitions, selector["partition"] + 1)
    else:
        keys = [order_key(as_tuple(key) if key.__class__ is list else key) for key in index["first_keys"]]
        low, high = selector["low"], selector["high"]
        # The frame before the first one that starts at `low` or later may still end with it.
        first = 0 if low is None else max(0, bisect_left(keys, order_key(_key(low[0]))) - 1)
        last = len(keys) if high is None else bisect_left(keys, order_key(_key(high[0])))
    length = sum(lengths[first:last])
    return [(sum(lengths[:first]), length)] if length > 0 else []


def _key(key: Any) -> Key:
    return as_tuple(key) if key.__class__ is list else key


def read_parts(parts: Parts) -> Iterator[tuple[list[Key], list[list[Value]]]]:
    """Read parts block by block, as `read_frames` does frames. Raises JobFault for one that is missing or damaged."""
    for path, told in zip(parts.paths, parts.told, strict=True):
        checksum = 0
        try:
            with xopen(path, "rb", threads=0) as stream:
                while block := stream.read(min(told["batch_bytes"], PART_BLOCK_BYTES)):
                    block += stream.readline()
                    checksum = crc32(block, checksum)
                    yield _grouped(loads(b"[" + block[:-1].replace(b"\n", b",") + b"]"))
            if checksum != told["crc32"]:
                raise ValueError("its checksum is not the committed one")
        except MemoryError:
            raise
        except Exception as error:  # two formats with error classes of their own
            raise JobFault(
                f"part {told['name']} of the earlier output on {told['node']} cannot be read ({error}): bring it back, "
                "or have all inputs read anew by `mrcore ledger forget JOB`"
            ) from error


def _grouped(items: list[list[Any]]) -> tuple[list[Key], list[list[Value]]]:
    keys: list[Key] = [_key(key) for key, _ in items]
    if not any(map(eq, keys, islice(keys, 1, None))):
        return keys, [[value] for _, value in items]
    groups = {key: [item[1] for item in group] for key, group in groupby(items, lambda item: _key(item[0]))}
    return list(groups), list(groups.values())


def read_frames(segment: Segment | Parts) -> Iterator[tuple[list[Key], list[list[Value]]]]:
    """Read a segment's frames in order, as `(keys, lists of values)`.

    Raises ValueError naming file and offset when a frame is damaged or cut off, and what `read_parts` raises.
    """
    if isinstance(segment, Parts):
        yield from read_parts(segment)
        return
    position, end = segment.offset, segment.offset + segment.length
    descriptor = os.open(segment.path, os.O_RDONLY)
    try:
        while position < end:
            header = os.pread(descriptor, FRAME_HEADER.size, position)
            if len(header) < FRAME_HEADER.size:
                raise ValueError(f"{segment.path} ends in the middle of a frame at byte {position}")
            length, count, checksum = FRAME_HEADER.unpack(header)
            if length > end - position - FRAME_HEADER.size:
                raise ValueError(f"{segment.path}: the frame at byte {position} claims {length} bytes, past its range")
            payload = os.pread(descriptor, length, position + FRAME_HEADER.size)
            try:
                yield decode_payload(payload, count, checksum)
            except ValueError as error:
                raise ValueError(f"{segment.path}: frame at byte {position}: {error}") from None
            position += FRAME_HEADER.size + length
    finally:
        os.close(descriptor)
