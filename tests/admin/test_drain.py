"""Draining a node: nothing is lost or read twice, whatever dies; on real clusters, and the plan over random rooms."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from clusters import TestCluster
from conditions import wait_until
from hypothesis import given
from hypothesis import strategies as st
from signals import kill

from mrcore.admin import drain, drain_plan
from mrcore.admin.drain_plan import Room, plan, renamed
from mrcore.admin.drain_steps import Steps
from mrcore.cli.main import main
from mrcore.cluster.manage_cluster import ManageCluster
from mrcore.errors import ClusterFault, UsageError
from mrcore.launchers import local
from mrcore.messages.nodes import HeldFile
from mrcore.queue.scheduler import Runner, Scheduler
from mrcore.settings.config import Settings
from mrcore.state import manifest
from mrcore.state.store import Store
from mrcore.system import failpoints, procfs
from mrcore.transfer.batches import MIN_FREE_DISK_BYTES, cut

MERGE = {"hold_state": True, "merge_output": True}
ACCUMULATE = {"hold_state": True, "delete_job_data": False}
_numbers = iter(range(1, 10**6))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestCluster]:
    with TestCluster(tmp_path_factory.mktemp("drains"), 3, 1) as running:
        yield running


def empty(settings: Settings) -> None:
    for node in settings.nodes:
        for folder in (node.layout.base_dir, node.layout.auxiliary_dir, node.layout.incoming_dir):
            for path in sorted(folder.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


@pytest.fixture(params=["local", "deployed"])
def settings(cluster: TestCluster, request: pytest.FixtureRequest) -> Iterator[Settings]:
    """The cluster as it is, and as if its nodes were machines of their own, whose names the ledger then has."""
    made = cluster.settings.model_copy(update={"local": request.param == "local"})
    cluster.settings, cluster.manager = made, ManageCluster(made)
    empty(made)
    yield made
    scheduler = Scheduler(made)
    scheduler.store.check()
    assert scheduler.state()["drain"] is None
    scheduler.store.close()
    for node in made.nodes:
        assert not [path for path in node.layout.incoming_dir.rglob("*") if path.is_file()]


def files_of(settings: Settings, node: str) -> dict[str, bytes]:
    (root,) = [each.layout.base_dir for each in settings.nodes if each.name == node]
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def every_file(settings: Settings) -> Counter[tuple[str, bytes]]:
    return Counter(each for node in settings.nodes for each in files_of(settings, node.name).items())


class Words:
    """One counting job over files of its own, and the words that it should have counted."""

    def __init__(self, cluster: TestCluster, **keys: Any) -> None:
        self.cluster, self.name = cluster, f"job{next(_numbers)}"
        self.keys = {"job_name": self.name, "input_dirs": [f"inputs/{self.name}"], "number_of_partitions": 12} | keys
        self.settings = cluster.settings

    def write(self, node: int | None = None, /, **texts: str) -> None:
        self.cluster.write_inputs(texts, node, f"inputs/{self.name}")

    def paths(self) -> list[Path]:
        return [
            path
            for node in self.settings.nodes
            for path in sorted((node.layout.base_dir / "inputs" / self.name).glob("*"))
        ]

    def run(self) -> dict[str, Any]:
        return self.cluster.run(self.cluster.job(**self.keys), run=next(_numbers))

    def holder(self) -> str:
        """A node that has part of the output."""
        return str(next(iter(manifest.parts(self.settings.state_dir, self.name))).node)

    def bytes(self) -> bytes:
        path = self.cluster.folder / "output"
        with path.open("wb") as out:
            self.cluster.manager.cat(self.name, out)
        return path.read_bytes()

    def counted(self) -> dict[str, int]:
        total: Counter[str] = Counter()
        for line in self.bytes().decode().splitlines():
            key, value = json.loads(line)
            total[key] += value
        return total

    def words(self) -> dict[str, int]:
        return Counter(word for path in self.paths() for word in path.read_text().split())


def texts(count: int, salt: str = "") -> dict[str, str]:
    return {f"f{n}": f"some words{salt} of file {n} and w{n % 7}é\n" * (n + 1) for n in range(count)}


def test_all_that_a_node_holds_goes_to_the_others_and_nothing_else_changes(
    cluster: TestCluster, settings: Settings
) -> None:
    job = Words(cluster)
    job.write(**texts(12))
    job.run()
    before, output = every_file(settings), job.bytes()
    node = job.holder()
    held = drain.look(settings, node)
    assert not held["empty"] and held["jobs"] == [{"job_name": job.name} | held["kinds"]["output"]]
    inputs = [content for name, content in files_of(settings, node).items() if name.startswith("inputs")]
    assert held["kinds"]["input"] == {"files": 4, "bytes": sum(map(len, inputs))}
    told = drain.drain(settings, node)
    assert told["empty"] and not told["left"] and not told["renamed"]
    assert sum(each["files"] for each in told["moved"].values()) == sum(
        kind["files"] for kind in held["kinds"].values()
    )
    assert not files_of(settings, node) and every_file(settings) == before
    assert job.bytes() == output
    assert drain.look(settings, node)["empty"]
    assert drain.drain(settings, node)["moved"] == {}
    job.run()
    assert job.counted() == job.words()


VARIANTS: dict[str, dict[str, Any]] = {
    "merge": MERGE,
    "many parts": MERGE | {"max_number_dumped_items_reducer": 3, "number_of_partitions": 2, "compress": True},
    "accumulate": ACCUMULATE,
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_increments_go_on_after_a_drain(cluster: TestCluster, settings: Settings, variant: str) -> None:
    job = Words(cluster, **VARIANTS[variant])
    job.write(**texts(9))
    job.run()
    output = job.bytes()
    first = job.holder()
    drain.drain(settings, first)
    assert job.bytes() == output
    assert job.run()["counts"] == {"input_files": 0, "input_bytes": 0, "bytes": 0, "files_read_before": 9}
    for path in job.paths()[::2]:
        with path.open("a") as stream:
            stream.write("they grew\n")
    others = [number for number, node in enumerate(settings.nodes) if node.name != first]
    job.write(others[0], new="one more file")
    for path in job.paths():
        if path.name == "new":
            os.utime(path, (1, 1))  # nobody writes to it any more
    counts = job.run()["counts"]
    assert (counts["input_files"], counts["input_bytes"]) == (6, 5 * len("they grew\n") + len("one more file"))
    assert counts["files_read_before"] == 4
    assert job.counted() == job.words()
    drain.drain(settings, first)  # the run has put parts there again
    two = tuple(settings.nodes[number] for number in others)
    job.cluster.manager = ManageCluster(settings.model_copy(update={"nodes": two}))  # the operator has removed the node
    job.run()
    drain.drain(job.cluster.manager.settings, two[1].name)
    assert [bool(files_of(settings, node.name)) for node in settings.nodes].count(True) == 1
    assert job.run()["counts"]["input_files"] == 0
    assert job.counted() == job.words()


# --- The plan --------------------------------------------------------------------------------------------------------

NAMES = st.sampled_from([f"{folder}{name}" for folder in ("", "in/") for name in ("a", "a.n1", "b.log", "b.n1.log")])
SIZES = st.integers(0, 100) | st.just(1 << 30)
FILES = st.dictionaries(NAMES, SIZES).map(
    lambda found: [HeldFile(name, size, 1, 0o644, 1) for name, size in found.items()]
)
ROOMS = st.dictionaries(
    st.sampled_from(["n2", "n3", "n4"]),
    st.builds(
        Room, st.integers(0, 300), st.integers(0, 300).map(lambda free: free + MIN_FREE_DISK_BYTES), st.sets(NAMES)
    ),
)


@given(FILES, ROOMS, st.sets(NAMES))
def test_a_plan_moves_each_file_once_overwrites_nothing_and_fills_no_disk(
    files: list[HeldFile], rooms: dict[str, Room], parts: set[str]
) -> None:
    before = {name: Room(room.held, room.free, set(room.taken)) for name, room in rooms.items()}
    moves, left = plan(files, rooms, parts, "n1")
    assert sorted([move.name for move in moves] + list(left)) == sorted(file.name for file in files)
    placed = [(move.target, move.new_name) for move in moves]
    assert len(set(placed)) == len(placed)
    for move in moves:
        assert move.new_name not in before[move.target].taken
        assert move.new_name == move.name or (move.new_name == renamed(move.name, "n1") and move.name not in parts)
    for name, room in before.items():
        given_bytes = sum(move.size for move in moves if move.target == name)
        assert not given_bytes or given_bytes <= room.free - MIN_FREE_DISK_BYTES
    for name, size in ((file.name, file.size) for file in files):
        if name in left:  # nobody could have taken it at the end either, had it been the last
            fitting = [room for room in rooms.values() if room.free - size >= MIN_FREE_DISK_BYTES]
            assert all(name in room.taken for room in fitting)


@given(st.lists(st.integers(0, 1000), min_size=1), st.integers(1, 5))
def test_a_plan_balances_bytes(sizes: list[int], nodes: int) -> None:
    rooms = {f"n{number}": Room(0, 1 << 40) for number in range(nodes)}
    plan([HeldFile(f"f{number}", size, 1, 0o644, 1) for number, size in enumerate(sizes)], rooms, (), "old")
    held = [room.held for room in rooms.values()]
    assert sum(held) == sum(sizes) and max(held) - min(held) <= max(sizes)


@given(FILES, st.integers(1, 5), st.integers(0, 200), st.integers(1, 200))
def test_steps_are_bounded(files: list[HeldFile], max_files: int, max_bytes: int, alone: int) -> None:
    moves = plan(files, {"n2": Room(0, 1 << 40)}, (), "n1")[0]
    pieces = [*cut(moves, lambda move: move.size, max_files, max_bytes, alone)]
    assert [move for piece in pieces for move in piece] == moves
    for piece in pieces:
        assert len(piece) <= max_files and (len(piece) == 1 or sum(move.size for move in piece) <= max_bytes)
        assert len(piece) == 1 or max(move.size for move in piece) < alone


def test_a_new_name_keeps_the_endings_that_patterns_look_for() -> None:
    names = {
        "a/day.log.gz": "a/day.w4.log.gz",
        "day": "day.w4",
        ".rc": ".rc.w4",
        "x.zst": "x.w4.zst",
        "a.b/c": "a.b/c.w4",
    }
    assert {name: renamed(name, "w4") for name in names} == names


# --- The command -----------------------------------------------------------------------------------------------------


def command(cluster: TestCluster, capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Run `mrcore drain`; gives exit status and what it printed."""
    config = cluster.folder / "config.json"
    keys = ("home", "projects_dir", "state_dir", "logs_dir")
    config.write_text(json.dumps({key: str(getattr(cluster.settings, key)) for key in keys}))
    with pytest.raises(SystemExit) as ended:
        main(["--config", str(config), "drain", *([] if "--list" in arguments else ["--yes"]), *arguments])
    out, err = capfd.readouterr()
    return int(ended.value.code or 0), out, err


