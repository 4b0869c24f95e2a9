"""What the user of this process may reach on this machine, and which part of a path stands in the way."""

from __future__ import annotations

import os
import pwd
import stat
from pathlib import Path


def blocked(path: str | os.PathLike[str], write: bool = False) -> str | None:
    """Why we may not read `path`, or with `write` fill the folder `path`; None when we may.

    What is not there yet is no fault, as long as we may look for it, and with `write` make it.
    """
    target = Path(os.path.realpath(path))
    for folder in reversed(target.parents):
        if not folder.exists():
            break
        if not os.access(folder, os.X_OK, effective_ids=True):
            return _say("enter", folder, target, "x")
    if write:
        while not target.exists():
            target = target.parent
        return None if _may(target, os.W_OK | os.X_OK) else _say("write into", target, target, "wx")
    if not target.exists():
        return None
    if target.is_dir():
        return None if _may(target, os.R_OK | os.X_OK) else _say("read", target, target, "rx")
    return None if _may(target, os.R_OK) else _say("read", target, target, "r")


def _may(path: Path, mode: int) -> bool:
    return os.access(path, mode, effective_ids=True)


def _say(verb: str, culprit: Path, target: Path, rights: str) -> str:
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
