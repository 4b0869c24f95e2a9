"""The coordinator without a cluster: every loss at every moment, and nothing lost or done twice."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from mrcore.cluster.attempt import Attempt, EndServer, Give, Start
from mrcore.cluster.partitions import Partitioning, default_partitions, range_cuts
from mrcore.engine.output import part_name
from mrcore.engine.records import order_key
from mrcore.errors import ClusterFault, InternalError, JobFault, MrcoreError, TaskDied, Unreachable, UsageError
from mrcore.messages import tasks
from mrcore.messages.kinds import convert
from mrcore.messages.tasks import Bundle, Part, PlacedPart, RunIdentity, Spill, TaskIdentity, TaskResult

RUN = RunIdentity(job="wc", run=3)


RESULT = TaskResult(peak_bytes=1, counters={}, seconds={})
PART: dict[str, Any] = dict.fromkeys(("records", "bytes", "text_bytes", "batch_bytes", "max_decoded"), 1)
PART |= {"crc32": 0, "partition": 0}


def name(task: dict[str, Any]) -> str:
    return part_name(3, task["partition"], 0, False)


def plain(error: MrcoreError) -> tasks.PlainError:
    return convert(tasks.PlainError, error.to_dict())


def make(
    shape: dict[str, int],
    bundles: dict[str, int],
    *,
    partitions: int = 3,
    max_attempts: int = 3,
    map_only: bool = False,
    by_range: bool = False,
    **more: Any,
) -> Attempt:
    servers, number = {}, 0
    for node, count in shape.items():
        for _ in range(count):
            servers[f"S_{number}"] = node
            number += 1
    numbers = iter(range(10_000))
    dealt = {node: [Bundle(next(numbers), []) for _ in range(count)] for node, count in bundles.items()}
    return Attempt(
        RUN,
        servers,
        dealt,
        Partitioning(partitions, by_range, **more),
        map_only=map_only,
        max_attempts=max_attempts,
        node_timeout_seconds=10,
        now=0.0,
    )


class Cluster:
    """Servers that obey instructions; a map task's one run says which bundles it mapped."""

    def __init__(self, attempt: Attempt, rng: random.Random) -> None:
        self.attempt, self.rng = attempt, rng
        self.tasks: dict[str, dict[str, Any]] = {}  # by server
        self.stale: list[tuple[str, tasks.Done]] = []
        self.reduced: list[int] = []
        self.mapped: dict[str, list[int]] = {}  # by run: the bundles that it is of
        self.now = 0.0

    def obey(self) -> None:
        for instruction in self.attempt.instructions():
            if isinstance(instruction, Start):
                assert instruction.server not in self.tasks, "a second task for a busy server"
                partition = instruction.partition
                self.tasks[instruction.server] = {
                    "identity": instruction.identity,
                    "todo": list(instruction.bundles),
                    "mapped": [],
                    "no_more": instruction.no_more,
                    "asked": False,
                    "partition": partition and partition.number,
                }
            elif isinstance(instruction, Give):
                task = self.tasks.get(instruction.server)
                if task and task["identity"] == instruction.identity:
                    task["todo"] += instruction.bundles
                    task["no_more"] = task["no_more"] or instruction.no_more
                    task["asked"] = False
            elif isinstance(instruction, EndServer):
                self.tasks.pop(instruction.server, None)
        self.attempt.check()

    def report(self, server: str, kind: type[Any], **event: Any) -> None:
        self.attempt.task_event(server, kind(identity=self.tasks[server]["identity"], **event))

    def work(self, server: str) -> None:
        """One step of the task that a server has."""
        task = self.tasks[server]
        identity: TaskIdentity = task["identity"]
        self.stale.append((server, tasks.Done(identity=identity, result=RESULT)))
        if identity.phase == "MAP":
            if not task["no_more"] and not task["asked"] and len(task["todo"]) < 2:
                task["asked"] = True
                self.report(server, tasks.Want)
            elif task["todo"]:
                bundle = task["todo"].pop(0)
                task["mapped"].append(bundle.id)
                self.report(server, tasks.BundleDone, id=bundle.id)
            elif task["no_more"]:
                spill = Spill(
                    id=f"map-{identity.task}-{identity.try_}-0", bytes=30, groups=1, values=1, max_decoded=1,
                    partitions={"0": 10, "1": 10, "2": 10}, samples=[],
                )  # fmt: skip
                self.mapped[spill.id] = task["mapped"]
                self._done(server, runs=[spill], counters={"lines": len(task["mapped"])})
        else:
            self.report(server, tasks.PhaseBegun, phase="REDUCE")
            self.reduced.append(task["partition"])
            self._done(server, parts=[convert(Part, PART | {"partition": task["partition"], "name": name(task)})])

    def _done(self, server: str, **result: Any) -> None:
        done = tasks.Done(identity=self.tasks.pop(server)["identity"], result=replace(RESULT, **result))
        self.attempt.task_event(server, done)

    def lose(self, server: str) -> None:
        """Some loss of a server or its task."""
        how = self.rng.choice(["died", "up", "down", "refused", "failed"])
        task = self.tasks.get(server)
        if how in ("died", "refused", "failed") and task is None:
            return
        if how == "died":
            self.report(server, tasks.Died, message="killed")
        elif how == "failed":
            self.report(server, tasks.Failed, error=plain(Unreachable("no answer")))
        elif how == "refused":
            assert task is not None
            self.attempt.refused(server, task["identity"], ClusterFault("busy"))
        elif how == "up":
            self.attempt.server_up(server)
        else:
            self.attempt.server_down(server, self.now)
        self.tasks.pop(server, None)


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    nodes=st.lists(st.tuples(st.integers(1, 3), st.integers(0, 12)), min_size=1, max_size=3),
    losses=st.floats(0, 0.3),
)
def test_any_losses_leave_every_bundle_mapped_once_and_every_partition_reduced_once(
    seed: int, nodes: list[tuple[int, int]], losses: float
) -> None:
    rng = random.Random(seed)
    shape = {f"n{i}": servers for i, (servers, _) in enumerate(nodes)}
    attempt = make(shape, {f"n{i}": count for i, (_, count) in enumerate(nodes)}, max_attempts=1000)
    everything = {bundle.id for waiting in attempt.waiting.values() for bundle in waiting}
    cluster = Cluster(attempt, rng)
    for server in attempt.servers:
        attempt.server_up(server)
    lost = 0  # bounded: at a high rate a task with many bundles could use up all its tries
    for _ in range(5000):
        cluster.obey()
        if attempt.finished or attempt.fault:
            break
        if lost < 200 and rng.random() < losses:
            lost += 1
            cluster.lose(rng.choice(list(attempt.servers)))
            cluster.obey()
        if cluster.stale and rng.random() < 0.2:
            server, event = rng.choice(cluster.stale[:-1] or cluster.stale)
            held = cluster.tasks.get(server)
            if held is None or held["identity"] != event.identity:
                attempt.task_event(server, event)  # a dead task still speaks: ignored
        down = [name for name, server in attempt.servers.items() if not server.up]
        if down and rng.random() < 0.5:
            attempt.server_up(rng.choice(down))
        busy = list(cluster.tasks)
        if busy:
            cluster.work(rng.choice(busy))
    assert attempt.finished and attempt.fault is None, (attempt.fault, attempt.phase)
    mapped = [bundle for spill in attempt.results.all_spills() for bundle in cluster.mapped[spill.id]]
    assert sorted(mapped) == sorted(everything)
    assert attempt.results.counters["lines"] == len(everything)
    assert sorted(part.partition for part in attempt.results.parts) == ([0, 1, 2] if everything else [])


