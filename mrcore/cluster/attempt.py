"""What one attempt of a mapreduce job does next: events in, instructions out, no I/O.

    MAP     every server maps bundles of splits of its own node until there are none; its spill runs are sealed
    REDUCE  every partition is fetched, merged (SORT) and reduced by whichever server is free

Identity: every order and event carries (job, run, attempt, phase, task, try); what does not fit the task that a server
has in hand is stale and ignored. A task that dies is tried again, its bundles and runs with it; a sealed map task's
runs lie on its node's disk and outlive its server. A fault of the job or the loss of a node ends the attempt.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mrcore.engine.records import Key, as_tuple, order_key
from mrcore.errors import ClusterFault, JobFault, Malformed, MrcoreError
from mrcore.messages import legacy
from mrcore.messages.methods import decode_error

Json = dict[str, Any]
BUNDLES_AHEAD = 2  # one in work, one in hand: a server never waits for the next
FIRST_PARTITION_BYTES = 4 << 20  # a small job does not pay for more partitions than its data fills


# --- Instructions ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Start:
    """Order `server` to start a task; `extra` are the order's fields beside identity and job."""

    server: str
    identity: Json
    extra: Json


@dataclass(frozen=True)
class Give:
    """Hand more bundles to a running map task, or the news that there are none."""

    server: str
    identity: Json
    bundles: list[Json]
    no_more: bool


@dataclass(frozen=True)
class EndServer:
    """Have the node's agent end a server that does not answer, so that nothing of it speaks or writes later."""

    server: str


Instruction = Start | Give | EndServer


# --- State -----------------------------------------------------------------------------------------------------------

# Every change of a task's state; any other raises with the task's story.
TRANSITIONS = {
    ("waiting", "start"): "running",
    ("running", "done"): "done",
    ("running", "died"): "waiting",
}


@dataclass
class Task:
    """A map task (made when a server is free and bundles wait) or a reduce task (one for each partition)."""

    number: int
    extra: Json
    bundles: list[Json] = field(default_factory=list)
    state: str = "waiting"
    tries: int = 0
    server: str | None = None
    story: list[str] = field(default_factory=list)
    no_more: bool = False

    def move(self, what: str, because: str = "") -> None:
        """Change state by the table. Raises AssertionError with the task's story for a change that is not in it."""
        follows = TRANSITIONS.get((self.state, what))
        self.story.append(f"{self.state} + {what} ({self.server}, try {self.tries}) {because}".rstrip())
        if follows is None:
            raise AssertionError(f"task {self.number}: no transition {what!r} from {self.state!r}: {self.story}")
        self.state = follows


@dataclass
class Server:
    """What the attempt knows of a cluster server: `task` is the one that it has in hand."""

    name: str
    node: str
    up: bool = False
    down_since: float = 0.0
    task: Task | None = None


