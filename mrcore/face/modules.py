"""The user's own modules, which have to go along with functions that import them; installed ones are not theirs."""

from __future__ import annotations

import ast
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

from mrcore.errors import UsageError

MAX_BYTES = 64 << 20  # of all of them together
_INSTALLED = tuple(
    Path(folder).resolve()
    for folder in {*(sysconfig.get_paths()[kind] for kind in ("stdlib", "platstdlib", "purelib", "platlib"))}
)
_OURS = Path(__file__).resolve().parents[1]


def is_importable(name: str) -> bool:
    """Return whether a task can import a module by its name, if it is installed or goes along."""
    module = sys.modules.get(name)
    return module is not None and name != "__main__" and getattr(module, "__spec__", None) is not None


def local(name: str) -> set[str]:
    """Return the name of the module or package on top of this one if it is the user's own, else nothing."""
    top = name.partition(".")[0]
    return {top} if _place(sys.modules.get(top)) else set()


def _place(module: ModuleType | None) -> Path | None:
    """Return the file of a module of the user's own, or a package's folder; None: it is installed."""
    file, folders = getattr(module, "__file__", None), list(getattr(module, "__path__", []))
    if not (file or folders) or (module is not None and module.__name__ == "__main__"):
        return None
    place = Path(folders[0] if folders else str(file)).resolve()
    if place == _OURS or any(place.is_relative_to(folder) for folder in (*_INSTALLED, _OURS)):
        return None
    return place if folders or place.suffix == ".py" else None


def files(names: set[str]) -> dict[str, bytes]:
    """Return the files of these modules, and of those of the user's that they import, by their names in a project.

    Raises UsageError when they are larger than MAX_BYTES.
    """
    found: dict[str, bytes] = {}
    seen, left = set[str](), set(names)
    while left - seen:
        name = min(left - seen)
        seen.add(name)
        place = _place(sys.modules.get(name))
        if place is None:
            continue
        paths = [place] if place.is_file() else [path for path in sorted(place.rglob("*")) if path.is_file()]
        for path in (path for path in paths if not {"__pycache__"} & set(path.parts)):
            within = str(path.relative_to(place.parent))
            if any(part.startswith(".") for part in Path(within).parts):
                continue
            if sum(map(len, found.values())) + path.stat().st_size > MAX_BYTES:  # before it is read: it may be huge
                raise UsageError(
                    f"module {name}, which a function imports, has with the others more than {MAX_BYTES >> 20} MiB in "
                    f"{place}: install it on the nodes, or make a project of it (docs/jobs.md)"
                )
            found[within] = path.read_bytes()
            if path.suffix == ".py":
                left |= _imported(found[within])
    return found


def _imported(content: bytes) -> set[str]:
    """Return the user's own modules that a source file imports and this process has loaded."""
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError):
        return set()
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level}
    return set().union(*map(local, names))
