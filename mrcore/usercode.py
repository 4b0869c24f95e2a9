"""The user's project: its files, its functions, and what to say when they fail."""

from __future__ import annotations

import difflib
import errno
import hashlib
import importlib
import io
import os
import site
import sys
import tarfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mrcore import forks
from mrcore.access import blocked
from mrcore.errors import JobFault
from mrcore.readers import open_regular
from mrcore.records import BadItem, Key, Snapshot, Value, check_item, describe, loads

Function = Callable[[Any, Any], Any]
COMBINE_VALUES = 4096
_IGNORED = {"__pycache__", "wheels"}  # compiled files differ by interpreter; wheels travel apart
MAX_PROJECT_BYTES = 512 << 20  # it travels in one piece, through the memory of the master and of each node
_OURS = str(Path(__file__).parent) + os.sep


def project_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Give `(relative name, path)` of every file that makes up a project, in order of name.

    Dotfiles, `__pycache__` and `wheels` are left out. Raises JobFault for a link that leads out of the folder, for what
    is no plain file (to open a FIFO would wait for ever), and when all together is larger than MAX_PROJECT_BYTES.
    """
    root, total = folder.resolve(), 0
    for base, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in _IGNORED and not name.startswith("."))
        for name in sorted(files):
            if name.startswith(".") or name.endswith(".pyc"):
                continue
            path = Path(base, name)
            if not path.resolve().is_relative_to(root):
                raise JobFault(f"project file {path} is a link that leads out of the project: copy the file instead")
            if reason := blocked(path):
                raise JobFault(f"project file: {reason}")
            try:
                with open(open_regular(path), "rb") as stream:
                    total += os.fstat(stream.fileno()).st_size
            except OSError as error:
                raise JobFault(f"project file {path} cannot be read: {error.strerror}: remove it") from None
            if total > MAX_PROJECT_BYTES:
                raise JobFault(
                    f"project folder {folder}: with {path} it is larger than {MAX_PROJECT_BYTES >> 20} MiB: put data "
                    "into input_dirs or auxiliary data"
                )
            yield str(path.relative_to(folder)), path


def project_hash(folder: Path) -> str:
    """Give the content hash that names a snapshot of the project: 32 hexadecimal digits."""
    state = hashlib.sha256()
    for name, path in sorted(project_files(folder)):
        content = path.read_bytes()
        state.update(f"{len(name.encode())}:{name}:{len(content)}:".encode() + content)
    return state.hexdigest()[:32]


def pack_project(folder: Path) -> bytes:
    """Give the project's files as an uncompressed tar archive, the same bytes for the same content."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, path in sorted(project_files(folder)):
            content = path.read_bytes()
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), 0o644
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def use_packages(environment: Path) -> None:
    """Let this process import from a folder of installed packages: after the standard library, before all others."""
    before = len(sys.path)
    site.addsitedir(str(environment))  # unlike a mere entry, this reads .pth files
    entries = sys.path[before:]
    del sys.path[before:]
    others = [number for number, entry in enumerate(sys.path) if entry.endswith(("site-packages", "dist-packages"))]
    at = min(others, default=len(sys.path))
    sys.path[at:at] = entries


def load_function(project_dir: Path, kind: str, name: str) -> Function:
    """Import `kind`_functions.py ("map" or "reduce") of a project and find the function `name` in it.

    The original's way comes first: a class MapFunctions(name) with get_map_function(); else the module's own name.
    Raises JobFault naming file, line and cause.
    """
    if str(project_dir) not in sys.path:
        sys.path.insert(0, str(project_dir))
    module_name, file = f"{kind}_functions", project_dir / f"{kind}_functions.py"
    if not file.is_file():
        raise JobFault(f"project {project_dir.name} has no {file.name}: create {file} with the function {name}")
    try:
        module = importlib.import_module(module_name)
        factory = getattr(module, f"{kind.capitalize()}Functions", None)
        function = getattr(factory(name), f"get_{kind}_function")() if isinstance(factory, type) else None
    except SyntaxError as error:
        raise JobFault(f"{error.filename}, line {error.lineno}: syntax error: {error.msg}") from error
    except (Exception, SystemExit) as error:
        raise user_fault(error, f"loading {name} from {file.name} failed") from error
    function = function if callable(function) else getattr(module, name, None)
    if not callable(function):
        near = difflib.get_close_matches(name, [n for n in dir(module) if callable(getattr(module, n))], 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise JobFault(f"{file.name} of project {project_dir.name} has no function {name!r}{hint}")
    forks.check()
    found: Function = function
    return found


def load_auxiliary(folder: Path, name: str | None) -> Any:
    """Load the JSON of `folder/NAME.data`, or None for no name. Raises JobFault when it is missing or no JSON."""
    if name is None:
        return None
    path = folder / f"{name}.data"
    try:
        return loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise JobFault(f"auxiliary data {name!r} is not on this node: {path} is missing; upload it first") from None
    except (OSError, ValueError) as error:
        raise JobFault(f"auxiliary data {path} cannot be read as JSON: {error}") from error


def user_fault(error: BaseException, what: str, **details: Any) -> JobFault:
    """Describe an exception of user code, with the traceback of the user's own frames."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(_OURS)]
    frames = [frame for frame in frames if not frame.filename.startswith("<frozen importlib")]
    text = "".join(["Traceback (your code, most recent call last):\n", *traceback.format_list(frames)])
    text += "".join(traceback.format_exception_only(error))
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    message = f"{what}: {type(error).__name__}: {describe_text(str(error))}{where}"
    return JobFault(message, traceback=text, **details)


def describe_text(text: str, limit: int = 300) -> str:
    """Cut a text for a message."""
    return text if len(text) <= limit else text[:limit] + "…"


def is_disk_full(error: BaseException) -> bool:
    """Tell whether the disk is full, which is no fault of the job, whoever was writing."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def raised_by_user(error: BaseException) -> bool:
    """Tell whether the exception came from the user's frames rather than from ours."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and not frames[-1].filename.startswith(_OURS)


def make_combiner(function: Function, name: str, auxiliary: Any) -> Callable[[Key, list[Value]], list[Value]]:
    """Wrap a reduce function as a combiner: `(key, values) -> values`.

    Raises JobFault when it raises, gives what is no item, or changes the key.
    """
    snapshot = Snapshot()

    def combine(key: Key, values: list[Value]) -> list[Value]:
        if len(values) > COMBINE_VALUES:  # the pairs of a giant group would outweigh it many times
            starts = range(0, len(values), COMBINE_VALUES)
            fewer = [value for start in starts for value in combine(key, values[start : start + COMBINE_VALUES])]
            return combine(key, fewer) if len(fewer) <= len(values) // 2 else fewer
        try:
            found = function([(key, value) for value in values], auxiliary)
            if forks.in_child:
                forks.check()
            item = found[0] if found.__class__ is list and len(found) == 1 else None
            if item.__class__ is tuple and len(item) == 2 and item[0] is key and item[1].__class__ is int:
                return [item[1]]  # the usual combiner adds up: no need to look closer
            items = [check_item(item, snapshot) for item in found]
        except BadItem as error:
            raise JobFault(f"combiner {name} on key {describe(key)}: {error}", function=name) from error
        except (Exception, SystemExit) as error:
            raise user_fault(error, f"combiner {name} failed on key {describe(key)}", function=name) from error
        for new_key, _ in items:
            if new_key != key:
                raise JobFault(
                    f"combiner {name} turned key {describe(key)} into {describe(new_key)}: a combiner must keep its "
                    "key; use the function as reduce function only",
                    function=name,
                )
        return [value for _, value in items]

    return combine
