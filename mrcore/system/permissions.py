"""What the user of this process may reach on this machine, and which part of a path stands in the way."""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import stat
from collections.abc import Iterator
from pathlib import Path


def blocked(path: str | os.PathLike[str], write: bool = False) -> str | None:
    """Return why we may not read `path`, or with `write` fill the folder `path`; None when we may.

    What is not there yet is no error, as long as we may look for it, and with `write` make it.
    """
    target = Path(os.path.realpath(path))
    for folder in reversed(target.parents):
        if not folder.exists():
            break
        if not _may(folder, os.X_OK):
            return _refusal("enter", folder, target, "x")
    if write:
        while not target.exists():
            target = target.parent
        return None if _may(target, os.W_OK | os.X_OK) else _refusal("write into", target, target, "wx")
    mode, rights = (os.R_OK | os.X_OK, "rx") if target.is_dir() else (os.R_OK, "r")
    return None if not target.exists() or _may(target, mode) else _refusal("read", target, target, rights)


def foreign_code(folder: Path) -> tuple[Path, str] | None:
    """Return what of a project, or of the folders above it, others than we and root may change, and who; None: nothing.

    Who may change it decides what its code does. Links count as what they lead to.
    """
    for path in _code_paths(folder):
        try:
            status = path.stat()
        except OSError:  # a link that leads nowhere is no code
            continue
        if status.st_mode & stat.S_ISVTX and path.is_dir():
            continue  # as /tmp: what others own there they cannot put in our place
        if status.st_uid not in (0, os.geteuid()):
            return path, _user(status.st_uid)
        if status.st_mode & 0o002:
            return path, "everybody"
        if status.st_mode & 0o020 and (group := _shared_group(status)):
            return path, f"the group {group}"
    return None


def _code_paths(folder: Path) -> Iterator[Path]:
    """Yield a folder, those above it, all below it, and likewise what links there lead to."""
    waiting, seen = [folder], set[Path]()
    while waiting:
        path = waiting.pop()
        real = Path(os.path.realpath(path))
        if real in seen:
            continue
        seen.add(real)
        if path != real or path == folder:
            yield from reversed(real.parents)
        yield path
        if real.is_dir():
            with contextlib.suppress(PermissionError):  # what we cannot read we cannot run
                waiting += sorted(path / name for name in os.listdir(real))


def _shared_group(status: os.stat_result) -> str | None:
    """Return the group of a file, unless its owner is alone in it."""
    try:
        group = grp.getgrgid(status.st_gid)
    except KeyError:
        return str(status.st_gid)
    own = status.st_gid == 0 or group.gr_name == _user(status.st_uid)
    return None if own and set(group.gr_mem) <= {_user(status.st_uid)} else group.gr_name


def _may(path: Path, mode: int) -> bool:
    return os.access(path, mode, effective_ids=True)


def _refusal(verb: str, culprit: Path, target: Path, rights: str) -> str:
    user, status = _user(os.geteuid()), culprit.stat()
    way = f", which is on the way to {target}" if culprit != target else ""
    return (
        f"user {user} may not {verb} {culprit}{way} ({stat.filemode(status.st_mode)}, owner {_user(status.st_uid)}): "
        f"`setfacl -m u:{user}:{rights} {culprit}` or chmod lets it, or choose another place"
    )


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)