@pytest.mark.parametrize("settings", ["local"], indirect=True)
def test_the_command_lists_and_moves_and_tells_by_its_exit_status(
    cluster: TestCluster, settings: Settings, capfd: pytest.CaptureFixture[str]
) -> None:
    job = Words(cluster)
    job.write(**texts(6))
    job.run()
    node = job.holder()
    status, out, _ = command(cluster, capfd, node, "--list")
    assert status == 1 and f"output of {job.name}" in out and f"{node} holds input: 2 files" in out
    status, out, _ = command(cluster, capfd, node, "--list", "--json")
    assert status == 1 and json.loads(out) == drain.look(settings, node)
    status, out, _ = command(cluster, capfd, node)
    assert status == 0 and f"{node} holds nothing" in out and out.count("to node-") == 2
    assert command(cluster, capfd, node, "--list")[0] == 0
    assert json.loads(command(cluster, capfd, node, "--json")[1])["moved"] == {}
    status, _, err = command(cluster, capfd, "node-9")
    assert (status, err.count("\n")) == (2, 1) and "there is no node 'node-9'" in err


def test_the_only_node_is_not_drained(cluster: TestCluster, settings: Settings) -> None:
    one = settings.model_copy(update={"nodes": settings.nodes[:1]})
    cluster.write_inputs({"f": "x"}, node=0)
    with pytest.raises(UsageError, match="node-0 is the only node"):
        drain.drain(one, "node-0")
    assert drain.look(one, "node-0")["kinds"]["input"]["files"] == 1


