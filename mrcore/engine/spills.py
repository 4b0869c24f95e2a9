"""Spills: sorted data on disk, as frames, with an index by partition and key.

A spill is a data file of frames ordered by partition, then key, and an index file written last, so that a spill exists
exactly when its index does. A reducing node reads a range of frames: all of one partition, or all that may hold keys
of one key range. A group too large for one frame stands in several frames with the same key.
"""

from __future__ import annotations

import os
import struct
import sys
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from zlib import crc32

from mrcore.engine.records import LARGE, Key, Value, as_key, dumps, loads, order_key
from mrcore.messages.tasks import Spill
from mrcore.system.paths import PARTIAL

MAX_FRAME_GROUPS = 1000  # 300 to 1,000 measured best for encoding and for merging by blocks
MAX_FRAME_VALUES = 4096
SAMPLES_PER_SPILL = 256  # first keys that a spill reports for range partitioning
FRAME_HEADER = struct.Struct("<III")  # payload length in bytes, number of groups, crc32 of the payload
GROUP_OVERHEAD_BYTES = 100  # a group's place in the dict of a merge
DECODED_BYTES = {",": 60, "[": 80, "{": 250}  # what such a sign stands for, decoded, beyond its text (measured)
SIZING_CHARACTERS = 4096  # of a frame's middle are looked at to estimate its decoded size

Block = tuple[list[Key], list[list[Value]]]  # keys in ascending order, and the values of each


class DamagedFrame(Exception):
    """A spill is cut off, or holds other bytes than were written: the next try reads or makes it again."""


# --- Frames ----------------------------------------------------------------------------------------------------------


def encode_frame(keys: Sequence[Key], lists: Sequence[list[Value]]) -> tuple[bytes, int]:
    """Encode groups as one frame: header, then the JSON text `[[key, …], [[value, …], …]]`.

    Return the frame and an estimate of the memory, in bytes, that it takes once decoded.
    """
    text = dumps((keys, lists))
    payload = text.encode()
    return FRAME_HEADER.pack(len(payload), len(keys), crc32(payload)) + payload, decoded_bytes(text, len(keys))


