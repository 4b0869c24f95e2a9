"""What can go wrong, sorted by who must act and whether another try can help.

The class decides what the queue does; the text is for the person who reads it and names the thing,
the cause and the next step. Errors cross process and machine borders as plain dicts (`to_dict`), and hold whatever
users and data bring: so every error cleans and bounds its text and its details when it is made.
"""

from __future__ import annotations

import errno
import traceback
from typing import Any, NoReturn

from mrcore import text

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class MrcoreError(Exception):
    """Base of every error of ours. `details` holds JSON-able facts (file, offset, traceback, …)."""

    retryable = False

    def __init__(self, message: object, /, **details: Any) -> None:
        self.message = text.message(message)
        super().__init__(self.message)
        self.details: dict[str, Any] = text.plain(details)

    def to_dict(self) -> dict[str, Any]:
        """Give `{"class", "message", "details"}`, JSON-able, for the wire and the history."""
        return {"class": type(self).__name__, "message": self.message, "details": self.details}


class JobFault(MrcoreError):
    """The job's own fault (its code, inputs, settings): final, fails the job and its group."""


class ClusterFault(MrcoreError):
    """The cluster's fault (a silent node, a full disk): never the job's; the queue holds and retries."""

    retryable = True


class Unreachable(ClusterFault):
    """A daemon did not answer before its deadline, or the connection broke."""


class Refused(ClusterFault):
    """A daemon answered and said no: wrong role, wrong version, stale or unknown order."""


class Malformed(ClusterFault):
    """A daemon answered with what cannot be an answer: it is broken, or in other hands. Nothing of it is believed."""


class TaskDied(MrcoreError):
    """A task process ended without a result (killed, crashed): its task is tried again."""

    retryable = True


class InternalError(MrcoreError):
    """What nobody foresaw, met in working for one job: that job's run is repeated a few times, then the job fails.

    Never a ClusterFault, which holds the whole queue: what one job meets, the next need not meet.
    """

    retryable = True


class UsageError(MrcoreError):
    """What the caller asked cannot be done as asked; nothing was changed."""


class Interrupted(KeyboardInterrupt):
    """Somebody sent SIGINT to the process (Ctrl-C), as opposed to user code that raises KeyboardInterrupt itself."""


def interrupt(number: int, frame: object) -> NoReturn:
    """Handle SIGINT in a process that runs user code."""
    raise Interrupted


_KINDS = (MrcoreError, JobFault, ClusterFault, Unreachable, Refused, Malformed, TaskDied, InternalError, UsageError)
_CLASSES = {kind.__name__: kind for kind in _KINDS}


def from_dict(plain: dict[str, Any]) -> MrcoreError:
    """Make the error again that `to_dict` described; an unknown class becomes MrcoreError."""
    kind = _CLASSES.get(str(plain.get("class")), MrcoreError)
    details = plain.get("details") or {}
    return kind(plain.get("message", "unknown error"), **{str(key): value for key, value in details.items()})


def unforeseen(error: BaseException, where: str = "internal error") -> MrcoreError:
    """Return any exception as one of ours: a machine that is full is the cluster's fault, all else InternalError."""
    if issubclass(type(error), MrcoreError):
        return error  # type: ignore[return-value]
    if issubclass(type(error), OSError) and error.errno in _FULL:  # type: ignore[attr-defined]
        return ClusterFault(f"{where}: the machine cannot go on: {text.clean(error)}")
    frames = "".join(traceback.format_exception(error))
    return InternalError(f"{where}: {text.type_name(error)}: {text.one_line(error, 500)}", internal_traceback=frames)


def is_disk_full(error: BaseException) -> bool:
    """Tell whether the disk is full, which is no fault of the job, whoever was writing."""
    return issubclass(type(error), OSError) and OSError.__dict__["errno"].__get__(error) in (errno.ENOSPC, errno.EDQUOT)