class Attempt:
    """One attempt of one job, as a machine of events and instructions.

    `servers` maps names of servers to their nodes, `bundles` nodes to their bundles (see `inputs.plan_bundles`).
    After every event: `instructions()` gives what to do, `fault` is set when the attempt has failed, and `finished`
    when it has succeeded; `runs`, `parts` and `counters` then tell what it made. `earlier` are the parts, by partition,
    that are merged with what is new; the partitions, by range with their `cuts`, must be those of that output.
    """

    def __init__(
        self,
        identity: Mapping[str, Any],
        servers: Mapping[str, str],
        bundles: Mapping[str, Sequence[Json]],
        *,
        partitions: int,
        by_range: bool,
        map_only: bool,
        max_attempts: int,
        node_timeout_seconds: float,
        now: float,
        earlier: Mapping[int, Sequence[Json]] | None = None,
        cuts: Sequence[Key] | None = None,
    ) -> None:
        self.identity = dict(identity)
        self.servers = {name: Server(name, node, down_since=now) for name, node in servers.items()}
        self.waiting = {node: deque(waiting) for node, waiting in bundles.items() if waiting}
        self.partitions, self.by_range, self.map_only = partitions, by_range, map_only
        self.max_attempts, self.node_timeout_seconds = max_attempts, node_timeout_seconds
        self.earlier, self.cuts = earlier or {}, cuts
        self.phase = "MAP"
        self.fault: MrcoreError | None = None
        self.finished = False
        self.maps: list[Task] = []
        self.reduces: list[Task] = []
        self.runs: dict[str, list[Json]] = {}  # by node
        self.parts: list[Json] = []
        self.shuffled: dict[tuple[str, str], int] = {}  # (source node, reducing node) → bytes
        self.bundles_done = 0  # for progress only: those of tasks that died are in it twice
        self.counters: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self.deaths: list[str] = []
        self.keys_kept = True
        self.peak_bytes = 0
        self._out: list[Instruction] = []
        self._tries: dict[int, int] = {}  # bundle id → tasks that died with it

    # --- events ---

    def server_up(self, name: str) -> None:
        """A server answers for the first time, or as a new incarnation, which knows nothing of its task."""
        server = self.servers[name]
        self._lose_task(server, "the cluster server was started afresh")
        server.up = True

    def server_down(self, name: str, now: float) -> None:
        """A server has not answered for too long."""
        server = self.servers[name]
        if server.up:
            server.up, server.down_since = False, now
            self._lose_task(server, "the cluster server does not answer")
            self._out.append(EndServer(name))

    def node_lost(self, node: str, reason: str) -> None:
        """A node's agent has not answered for too long: its inputs and runs are out of reach."""
        self._fail(ClusterFault(f"node {node} was lost in phase {self.phase}: {reason}", node=node))

    def refused(self, name: str, identity: Json, error: MrcoreError) -> None:
        """An order was answered with a no: the server's task goes back."""
        server = self.servers[name]
        if server.task is not None and self._identity(server.task) == identity:
            self._lose_task(server, f"the order was refused: {error.message}", _blame(error))

    def task_event(self, name: str, event: Json) -> None:
        """A server tells of its task. Stale events (another run, attempt, task or try) are ignored."""
        server = self.servers[name]
        task = server.task
        if task is None or event.get("identity") != (task_identity := self._identity(task)):
            return
        try:
            event = legacy.event(event, task_identity, self.partitions, server.node)
        except Malformed as error:
            self._fail(error)
            return
        what = event["event"]
        if what == "want":
            self._give(server, task)
        elif what == "bundle_done":
            self.bundles_done += 1
        elif what == "phase" and self.phase == "SORT":
            self.phase = "REDUCE"
        elif what == "done":
            server.task = None
            task.move("done")
            self._take(server, task, event["result"])
        elif what == "failed":
            self._task_failed(server, decode_error(event["error"], server.node))
        elif what == "died":
            self._lose_task(server, event["message"], JobFault)

    def tick(self, now: float) -> None:
        """Look at the clock: work that only servers can do which have been away for too long ends the attempt."""
        needed = set(self.waiting) if self.phase == "MAP" else {s.node for s in self.servers.values()}
        for node in needed:
            servers = [s for s in self.servers.values() if s.node == node]
            if self.phase == "MAP" and all(not s.up for s in servers):
                away = now - max((s.down_since for s in servers), default=0.0)
                if away > self.node_timeout_seconds:
                    self._fail(ClusterFault(f"no cluster server of node {node} answers since {away:.0f} s", node=node))
        if self.phase != "MAP" and all(not s.up for s in self.servers.values()):
            away = now - max(s.down_since for s in self.servers.values())
            if away > self.node_timeout_seconds:
                self._fail(ClusterFault(f"no cluster server answers since {away:.0f} s"))

    # --- what to do ---

    def instructions(self) -> list[Instruction]:
        """Give what is to be done now, each thing once."""
        if not self.fault:
            self._advance()
        out, self._out = self._out, []
        return out

    def _advance(self) -> None:
        free = [s for s in self.servers.values() if s.up and s.task is None]
        if self.phase == "MAP":
            for server in free:
                if self.waiting.get(server.node):
                    task = Task(len(self.maps), {})
                    self.maps.append(task)
                    task.bundles = self._next_bundles(server.node, BUNDLES_AHEAD)
                    task.no_more = not self.waiting.get(server.node)
                    task.tries = max(self._tries.get(bundle["id"], 0) for bundle in task.bundles)
                    self._start(server, task, {"bundles": task.bundles, "no_more": task.no_more})
            if not self.waiting and all(task.state == "done" for task in self.maps if task.bundles):
                self._end_map()
                self._advance()
            return
        waiting = [task for task in self.reduces if task.state == "waiting"]
        for server in free[: len(waiting)]:  # the largest partitions come first, but for those whose output lies there
            near = (task for task in waiting if self._lies_on(task.number, server.node)) if self.earlier else iter(())
            task = next(near, waiting[0])
            waiting.remove(task)
            self._start(server, task, task.extra)
        if all(task.state == "done" for task in self.reduces):
            self.finished = True

    def _lies_on(self, partition: int, node: str) -> bool:
        return any(part["node"] == node for part in self.earlier.get(partition, ()))

    def _next_bundles(self, node: str, count: int) -> list[Json]:
        waiting = self.waiting.get(node)
        taken = [waiting.popleft() for _ in range(min(count, len(waiting)))] if waiting else []
        if waiting is not None and not waiting:
            del self.waiting[node]
        return taken

    def _start(self, server: Server, task: Task, extra: Json) -> None:
        server.task, task.server = task, server.name
        task.tries += 1
        task.move("start")
        self._out.append(Start(server.name, self._identity(task), {"node": server.node} | extra))

    def _give(self, server: Server, task: Task) -> None:
        more = self._next_bundles(server.node, 1)
        task.bundles += more
        task.no_more = not self.waiting.get(server.node)
        self._out.append(Give(server.name, self._identity(task), more, task.no_more))

    def _identity(self, task: Task) -> Json:
        phase = "MAP" if self.phase == "MAP" else "REDUCE"
        return {**self.identity, "phase": phase, "task": task.number, "try": task.tries}

    # --- losses ---

    def _lose_task(self, server: Server, because: str, blame: type[MrcoreError] = ClusterFault, **details: Any) -> None:
        """A server's task is gone: its bundles wait again, or its partition does. `blame`: whose fault the last is."""
        task, server.task = server.task, None
        if task is None or self.fault:
            return
        self.deaths.append(f"{server.name}: {'map' if self.phase == 'MAP' else 'reduce'} task {task.number}: {because}")
        task.move("died", because)
        if self.phase == "MAP":
            for bundle in task.bundles:
                self._tries[bundle["id"]] = task.tries
            self.waiting.setdefault(server.node, deque()).extendleft(reversed(task.bundles))
            task.bundles = []
        if task.tries >= self.max_attempts:
            who = f"at last by {server.name} on node {server.node}"
            text = f"a task was tried {task.tries} times (max_attempts), {who}, and ended each time: {because}"
            self._fail(blame(text, **details))

    def _task_failed(self, server: Server, error: MrcoreError) -> None:
        if isinstance(error, JobFault) or error.details.get("hold"):
            self._fail(error)
        else:  # that it could not reach its data is no fault of the job; that its process gave up is
            self._lose_task(server, error.message, _blame(error), **error.details)

    def _fail(self, fault: MrcoreError) -> None:
        self.fault = self.fault or fault

    # --- results ---

    def _count(self, counters: Mapping[str, int]) -> None:
        for key, value in counters.items():
            self.counters[key] = self.counters.get(key, 0) + value

    def _take(self, server: Server, task: Task, result: Json) -> None:
        self.peak_bytes = max(self.peak_bytes, result["peak_bytes"])
        self._count(result["counters"])
        for name, seconds in result["seconds"].items():
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        self.parts += [part | {"node": server.node} for part in result.get("parts", ())]
        if self.phase == "MAP":
            self.runs.setdefault(server.node, []).extend(result.get("runs", ()))
            return
        self.keys_kept = self.keys_kept and result["keys_kept"]
        for source, length in result["fetched"].items():
            pair = (source, server.node)
            self.shuffled[pair] = self.shuffled.get(pair, 0) + length

    def _end_map(self) -> None:
        """Every split is mapped and sealed: cut the key space into partitions and make the reduce tasks."""
        runs = [run for each in self.runs.values() for run in each]
        self._count({"spills": len(runs), "spilled_bytes": sum(run["bytes"] for run in runs)})
        self.phase = "SORT"
        if self.map_only:
            return
        selectors: list[Json] = []
        if self.by_range:
            samples = [(_key(key), weight) for run in runs for key, weight in run["samples"]]
            self.cuts = range_cuts(samples, self.partitions) if self.cuts is None else self.cuts
            borders: list[list[Key] | None] = [None, *([cut] for cut in self.cuts), None]
            if runs or self.earlier:
                selectors = [
                    {"partition": number, "low": low, "high": high}
                    for number, (low, high) in enumerate(itertools.pairwise(borders))
                ]
        else:
            weights = {number: sum(part["bytes"] for part in parts) for number, parts in self.earlier.items()}
            for run in runs:
                for partition, length in run["partitions"].items():
                    weights[int(partition)] = weights.get(int(partition), 0) + length
            order = sorted(weights, key=lambda partition: -weights[partition])
            selectors = [{"partition": partition, "low": None, "high": None} for partition in order]
        self.reduces = [Task(each["partition"], each) for each in selectors]

    def sources(self, partition: int) -> list[Json]:
        """Give, for a reduce order, the runs of each node that hold something of the partition."""
        found = []
        for node, runs in self.runs.items():
            mine = [run for run in runs if self.by_range or str(partition) in run["partitions"]]
            if mine:
                brief = [
                    {
                        "id": run["id"],
                        "max_decoded": run["max_decoded"],
                        "most_bytes": run["bytes"] if self.by_range else run["partitions"][str(partition)],
                    }
                    for run in mine
                ]
                found.append({"node": node, "runs": brief})
        return found

    def check(self) -> None:
        """Restate the invariants; tests call this after every event. Raises AssertionError."""
        held = [bundle["id"] for task in self.maps if task.state != "waiting" for bundle in task.bundles]
        held += [bundle["id"] for waiting in self.waiting.values() for bundle in waiting]
        assert len(held) == len(set(held)), f"a bundle is in two hands: {held}"
        for server in self.servers.values():
            assert server.task is None or (server.task.state == "running" and server.task.server == server.name)
            assert server.up or server.task is None, f"{server.name} is down and has a task"
        running = [task for task in self.maps + self.reduces if task.state == "running"]
        assert len(running) == sum(server.task is not None for server in self.servers.values())
        assert not (self.finished and (running or self.waiting)), "finished with work left"


