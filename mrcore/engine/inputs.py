"""Input files: how they are cut into splits, and how a split's lines are read.

A line belongs to the split that holds its first byte; only a newline ends a line. A file is read up to the size that
it had when it was listed, so a growing log is fine; one that shrinks or is replaced meanwhile fails its split.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from mrcore.errors import JobFault
from mrcore.messages.nodes import InputFile, ReadFile
from mrcore.messages.tasks import Bundle, Split
from mrcore.system.readers import HEAD_BYTES, Damaged, Format, decompress, format_of, no_text, open_regular

SAMPLE_BLOCK_BYTES = 64 * 1024
PROBE_BYTES = 4096  # read at a time to find where a line ends: a sampled block costs two such probes
MIN_SPLIT_BYTES, MAX_SPLIT_BYTES = 1 << 20, 64 << 20
SPLITS_PER_SERVER = 8  # so that a slow one delays the end by an eighth of a server's work at most
OPEN_COST_BYTES = 16 * 1024  # opening a small file takes as long as reading about so many bytes
THIN_BY_LINES_BELOW = 64 << 20  # a sample expected to be smaller than this is thinned line by line


# --- Splits ----------------------------------------------------------------------------------------------------------


def unread_bytes(file: InputFile) -> int:
    """Return how much of a file is to be read: all, or what follows the position where it was left."""
    return file.size - (file.read if isinstance(file, ReadFile) else 0)


def plan_bundles(files: Sequence[InputFile], servers: int, first_id: int = 0) -> list[Bundle]:
    """Cut one node's files into bundles of splits, the unit that a map task is given.

    A ReadFile is read from where it was left. A bundle is of 1 to 64 MiB; a compressed file is one split. Cuts fall on
    multiples of 64 KiB, so that a sample does not depend on them.
    """
    total = sum(max(unread_bytes(file), OPEN_COST_BYTES) for file in files)
    target = min(MAX_SPLIT_BYTES, max(MIN_SPLIT_BYTES, total // max(1, servers * SPLITS_PER_SERVER)))
    target = -(-target // SAMPLE_BLOCK_BYTES) * SAMPLE_BLOCK_BYTES
    bundles: list[Bundle] = []
    weight = target  # of the last bundle: full, as there is none yet
    for file in files:
        cuts: list[tuple[int, int | None, int]] = [(0, None, 4 * file.size)]
        if not format_of(file.path):
            starts = range(file.size - unread_bytes(file), file.size, target)
            cuts = [(start, end, end - start) for start in starts for end in [min(file.size, start + target)]]
        for start, end, weighs in cuts:
            if weight + weighs > target or not bundles:
                bundles.append(Bundle(first_id + len(bundles), []))
                weight = 0
            bundles[-1].pieces.append(Split(file.path, start, end, file.size, file.mtime_ns, file.inode))
            weight += max(weighs, OPEN_COST_BYTES)
    return bundles


# --- Reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """A random share `p` of the lines; `by_lines` thins line by line, else whole 64 KiB blocks are kept or not.

    The choice is made per aligned block of a file, from `seed` and the file's whole path, whatever the splits are. Of
    a file in `base_dir` the path below it counts, so that it does not matter on which node the file lies.
    """

    p: float
    seed: int
    by_lines: bool
    base_dir: str

    def random(self, path: str, block: int) -> random.Random:
        """Return the random numbers of one block of one file."""
        return random.Random(f"{self.seed}:{path.removeprefix(self.base_dir.rstrip('/') + '/')}:{block}")


class Reader:
    """Reads splits as blocks of whole lines: `for offset, block in reader.blocks(split)`.

    `block` is bytes that end with a line's end (the file's last line may lack it), `offset` its place in the
    (uncompressed) file. `bytes_read` counts what was read. Raises JobFault naming file and offset.
    """

    def __init__(self, *, max_line_bytes: int, block_bytes: int, sample: Sample | None = None) -> None:
        self._max_line_bytes, self._block_bytes, self._sample = max_line_bytes, block_bytes, sample
        self.bytes_read = 0

    def blocks(self, split: Split) -> Iterator[tuple[int, bytes]]:
        """Read one split."""
        path, start, size = split.path, split.start, split.size
        end = size if split.end is None else split.end
        try:
            with open(open_regular(path), "rb", buffering=0) as raw:
                self._check_unchanged(raw, split)
                if form := format_of(path):
                    yield from self._thinned(
                        path, self._whole_lines(path, 0, self._decompressed(raw, path, size, form))
                    )
                else:
                    self._check_text(path, os.pread(raw.fileno(), HEAD_BYTES, 0))  # else it is merely bad UTF-8
                    if self._sample is not None and not self._sample.by_lines:
                        yield from self._chosen_blocks(raw, path, start, end, size, self._sample)
                    else:
                        yield from self._thinned(path, self._plain(raw, path, start, end, size))
                self._check_unchanged(raw, split)
        except OSError as error:
            raise JobFault(f"input file {path} cannot be read: {error.strerror or error}", file=path) from error

    def _check_unchanged(self, raw: BinaryIO, split: Split) -> None:
        now = os.fstat(raw.fileno())
        if now.st_ino != split.inode or now.st_size < split.size:
            what = "was replaced" if now.st_ino != split.inode else f"shrank from {split.size} to {now.st_size} bytes"
            raise JobFault(f"input file {split.path} {what} since it was listed: run the job again", file=split.path)

    def _check_text(self, path: str, head: bytes) -> None:
        if what := no_text(head):
            inside = "what is compressed in it " if format_of(path) else ""
            raise JobFault(f"input file {path}: {inside}{what}", file=path)

    def _plain(self, raw: BinaryIO, path: str, start: int, end: int, size: int) -> Iterator[tuple[int, bytes]]:
        if start:  # the first line to start here follows the first newline at start - 1 or later
            raw.seek(start - 1)
            start = start if raw.read(1) == b"\n" else self._line_end(raw, path, start, size)
        return self._whole_lines(path, start, self._range(raw, path, start, end, size))

    def _range(self, raw: BinaryIO, path: str, position: int, end: int, size: int) -> Iterator[bytes]:
        """Read from the start of a line up to `end`, and the line that reaches past it to its end."""
        raw.seek(position)
        begin = position  # of the line that is not complete yet
        while position < end:
            fresh = self._read(raw, path, min(self._block_bytes, end - position), position, size)
            position += len(fresh)
            if cut := fresh.rfind(b"\n") + 1:
                begin = position - len(fresh) + cut
            yield fresh
        if begin < position:
            line_end = self._line_end(raw, path, position, size, begin)
            raw.seek(position)
            yield raw.read(line_end - position)

    def _line_end(self, raw: BinaryIO, path: str, position: int, size: int, begin: int | None = None) -> int:
        """Return the offset behind the first newline at `position` or later, `size` when there is none.

        The line's length is checked when its `begin` is given: the split that holds it reports it.
        """
        raw.seek(position)
        while position < size:
            fresh = self._read(raw, path, min(PROBE_BYTES, size - position), position, size)
            if cut := fresh.find(b"\n") + 1:
                return position + cut
            position += len(fresh)
            if begin is not None:
                self._check_line(path, begin, position - begin)
        return size

    def _read(self, raw: BinaryIO, path: str, count: int, position: int, size: int) -> bytes:
        fresh = raw.read(count)
        if not fresh:
            raise JobFault(f"input file {path} ended at byte {position}, before its listed size {size}", file=path)
        self.bytes_read += len(fresh)
        return fresh

    def _whole_lines(self, path: str, begin: int, blocks: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
        """Join blocks, the first of which starts at byte `begin`, to blocks that end where a line ends."""
        pending = b""
        for fresh in blocks:
            if cut := fresh.rfind(b"\n") + 1:
                yield self._checked(path, begin, pending + fresh[:cut])
                begin, pending = begin + len(pending) + cut, fresh[cut:]
            else:
                pending += fresh
                self._check_line(path, begin, len(pending))
        if pending:
            yield self._checked(path, begin, pending)

    def _checked(self, path: str, begin: int, block: bytes) -> tuple[int, bytes]:
        if len(block) > self._max_line_bytes:
            position = begin
            for line in cut_lines(block):
                self._check_line(path, position, len(line))
                position += len(line)
        return begin, block

    def _check_line(self, path: str, begin: int, length: int) -> None:
        if length > self._max_line_bytes:
            raise JobFault(
                f"input file {path}: the line at byte {begin} is longer than max_line_bytes "
                f"({self._max_line_bytes:,}): is this a text file? If so, raise max_line_bytes",
                file=path,
                offset=begin,
            )

    def _decompressed(self, raw: BinaryIO, path: str, size: int, form: Format) -> Iterator[bytes]:
        position = 0
        try:
            for fresh in decompress(raw, size, form, self._block_bytes):
                if not position:
                    self._check_text(path, fresh[:HEAD_BYTES])
                position += len(fresh)
                self.bytes_read += len(fresh)
                yield fresh
        except Damaged as error:
            raise JobFault(
                f"compressed input file {path} is damaged or cut off after {position:,} uncompressed bytes: {error}; "
                "upload it again",
                file=path,
                offset=position,
            ) from error

    def _chosen_blocks(
        self, raw: BinaryIO, path: str, start: int, end: int, size: int, sample: Sample
    ) -> Iterator[tuple[int, bytes]]:
        for begin in range(start, end, SAMPLE_BLOCK_BYTES):
            if sample.random(path, begin // SAMPLE_BLOCK_BYTES).random() < sample.p:
                yield from self._plain(raw, path, begin, min(end, begin + SAMPLE_BLOCK_BYTES), size)

    def _thinned(self, path: str, blocks: Iterator[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
        if self._sample is None:
            yield from blocks
            return
        number, draw = -1, self._sample.random(path, -1)
        for offset, block in blocks:
            for line in cut_lines(block):
                if offset // SAMPLE_BLOCK_BYTES != number:
                    number = offset // SAMPLE_BLOCK_BYTES
                    draw = self._sample.random(path, number)
                if draw.random() < self._sample.p:
                    yield offset, line
                offset += len(line)


def cut_lines(block: bytes) -> list[bytes]:
    """Cut a block into its lines, each with its newline."""
    if b"\r" not in block:
        return block.splitlines(keepends=True)
    lines = [line + b"\n" for line in block.split(b"\n")]
    lines[-1] = lines[-1][:-1]
    return lines if lines[-1] else lines[:-1]
