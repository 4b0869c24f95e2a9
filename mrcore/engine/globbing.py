"""Which paths an entry of `input_dirs` means: a folder's files, a file, or all that a pattern matches.

Not the standard library's glob: that follows links out of a `**`, so that a file has many names or the
walk never ends; it recurses, passes over folders that may not be read, and takes a `[` in base_dir for a pattern.
"""

from __future__ import annotations

import errno
import fnmatch
import os
import re
from collections.abc import Callable, Iterator

_MAGIC = re.compile(r"[*?[]")
_WILD = re.compile(r"[*?]")
OnError = Callable[[str, OSError], None]


def expand(entry: str, base_dir: str, on_error: OnError) -> Iterator[str | None]:
    """Yield the paths that `entry` means, in an order that depends on names only, and None whenever time has passed.

    A relative entry lies under `base_dir`. Names that begin with a dot are matched by a pattern that does. `**` means
    any number of folders, and follows no link; a link that another part of the entry names is followed. What exists
    under just the entry's name is meant, too, whatever characters are in it, and means no pattern without `*` or `?`.
    `on_error` is called with each folder that cannot be read, and why.
    """
    full = "/" + os.path.normpath(os.path.join(base_dir, entry)).lstrip("/")  # normpath leaves two leading slashes
    if (exists := os.path.lexists(full)) or not _MAGIC.search(entry):
        if os.path.isdir(full):
            yield from (os.path.join(full, name) for name, _ in _entries(full, on_error))
        elif exists or _hides(full, on_error):
            yield full
    if _MAGIC.search(entry) and (not exists or _WILD.search(entry)):
        inside = full.startswith(base_dir.rstrip("/") + "/") and not os.path.isabs(entry)
        root = base_dir.rstrip("/") if inside else ""
        yield from _match(root, full[len(root) + 1 :].split("/"), on_error)


def _hides(path: str, on_error: OnError) -> bool:
    """Report it when we may not even look whether a path exists; returns False."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        on_error(path, error)
    return False


def _entries(folder: str, on_error: OnError) -> list[tuple[str, os.DirEntry[str]]]:
    try:
        with os.scandir(folder or "/") as entries:
            return sorted((entry.name, entry) for entry in entries)
    except OSError as error:
        nothing = error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)  # it need not be there, or has just gone
        if not nothing and os.path.basename(folder) != "lost+found":  # the file system's own, root's alone
            on_error(folder or "/", error)
        return []


def _match(root: str, parts: list[str], on_error: OnError) -> Iterator[str | None]:
    """Walk from `root`; what is still to be visited is a stack of folders, each with the parts that are left of it."""
    parts = [part for number, part in enumerate(parts) if part != "**" or parts[number - 1 : number] != ["**"]]
    if parts[-1] == "**":
        parts.append("*")
    todo, done = [(root, 0)], set[tuple[str, int]]()
    several = parts.count("**") > 1  # then more than one way may lead to a folder
    while todo:
        folder, number = state = todo.pop()
        if several:
            if state in done:
                continue
            done.add(state)
        if number == len(parts):
            yield folder
            continue
        part = parts[number]
        if part != "**" and (not _MAGIC.search(part) or _is_literal(folder, part)):
            if number + 1 < len(parts) or os.path.lexists(f"{folder}/{part}"):
                todo.append((f"{folder}/{part}", number + 1))
            continue
        entries, deeper = _entries(folder, on_error), []
        if part == "**":
            deeper = [
                (f"{folder}/{name}", number)
                for name, entry in entries
                if not name.startswith(".") and entry.is_dir(follow_symlinks=False)
            ]
            number += 1
            part = parts[number]
            if not _MAGIC.search(part) or _is_literal(folder, part):
                todo += [*reversed(deeper), (folder, number)]
                yield None
                continue
        matches = re.compile(fnmatch.translate(part)).match
        result = [entry for name, entry in entries if (name[0] != "." or part[0] == ".") and matches(name)]
        todo += reversed(deeper)
        if number + 1 == len(parts):
            yield from (f"{folder}/{entry.name}" for entry in result)
        else:
            folders = [entry.name for entry in reversed(result) if not entry.is_file(follow_symlinks=False)]
            todo += [(f"{folder}/{name}", number + 1) for name in folders]
        yield None


def _is_literal(folder: str, part: str) -> bool:
    return not _WILD.search(part) and os.path.lexists(f"{folder}/{part}")
