"""Files on their way into a folder, on a node or on the master: they gather aside and get their names all at once.

While a file comes it lies in a staging folder of the same file system under a digest of what it is (`File`), readable
by its owner only, so that a transfer that was cut off finds it again; it gets its mode with its name.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mrcore.errors import ClusterFault, JobFault, Refused
from mrcore.messages.nodes import File, HeldFile
from mrcore.system.paths import PARTIAL, remove_tree
from mrcore.system.permissions import blocked

ON_NODES = 0o755  # of a file's mode: nobody but its owner writes to what a cluster reads
_libc = ctypes.CDLL(None, use_errno=True)


def checked_name(name: Any) -> str:
    """Return a relative name if it stays inside its folder. Raises Refused for any other."""
    if not isinstance(name, str) or "\0" in name or {"", ".", ".."} & set(name.split("/")):
        raise Refused(f"not a name inside a folder: {name!r:.300}")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise Refused(f"the file name {os.fsencode(name)!r:.300} is not UTF-8: rename the file") from None
    return name


def inside(folder: Path, name: str) -> Path:
    """Return `folder`/`name`. Raises Refused for a name, JobFault for a symbolic link on its way, that leads out."""
    path = folder / checked_name(name)
    if os.path.realpath(path.parent) != os.path.join(os.path.realpath(folder), *name.split("/")[:-1]).rstrip("/"):
        raise JobFault(f"{path.parent} is reached by a symbolic link: transfers stay inside {folder}; remove the link")
    return path


def walk(folder: Path, name: str = "", refused: list[str] | None = None) -> Iterator[HeldFile]:
    """Yield every file below `folder`, or `folder`/`name`, in order.

    Raises JobFault for a symbolic link, or what else is no plain file, for one that we may not read, for a name that is
    not UTF-8. With `refused` the message is added there and the walk goes on, also when something is gone meanwhile.
    """
    try:
        entry = _look(folder, name)
    except (JobFault, FileNotFoundError) as error:
        if refused is None:
            raise
        if isinstance(error, JobFault):
            refused.append(error.message)
        return
    if isinstance(entry, HeldFile):
        yield entry
    else:
        for below in entry:
            yield from walk(folder, f"{name}/{below}" if name else below, refused)


def _look(folder: Path, name: str) -> HeldFile | list[str]:
    """Return a file, or the names in a folder. Raises as `walk` does."""
    path = folder / name if name else folder
    status = path.lstat()
    is_folder = stat.S_ISDIR(status.st_mode)
    plain = is_folder or stat.S_ISREG(status.st_mode)
    if plain and not os.access(path, os.R_OK, effective_ids=True):  # before the first file is sent
        raise JobFault(blocked(path) or f"{path} cannot be read")
    if is_folder:
        return sorted(os.listdir(path))
    if not plain:
        what = "a symbolic link" if stat.S_ISLNK(status.st_mode) else "no plain file"
        raise JobFault(f"{path} is {what}: transfers take plain files; remove it or put the file itself there")
    try:
        mode = status.st_mode & 0o777
        return HeldFile(checked_name(name), status.st_size, status.st_mtime_ns, mode, status.st_ino)
    except Refused as error:
        raise JobFault(f"in {folder}: {error.message}") from None


class Staging:
    """Gathers files that come into `target` in `folder`, which is made now. Raises OSError.

    Of a file's mode `mask` is kept; its owner may always read it.
    """

    def __init__(self, folder: Path, target: Path, mask: int = ON_NODES) -> None:
        self.folder, self.target, self._mask = folder, target, mask
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def path(self, file: File) -> Path:
        """Return where a file lies when it is here whole; until then its name has `.partial` added."""
        text = json.dumps([file.name, file.size, file.mtime_ns, file.mode])
        return self.folder / hashlib.blake2b(text.encode(), digest_size=20).hexdigest()

    def partial(self, file: File) -> Path:
        """Return where a file lies while it comes, so that it can be resumed."""
        path = self.path(file)
        return path.with_name(path.name + PARTIAL)

    def has(self, file: File) -> bool:
        """Return whether a file that came by itself, and was flushed to disk, is here whole."""
        path = self.path(file)
        return path.is_file() and path.stat().st_size == file.size

    def take(self, file: File) -> None:
        """Take in a file whose `.partial` is whole and flushed."""
        os.utime(self.partial(file), ns=(file.mtime_ns, file.mtime_ns))
        os.replace(self.partial(file), self.path(file))

    def put(self, file: File, content: bytes | bytearray) -> None:
        """Take in a small file whole. It is flushed by `publish`."""
        path, flags = self.path(file), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        path.unlink(missing_ok=True)  # of an earlier try, which may have got its mode
        with open(os.open(path, flags, 0o600), "wb", buffering=0) as stream:
            view = memoryview(content)
            while view:
                view = view[stream.write(view) :]
            os.utime(stream.fileno(), ns=(file.mtime_ns, file.mtime_ns))

    def publish(self, files: Sequence[File], replace: bool) -> int:
        """Give the files their names in the target; with `replace` all others there go then. Return how many.

        May be begun again after a crash. Raises ClusterFault (a file is not here), JobFault (a folder stands in the way
        of a file, a file in that of a folder, a symbolic link), OSError.
        """
        paths = [self.path(file) for file in files]
        missing = [file.name for file, path in zip(files, paths, strict=True) if not path.exists()]
        if missing:
            raise ClusterFault(f"{len(missing)} files, {missing[0]!r:.200} among them, never came: send them again")
        self.target.mkdir(parents=True, exist_ok=True)
        for parent in sorted({file.name.rpartition("/")[0] for file in files}):
            self._make_folder(parent, replace)
        for file in files:
            if (final := self.target / file.name).is_dir() and not final.is_symlink():
                self._in_the_way(final, replace)
        for file, path in zip(files, paths, strict=True):
            self.give_mode(file, path)
        flush(self.folder)
        for file, path in zip(files, paths, strict=True):
            os.replace(path, self.target / file.name)
        flush(self.target)
        self.drop()
        return self._remove_others({file.name for file in files}) if replace else 0

    def give_mode(self, file: File, path: Path) -> None:
        """Let a file that is here whole have its own mode."""
        path.chmod((file.mode & self._mask) | 0o400)

    def drop(self) -> None:
        """Forget what is here."""
        remove_tree(self.folder)

    def _make_folder(self, parent: str, replace: bool) -> None:
        path = self.target
        for part in parent.split("/") if parent else ():
            path = path / part
            if path.is_symlink() or path.is_file():
                self._in_the_way(path, replace)
            path.mkdir(exist_ok=True)

    def _in_the_way(self, path: Path, replace: bool) -> None:
        if not replace:
            raise JobFault(f"{path} stands in the way of a file of that name: remove it, or replace the folder")
        remove(path)

    def _remove_others(self, names: set[str]) -> int:
        removed, begin = 0, len(str(self.target)) + 1
        for folder, folders, others in os.walk(self.target, topdown=False):
            relative = folder[begin:]
            for entry in others + [name for name in folders if os.path.islink(f"{folder}/{name}")]:
                if (f"{relative}/{entry}" if relative else entry) not in names:
                    os.unlink(f"{folder}/{entry}")
                    removed += 1
            if relative and not os.listdir(folder):
                os.rmdir(folder)
        return removed


def remove(path: Path) -> None:
    """Remove a file, a link (not what it leads to), or a folder with all in it."""
    if path.is_dir() and not path.is_symlink():
        remove_tree(path)
    else:
        path.unlink()


def newest(folder: Path) -> float:
    """Return when something was last written in a folder, in seconds since 1970."""
    with os.scandir(folder) as entries:
        return max([folder.stat().st_mtime, *(entry.stat(follow_symlinks=False).st_mtime for entry in entries)])


def flush(folder: Path) -> None:
    """Flush all of a folder's file system: for thousands of files cheaper by far than each by itself."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if _libc.syncfs(descriptor):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(folder))
    finally:
        os.close(descriptor)
