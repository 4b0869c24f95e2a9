"""The node agent's share in a drain: lists all that the node holds, takes files for good, removes what others took.

A file is staged on its new node first, as in any upload. From then on its inode there is known, and the name that it
gets, so each of the further steps can be repeated after a death on either side: it meets what it did before. Nothing is
ever overwritten, and nothing is removed that is not as it was listed.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from mrcore.errors import JobFault
from mrcore.messages.kinds import Count, Token
from mrcore.messages.nodes import File, HeldFile, HoldingsPage, Staged
from mrcore.node.files import FileMethods, Listing
from mrcore.system import failpoints
from mrcore.system.staging import Staging, flush, inside, walk
from mrcore.wire.tls import Identity

NAMED_ERRORS = 100


class MoveMethods(FileMethods):
    """The part of a node agent that empties nodes; for the master only. Names are relative to base_dir."""

    RPC = f"{FileMethods.RPC} holdings taken stage_moves publish_moves remove_moves"

    def holdings(
        self, caller: Identity, auxiliary: bool = False, listing: Token | None = None, start: Count = 0
    ) -> HoldingsPage:
        """List every file under base_dir, or all auxiliary data, at most PAGE_FILES a call; the first page has sums.

        Its `faults`: what is no plain file, or has no name that can be sent, and is left alone.
        """
        count, size, refused = None, None, list[str]()
        if listing is None:
            root = self._layout.auxiliary_dir if auxiliary else self._layout.base_dir
            files = self._on_disk(list, walk(root, refused=refused))
            if len(refused) > NAMED_ERRORS:
                refused[NAMED_ERRORS:] = [f"and {len(refused) - NAMED_ERRORS} more"]
            listing = self._hold(self._held, Listing(root, files))
            count, size = len(files), sum(file.size for file in files)
        page, following = self._page(listing, start)
        return HoldingsPage(listing=listing, files=page, next=following, count=count, bytes=size, faults=refused)

    def taken(self, caller: Identity, names: list[str]) -> list[bool]:
        """Return whether something has each of these names, or is in the way of a folder that it needs."""
        return [self._is_taken(name) for name in names]

    def stage_moves(self, caller: Identity, source: str, files: list[File]) -> list[Staged | None]:
        """Flush what came; return inode and time of each of these files, None for one that is missing."""
        staging = self._staging(None, source)
        self._on_disk(flush, staging.folder)
        failpoints.point("moved files staged")
        statuses = [_status(staging.path(file)) for file in files]
        return [Staged(status.st_ino, status.st_mtime_ns) if status else None for status in statuses]

    def publish_moves(self, caller: Identity, source: str, files: list[HeldFile]) -> list[bool]:
        """Give staged files, with the inodes that they have here, their names; False: it never came, or the name is
        taken. May be repeated: a name that this very file has is fine.
        """
        staging = self._staging(None, source)
        with self._publishing:
            done = [self._on_disk(self._give_name, staging, file) for file in files]
            self._on_disk(flush, self._layout.base_dir)
        failpoints.point("moved files published")
        return done

    def remove_moves(self, caller: Identity, files: list[HeldFile]) -> list[bool]:
        """Remove files that are as listed; False: another, written to, or locked.

        May be repeated: one that is gone is fine. Folders that are empty then go too.
        """
        done = [self._on_disk(self._remove_if_unchanged, file) for file in files]
        self._on_disk(flush, self._layout.base_dir)
        failpoints.point("moved files removed")
        return done

    # ---- inside

    def _is_taken(self, name: str) -> bool:
        try:
            path = inside(self._layout.base_dir, name)
        except JobFault:  # a link leads out
            return True
        return os.path.lexists(path) or any(os.path.lexists(up) and not up.is_dir() for up in _folders(path, name))

    def _give_name(self, staging: Staging, file: HeldFile) -> bool:
        final, staged = self._layout.base_dir / file.name, staging.path(file)
        there, here = _status(final), _status(staged)
        if there is None or there.st_ino != file.inode:
            if here is None or here.st_ino != file.inode or self._is_taken(file.name):
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

    def _remove_if_unchanged(self, file: HeldFile) -> bool:
        path = inside(self._layout.base_dir, file.name)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            return True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a job would leave out what its writer has locked
            status = os.fstat(descriptor)
            if (status.st_size, status.st_mtime_ns, status.st_ino) != (file.size, file.mtime_ns, file.inode):
                return False
            path.unlink()
        except BlockingIOError:
            return False
        finally:
            os.close(descriptor)
        failpoints.point("moved file removed")
        for folder in _folders(path, file.name):
            try:
                folder.rmdir()
            except OSError:
                break
        return True


def _folders(path: Path, name: str) -> list[Path]:
    """Return the folders of a name under base_dir, the innermost first."""
    return list(path.parents)[: name.count("/")]


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
