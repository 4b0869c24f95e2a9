"""What one attempt of a mapreduce job does next: events in, instructions out, no I/O.

    MAP     every server maps bundles of splits of its own node until there are none; its spills are sealed
    REDUCE  every partition is fetched, merged (SORT) and reduced by whichever server is free

Identity: every order and event carries (job, run, phase, task, try); what does not fit the task that a server has in
hand is stale and ignored. A task that dies is tried again, its bundles and spills with it; the spills of a sealed map
task lie on its node's disk and outlive its server. A fault of the job or the loss of a node ends the attempt.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from mrcore.cluster.partitions import Partition, Partitioning
from mrcore.cluster.results import Results
from mrcore.errors import ClusterFault, JobFault, Malformed, MrcoreError
from mrcore.messages import tasks
from mrcore.messages.methods import decode_error
from mrcore.messages.tasks import Bundle, TaskEvent, TaskIdentity, check_result
from mrcore.state.board import WHY_CHARACTERS, Board
from mrcore.text import one_line

BUNDLES_AHEAD = 2  # one in work, one in hand: a server never waits for the next


# --- Instructions ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Start:
    """Order `server` to start a task: a map task with its first bundles, or the reduce task of a partition."""

    server: str
    identity: TaskIdentity
    bundles: Sequence[Bundle] = ()
    no_more: bool = False
    partition: Partition | None = None


@dataclass(frozen=True)
class Give:
    """Hand more bundles to a running map task, or the news that there are none."""

    server: str
    identity: TaskIdentity
    bundles: Sequence[Bundle]
    no_more: bool


@dataclass(frozen=True)
class EndServer:
    """Have the node's agent end a server that does not answer, so that nothing of it speaks or writes later."""

    server: str


Instruction = Start | Give | EndServer


# --- State -----------------------------------------------------------------------------------------------------------

# Every change of a task's state; any other raises with the task's story.
TRANSITIONS = {("waiting", "start"): "running", ("running", "done"): "done", ("running", "died"): "waiting"}


