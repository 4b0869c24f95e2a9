"""The user's project: its files, its functions, and what to say when they fail."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from textwrap import indent
from typing import Any

from mrcore.engine.records import BadItem, Key, Snapshot, Value, check_item, describe, loads
from mrcore.errors import Interrupted, JobFault, MrcoreError, is_disk_full
from mrcore.system import forks
from mrcore.text import clean, one_line, type_name

Function = Callable[[Any, Any], Any]
COMBINE_VALUES = 4096
MAX_FRAMES, MAX_NOTES, MAX_STORIES = 100, 10, 20  # of each exception, and exceptions, that a traceback shows
_CAUSED = "\nThe above exception was the direct cause of the following exception:\n\n"
_WHILE_HANDLING = "\nDuring handling of the above exception, another exception occurred:\n\n"
NOTHING = object()  # stands for what a function returns, until it has returned
_OURS = str(Path(__file__).parents[1]) + os.sep
# Frames in these, below a frame of ours, are what we called; a user's packages lie elsewhere.
_LIBRARIES = (
    "<frozen",
    *(sysconfig.get_paths()[kind] + os.sep for kind in ("stdlib", "platstdlib", "purelib", "platlib")),
)
_PARAMETERS = {"map": "(line, auxiliary_data)", "reduce": "(group, auxiliary)"}


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
        function = function if callable(function) else getattr(module, name, None)
        if not callable(function):
            near = difflib.get_close_matches(name, [n for n in dir(module) if callable(getattr(module, n))], 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise JobFault(f"{file.name} of project {project_dir.name} has no function {name!r}{hint}")
    except BaseException as error:
        if is_ours(error):
            raise
        if type(error) in (SyntaxError, IndentationError, TabError) and type(error.filename) is str:  # type: ignore[attr-defined]
            raise JobFault(f"{error.filename}, line {error.lineno}: syntax error: {error.msg}") from error  # type: ignore[attr-defined]
        raise user_fault(error, f"loading {name} from {file.name} failed") from error
    forks.check()
    found: Function = function
    try:
        parameters = inspect.signature(found, follow_wrapped=False)  # what a decorator returns is what is called
    except (ValueError, TypeError):  # of a function in C, which does not tell
        return found
    try:
        parameters.bind(None, None)
    except TypeError as error:
        raise JobFault(
            f"{kind} function {name} of {file.name} cannot be called as f{_PARAMETERS[kind]}: its parameters are "
            f"{parameters} ({error})",
            function=name,
        ) from None
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
    """Describe an exception of user code: its own frames, its causes, the members of a group, all bounded.

    Raises the error itself if it is none of user code: Ctrl-C, or a disk that is full, whoever was writing.
    """
    kind = type(error)  # never isinstance: that asks `__class__`, which user code may have defined
    if issubclass(kind, Interrupted) or is_disk_full(error):
        raise error
    frames = user_frames(error)
    frames = [frame for frame in frames if not frame.filename.startswith(_LIBRARIES)] or frames
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    told = one_line(error, 300)
    message = f"{what}: {type_name(error)}{': ' if told else ''}{told}{where}"
    return JobFault(message, traceback=_story(error, [MAX_STORIES]), **details)


def _of(error: BaseException, name: str) -> Any:
    """An attribute of an exception as Python itself sees it, whatever its class makes of that name."""
    return BaseException.__dict__[name].__get__(error)


def user_frames(error: BaseException) -> list[traceback.FrameSummary]:
    """Return the frames of an exception's traceback that are neither ours nor the import machinery's."""
    steps = list(traceback.walk_tb(_of(error, "__traceback__")))
    if len(steps) > MAX_FRAMES:  # a recursion: where it began, and its end
        del steps[MAX_FRAMES // 4 : -MAX_FRAMES * 3 // 4]
    frames = traceback.StackSummary.extract(iter(steps))
    return [frame for frame in frames if not frame.filename.startswith((_OURS, "<frozen importlib"))]


def _story(error: BaseException, left: list[int]) -> str:
    """What a traceback shows of an exception, and before it of those that it came from; `left`: how many, in all."""
    chain: list[str] = []
    seen, current, link = set[int](), error, ""
    while current is not None and id(current) not in seen and left[0] > 0:
        seen.add(id(current))
        left[0] -= 1
        frames = user_frames(current)
        text = "Traceback (your code, most recent call last):\n" if frames else ""
        text += "".join(traceback.format_list(frames)) + f"{type_name(current)}: {clean(current, 2000)}\n"
        notes = _of(current, "__dict__").get("__notes__")
        text += "".join(f"{clean(note, 1000)}\n" for note in notes[:MAX_NOTES]) if type(notes) is list else ""
        if issubclass(type(current), BaseExceptionGroup):
            members = BaseExceptionGroup.__dict__["exceptions"].__get__(current)
            for member in members[: left[0]]:
                text += "  one of its exceptions:\n" + indent(_story(member, left), "    ")
        chain.append(text + link)
        cause, link = _of(current, "__cause__"), _CAUSED
        if cause is None and not _of(current, "__suppress_context__"):
            cause, link = _of(current, "__context__"), _WHILE_HANDLING
        current = cause
    return ("" if current is None else "(other exceptions are left out)\n") + "".join(reversed(chain))


def is_ours(error: BaseException) -> bool:
    """Tell whether an error is of our own making, which user code had no part in: it is passed on as it is.

    Trouble with a file of ours, such as a DiskList's, is the machine's, though user code may have called us.
    """
    if issubclass(type(error), MrcoreError):
        return not user_frames(error)
    own = _files_below(error)[1]
    return issubclass(type(error), OSError) and bool(own) and own[-1].startswith(_OURS)


def is_iterable(thing: Any) -> bool:
    """Tell whether a for loop takes `thing`."""
    try:
        iter(thing)
    except TypeError:
        return False
    except BaseException:  # noqa: BLE001  of its own `__iter__`
        return True
    return True


def raised_by_user(error: BaseException) -> bool:
    """Tell whether the exception, caught where user code is called, came out of user code.

    It did, wherever it was raised, if the first thing that we called is not ours (a DiskList that refuses an item is
    called by the user's function), or if the user's code was called further down (the `items` of a dict of theirs).
    """
    files, own = _files_below(error)
    theirs = issubclass(type(error), MemoryError | RecursionError)
    return theirs or not all(file.startswith(_OURS) for file in (*files[:1], *own))


def _files_below(error: BaseException) -> tuple[list[str], list[str]]:
    """Return the files of the frames below the one that caught it; and those of ours and the user's among them."""
    steps = traceback.walk_tb(_of(error, "__traceback__"))
    files = [frame.f_code.co_filename for frame, _ in steps][1:]
    return files, [file for file in files if file.startswith(_OURS) or not file.startswith(_LIBRARIES)]


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
        except BaseException as error:
            if issubclass(type(error), BadItem) and not raised_by_user(error):
                raise JobFault(f"combiner {name} on key {describe(key)}: {error}", function=name) from error
            raise user_fault(error, f"combiner {name} failed on key {describe(key)}", function=name) from error
        for new_key, _ in items:
            if new_key != key:
                raise JobFault(
                    f"combiner {name} turned key {describe(key)} into {describe(new_key)}: a combiner must keep its "
                    "key; use the function as reduce function only",
                    function=name,
                )
        return [value for _, value in items]

    combine.__name__ = name
    return combine
