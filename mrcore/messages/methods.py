"""The methods of agents and cluster servers: what each answers, within which bounds, whether it may blame the job."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import msgspec

from mrcore.errors import ClusterFault, InternalError, JobFault, Malformed, MrcoreError, TaskDied, from_dict
from mrcore.messages import kinds, nodes, tasks
from mrcore.messages.kinds import Count, Crc32, Word
from mrcore.text import clean

T = TypeVar("T")
ANSWER_BYTES = 1 << 20  # one answer as JSON, unless its entry says otherwise
LARGE_BYTES = 32 << 20


@dataclass(frozen=True)
class Method(Generic[T]):
    """A method by its name, and the type of its answer.

    `like` names the argument, a list, to each of whose items the answer has one. `blames` says that the method may
    find fault with the job; of any other, even a JobFault is the node's.
    """

    name: str
    answer: Any  # the type T: a class, or a composed type, which no signature can express
    most_bytes: int = ANSWER_BYTES
    like: str | None = None
    blames: bool = False

    def decode(self, answer: msgspec.Raw, arguments: Mapping[str, Any], node: str) -> T:
        """Return what a node answered, if it is an answer to this method. Raises Malformed, naming the node."""
        try:
            value = kinds.decode(self.answer, answer)
            if self.like and len(value) != len(arguments[self.like]):
                raise ValueError(f"{len(value)} answers for {len(arguments[self.like])} {self.like}")
        except ValueError as error:
            raise Malformed(f"node {node} gave no answer to {self.name}: {error}", node=node) from None
        return value  # type: ignore[no-any-return]


# --- Node agents -----------------------------------------------------------------------------------------------------

HEALTH = Method[nodes.Health]("health", nodes.Health)
END_SERVER = Method[bool]("end_server", bool)
PROJECT_STATE = Method[bool]("project_state", bool)
ENVIRONMENT_STATE = Method[bool]("environment_state", bool)
INSTALL_ENVIRONMENT = Method[bool]("install_environment", bool, blames=True)
AUXILIARY = Method[bool]("auxiliary", bool)
START_RUN = Method[nodes.Space]("start_run", nodes.Space)
LIST_INPUTS = Method[nodes.InputPage]("list_inputs", nodes.InputPage, LARGE_BYTES, blames=True)
CHECK_TAILS = Method[list[nodes.Tail]]("check_tails", list[nodes.Tail], like="files", blames=True)
PUBLISH = Method[nodes.Published]("publish", nodes.Published)
END_RUN = Method[bool]("end_run", bool)
SWEEP = Method[dict[str, int]]("sweep", dict[Word, Count])
EXISTS = Method[bool]("exists", bool, blames=True)
LIST_FILES = Method[nodes.FilePage]("list_files", nodes.FilePage, LARGE_BYTES, blames=True)
FILE_CHECKSUM = Method[int]("file_checksum", Crc32, blames=True)
BEGIN_UPLOAD = Method[nodes.UploadBegun]("begin_upload", nodes.UploadBegun, blames=True)
ANNOUNCE = Method[int | None]("announce", Count | None, blames=True)
COMMIT_UPLOAD = Method[int]("commit_upload", Count, blames=True)
DROP_UPLOAD = Method[None]("drop_upload", None)
DELETE_FILES = Method[nodes.Removal]("delete_files", nodes.Removal, LARGE_BYTES, blames=True)
HOLDINGS = Method[nodes.HoldingsPage]("holdings", nodes.HoldingsPage, LARGE_BYTES, blames=True)
TAKEN = Method[list[bool]]("taken", list[bool], like="names", blames=True)
STAGE_MOVES = Method[list[nodes.Staged | None]]("stage_moves", list[nodes.Staged | None], like="files", blames=True)
PUBLISH_MOVES = Method[list[bool]]("publish_moves", list[bool], like="files", blames=True)
REMOVE_MOVES = Method[list[bool]]("remove_moves", list[bool], like="files", blames=True)

# --- Cluster servers -------------------------------------------------------------------------------------------------

HELLO = Method[tasks.Hello]("hello", tasks.Hello)
ORDER = Method[tasks.Accepted]("order", tasks.Accepted)
GIVE = Method[tasks.Given]("give", tasks.Given)
POLL = Method[tasks.Polled]("poll", tasks.Polled, LARGE_BYTES)
CANCEL = Method[tasks.Cancelled]("cancel", tasks.Cancelled)

METHODS: dict[str, Method[Any]] = {value.name: value for value in list(globals().values()) if type(value) is Method}


def decode_error(plain: object, node: str, method: Method[Any] | None = None) -> MrcoreError:
    """Return the error that a node answered with, or, without a `method`, that a task or a data request ended with.

    Only some methods may blame the job; a task may whatever its error is, or its job would hold the queue.
    """
    match plain:
        case {"class": str(kind), "message": str(message), **rest}:
            given: Any = rest.get("details")
            details = {name: given[name] for name in given.keys() - {"message", "self"}} if type(given) is dict else {}
            made = from_dict({"class": kind, "message": clean(message), "details": details})
            blames = method is None or method.blames
            ours = isinstance(made, ClusterFault | TaskDied | InternalError) or method is None
            if ours or (blames and isinstance(made, JobFault)):
                return made
            return ClusterFault(f"node {node}: {made.message}", **made.details)
    return Malformed(f"node {node} answered with an error that is none", node=node)