@dataclass
class Task:
    """A map task (made when a server is free and bundles wait) or the reduce task of a partition."""

    number: int
    partition: Partition | None = None
    bundles: list[Bundle] = field(default_factory=list)
    state: str = "waiting"
    tries: int = 0
    server: str | None = None
    story: list[str] = field(default_factory=list)

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
    After every event: `instructions()` returns what to do, `fault` is set when the attempt has failed, and `finished`
    when it has succeeded; `results` holds what it made, `board` how far it is.
    """

    def __init__(
        self,
        run: tasks.RunIdentity,
        servers: Mapping[str, str],
        bundles: Mapping[str, Sequence[Bundle]],
        partitioning: Partitioning,
        *,
        map_only: bool,
        max_attempts: int,
        node_timeout_seconds: float,
        now: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.run, self.partitioning, self.map_only = run, partitioning, map_only
        self.servers = {name: Server(name, node, down_since=now) for name, node in servers.items()}
        self.waiting = {node: deque(waiting) for node, waiting in bundles.items() if waiting}
        self.max_attempts, self.node_timeout_seconds = max_attempts, node_timeout_seconds
        self.phase = "MAP"
        self.fault: MrcoreError | None = None
        self.finished = False
        self.maps: list[Task] = []
        self.reduces: list[Task] = []
        self.results = Results()
        self.board = Board(run, servers, bundles, clock)
        self._out: list[Instruction] = []
        self._tries: dict[int, int] = {}  # bundle id → tasks that died with it

    # --- events ---

    def server_up(self, name: str) -> None:
        """A server answers for the first time, or as a new incarnation, which knows nothing of its task."""
        server = self.servers[name]
        self._lose_task(server, "the cluster server was started afresh")
        server.up = True
        self.board.up(name, True)

    def server_down(self, name: str, now: float) -> None:
        """A server has not answered for too long."""
        server = self.servers[name]
        if server.up:
            server.up, server.down_since = False, now
            self.board.up(name, False)
            self._lose_task(server, "the cluster server does not answer")
            self._out.append(EndServer(name))

    def node_lost(self, node: str, reason: str) -> None:
        """A node's agent has not answered for too long: its inputs and spills are out of reach."""
        self._fail(ClusterFault(f"node {node} was lost in phase {self.phase}: {reason}", node=node))

    def refused(self, name: str, identity: TaskIdentity, error: MrcoreError) -> None:
        """An order was answered with a no: the server's task goes back."""
        server = self.servers[name]
        if server.task is not None and self._identity(server.task) == identity:
            self._lose_task(server, f"the order was refused: {error.message}", _blame(error))

    def task_event(self, name: str, event: TaskEvent) -> None:
        """A server reports on its task. Stale ones (of another run, task or try) are ignored, and all after a fault."""
        server = self.servers[name]
        task = server.task
        if task is None or self.fault or event.identity != (identity := self._identity(task)):
            return
        match event:
            case tasks.Want():
                more = self._next_bundles(server.node, 1)
                task.bundles += more
                self.board.give(name, more)
                self._out.append(Give(name, identity, more, server.node not in self.waiting))
            case tasks.BundleDone(id=number):
                self.results.bundles_done += 1
                self.board.bundle_done(name, number)
            case tasks.PhaseBegun() if task.partition is not None:
                self.phase = "REDUCE"
                self.board.sorted(name)
            case tasks.Progressed():
                self.board.progressed(name, event)
            case tasks.Done(result=result):
                try:
                    check_result(result, identity, self.partitioning.count, server.node)
                except Malformed as error:
                    self._fail(error)
                    return
                server.task = None
                task.move("done")
                self.results.add(server.node, result)
                self.board.done(name, result)
            case tasks.Failed():
                why = decode_error(msgspec.to_builtins(event.error), server.node)
                if isinstance(why, JobFault) or why.details.get("hold"):
                    why.details |= _place(server, identity)
                    self._fail(why)
                    self.board.died(name, why.message)
                else:  # that it could not reach its data is no fault of the job; that its process gave up is
                    self._lose_task(server, why.message, _blame(why), **why.details)
            case tasks.Died():
                self._lose_task(server, event.message, JobFault, **event.details())

    def tick(self, now: float) -> None:
        """Look at the clock: work that only servers can do which have been away for too long ends the attempt."""
        for node in set(self.waiting) if self.phase == "MAP" else {None}:  # after MAP, any node's servers will do
            servers = [server for server in self.servers.values() if node in (None, server.node)]
            away = now - max((server.down_since for server in servers), default=0.0)
            if away > self.node_timeout_seconds and not any(server.up for server in servers):
                whose, details = (f" of node {node}", {"node": node}) if node else ("", {})
                self._fail(ClusterFault(f"no cluster server{whose} answers since {away:.0f} s", **details))

    # --- what to do ---

    def instructions(self) -> list[Instruction]:
        """Return what is to be done now, each thing once."""
        if not self.fault:
            self._advance()
        out, self._out = self._out, []
        return out

    def _advance(self) -> None:
        free = [server for server in self.servers.values() if server.up and server.task is None]
        if self.phase == "MAP":
            for server in free:
                if bundles := self._next_bundles(server.node, BUNDLES_AHEAD):
                    tries = max(self._tries.get(bundle.id, 0) for bundle in bundles)
                    self.maps.append(Task(len(self.maps), bundles=bundles, tries=tries))
                    self._start(server, self.maps[-1])
            if not self.waiting and all(task.state == "done" for task in self.maps if task.bundles):
                self._end_map()
                self._advance()
            return
        waiting = [task for task in self.reduces if task.state == "waiting"]
        for server in free[: len(waiting)]:  # the largest partitions come first, but for those whose output lies there
            near = (task for task in waiting if self.partitioning.lies_on(task.number, server.node))
            task = next(near, waiting[0])
            waiting.remove(task)
            self._start(server, task)
        self.finished = all(task.state == "done" for task in self.reduces)

    def _next_bundles(self, node: str, count: int) -> list[Bundle]:
        waiting = self.waiting.get(node, deque())
        bundles = [waiting.popleft() for _ in range(min(count, len(waiting)))]
        if not waiting:
            self.waiting.pop(node, None)
        return bundles

    def _start(self, server: Server, task: Task) -> None:
        server.task, task.server = task, server.name
        task.tries += 1
        task.move("start")
        no_more = server.node not in self.waiting
        identity = self._identity(task)
        self._out.append(Start(server.name, identity, list(task.bundles), no_more, task.partition))
        self.board.start(server.name, identity, task.bundles, task.partition and task.partition.number)

    def _end_map(self) -> None:
        """Every split is mapped and sealed: cut the key space into partitions and make the reduce tasks."""
        spills = self.results.all_spills()
        self.results.counters.update(spills=len(spills), spilled_bytes=sum(spill.bytes for spill in spills))
        self.phase = "SORT"
        if not self.map_only:
            self.reduces = [Task(partition.number, partition) for partition in self.partitioning.plan(spills)]
        sizes = self.partitioning.sizes(spills)
        self.board.end_map({task.number: sizes[task.number] for task in self.reduces})

    def _identity(self, task: Task) -> TaskIdentity:
        run, phase = self.run, tasks.MAP if task.partition is None else tasks.REDUCE
        return TaskIdentity(job=run.job, run=run.run, phase=phase, task=task.number, try_=task.tries)

    # --- losses ---

    def _lose_task(
        self, server: Server, because: str, blame: type[MrcoreError] = ClusterFault, **details: object
    ) -> None:
        """A server's task is gone: its bundles wait again, or its partition does. `blame`: whose fault the last is."""
        task, server.task = server.task, None
        if task is None or self.fault:
            return
        kind = "map" if self.phase == "MAP" else "reduce"
        place = _place(server, self._identity(task))
        self.results.deaths.append(f"{server.name}: {kind} task {task.number}: {one_line(because, WHY_CHARACTERS)}")
        task.move("died", because)
        self.board.died(server.name, because)
        if task.bundles:
            self._tries.update((bundle.id, task.tries) for bundle in task.bundles)
            self.waiting.setdefault(server.node, deque()).extendleft(reversed(task.bundles))
            task.bundles = []
        if task.tries >= self.max_attempts:
            who = f"at last by {server.name} on node {server.node}"
            text = f"a task was tried {task.tries} times (max_attempts), {who}, and ended each time: {because}"
            self._fail(blame(text, **{"code": "task_died"} | place | details))

    def _fail(self, fault: MrcoreError) -> None:
        self.fault = self.fault or fault

    def check(self) -> None:
        """Restate the invariants; tests call this after every event. Raises AssertionError."""
        held = [bundle.id for task in self.maps if task.state != "waiting" for bundle in task.bundles]
        held += [bundle.id for waiting in self.waiting.values() for bundle in waiting]
        assert len(held) == len(set(held)), f"a bundle is in two hands: {held}"
        for server in self.servers.values():
            assert server.task is None or (server.task.state == "running" and server.task.server == server.name)
            assert server.up or server.task is None, f"{server.name} is down and has a task"
        running = [task for task in self.maps + self.reduces if task.state == "running"]
        assert len(running) == sum(server.task is not None for server in self.servers.values())
        assert not (self.finished and (running or self.waiting)), "finished with work left"


def _place(server: Server, identity: TaskIdentity) -> dict[str, str]:
    """Return where a task ran, and its name as in the server's log."""
    task = f"{identity.phase.lower()}-{identity.task}-{identity.try_}"
    return {"server": server.name, "node": server.node, "task": task}


def _blame(error: MrcoreError) -> type[MrcoreError]:
    """Return whose fault it is when a task ends so for the last time: only what is the cluster's may hold the queue."""
    return ClusterFault if isinstance(error, ClusterFault) else JobFault
