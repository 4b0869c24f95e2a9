"""Tar archives of plain files: written the same for the same content, and unpacked without believing what they say.

An archive may come from another machine or from whoever has written to a disk: it may name files outside of its folder,
links and devices, hold more than it seems to, or be damaged in ways that make tarfile read for hours.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from mrcore.system.paths import fsync_dir

MAX_FILES = 1_000_000
MAX_READ_BYTES = 1 << 20  # at once: what tarfile takes for a header, it takes into memory whole
# A relative name, no part of which is empty, . or ..
INSIDE = re.compile(r"(?:(?!\.{1,2}(?:/|\Z))[^/\0]+(?:/(?!\Z)|\Z))+")


class BadArchive(Exception):
    """An archive is damaged or holds what it may not; the text goes on from a name of the archive: "holds …"."""


def pack(files: Iterable[tuple[str, Path]], target: IO[bytes]) -> None:
    """Write files under the given names as an uncompressed archive: no owners, no times."""
    with tarfile.open(fileobj=target, mode="w") as archive:
        for name, path in files:
            with path.open("rb") as stream:
                member = tarfile.TarInfo(name)
                member.size = os.fstat(stream.fileno()).st_size
                archive.addfile(member, stream)


def unpack(
    stream: IO[bytes],
    folder: Path,
    *,
    most_bytes: int,
    most_files: int = MAX_FILES,
    names: re.Pattern[str] = INSIDE,
    kind: str = "plain file inside it",
) -> None:
    """Unpack an uncompressed archive of plain files into `folder`, none over another, all flushed to disk.

    Every name must match `names`, which admits none outside of `folder`; `kind` says in errors what is wanted.
    `most_bytes` bounds what is read of `stream`, headers included. Raises BadArchive, and what `stream` raises.
    """
    folders = {folder}
    try:
        with tarfile.open(fileobj=_Bounded(stream, most_bytes), mode="r:") as archive:  # type: ignore[call-overload]
            for count, member in enumerate(archive, 1):
                if not member.isreg() or member.issparse() or not names.fullmatch(member.name):
                    raise BadArchive(f"holds {member.name!r:.200}, which is no {kind}")
                if count > most_files:
                    raise BadArchive(f"holds more than {most_files:,} files")
                path = folder / member.name
                path.parent.mkdir(parents=True, exist_ok=True)
                folders.update(parent for parent in path.parents if parent.is_relative_to(folder))
                with path.open("xb") as target:
                    shutil.copyfileobj(archive.extractfile(member) or io.BytesIO(), target, MAX_READ_BYTES)
                    target.flush()
                    os.fsync(target.fileno())
    except (tarfile.TarError, FileExistsError, NotADirectoryError, ValueError, OverflowError, RecursionError) as error:
        raise BadArchive(f"cannot be unpacked: {error}") from None
    for made in folders:
        fsync_dir(made)


class _Bounded:
    """The beginning of a stream, of which not much is read at once."""

    def __init__(self, stream: IO[bytes], most_bytes: int) -> None:
        self._stream, self._left, self.seek, self.tell = stream, most_bytes, stream.seek, stream.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_READ_BYTES:
            raise BadArchive("has a part that is too large")
        content = self._stream.read(size)
        self._left -= len(content)
        if self._left < 0:
            raise BadArchive("is too large when unpacked, or for the disk here")
        return content
