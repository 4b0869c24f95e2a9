"""Functions of a script or a notebook as a project: a folder of plain files, named by a checksum of its content."""

from __future__ import annotations

import hashlib
import inspect
import io
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple

from mrcore.errors import UsageError
from mrcore.face import modules
from mrcore.face.places import place_of
from mrcore.face.sources import Module, NotSource
from mrcore.system.paths import PARTIAL, fsync_dir, fsync_file, remove_tree
from mrcore.text import one_line

Function = Callable[[Any, Any], Any]
MAX_PROJECTS = 200  # packed ones that are kept, beside those of jobs in the queue
PACKED = re.compile(r"notebook-[0-9a-f]{16}")
_TITLE = "Written by mrcore from functions of {}: change them there, and submit again."


class Packed(NamedTuple):
    """A project, not yet written: its files, and the functions of the job by its keys."""

    files: dict[str, bytes]
    functions: dict[str, str]  # map_function_name, … of the job

    @property
    def name(self) -> str:
        """Return the project's name, which follows from its content."""
        state = hashlib.sha256()
        for name, content in sorted(self.files.items()):
            state.update(f"{len(name.encode())}:{name}:{len(content)}:".encode() + content)
        return f"notebook-{state.hexdigest()[:16]}"


def pack(functions: dict[str, Function], may_pickle: bool) -> Packed:
    """Return the functions, by their keys of a job (`map_function_name`, …), as a project.

    Raises UsageError for what is no function of `(line, auxiliary_data)` or `(group, auxiliary_data)`, and, unless
    `may_pickle`, for one that cannot be written as source.
    """
    files: dict[str, bytes] = {}
    names: dict[str, str] = {}
    local = set[str]()
    for kind, keys in (
        ("map", ["map_function_name"]),
        ("reduce", ["reduce_function_name", "combine_function_name"]),
    ):
        given = {key: functions[key] for key in keys if key in functions}
        if not given:
            continue
        for key, function in given.items():
            _check(key, function)
        try:
            made = Module(_TITLE.format(_written_in(given)))
            for key, function in given.items():
                names[key] = made.function(function, key.partition("_")[0])
            text = made.text()
        except NotSource as why:
            if not may_pickle:
                raise UsageError(
                    f"{kind} function: {why}. A deployed cluster takes functions as source only, since a pickle is "
                    "code that nobody can read: write a def whose names are imports, functions, classes and constants "
                    "of its module, and give other values as auxiliary data"
                ) from None
            text, files[f"{kind}.pickle"] = _pickled(kind, given, why)
            names |= {key: key.removesuffix("_name") for key in given}
        files[f"{kind}_functions.py"] = text.encode()
        local |= made.local
    own = modules.files(local)
    if clash := sorted(own.keys() & files.keys()):
        raise UsageError(f"a function imports your own module {clash[0]}, a name that mrcore needs: rename that module")
    return Packed(files | own, names)


def _check(key: str, function: Function) -> None:
    what = key.removesuffix("_name").replace("_", " ")
    if not callable(function):
        raise UsageError(f"the {what} is no function but of type {type(function).__name__}: give the function itself")
    try:
        parameters = inspect.signature(function)
    except (ValueError, TypeError):  # a function in C may not have one
        return
    try:
        parameters.bind(None, None)
    except TypeError:
        wanted = "(line, auxiliary_data)" if key.startswith("map") else "(group, auxiliary_data)"
        raise UsageError(f"the {what} is called as f{wanted}; its parameters are {parameters}") from None


def _written_in(functions: dict[str, Function]) -> str:
    code = getattr(inspect.unwrap(next(iter(functions.values()))), "__code__", None)
    return one_line(place_of(code.co_filename)) if code else "a Python program"


def _pickled(kind: str, functions: dict[str, Function], why: NotSource) -> tuple[str, bytes]:
    """Return a module that loads functions from a pickle, and the pickle. Raises UsageError."""
    try:
        import cloudpickle
    except ImportError:
        raise UsageError(
            f"{kind} function: {why}. Write it as a def whose names are imports, functions, classes and constants of "
            "its module, or install what else is needed: pip install 'mrcore[notebook]'"
        ) from None
    named = {key.removesuffix("_name"): function for key, function in functions.items()}

    class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
        """One that keeps where a function was written, which errors name."""

        def reducer_override(self, thing: Any) -> Any:
            if type(thing) is not CodeType:
                return super().reducer_override(thing)
            make, parts = self.dispatch_table[CodeType](thing)
            return make, tuple(place_of(thing.co_filename) if part == "<dynamic-code>" else part for part in parts)

    buffer = io.BytesIO()
    try:
        Pickler(buffer).dump(named)
    except Exception as error:  # noqa: BLE001  objects of the user's raise what they like
        raise UsageError(f"{kind} function: {why}, and cannot be pickled either: {error}") from None
    lines = [
        f"# Written by mrcore: {why}, so {' and '.join(named)} cannot be written as source.",
        "",
        "from pathlib import Path",
        "",
        "import cloudpickle",
        "",
        f'_functions = cloudpickle.loads(Path(__file__).with_name("{kind}.pickle").read_bytes())',
        *(f'{name} = _functions["{name}"]' for name in named),
        "",
    ]
    return "\n".join(lines), buffer.getvalue()


def write(packed: Packed, folder: Path, needed: set[str]) -> None:
    """Have the project in `folder`, durably, and no more than MAX_PROJECTS others that are not `needed`."""
    target = folder / packed.name
    if target.is_dir():
        os.utime(target)
        return
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{packed.name}.{os.getpid()}{PARTIAL}"
    remove_tree(partial)
    try:
        for name, content in packed.files.items():
            path = partial / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            fsync_file(path)
        try:
            partial.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was faster
                raise
        fsync_dir(folder)
    except OSError as error:
        raise UsageError(f"cannot write the functions into {folder}: {error.strerror}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    others = [path for path in folder.iterdir() if PACKED.fullmatch(path.name) and path != target]
    others.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    for path in [path for path in others[MAX_PROJECTS:] if path.name not in needed]:
        shutil.rmtree(path, ignore_errors=True)
