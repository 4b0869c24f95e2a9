"""Errors of user code: whose they are, and what the history of a job shows of them.

User code may raise anything, with any class, text and attributes; nothing here asks an object of the user's what it
is, only Python itself.
"""

from __future__ import annotations

import os
import sysconfig
import traceback
from pathlib import Path
from textwrap import indent
from typing import Any

from mrcore.engine.records import BadItem, Snapshot, check_item
from mrcore.errors import Interrupted, JobFault, MrcoreError, is_disk_full
from mrcore.text import clean, one_line, type_name

MAX_FRAMES, MAX_NOTES, MAX_EXCEPTIONS = 100, 10, 20  # of each exception, and exceptions, that a traceback shows
NOTHING = object()  # stands for what a function returns, until it has returned
_CAUSED = "\nThe above exception was the direct cause of the following exception:\n\n"
_WHILE_HANDLING = "\nDuring handling of the above exception, another exception occurred:\n\n"
_OURS = str(Path(__file__).parents[1]) + os.sep
# Frames in these, below a frame of ours, are what we called; a user's packages lie elsewhere.
_LIBRARIES = (
    "<frozen",
    *(sysconfig.get_paths()[kind] + os.sep for kind in ("stdlib", "platstdlib", "purelib", "platlib")),
)


def user_fault(error: BaseException, what: str, **details: Any) -> JobFault:
    """Return an exception of user code as a JobFault: its own frames, its causes, the members of a group, all bounded.

    Raises the error itself if it is none of user code: Ctrl-C, or a disk that is full, no matter who was writing.
    """
    kind = type(error)  # never isinstance: that asks `__class__`, which user code may have defined
    if issubclass(kind, Interrupted) or is_disk_full(error):
        raise error
    frames = user_frames(error)
    frames = [frame for frame in frames if not frame.filename.startswith(_LIBRARIES)] or frames
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    text = one_line(error, 300)
    message = f"{what}: {type_name(error)}{': ' if text else ''}{text}{where}"
    if frames:
        details |= {"code_file": frames[-1].filename, "code_line": frames[-1].lineno}
    return JobFault(message, traceback=_traceback(error, [MAX_EXCEPTIONS]), **details)


def _of(error: BaseException, name: str) -> Any:
    """Return an attribute of an exception as Python itself sees it, whatever its class makes of that name."""
    return BaseException.__dict__[name].__get__(error)


def user_frames(error: BaseException) -> list[traceback.FrameSummary]:
    """Return the frames of an exception's traceback that are neither ours nor the import machinery's."""
    steps = list(traceback.walk_tb(_of(error, "__traceback__")))
    if len(steps) > MAX_FRAMES:  # a recursion: where it began, and its end
        del steps[MAX_FRAMES // 4 : -MAX_FRAMES * 3 // 4]
    frames = traceback.StackSummary.extract(iter(steps))
    return [frame for frame in frames if not frame.filename.startswith((_OURS, "<frozen importlib"))]


def _traceback(error: BaseException, left: list[int]) -> str:
    """Format an exception, and before it those that it came from, as Python does; `left`: how many more, in all."""
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
                text += "  one of its exceptions:\n" + indent(_traceback(member, left), "    ")
        chain.append(text + link)
        cause, link = _of(current, "__cause__"), _CAUSED
        if cause is None and not _of(current, "__suppress_context__"):
            cause, link = _of(current, "__context__"), _WHILE_HANDLING
        current = cause
    return ("" if current is None else "(other exceptions are left out)\n") + "".join(reversed(chain))


def is_ours(error: BaseException) -> bool:
    """Return whether an error is of our own making, which user code had no part in: it is passed on as it is.

    Trouble with a file of ours, such as a DiskList's, is the machine's, though user code may have called us.
    """
    if issubclass(type(error), MrcoreError):
        return not user_frames(error)
    own = _files_below(error)[1]
    return issubclass(type(error), OSError) and bool(own) and own[-1].startswith(_OURS)


def _is_iterable(thing: Any) -> bool:
    """Return whether a for loop takes `thing`."""
    try:
        iter(thing)
    except TypeError:
        return False
    except BaseException:  # noqa: BLE001  of its own `__iter__`
        return True
    return True


def raised_by_user(error: BaseException) -> bool:
    """Return whether the exception, caught where user code is called, came out of user code.

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


def flaw_of(error: BaseException, item: Any, items: Any) -> BaseException | None:
    """Return what is wrong with `items`, the result of a user's function, when taking `item` of them raised `error`.

    That is a BadItem, or another error if they are no iterable. None: the user's code raised. Raises the error itself
    if user code had no part in it.
    """
    if is_ours(error):
        raise error
    # What was raised before the function returned is its own as well: a function in C has no frame.
    if raised_by_user(error) or items is NOTHING:
        return None
    if issubclass(type(error), BadItem):
        return error
    try:
        if item is not None:  # it was taken unchecked
            check_item(item, Snapshot())
    except BadItem as bad:
        return bad
    return None if _is_iterable(items) else error  # an iterable that raises is one in C, such as `map`
