"""Parts: the output files of a task, one JSON item a line."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO
from zlib import crc32

from xopen import xopen

from mrcore.engine.records import Key, Value, decoded_bytes, encode_items
from mrcore.system import forks
from mrcore.system.paths import PARTIAL, fsync_dir, fsync_file


def part_name(run: int, partition: int, sequence: int, compress: bool) -> str:
    """Give the final name of a part; the order of the names is the order of the parts."""
    return f"part-{run:06d}-{partition:05d}-{sequence:05d}.data" + (".gz" if compress else "")


class PartWriter:
    """Writes one task's items into parts in `folder`, a new part after `max_items` items (None: one part).

    Unfinished files carry the try that writes them (`<name>.try<n>.partial`). `close()` gives what the manifest
    records of each part.
    """

    def __init__(
        self, folder: Path, *, run: int, partition: int, attempt_try: int, max_items: int | None, compress: bool
    ) -> None:
        self._folder, self._run, self._partition, self._try = folder, run, partition, attempt_try
        self._max_items, self._compress = max_items, compress
        self._parts: list[dict[str, Any]] = []
        self._stream: BinaryIO | None = None
        self._checksum = self._bytes = self._records = self._batch_bytes = self._max_decoded = 0

    def write(self, items: Sequence[tuple[Key, Value]]) -> None:
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
        stream = (
            xopen(self._partial, "wb", format="gz", threads=0) if self._compress else open(self._partial, "wb", 1 << 20)
        )
        self._stream = stream

    def _finish(self) -> None:
        assert self._stream is not None
        self._stream.close()
        self._stream = None
        fsync_file(self._partial)
        os.replace(self._partial, self._path)
        self._parts.append(
            {
                "name": self._name,
                "partition": self._partition,
                "records": self._records,
                "bytes": self._path.stat().st_size,
                "text_bytes": self._bytes,
                "crc32": self._checksum,
                "batch_bytes": self._batch_bytes,
                "max_decoded": self._max_decoded,
            }
        )

    def close(self) -> list[dict[str, Any]]:
        """Finish the last part and give all of them: name, partition, records, bytes (on disk),
        text_bytes and crc32 (of the uncompressed lines), batch_bytes and max_decoded (of the largest batch written)."""
        if self._stream is not None:
            self._finish()
        fsync_dir(self._folder)
        return self._parts