# --- Beside a Runner -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", ["local"], indirect=True)
def test_a_drain_waits_for_the_run_under_way_and_no_other_starts_beside_it(
    cluster: TestCluster, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (Words(cluster, project_name="gated", run_once=True) for _ in range(2))
    first.write(gated="GATE\n", **texts(5))
    second.write(**texts(5))
    cluster.close_gate("map")
    scheduler, runner = Scheduler(settings), Runner(settings)
    thread = threading.Thread(target=runner.run)
    thread.start()
    try:
        scheduler.submit_jobs([cluster.job(**job.keys) for job in (first, second)])
        cluster.waiting("map")
        with pytest.raises(ClusterFault, match=f"run 1 of {first.name} is still under way"):
            drain.drain(settings, "node-0", wait_seconds=0)
        assert scheduler.state()["drain"] is None
        phases: list[str] = []
        states: list[Any] = []

        def progress(phase: str, **facts: int) -> None:
            phases.append(phase)
            states.append((scheduler.state()["drain"] is not None, bool(scheduler.state()["running"])))
            if phase.startswith("waiting"):
                cluster.open_gate("map")

        told = drain.drain(settings, "node-0", progress)
        assert told["empty"] and phases[0] == f"waiting for run 1 of {first.name}" and "TRANSFER" in phases
        assert all(held for held, _ in states)
        assert not any(runs for (_, runs), phase in zip(states, phases, strict=True) if phase == "TRANSFER")
        assert [row["job_name"] for row in scheduler.queue()] == [second.name] or not scheduler.queue()
        wait_until(lambda: not scheduler.queue(), 30, "the second job, which nobody rang for")
    finally:
        cluster.open_gate("map")
        runner.stop()
        thread.join(20)
        for path in cluster.gates.glob("*map*"):
            path.unlink()
    assert {row["state"] for row in scheduler.history()} == {"succeeded"}
    for job in (first, second):
        assert job.counted() == job.words()
    scheduler.store.close()


@pytest.mark.parametrize("settings", ["local"], indirect=True)
def test_a_paused_queue_stays_paused_and_two_drains_do_not_meet(cluster: TestCluster, settings: Settings) -> None:
    cluster.write_inputs({"a": "x"}, node=0)
    scheduler = Scheduler(settings)
    scheduler.pause()
    refused: list[str] = []

    def progress(phase: str, **facts: int) -> None:
        with pytest.raises(UsageError, match=f"process {os.getpid()} is draining node node-0") as error:
            drain.drain(settings, "node-1")
        refused.append(error.value.message)

    assert drain.drain(settings, "node-0", progress)["empty"] and refused
    assert scheduler.state()["paused"]
    scheduler.resume()
    scheduler.store.close()


# --- Names, links, room ----------------------------------------------------------------------------------------------


def test_a_name_that_others_have_is_kept_where_it_is_free_and_changed_where_it_is_not(
    cluster: TestCluster, settings: Settings
) -> None:
    job = Words(cluster, **MERGE)
    for node, text in enumerate(("of the first\n", "of the second\n", "of the third\n")):
        job.write(node, **{"day.log": text})
    job.write(0, two="only on\n")
    job.write(1, two="two nodes\n")
    job.run()
    told = drain.drain(settings, "node-0")
    folder = f"inputs/{job.name}"
    assert told["empty"] and [each[::2] for each in told["renamed"]] == [
        [f"{folder}/day.log", f"{folder}/day.node-0.log"]
    ]
    assert files_of(settings, "node-2")[f"{folder}/two"] == b"only on\n"
    assert job.run()["counts"]["input_files"] == 0
    told = drain.drain(settings.model_copy(update={"nodes": settings.nodes[1:]}), "node-1")
    assert told["empty"] and [f"{folder}/two", "node-2", f"{folder}/two.node-1"] in told["renamed"]
    assert sorted(files_of(settings, "node-2").values())[-5:].count(b"two nodes\n") == 1
    assert job.run()["counts"]["input_files"] == 0
    assert (
        job.counted()
        == job.words()
        == Counter(["of", "the", "first", "of", "the", "second", "of", "the", "third", "only", "on", "two", "nodes"])
    )


def test_what_was_read_of_another_file_of_the_name_is_forgotten(cluster: TestCluster, settings: Settings) -> None:
    job = Words(cluster, **ACCUMULATE)
    job.write(1, gone="the old one\n")
    job.run()
    job.paths()[0].unlink()
    job.write(0, gone="new\n")
    drain.drain(settings.model_copy(update={"nodes": settings.nodes[:2]}), "node-0")
    assert files_of(settings, "node-1")[f"inputs/{job.name}/gone"] == b"new\n"
    assert job.run()["counts"]["input_files"] == 1
    assert job.counted() == {"the": 1, "old": 1, "one": 1, "new": 1}


def test_what_cannot_be_moved_is_told_and_left(
    cluster: TestCluster, settings: Settings, capfd: pytest.CaptureFixture[str]
) -> None:
    cluster.write_inputs({"locked": "x", "free": "y"}, node=0)
    base = settings.nodes[0].layout.base_dir
    (base / "inputs/link").symlink_to("text")
    (base / "inputs/text/b\udcff").write_text("no UTF-8")
    with (base / "inputs/text/locked").open() as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        told = drain.drain(settings, "node-0")
    assert not told["empty"] and told["moved"].popitem()[1]["files"] == 1
    assert told["left"] == ["inputs/text/locked: it is locked, or was written to meanwhile"]
    assert len(told["cannot_move"]) == 2 and "symbolic link" in str(told["cannot_move"])
    assert told["kinds"]["input"]["files"] == 1
    assert list(files_of(settings, "node-0"))  # the locked one
    assert every_file(settings)["inputs/text/locked", b"x"] == 1
    (base / "inputs/link").unlink()
    (base / "inputs/text/b\udcff").unlink()
    assert drain.drain(settings, "node-0")["empty"]


def test_without_room_nothing_is_moved(
    cluster: TestCluster, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.write_inputs({"f": "x"}, node=0)
    with monkeypatch.context() as context:
        context.setattr(drain_plan, "MIN_FREE_DISK_BYTES", 1 << 60)
        told = drain.drain(settings, "node-0")
    assert told["left"] == ["inputs/text/f: every other node is short of disk for its 1 bytes"] and not told["empty"]
    assert every_file(settings) == {("inputs/text/f", b"x"): 1}


def test_auxiliary_data_that_only_this_node_has_goes_to_all_others(cluster: TestCluster, settings: Settings) -> None:
    first, second, third = (node.layout.auxiliary_dir for node in settings.nodes)
    (first / "only.data").write_text("[1]")
    (first / "both.data").write_text("[2]")
    (second / "both.data").write_text("[2]")
    assert drain.look(settings, "node-0")["kinds"]["auxiliary"] == {"files": 1, "bytes": 3}
    assert drain.drain(settings, "node-0")["empty"]
    assert (second / "only.data").read_text() == (third / "only.data").read_text() == "[1]"
    assert not (third / "both.data").exists()


def test_inputs_outside_of_base_dir_are_told(cluster: TestCluster, settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "log").write_text("x")
    scheduler = Scheduler(settings)
    scheduler.submit_job(cluster.job(job_name="outside", input_dirs=["inputs/text", str(tmp_path)], shared_input=False))
    told = [] if settings.local else [{"job_name": "outside", "input_dir": str(tmp_path)}]
    assert drain.look(settings, "node-0")["elsewhere"] == told
    scheduler.delete_job("outside")
    assert drain.look(settings, "node-0")["elsewhere"] == []
    scheduler.store.close()


# --- What dies -------------------------------------------------------------------------------------------------------

CODE = """
import sys
from mrcore.admin import drain, drain_plan
from mrcore.settings.config import load_settings
drain.STEP_FILES = 4
settings = load_settings(sys.argv[1]).model_copy(update={"local": False})
drain.drain(settings, sys.argv[2])
"""
AGENTS = [each for each in failpoints.POINTS if each.startswith("moved ")]
MASTER = [
    *(f"{when} drain@{number}" for when in ("before", "after") for number in range(1, 9)),
    *(f"{point}@{number}" for point in failpoints.POINTS if point.startswith("file ") for number in (1, 2)),
]


class Victim:
    """A job with output, increments and names that collide, on a node whose drain is killed somewhere."""

    def __init__(self, cluster: TestCluster, settings: Settings) -> None:
        self.cluster, self.settings = cluster, settings
        keys = {"number_of_partitions": 6, "max_number_dumped_items_reducer": 4}
        self.job = Words(cluster, **MERGE, **keys)
        self.job.write(**texts(7))
        for node in range(3):
            self.job.write(node, same=f"on node {node}\n")
        self.job.run()
        self.node = self.job.holder()
        self.contents = Counter(every_file(settings).elements())
        self.output = self.job.bytes()
        self.config = cluster.folder / "victim.json"
        named = ("home", "projects_dir", "state_dir", "logs_dir")
        self.config.write_text(json.dumps({key: str(getattr(settings, key)) for key in named}))

    def drain(self, fault: str = "") -> subprocess.Popen[bytes]:
        environment = os.environ | {"MRCORE_FAULT": fault}
        command = [sys.executable, "-c", CODE, str(self.config), self.node]
        return subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)

    def check_in_between(self) -> None:
        """Nothing is gone, and what is there twice is read by no run."""
        now = Counter(content for _, content in every_file(self.settings).elements())
        before = Counter(content for _, content in self.contents.elements())
        assert not before - now, "files are lost"
        with contextlib.closing(Store(self.settings.state_dir)) as store:
            assert now == before or store.held_by_drain()

    def check_at_the_end(self) -> None:
        """All is as if nothing had happened, also for the next increment."""
        assert drain.drain(self.settings, self.node)["empty"]
        assert self.job.bytes() == self.output
        now = Counter(content for _, content in every_file(self.settings).elements())
        assert now == Counter(content for _, content in self.contents.elements())
        assert self.job.run()["counts"]["input_files"] == 0
        for path in self.job.paths()[::2]:
            with path.open("a") as stream:
                stream.write("they grew\n")
        assert self.job.run()["counts"]["input_bytes"] == 5 * len("they grew\n")
        assert self.job.counted() == self.job.words()


@pytest.fixture
def victim(cluster: TestCluster) -> Iterator[Victim]:
    made = cluster.settings.model_copy(update={"local": False})
    cluster.settings, cluster.manager = made, ManageCluster(made)
    empty(made)
    yield Victim(cluster, made)
    start_agents(cluster)


@pytest.mark.slow
@pytest.mark.parametrize("point", MASTER)
def test_the_command_killed_at_every_point(victim: Victim, point: str) -> None:
    status = victim.drain(point).wait(60)
    assert status == -signal.SIGKILL or (status == 0 and int(point.partition("@")[2]) > 1)
    victim.check_in_between()
    assert victim.job.bytes() == victim.output
    victim.check_at_the_end()


def end_agents(cluster: TestCluster) -> None:
    pids = [cluster.agent_pid(number) for number in range(3)]
    for pid in filter(procfs.state, pids):
        kill(pid)
    wait_until(lambda: not any(map(procfs.state, pids)), 10, "the end of the agents")


def start_agents(cluster: TestCluster) -> None:
    def started() -> bool:
        with contextlib.suppress(UsageError):  # a port is still held by threads of an agent that ends
            local.start_cluster(cluster.settings)
            return True
        return False

    wait_until(started, 30, "the start of the agents")


@pytest.mark.slow
@pytest.mark.parametrize("point", [f"{point}{number}" for point in AGENTS for number in ("", "@2")])
def test_agents_killed_at_every_point(victim: Victim, point: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = victim.cluster
    end_agents(cluster)
    with monkeypatch.context() as context:
        context.setenv("MRCORE_FAULT", point)
        context.setattr(local, "_INHERITED", (*local._INHERITED, "MRCORE_FAULT"))
        start_agents(cluster)
    deadly = [cluster.agent_pid(number) for number in range(3)]
    assert victim.drain().wait(60) == 1
    assert not all(map(procfs.state, deadly)), f"no agent died at {point}"
    end_agents(cluster)
    victim.check_in_between()
    start_agents(cluster)
    assert victim.job.bytes() == victim.output
    victim.check_at_the_end()


def test_what_is_written_to_meanwhile_stays_and_is_moved_as_it_is_then(
    cluster: TestCluster, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Words(cluster, **MERGE)
    job.write(**texts(6))
    job.run()
    node = job.holder()
    (base,) = [each.layout.base_dir for each in settings.nodes if each.name == node]
    grown = sorted((base / f"inputs/{job.name}").iterdir())[0]
    remove, times = Steps._remove, []

    def late(self: Any, *arguments: Any) -> Any:
        if grown.exists() and len(times) < 2:
            times.append(1)
            with grown.open("a") as stream:
                stream.write("written late\n")
        return remove(self, *arguments)

    monkeypatch.setattr(Steps, "_remove", late)
    assert drain.drain(settings, node)["empty"] and len(times) == 2
    every = [path.name for path in job.paths()]
    assert sorted(every) == sorted(texts(6)) and job.words()["late"] == 2
    assert job.run()["counts"]["input_bytes"] == 2 * len("written late\n")
    assert job.counted() == job.words()


@pytest.mark.parametrize("point", ["after drain@3", "after drain@4", "after drain@6"])
def test_the_drained_node_never_comes_back(victim: Victim, point: str) -> None:
    assert victim.drain(point).wait(60) == -signal.SIGKILL
    gone = victim.node
    victim.settings = victim.settings.model_copy(
        update={"nodes": tuple(node for node in victim.settings.nodes if node.name != gone)}
    )
    told = drain.drain(victim.settings, gone)
    assert told["empty"] and not Scheduler(victim.settings).state()["drain"]
    now = Counter(content for _, content in every_file(victim.settings).elements())
    assert not now - Counter(content for _, content in victim.contents.elements()), "something is there twice"
    with pytest.raises(UsageError, match="there is no node"):
        drain.drain(victim.settings, gone)


@pytest.mark.parametrize("point", ["after drain@3", "after drain@4"])
def test_a_new_node_never_comes_back(victim: Victim, point: str) -> None:
    before = files_of(victim.settings, victim.node)
    assert victim.drain(point).wait(60) == -signal.SIGKILL
    gone = next(node.name for node in victim.settings.nodes if node.name != victim.node)
    victim.settings = victim.settings.model_copy(
        update={"nodes": tuple(node for node in victim.settings.nodes if node.name != gone)}
    )
    assert drain.drain(victim.settings, victim.node)["empty"]
    now = Counter(content for _, content in every_file(victim.settings).elements())
    assert not Counter(before.values()) - now, "what the node had is lost"


def test_until_a_drain_that_was_cut_off_is_completed_nothing_else_begins(
    victim: Victim, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert victim.drain("after drain@4").wait(60) == -signal.SIGKILL
    scheduler = Scheduler(victim.settings)
    scheduler.submit_job(victim.cluster.job(**victim.job.keys, run_once=True))
    told: list[Any] = []
    runner = Runner(victim.settings, report=lambda event, **facts: told.append((event, facts.get("reason"))))
    assert runner.step(time.time()) and runner.step(time.time())
    reason = f"a drain was cut off while it moved files of node {victim.node}: `mrcore drain {victim.node}` completes"
    assert told[0][0] == "hold" and told[0][1].startswith(reason) and not scheduler.history(victim.job.name)
    for arguments in (["rm", "inputs"], ["restore", "--force", str(tmp_path / "file")]):
        with pytest.raises(SystemExit) as ended:
            main(["--config", str(victim.config), *arguments])
        assert ended.value.code == 2 and reason in capfd.readouterr().err
    with pytest.raises(SystemExit):
        main(["--config", str(victim.config), "queue"])
    assert f"the queue waits: {reason}" in capfd.readouterr().out
    scheduler.delete_job(victim.job.name)
    scheduler.store.close()
    victim.check_at_the_end()


def test_a_large_file_is_streamed_and_goes_on_where_it_was(victim: Victim) -> None:
    (base,) = [node.layout.base_dir for node in victim.settings.nodes if node.name == victim.node]
    large = base / "large"
    with large.open("wb") as stream:
        stream.write(os.urandom(1 << 20))
        stream.truncate(160 << 20)
    first = victim.drain()
    staged = [node.layout.incoming_dir for node in victim.settings.nodes]

    def half_way() -> bool:
        return any(path.stat().st_size > 16 << 20 for folder in staged for path in folder.rglob("*.partial"))

    wait_until(half_way, 30, "a part of the large file")
    first.kill()
    first.wait()
    sent: list[int] = []
    os.environ.pop("MRCORE_FAULT", None)
    told = drain.drain(victim.settings, victim.node, lambda phase, **facts: sent.append(facts["sent_bytes"]))
    assert told["empty"] and max(sent) < 150 << 20
    (arrived,) = [node.layout.base_dir / "large" for node in victim.settings.nodes if node.name != victim.node
                  and (node.layout.base_dir / "large").exists()]  # fmt: skip
    assert arrived.stat().st_size == 160 << 20
    arrived.unlink()
    victim.check_at_the_end()