def decoded_bytes(text: str, groups: int) -> int:
    """Estimate the memory that JSON text of so many groups takes once decoded, in bytes."""
    start = max(0, (len(text) - SIZING_CHARACTERS) // 2)
    middle = text[start : start + SIZING_CHARACTERS]
    objects = sum(count * middle.count(sign) for sign, count in DECODED_BYTES.items()) * len(text) // len(middle)
    return sys.getsizeof(text) + objects + GROUP_OVERHEAD_BYTES * groups


def decode_payload(payload: bytes, count: int, checksum: int) -> Block:
    """Decode a frame's payload. Raises DamagedFrame when it is not what the header was made for."""
    if crc32(payload) != checksum:
        raise DamagedFrame("checksum of a frame does not fit: the file is damaged")
    try:
        keys, lists = loads(payload)
        if not len(keys) == len(lists) == count:
            raise DamagedFrame(f"a frame says that it holds {count} groups and holds {len(keys)}")
    except (ValueError, TypeError) as error:  # another machine's invention
        raise DamagedFrame(f"a frame holds no groups: {error}") from None
    return (list(map(as_key, keys)) if list in set(map(type, keys)) else keys), lists


def frame_bytes_for(budget_bytes: int) -> int:
    """Return the target size of a frame: small enough that a wide merge fits half of the budget."""
    return min(256 * 1024, max(16 * 1024, budget_bytes // 2048))


def size_of(value: Value) -> int:
    """Estimate a key's or value's encoded size in bytes, quickly for scalars."""
    kind = value.__class__
    if kind is str:
        return len(value) + 3 if value.isascii() else 3 * len(value)
    if kind is int:
        return 3 + int(value.bit_length() * 0.31)
    return len(dumps(value)) if kind in (list, dict, tuple) else 24


def any_large(keys: Sequence[Key]) -> bool:
    """Return whether some key is so large that frames must be sized before they are encoded."""
    kinds = set(map(type, keys))
    if kinds <= {str}:
        return max(map(len, keys), default=0) > LARGE
    return any(size_of(key) > LARGE for key in keys) if kinds - {int, float} else False


# --- Writing ---------------------------------------------------------------------------------------------------------


class SpillWriter:
    """Writes one spill. `write()` takes partitions in ascending order, each partition's keys sorted."""

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
        """Return the data file's path."""
        return self.folder / f"{self.name}.data{ending}"

    def write(self, partition: int, keys: Sequence[Key], groups: Mapping[Key, list[Value]], large_values: bool) -> None:
        """Write the groups of `keys` (sorted). `large_values`: some may be, so size all before encoding them."""
        position = 0
        while position < len(keys):
            chunk = keys[position : position + self._chunk]
            lists = [groups[key] for key in chunk]
            if large_values or any_large(chunk):
                fitting = self._count_fitting(chunk, lists, large_values)
                chunk, lists = chunk[:fitting], lists[:fitting]
            position += len(chunk)
            self._write_frames(partition, chunk, lists)

    def _count_fitting(self, keys: Sequence[Key], lists: list[list[Value]], large_values: bool) -> int:
        total = 0
        for count, (key, values) in enumerate(zip(keys, lists, strict=True)):
            total += size_of(key) + (sum(map(size_of, values)) if large_values else 8 * len(values))
            if total > self._frame_bytes and count:
                return count
        return len(keys)

    def _write_frames(self, partition: int, keys: Sequence[Key], lists: list[list[Value]]) -> None:
        count, one = sum(map(len, lists)), len(keys) == 1
        if count > MAX_FRAME_VALUES or (one and count > 1 and sum(map(size_of, lists[0])) > self._frame_bytes):
            self._write_halves(partition, keys, lists)
            return
        frame, decoded = encode_frame(keys, lists)
        if len(frame) > 2 * self._frame_bytes and not one:
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
        """Write several groups as two halves of them, and a single group as two halves of its values."""
        if (middle := len(keys) // 2) > 0:
            self._write_frames(partition, keys[:middle], lists[:middle])
            self._write_frames(partition, keys[middle:], lists[middle:])
            return
        values = lists[0]
        middle = len(values) // 2
        if len(values) > MAX_FRAME_VALUES:  # so that all frames but the last are full
            middle += -middle % MAX_FRAME_VALUES
        self._write_frames(partition, keys, [values[:middle]])
        self._write_frames(partition, keys, [values[middle:]])

    def close(self) -> Spill:
        """Publish the spill: data first, index last. Return what others must know of it.

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
        partial = path.with_name(path.name + PARTIAL)
        partial.write_text(dumps(index), encoding="utf-8")
        os.replace(partial, path)
        by_partition: dict[str, int] = {}
        for partition, length in zip(self._partitions, self._lengths, strict=True):
            by_partition[str(partition)] = by_partition.get(str(partition), 0) + length
        step = -(-len(self._lengths) // SAMPLES_PER_SPILL) or 1
        starts = range(0, len(self._first_keys), step)
        return Spill(
            id=self.name,
            bytes=sum(self._lengths),
            groups=self.groups,
            values=self.values,
            max_decoded=self._max_decoded,
            partitions=by_partition,
            samples=[(dumps(self._first_keys[start]), sum(self._lengths[start : start + step])) for start in starts],
        )


# --- Reading ---------------------------------------------------------------------------------------------------------


def select(folder: Path, spill_id: str, selector: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Return the byte ranges `(offset, length)` of a spill's data file that hold what `selector` asks for.

    `{"partition": p}` asks for one hash partition, `{"low": [key], "high": [key]}` for a range of keys (None: open
    end); frames at the borders may hold further keys, which the reader drops. Raises FileNotFoundError when there is no
    such spill, DamagedFrame when its index cannot be read.
    """
    path = folder / f"{spill_id}.index"
    content = path.read_bytes()
    try:
        index = loads(content)
    except ValueError as error:
        raise DamagedFrame(f"{path}: the index is damaged: {error}") from None
    lengths: list[int] = index["lengths"]
    if "partition" in selector:
        first, last = (bisect_left(index["partitions"], selector["partition"] + more) for more in (0, 1))
    else:
        keys = [order_key(as_key(key)) for key in index["first_keys"]]
        low, high = selector["low"], selector["high"]
        # The frame before the first one that starts at `low` or later may still end with it.
        first = 0 if low is None else max(0, bisect_left(keys, order_key(as_key(low[0]))) - 1)
        last = len(keys) if high is None else bisect_left(keys, order_key(as_key(high[0])))
    length = sum(lengths[first:last])
    return [(sum(lengths[:first]), length)] if length > 0 else []


@dataclass
class Segment:
    """A byte range of a file that holds whole frames in key order.

    `max_decoded` estimates the memory, in bytes, that the largest of its frames takes once decoded.
    """

    path: Path
    offset: int
    length: int
    max_decoded: int
    bytes_read: int = 0  # by `blocks`, of `length`

    def blocks(self) -> Iterator[Block]:
        """Read the frames in order. Raises DamagedFrame naming file and offset when one is damaged or cut off."""
        position, end = self.offset, self.offset + self.length
        with open(self.path, "rb", buffering=0) as stream:
            while position < end:
                header = os.pread(stream.fileno(), FRAME_HEADER.size, position)
                if len(header) < FRAME_HEADER.size:
                    raise DamagedFrame(f"{self.path} ends in the middle of a frame at byte {position}")
                length, count, checksum = FRAME_HEADER.unpack(header)
                if length > end - position - FRAME_HEADER.size:
                    what = f"the frame at byte {position} claims {length} bytes, past its range"
                    raise DamagedFrame(f"{self.path}: {what}")
                payload = os.pread(stream.fileno(), length, position + FRAME_HEADER.size)
                try:
                    block = decode_payload(payload, count, checksum)
                except DamagedFrame as error:
                    raise DamagedFrame(f"{self.path}: frame at byte {position}: {error}") from None
                position += FRAME_HEADER.size + length
                self.bytes_read = position - self.offset
                yield block
