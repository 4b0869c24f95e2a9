"""What can go wrong, sorted by who must act and whether another try can help.

The class decides what the queue does; the text is for the person who reads it and names the thing,
the cause and the next step. Errors cross process and machine borders as plain dicts (`to_dict`).
"""

from __future__ import annotations

from typing import Any


class MrcoreError(Exception):
    """Base of every error of ours. `details` holds JSON-able facts (file, offset, traceback, …)."""

    retryable = False

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.details = details

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


class UsageError(MrcoreError):
    """What the caller asked cannot be done as asked; nothing was changed."""


_OURS = (MrcoreError, JobFault, ClusterFault, Unreachable, Refused, Malformed, TaskDied, UsageError)
_CLASSES = {c.__name__: c for c in _OURS}


def from_dict(plain: dict[str, Any]) -> MrcoreError:
    """Make the error again that `to_dict` described; an unknown class becomes MrcoreError."""
    kind = _CLASSES.get(str(plain.get("class")), MrcoreError)
    return kind(str(plain.get("message", "unknown error")), **dict(plain.get("details") or {}))