def _blame(error: MrcoreError) -> type[MrcoreError]:
    """Whose fault it is when a task ends so for the last time: only what is the cluster's may hold the queue."""
    return ClusterFault if isinstance(error, ClusterFault) else JobFault


def _key(key: Any) -> Key:
    return as_tuple(key) if isinstance(key, list) else key


def range_cuts(samples: Sequence[tuple[Key, int]], partitions: int) -> list[Key]:
    """Choose at most `partitions` - 1 ascending keys that cut the samples `(first key, bytes)` into equal shares."""
    ordered = sorted(samples, key=lambda sample: order_key(sample[0]))
    total = sum(weight for _, weight in ordered)
    cuts: list[Key] = []
    before = 0
    for key, weight in ordered:
        # A frame belongs to the range in which its first key lies, so a cut is taken where a share is full.
        if (
            before * partitions >= total * (len(cuts) + 1)
            and len(cuts) < partitions - 1
            and (not cuts or cuts[-1] != key)
        ):
            cuts.append(key)
        before += weight
    return cuts


def default_partitions(input_bytes: int, servers: int) -> int:
    """Give the number of hash partitions or key ranges: two for each server, fewer for little data."""
    return max(1, min(2 * servers, -(-input_bytes // FIRST_PARTITION_BYTES)))
