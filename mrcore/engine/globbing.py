"""Which paths an entry of `input_dirs` means: a folder's files, a file, or all that a pattern matches.

Not the standard library's glob: that follows links out of a `**`, so that a file is found under many names or the
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
Fault = Callable[[str, OSError], None]


def expand(entry: str, base_dir: str, fault: Fault) -> Iterator[str | None]:
    """Yield the paths that `entry` means, in an order that depends on names only, and None whenever time has passed.

    A relative entry lies under `base_dir`. Names that begin with a dot are matched by a pattern that does. `**` means
    any number of folders, and follows no link; a link that another part of the entry names is followed. What exists
    under just the entry's name is meant, too, whatever characters are in it, and means no pattern without `*` or `?`.
    `fault` hears of each folder that cannot be read.
    """
    full = "/" + os.path.normpath(os.path.join(base_dir, entry)).lstrip("/")  # normpath leaves two leading slashes
    if (exists := os.path.lexists(full)) or not _MAGIC.search(entry):
        if os.path.isdir(full):
            yield from (os.path.join(full, name) for name, _ in _entries(full, fault))
        elif exists or _hides(full, fault):
            yield full
    if _MAGIC.search(entry) and (not exists or _WILD.search(entry)):
        inside = full.startswith(base_dir.rstrip("/") + "/") and not os.path.isabs(entry)
        root = base_dir.rstrip("/") if inside else ""
        yield from _match(root, full[len(root) + 1 :].split("/"), fault)


def _hides(path: str, fault: Fault) -> bool:
    """Report it when we may not even look whether a path exists; returns False."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        fault(path, error)
    return False


def _entries(folder: str, fault: Fault) -> list[tuple[str, os.DirEntry[str]]]:
    try:
        with os.scandir(folder or "/") as found:
            return sorted((each.name, each) for each in found)
    except OSError as error:
        nothing = error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)  # it need not be there, or has just gone
        if not nothing and os.path.basename(folder) != "lost+found":  # the file system's own, root's alone
            fault(folder or "/", error)
        return []


def _match(root: str, parts: list[str], fault: Fault) -> Iterator[str | None]:
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
        entries, deeper = _entries(folder, fault), []
        if part == "**":
            deeper = [
                (f"{folder}/{name}", number)
                for name, each in entries
                if not name.startswith(".") and each.is_dir(follow_symlinks=False)
            ]
            number += 1
            part = parts[number]
            if not _MAGIC.search(part) or _is_literal(folder, part):
                todo += [*reversed(deeper), (folder, number)]
                yield None
                continue
        matches = re.compile(fnmatch.translate(part)).match
        found = [each for name, each in entries if (name[0] != "." or part[0] == ".") and matches(name)]
        if number + 1 == len(parts):
            yield from (f"{folder}/{each.name}" for each in found)
            found = []
        further = [(f"{folder}/{each.name}", number + 1) for each in found if not each.is_file(follow_symlinks=False)]
        todo += [*reversed(deeper), *reversed(further)]
        yield None


def _is_literal(folder: str, part: str) -> bool:
    return not _WILD.search(part) and os.path.lexists(f"{folder}/{part}")