def test_bundles_go_only_to_servers_of_their_node() -> None:
    attempt = make({"a": 1, "b": 1}, {"a": 3})
    for server in attempt.servers:
        attempt.server_up(server)
    assert [i.server for i in attempt.instructions() if isinstance(i, Start)] == ["S_0"]


def test_a_server_that_comes_late_takes_part() -> None:
    attempt = make({"a": 2}, {"a": 6})
    attempt.server_up("S_0")
    assert [type(i) for i in attempt.instructions()] == [Start]
    attempt.server_up("S_1")
    (start,) = attempt.instructions()
    assert isinstance(start, Start) and start.server == "S_1" and len(start.bundles) == 2


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (InternalError("a bug", internal_traceback="File x"), JobFault),
        (UsageError("too large"), JobFault),
        (MrcoreError("odd"), JobFault),
        (TaskDied("killed"), JobFault),
        (Unreachable("node-1 is silent"), ClusterFault),
        (ClusterFault("disk"), ClusterFault),
    ],
)
@pytest.mark.parametrize("refused", [False, True])
def test_only_what_is_the_clusters_ends_an_attempt_as_the_clusters_fault(
    error: MrcoreError, kind: type[MrcoreError], refused: bool
) -> None:
    attempt = make({"n0": 1}, {"n0": 1}, max_attempts=3)
    attempt.server_up("S_0")
    for _ in range(3):
        (start,) = attempt.instructions()
        assert isinstance(start, Start) and attempt.fault is None
        if refused:
            attempt.refused("S_0", start.identity, error)
        else:
            attempt.task_event("S_0", tasks.Failed(identity=start.identity, error=plain(error)))
        attempt.check()
    assert type(attempt.fault) is kind and error.message in str(attempt.fault)
    assert attempt.fault is not None
    assert attempt.fault.details == where(start.identity) | ({} if refused else error.details)


def where(identity: TaskIdentity) -> dict[str, Any]:
    """What the error of a task that died for the last time says of it."""
    task = f"{identity.phase.lower()}-{identity.task}-{identity.try_}"
    return {"code": "task_died", "server": "S_0", "node": "n0", "task": task}


def test_a_task_that_always_dies_fails_the_job_after_max_attempts() -> None:
    attempt = make({"a": 1}, {"a": 1}, max_attempts=3)
    attempt.server_up("S_0")
    tries = []
    while not attempt.fault:
        (start,) = attempt.instructions()
        assert isinstance(start, Start)
        tries.append(start.identity.try_)
        attempt.task_event("S_0", tasks.Died(identity=start.identity, message="was killed by SIGSEGV"))
    assert tries == [1, 2, 3]
    assert isinstance(attempt.fault, JobFault) and "SIGSEGV" in attempt.fault.message
    assert attempt.instructions() == []


