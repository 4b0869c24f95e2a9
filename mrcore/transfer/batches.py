"""Files in batches of a stream's worth, and what both directions of a transfer check alike."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, zip_longest

from mrcore.errors import ClusterFault, JobFault, MrcoreError, Refused, Unreachable, UsageError, is_disk_full
from mrcore.system.parallel import Item
from mrcore.system.staging import checked_name

SMALL_BYTES = 1 << 20  # smaller files share a stream and cannot be resumed
BATCH_BYTES, BATCH_FILES = 8 << 20, 2_000
AT_ONCE = 4  # batches
MIN_FREE_DISK_BYTES = 256 << 20


def cut(
    items: Iterable[Item], size_of: Callable[[Item], int], max_files: int = BATCH_FILES, max_bytes: int = BATCH_BYTES,
    alone: int = SMALL_BYTES,
) -> Iterator[list[Item]]:  # fmt: skip
    """Cut files into pieces of at most so many files and bytes; one of `alone` bytes or more is a piece by itself."""
    piece: list[Item] = []
    total = 0
    for item in items:
        size = size_of(item)
        large = size >= alone or (len(piece) == 1 and total >= alone)
        if piece and (large or len(piece) == max_files or total + size > max_bytes):
            yield piece
            piece, total = [], 0
        piece.append(item)
        total += size
    if piece:
        yield piece


def for_nodes(items: Mapping[str, Sequence[Item]], size_of: Callable[[Item], int]) -> list[tuple[str, list[Item]]]:
    """Return (node, batch) of all items, by node: the nodes take turns, large files come first."""
    batches = []
    for node, files in items.items():
        large_first = sorted(files, key=lambda item: size_of(item) < SMALL_BYTES)
        batches.append([(node, batch) for batch in cut(large_first, size_of)])
    return [item for item in chain.from_iterable(zip_longest(*batches)) if item is not None]


def checked(name: str, key: str) -> str:
    """Return a name under the nodes' base_dir. Raises UsageError that names the key it was given for."""
    try:
        return checked_name(name.rstrip("/"))
    except Refused:
        raise UsageError(f"{key} {name!r} must lie under the nodes' base_dir: a relative path without '..'") from None


def check_free(where: str, free_bytes: int, needed_bytes: int) -> None:
    """Raise ClusterFault if a transfer would fill a disk."""
    if free_bytes < needed_bytes + MIN_FREE_DISK_BYTES:
        raise ClusterFault(
            f"{where} has {free_bytes >> 20} MiB of free disk, the transfer needs {needed_bytes >> 20} and "
            f"{MIN_FREE_DISK_BYTES >> 20} to spare: make room"
        )


@contextlib.contextmanager
def resumable(drop: Callable[[], object]) -> Iterator[None]:
    """Raise what ends a transfer as one of ours; `drop` what was staged, unless another try could go on with it.

    What the master's own disk reports is the job's fault, but for a full disk.
    """
    try:
        yield
    except (JobFault, ClusterFault, OSError) as error:
        if not isinstance(error, Unreachable | Refused):  # another try would meet the same: make room
            drop()
        if isinstance(error, MrcoreError):
            raise
        kind = ClusterFault if is_disk_full(error) else JobFault
        raise kind(f"on the master: {error.filename or 'disk'}: {error.strerror or error}") from error
