"""The node agent's share in a drain: tells all that the node holds, takes files for good, removes what others took.

A file is staged on its new node first. From then on its inode there is known, and the name that it gets, so each of the
further steps can be repeated after a death on either side: it finds what it did before. Nothing is ever overwritten,
and nothing is removed that is not as it was told.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

from mrcore.errors import JobFault
from mrcore.node.files import FILES_A_PAGE, FileMethods, Incoming, Json, Listed
from mrcore.system import failpoints
from mrcore.system.staging import File, Staging, checked_file, flush, inside, walk
from mrcore.wire.tls import Identity

NAMED_FAULTS = 100


class MoveMethods(FileMethods):
    """The part of a node agent that empties nodes; for the master only. Names are relative to base_dir."""

    RPC = f"{FileMethods.RPC} holdings taken begin_moves stage_moves publish_moves remove_moves"

    def holdings(self, caller: Identity, auxiliary: bool = False, listing: str | None = None, start: int = 0) -> Json:
        """List every file under base_dir, or all auxiliary data, at most FILES_A_PAGE a call.

        Gives {"listing", "files" ([name, size, mtime_ns, mode, inode], …), "next"} and with the first page "count",
        "bytes" (all files'), "faults" (what is no plain file, or has no name that can be sent: it is left alone).
        """
        about: Json = {}
        if listing is None:
            root = self._layout.auxiliary_dir if auxiliary else self._layout.base_dir
            every, wrong = self._on_disk(_everything, root)
            listing = secrets.token_hex(8)
            self._hold(self._held, listing, every)
            about = {"count": len(every), "bytes": sum(file[1] for _, file, _ in every), "faults": wrong}
        found = self._get(self._held, listing)
        end = start + FILES_A_PAGE
        page = [(*file, inode) for _, file, inode in found[start:end]]
        return about | {"listing": listing, "files": page, "next": end if end < len(found) else None}

    def taken(self, caller: Identity, names: list[str]) -> list[bool]:
        """Whether something has each of these names, or is in the way of a folder that it needs."""
        return [self._is_taken(name) for name in names]

    def begin_moves(self, caller: Identity, source: str) -> Json:
        """Begin to take files from another node; an earlier time is void, but what came then counts.

        Gives {"upload" (for `announce`), "disk_free_bytes"}.
        """
        staging = self._moves(source)
        with self._files_lock:
            for token in [key for key, each in self._uploads.items() if each.staging.folder == staging.folder]:
                del self._uploads[token]
        token = secrets.token_hex(8)
        self._hold(self._uploads, token, Incoming(staging))
        return {"upload": token, "disk_free_bytes": shutil.disk_usage(staging.folder).free}

    def stage_moves(self, caller: Identity, source: str, files: list[Any]) -> list[list[int] | None]:
        """Flush what came; gives the inode and mtime_ns of each of these files, None for one that is missing."""
        staging = self._moves(source)
        self._on_disk(flush, staging.folder)
        failpoints.point("moved files staged")
        found = [_status(staging.path(checked_file(file))) for file in files]
        return [[status.st_ino, status.st_mtime_ns] if status else None for status in found]

    def publish_moves(self, caller: Identity, source: str, files: list[Any]) -> list[bool]:
        """Give staged files, [name, size, mtime_ns, mode, inode], their names; False: it never came, or the name is
        taken. May be repeated: a name that this very file has is fine.
        """
        staging = self._moves(source)
        with self._publishing:
            done = [self._on_disk(self._give_name, staging, checked_file(file), inode) for *file, inode in files]
            self._on_disk(flush, self._layout.base_dir)
        failpoints.point("moved files published")
        return done

    def remove_moves(self, caller: Identity, files: list[Any]) -> list[bool]:
        """Remove files, [name, size, mtime_ns, mode, inode], that are as told; False: another, written to, or locked.

        May be repeated: one that is gone is fine. Folders that are empty then go too.
        """
        done = [self._on_disk(self._let_go, checked_file(file), inode) for *file, inode in files]
        self._on_disk(flush, self._layout.base_dir)
        failpoints.point("moved files removed")
        return done

    # ---- inside

    def _moves(self, source: str) -> Staging:
        digest = hashlib.blake2b(f"moved from {source}".encode(), digest_size=16).hexdigest()
        return self._on_disk(Staging, self._layout.incoming_dir / digest, self._layout.base_dir, 0o777)  # type: ignore[no-any-return]

    def _is_taken(self, name: str) -> bool:
        try:
            path = inside(self._layout.base_dir, name)
        except JobFault:  # a link leads out
            return True
        up = list(path.parents)[: name.count("/")]
        return os.path.lexists(path) or any(os.path.lexists(each) and not each.is_dir() for each in up)

    def _give_name(self, staging: Staging, file: File, inode: int) -> bool:
        final, staged = self._layout.base_dir / file[0], staging.path(file)
        there, here = _status(final), _status(staged)
        if there is None or there.st_ino != inode:
            if here is None or here.st_ino != inode or self._is_taken(file[0]):
                return False
            try:
                staging.give_mode(file, staged)
                final.parent.mkdir(parents=True, exist_ok=True)
                os.link(staged, final)  # a rename would overwrite what has got the name just now
            except OSError:  # it stays where it was, whatever the reason
                return False
            failpoints.point("moved file named")
        staged.unlink(missing_ok=True)
        return True

    def _let_go(self, file: File, inode: int) -> bool:
        path = inside(self._layout.base_dir, file[0])
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            return True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a job would leave out what its writer has locked
            status = os.fstat(descriptor)
            if (status.st_size, status.st_mtime_ns, status.st_ino) != (*file[1:3], inode):
                return False
            path.unlink()
        except BlockingIOError:
            return False
        finally:
            os.close(descriptor)
        failpoints.point("moved file removed")
        for folder in list(path.parents)[: file[0].count("/")]:
            try:
                folder.rmdir()
            except OSError:
                break
        return True


def _everything(root: Path) -> tuple[Listed, list[str]]:
    """Every file below a folder, with its whole path, and what is wrong with others."""
    found: Listed = []
    wrong: list[str] = []
    for folder, folders, names in os.walk(root):
        folders.sort()
        links = [each for each in folders if os.path.islink(f"{folder}/{each}")]
        for name in sorted(names + links):
            path = f"{folder}/{name}"
            try:
                found += [(path, file, inode) for file, inode in walk(root, os.path.relpath(path, root))]
            except FileNotFoundError:
                continue
            except JobFault as error:
                wrong.append(error.message)
    if len(wrong) > NAMED_FAULTS:
        wrong[NAMED_FAULTS:] = [f"and {len(wrong) - NAMED_FAULTS} more"]
    return found, wrong


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