@pytest.mark.parametrize(
    ("error", "blamed"), [(Unreachable("no route"), ClusterFault), (TaskDied("damaged frame"), JobFault)]
)
def test_who_is_blamed_for_a_task_that_gives_up(error: MrcoreError, blamed: type[Exception]) -> None:
    attempt = make({"a": 1}, {"a": 1})
    attempt.server_up("S_0")
    while not attempt.fault:
        (start,) = attempt.instructions()
        assert isinstance(start, Start)
        event = tasks.Failed(identity=start.identity, error=plain(error))
        attempt.task_event("S_0", event)
    assert isinstance(attempt.fault, blamed)


def test_the_jobs_own_fault_and_a_full_disk_end_the_attempt_at_once() -> None:
    for error in (JobFault("bad line"), ClusterFault("disk full", hold=True)):
        attempt = make({"a": 1}, {"a": 1})
        attempt.server_up("S_0")
        (start,) = attempt.instructions()
        assert isinstance(start, Start)
        attempt.task_event("S_0", tasks.Failed(identity=start.identity, error=plain(error)))
        assert attempt.fault is not None and attempt.fault.message == error.message


def test_a_lost_node_and_servers_that_stay_away_hand_the_run_back() -> None:
    attempt = make({"a": 1, "b": 1}, {"a": 1})
    attempt.node_lost("b", "no answer")
    assert isinstance(attempt.fault, ClusterFault)
    attempt = make({"a": 1, "b": 1}, {"a": 1})
    attempt.server_up("S_1")
    attempt.tick(9.0)
    assert attempt.fault is None
    attempt.tick(10.5)
    assert isinstance(attempt.fault, ClusterFault) and "node a" in attempt.fault.message


def test_an_impossible_change_raises_with_the_story() -> None:
    attempt = make({"a": 1}, {"a": 1})
    attempt.server_up("S_0")
    attempt.instructions()
    with pytest.raises(AssertionError, match="no transition 'start' from 'running'"):
        attempt.maps[0].move("start")


def test_no_input_finishes_without_a_task() -> None:
    attempt = make({"a": 1}, {})
    attempt.server_up("S_0")
    assert attempt.instructions() == [] and attempt.finished and attempt.results.parts == []


KEYS = st.one_of(st.none(), st.integers(-50, 50), st.text(max_size=3), st.tuples(st.integers(0, 3)))


@given(st.lists(st.tuples(KEYS, st.integers(1, 100)), max_size=80), st.integers(1, 8))
def test_range_cuts_ascend_and_balance(samples: list[tuple[Any, int]], partitions: int) -> None:
    cuts = range_cuts(samples, partitions)
    keys = [order_key(cut) for cut in cuts]
    assert keys == sorted(set(keys)) and len(cuts) < max(2, partitions)
    heaviest: dict[Any, int] = {}
    for key, weight in samples:
        heaviest[order_key(key)] = heaviest.get(order_key(key), 0) + weight
    shares = [0] * (len(cuts) + 1)
    for key, weight in samples:
        shares[sum(order_key(key) >= cut for cut in keys)] += weight
    total = sum(weight for _, weight in samples)
    if samples:  # no share is more than its part and the heaviest single key
        assert max(shares) <= total / partitions + 2 * max(heaviest.values())


def test_default_partitions_follow_data_and_servers() -> None:
    assert default_partitions(0, 4) == 1
    assert default_partitions(5 << 20, 4) == 2
    assert default_partitions(1 << 40, 4) == 8


@pytest.mark.parametrize("cuts", [None, [["b", 1], "m"], []])
def test_earlier_output_is_reduced_where_it_lies_also_without_anything_new(cuts: list[Any] | None) -> None:
    places = {0: "n0", 2: "n1"} if cuts is None else {0: "n1"}
    earlier = {
        number: [convert(PlacedPart, PART | {"name": "part-1-0-0.data", "node": node, "bytes": 10 - number})]
        for number, node in places.items()
    }
    attempt = make({"n0": 1, "n1": 1}, {}, by_range=cuts is not None, earlier=earlier, cuts=cuts)
    for server in attempt.servers:
        attempt.server_up(server)
    started = attempt.instructions()
    assert all(isinstance(each, Start) for each in started)
    assert {task.number for task in attempt.reduces} == (set(places) if cuts is None else set(range(len(cuts) + 1)))
    on = {start.partition.number: attempt.servers[start.server].node for start in started if start.partition}  # type: ignore[union-attr]
    if cuts is None:
        assert on == places
    elif not cuts:
        assert len(started) == 1
    else:
        partitions = [task.partition for task in attempt.reduces]
        assert attempt.partitioning.cuts == cuts
        assert [each.low for each in partitions if each] == [None, '["b", 1]', '"m"']
    attempt.check()
