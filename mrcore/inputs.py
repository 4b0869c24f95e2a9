"""Input files: which there are, how they are cut into splits, and how a split's lines are read.

A line belongs to the split that holds its first byte; only a newline ends a line. A file is read up to the size that
it had when it was listed, so a growing log is fine; one that shrinks or is replaced meanwhile fails its split.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from xopen import xopen

from mrcore.answers import MAX_INPUT_BYTES, MAX_INPUT_FILES, MAX_INPUT_NAMES
from mrcore.errors import JobFault
from mrcore.paths import PARTIAL, Layout

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
SAMPLE_BLOCK_BYTES = 64 * 1024
PROBE_BYTES = 4096  # read at a time to find where a line ends: a sampled block costs two such probes
MIN_SPLIT_BYTES, MAX_SPLIT_BYTES = 1 << 20, 64 << 20
SPLITS_PER_SERVER = 8  # so that a slow one delays the end by an eighth of a server's work at most
OPEN_COST_BYTES = 16 * 1024  # opening a small file takes as long as reading about so many bytes
THIN_BY_LINES_BELOW = 64 << 20  # a sample expected to be smaller than this is thinned line by line

InputFile = tuple[str, int, int, int]  # path, size in bytes, mtime in ns, inode


# --- Listing ---------------------------------------------------------------------------------------------------------


def list_inputs(job: Mapping[str, Any], layout: Layout, node_names: Sequence[str], node_name: str) -> dict[str, Any]:
    """List the files of a job's `input_dirs` that this node is to read.

    An entry is a folder (one level), a file or a glob (`**` recurses); a relative one lies under the node's base_dir.
    With `shared_input` each file is dealt to one of `node_names`. `sibling_dirs`, which the local cluster adds to the
    job, is the folder that holds all nodes' own folders: files outside it are shared by their nature, those of other
    nodes are left out. Gives `{"files": [InputFile…], "matched": {entry: count}, "skipped": {reason: count},
    "fingerprint", "faults"}`; the fingerprint covers absolute entries, so that equal ones on all nodes are noticed.
    """
    entries, shared, sibling_dirs = job["input_dirs"], job.get("shared_input"), job.get("sibling_dirs")
    files: dict[str, InputFile] = {}
    matched: dict[str, int] = {}
    skipped: dict[str, int] = {}
    faults: list[str] = []
    seen = hashlib.sha256()
    for entry in entries:
        matched[entry] = 0
        for path in _expand(entry, layout.base_dir, faults):
            if sibling_dirs and _under(path, sibling_dirs) and not _under(path, str(layout.compute_dir)):
                continue
            found = _admit(path, skipped, faults)
            if found is None:
                continue
            matched[entry] += 1
            if Path(entry).is_absolute():
                seen.update(repr(found[:3]).encode())
            dealt = shared or (shared is None and sibling_dirs is not None and not _under(path, sibling_dirs))
            if not dealt or rendezvous(path, node_names) == node_name:
                files[path] = found
    total = sum(file[1] for file in files.values())
    if len(files) > MAX_INPUT_FILES or total > MAX_INPUT_BYTES or sum(map(len, files)) > MAX_INPUT_NAMES:
        faults.append(
            f"{len(files):,} input files of {total:,} bytes on node {node_name} are more than it may read in one run "
            f"({MAX_INPUT_FILES:,} files, {MAX_INPUT_BYTES >> 40} TiB): give the job fewer input_dirs, or fewer files"
        )
        files.clear()
    return {
        "files": list(files.values()),
        "matched": matched,
        "skipped": skipped,
        "fingerprint": seen.hexdigest(),
        "faults": faults,
    }


def rendezvous(name: str, nodes: Sequence[str]) -> str:
    """Choose the node for a name: the same whoever asks, and only 1/n of the names move when a node joins."""
    return max(nodes, key=lambda node: hashlib.blake2b(f"{node}\0{name}".encode(), digest_size=8).digest())


def _under(path: str, folder: str) -> bool:
    return path.startswith(folder.rstrip("/") + "/")


def _expand(entry: str, base_dir: Path, faults: list[str]) -> list[str]:
    full = os.path.normpath(os.path.join(base_dir, entry))  # one spelling, or a file named twice is read twice
    if glob.has_magic(entry) and not os.path.exists(full):
        return sorted(glob.glob(full, recursive=True, include_hidden=False))
    if os.path.isdir(full):
        try:
            return sorted(item.path for item in os.scandir(full))
        except OSError as error:
            faults.append(f"input folder {full} cannot be read: {error.strerror}")
            return []
    return [full] if os.path.exists(full) else []


def _admit(path: str, skipped: dict[str, int], faults: list[str]) -> InputFile | None:
    name = os.path.basename(path)

    def skip(reason: str) -> InputFile | None:
        skipped[reason] = skipped.get(reason, 0) + 1
        return None

    try:
        path.encode()
    except UnicodeEncodeError:
        faults.append(f"the file name {os.fsencode(path)!r} is not UTF-8: rename the file")
        return None
    if name.startswith("."):
        return skip("dotfile")
    if name.endswith(PARTIAL):
        return skip("partial")
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        if not os.path.isdir(path):
            faults.append(f"input file {path} cannot be read: {error.strerror}")
        return None
    try:
        status = os.fstat(descriptor)
        if not os.path.isfile(path):
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return skip("locked by its writer")
        return path, status.st_size, status.st_mtime_ns, status.st_ino
    finally:
        os.close(descriptor)


# --- Splits ----------------------------------------------------------------------------------------------------------


def plan_bundles(files: Sequence[Sequence[Any]], servers: int, first_id: int = 0) -> list[dict[str, Any]]:
    """Cut one node's files into bundles of splits, the unit that is handed to a map task.

    A bundle is `{"id": n, "pieces": [[path, start, end, size, mtime_ns, inode]…]}` of 1 to 64 MiB, `end` None for a
    compressed file, which is one split. Cuts fall on multiples of 64 KiB, so that a sample does not depend on them.
    An InputFile may have a fifth field: the position from which to read it.
    """
    total = sum(max(size - sum(begin), OPEN_COST_BYTES) for _, size, _, _, *begin in files)
    target = min(MAX_SPLIT_BYTES, max(MIN_SPLIT_BYTES, total // max(1, servers * SPLITS_PER_SERVER)))
    target = -(-target // SAMPLE_BLOCK_BYTES) * SAMPLE_BLOCK_BYTES
    bundles: list[dict[str, Any]] = []
    pieces: list[list[Any]] = []
    weight = 0

    def close() -> None:
        nonlocal pieces, weight
        if pieces:
            bundles.append({"id": first_id + len(bundles), "pieces": pieces})
        pieces, weight = [], 0

    for path, size, mtime_ns, inode, *begin in files:
        if path.endswith(COMPRESSED):
            pieces.append([path, 0, None, size, mtime_ns, inode])
            weight += max(size * 4, OPEN_COST_BYTES)
        else:
            for start in range(sum(begin), size, target):
                end = min(size, start + target)
                if weight and weight + end - start > target:
                    close()
                pieces.append([path, start, end, size, mtime_ns, inode])
                weight += max(end - start, OPEN_COST_BYTES)
        if weight >= target:
            close()
    close()
    return bundles


# --- Reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """A random share `p` of the lines; `by_lines` thins line by line, else whole 64 KiB blocks are kept or not.

    The choice is made per aligned block of a file from `seed` and the end of the file's path (its beginning may differ
    from node to node), whatever the splits are.
    """

    p: float
    seed: int
    by_lines: bool

    def random(self, path: str, block: int) -> random.Random:
        """Give the random numbers of one block of one file."""
        return random.Random(f"{self.seed}:{path.split(os.sep)[-3:]}:{block}")


class Reader:
    """Reads splits as blocks of whole lines: `for offset, block in reader.blocks(piece)`.

    `block` is bytes that end with a line's end (the file's last line may lack it), `offset` its place in the
    (uncompressed) file. `bytes_read` counts what was read. Raises JobFault naming file and offset.
    """

    def __init__(self, *, max_line_bytes: int, block_bytes: int, sample: Sample | None = None) -> None:
        self._max_line_bytes, self._block_bytes, self._sample = max_line_bytes, block_bytes, sample
        self.bytes_read = 0

    def blocks(self, piece: Sequence[Any]) -> Iterator[tuple[int, bytes]]:
        """Read one piece of a bundle (see `plan_bundles`)."""
        path, start, end, size, _, inode = piece
        try:
            with open(path, "rb", buffering=0) as raw:
                self._check_unchanged(raw, path, size, inode)
                if end is None:
                    with xopen(path, "rb", threads=0) as stream:
                        yield from self._thinned(path, self._compressed(stream, path))
                elif self._sample is not None and not self._sample.by_lines:
                    yield from self._chosen_blocks(raw, path, start, end, size, self._sample)
                else:
                    yield from self._thinned(path, self._plain(raw, path, start, end, size))
                self._check_unchanged(raw, path, size, inode)
        except OSError as error:
            raise JobFault(f"input file {path} cannot be read: {error.strerror or error}", file=path) from error

    def _check_unchanged(self, raw: Any, path: str, size: int, inode: int) -> None:
        now = os.fstat(raw.fileno())
        if now.st_ino != inode or now.st_size < size:
            what = "was replaced" if now.st_ino != inode else f"shrank from {size} to {now.st_size} bytes"
            raise JobFault(f"input file {path} {what} since it was listed: run the job again", file=path)

    def _plain(self, raw: Any, path: str, start: int, end: int, size: int) -> Iterator[tuple[int, bytes]]:
        position = start
        if start:
            # The first line to start here follows the first newline at start - 1 or later.
            raw.seek(start - 1)
            position = start if raw.read(1) == b"\n" else self._line_end(raw, path, start, size)
        raw.seek(position)
        begin, pending = position, b""
        while position < end:
            fresh = raw.read(min(self._block_bytes, end - position))
            if not fresh:
                raise JobFault(f"input file {path} ended at byte {position}, before its listed size {size}", file=path)
            position += len(fresh)
            self.bytes_read += len(fresh)
            cut = fresh.rfind(b"\n") + 1
            if cut:
                yield self._whole(path, begin, pending + fresh[:cut])
                begin, pending = position - len(fresh) + cut, fresh[cut:]
            else:
                pending += fresh
                self._check_line(path, begin, len(pending))
        if pending:  # the last line that starts before `end` may reach past it
            line_end = self._line_end(raw, path, position, size, begin)
            raw.seek(position)
            yield self._whole(path, begin, pending + raw.read(line_end - position))

    def _line_end(self, raw: Any, path: str, position: int, size: int, begin: int | None = None) -> int:
        """Give the offset behind the first newline at `position` or later, `size` when there is none.

        The line's length is checked when its `begin` is given: the split that holds it reports it.
        """
        raw.seek(position)
        while position < size:
            fresh = raw.read(min(PROBE_BYTES, size - position))
            if not fresh:
                raise JobFault(f"input file {path} ended at byte {position}, before its listed size {size}", file=path)
            self.bytes_read += len(fresh)
            found: int = fresh.find(b"\n")
            if found >= 0:
                return position + found + 1
            position += len(fresh)
            if begin is not None:
                self._check_line(path, begin, position - begin)
        return size

    def _whole(self, path: str, begin: int, block: bytes) -> tuple[int, bytes]:
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

    def _compressed(self, stream: Any, path: str) -> Iterator[tuple[int, bytes]]:
        begin, pending = 0, b""
        while True:
            try:
                fresh = stream.read(self._block_bytes)
            except Exception as error:  # four formats with error classes of their own
                raise JobFault(
                    f"compressed input file {path} is damaged or cut off after {begin + len(pending):,} uncompressed "
                    f"bytes ({type(error).__name__}: {error}): upload it again",
                    file=path,
                    offset=begin + len(pending),
                ) from error
            if not fresh:
                break
            self.bytes_read += len(fresh)
            cut = fresh.rfind(b"\n") + 1
            if cut:
                yield self._whole(path, begin, pending + fresh[:cut])
                begin, pending = begin + len(pending) + cut, fresh[cut:]
            else:
                pending += fresh
                self._check_line(path, begin, len(pending))
        if pending:
            yield self._whole(path, begin, pending)

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
