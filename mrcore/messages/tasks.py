"""What master, cluster servers and tasks say to each other: orders, events, results, and what they are made of."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from mrcore.errors import Malformed
from mrcore.messages.kinds import (
    AbsolutePath,
    Count,
    Crc32,
    Hash,
    Inode,
    JobName,
    Line,
    Message,
    PartName,
    Positive,
    Row,
    Seconds,
    TimeNs,
    Token,
    Word,
)
from mrcore.messages.nodes import Versions
from mrcore.text import one_line

KEY_DEPTH = 100  # as in `engine.records`
MAX_EVENTS = 1_000  # in one answer to a poll
MAX_USER_COUNTERS = 100  # different names in one task
MAX_HEAVY, MAX_STACKS = 10, 5_000  # of one task: groups, and different stacks of its profile
Phase = Literal["MAP", "REDUCE"]
MAP: Phase = "MAP"
REDUCE: Phase = "REDUCE"
Counters = dict[Word, Count]
Amount = Annotated[int, Meta(ge=-(1 << 62), le=(1 << 62))]
# A name of a counter, or a status: `task` cleans both, so what an honest task sends has nothing that a view escapes.
_FIT = r"\A[^\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]*\Z"
CounterName = Annotated[str, Meta(max_length=200, pattern=_FIT)]
Status = Annotated[str, Meta(max_length=500, pattern=_FIT)]
UserCounters = Annotated[dict[CounterName, Amount], Meta(max_length=MAX_USER_COUNTERS)]
Stack = Annotated[str, Meta(max_length=10_000)]
KeyText = str  # a key as Python's json writes it, which unlike JSON proper has infinities


class RunIdentity(Message, frozen=True, kw_only=True):
    """A run of a job."""

    job: JobName
    run: Positive


class TaskIdentity(RunIdentity, frozen=True, kw_only=True, rename={"try_": "try"}):
    """A try of a task: orders, events and paths carry it, so that late words of the dead change nothing."""

    phase: Phase
    task: Count
    try_: Positive

    def __str__(self) -> str:
        return f"{self.phase.lower()} task {self.task} of {self.job} (run {self.run}, try {self.try_})"


# --- Orders ----------------------------------------------------------------------------------------------------------


class Split(Row, frozen=True):
    """A byte range of an input file; `end` None: a compressed file as a whole. `size`: of the file when listed."""

    path: AbsolutePath
    start: Count
    end: Count | None
    size: Count
    mtime_ns: TimeNs
    inode: Inode


class Bundle(Struct, frozen=True):
    """Splits of about equal weight together, the unit that is handed to a map task."""

    id: Count
    pieces: list[Split]


class SpillShare(Message, frozen=True, kw_only=True):
    """A spill from which a reduce task takes its share, of `most_bytes` at most; `max_decoded`: bytes of a frame."""

    id: Word
    max_decoded: Count
    most_bytes: Count


class Source(Message, frozen=True, kw_only=True):
    """A node from which to fetch, and which spills it has. Without spills: it has earlier output."""

    node: Word
    address: Word
    port: Count
    runs: list[SpillShare] = []


class Part(Message, frozen=True, kw_only=True):
    """A published output file. `text_bytes` uncompressed; `batch_bytes`, `max_decoded`: of its largest batch."""

    name: PartName
    partition: Count
    records: Count
    bytes: Count
    text_bytes: Count
    batch_bytes: Count
    max_decoded: Count
    crc32: Crc32


class PlacedPart(Part, frozen=True, kw_only=True):
    """A part, and the node that it lies on."""

    node: Word


class Earlier(Message, frozen=True, kw_only=True):
    """Earlier output that is merged with what is new: its parts, and the nodes that hold them."""

    parts: list[PlacedPart]
    sources: list[Source]


class More(Struct, frozen=True):
    """Bundles for a running map task, or the news that there are no more."""

    bundles: list[Bundle] = []
    no_more: bool = False


class Order(Message, frozen=True, kw_only=True):
    """One task. `job`: the validated job; `project`, `environment`: hashes of what it runs with.

    MAP has `bundles` and `no_more`. REDUCE has `partition`, the keys from `low` up to `high` (None: no limit),
    `sources` and, with `merge_output`, `earlier`. `memory_bytes` is added by the server.
    """

    identity: TaskIdentity
    node: Word
    job: dict[str, Any]
    project: Hash
    environment: Hash | None = None
    partitions: Positive
    sample_by_lines: bool = False
    memory_bytes: Count = 0
    bundles: list[Bundle] = []
    no_more: bool = False
    partition: Count = 0
    low: KeyText | None = None
    high: KeyText | None = None
    sources: list[Source] = []
    earlier: Earlier | None = None


# --- Results ---------------------------------------------------------------------------------------------------------


class Spill(Message, frozen=True, kw_only=True):
    """A sorted spill of a map task. `partitions`: bytes by number; `samples`: first keys of frames and their bytes."""

    id: Word
    bytes: Count
    groups: Count
    values: Count
    max_decoded: Count
    partitions: dict[Annotated[str, Meta(pattern=r"\A[0-9]{1,9}\Z")], Count]
    samples: list[tuple[KeyText, Count]]


class HeavyGroup(Message, frozen=True, kw_only=True):
    """A key with many values, as errors print keys."""

    key: Word
    values: Count


class TaskResult(Message, frozen=True, kw_only=True):
    """What a task made: `runs` (spills) of MAP, or `parts`; `fetched`: bytes by node; `seconds` by what took them.

    `user_counters`: of `task.count`. `heavy`: the largest groups. `profile`: samples by stack, frames from the root on
    joined by ";", of a job with `profile`.
    """

    peak_bytes: Count
    counters: Counters
    seconds: dict[Word, Seconds]
    parts: list[Part] = []
    runs: list[Spill] = []
    keys_kept: bool = True
    fetched: Counters = {}
    user_counters: UserCounters = {}
    heavy: Annotated[list[HeavyGroup], Meta(max_length=MAX_HEAVY)] = []
    profile: Annotated[dict[Stack, Count], Meta(max_length=MAX_STACKS)] = {}


class PlainError(Struct, frozen=True, rename={"kind": "class"}):
    """An error on its way (`errors.to_dict`)."""

    kind: Word
    message: str
    details: dict[str, Any] = {}


# --- Events ----------------------------------------------------------------------------------------------------------


class Event(Message, frozen=True, kw_only=True, tag_field="event"):
    """What a task reports; the server adds whose it is."""

    identity: TaskIdentity | None = None


class Want(Event, frozen=True, kw_only=True, tag="want"):
    """A map task has begun its last bundle in hand."""


class BundleDone(Event, frozen=True, kw_only=True, tag="bundle_done"):
    """A bundle is mapped."""

    id: Count


class PhaseBegun(Event, frozen=True, kw_only=True, tag="phase"):
    """A reduce task has merged its partition: REDUCE begins."""

    phase: Word


class Progressed(Event, frozen=True, kw_only=True, tag="progress"):
    """What a task has done since its start, about once a second; a newer one replaces one that was not fetched yet.

    `bytes` and `records` are of `phase`: MAP: input read, and lines; SORT: of the partition's spills, fetched or found
    on this node, and none; REDUCE: of the partition's sources read by the merge, and values reduced. `spills`: written
    so far, or passes of the merge.
    """

    phase: Literal["MAP", "SORT", "REDUCE"]
    bytes: Count
    records: Count
    spills: Count = 0
    status: Status = ""
    user_counters: UserCounters = {}


class Done(Event, frozen=True, kw_only=True, tag="done"):
    """The task is done."""

    result: TaskResult


class Failed(Event, frozen=True, kw_only=True, tag="failed"):
    """The task has ended by an error that it could report."""

    error: PlainError


class Died(Event, frozen=True, kw_only=True, tag="died"):
    """The task process ended without a result: the server's own word, of which `message` tells most.

    `in_hand`: what user code was at. `memory_bytes`: anonymous memory that it held at most, of `budget_bytes`. `oom`:
    the kernel probably killed it for want of memory. `stack`: Python's, of a crash, most recent call first.
    """

    message: Line
    signal: Count | None = None
    status: Count | None = None
    in_hand: Line = ""
    memory_bytes: Count = 0
    budget_bytes: Count = 0
    oom: bool = False
    stack: Line = ""

    def details(self) -> dict[str, Any]:
        """Return what there is beside the message, as details of an error."""
        facts = msgspec.structs.asdict(self)
        return {name: fact for name, fact in facts.items() if fact and name not in ("identity", "message")}


TaskEvent = Want | BundleDone | PhaseBegun | Progressed | Done | Failed | Died


# --- Answers of cluster servers --------------------------------------------------------------------------------------


class Hello(Versions, frozen=True, kw_only=True):
    """A cluster server, one life of its child (`incarnation`), and the memory of server and supervisor."""

    incarnation: Token
    pid: Count
    anonymous_bytes: Count


class Accepted(Message, frozen=True, kw_only=True):
    """An order was taken."""

    accepted: bool


class Given(Message, frozen=True, kw_only=True):
    """Bundles were handed on."""

    given: Count


class Polled(Message, frozen=True, kw_only=True):
    """Numbered events of an incarnation."""

    incarnation: Token
    events: Annotated[list[tuple[Positive, TaskEvent]], Meta(max_length=MAX_EVENTS)]


class Cancelled(Message, frozen=True, kw_only=True):
    """Whether a task of the run was under way."""

    cancelled: bool


# --- What a type cannot say ------------------------------------------------------------------------------------------


def check_result(result: TaskResult, identity: TaskIdentity, partitions: int, node: str) -> None:
    """Raise Malformed, naming the node, unless a task of this identity can have made all of this."""
    spill = re.compile(rf"map-{identity.task}-{identity.try_}-[0-9]{{1,9}}")
    part = re.compile(rf"part-{identity.run:06d}-{identity.task:05d}-[0-9]{{5,9}}\.data(\.gz)?")
    wrong: list[object] = [each.id for each in result.runs if not spill.fullmatch(each.id)]
    wrong += [each.name for each in result.parts if not part.fullmatch(each.name)]
    wrong += [f"partition {each.partition}" for each in result.parts if each.partition != identity.task]
    wrong += [f"partition {name}" for each in result.runs for name in each.partitions if int(name) >= partitions]
    wrong += ["a sample's key" for each in result.runs for key, _ in each.samples if not _is_key(key)]
    made = [each.id for each in result.runs] + [each.name for each in result.parts]
    wrong += ["a name twice"] if len(set(made)) < len(made) else []
    if wrong or (result.runs and identity.phase != "MAP"):
        what = one_line(wrong[0] if wrong else "spills of a reduce task", 200)
        raise Malformed(f"node {node} gave no event of a task: done: {what}", node=node)


def read_key(text: KeyText) -> object:
    """Return a key from its text, lists in it as tuples. Raises ValueError."""
    try:
        return _as_key(json.loads(text))
    except RecursionError:
        raise ValueError("a key nested too deeply") from None


def _as_key(plain: object, depth: int = 0) -> object:
    if type(plain) is list and depth < KEY_DEPTH:
        return tuple(_as_key(item, depth + 1) for item in plain)
    if plain is None or type(plain) in (str, int, float, bool):
        return plain
    raise ValueError(f"a key holds a {type(plain).__name__}, or is nested too deeply")


def _is_key(text: KeyText) -> bool:
    try:
        read_key(text)
    except ValueError:
        return False
    return True
