"""Why a job does not run: one test for each row of docs/operations.md, "Why does it not run?".

Each makes a job called `it` be in that state, in a real queue with a real Runner; what only a cluster can make is made
by a real one.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
from checkout import PROJECT, text_of
from clusters import TestCluster
from fake_cluster import FakeCluster
from msgspec.structs import replace
from queues import job

from mrcore.engine.disk_sort import group_too_large
from mrcore.errors import ClusterFault, JobFault, UsageError
from mrcore.launchers import local
from mrcore.queue import printed, why
from mrcore.queue.diagnosis import STEPS
from mrcore.queue.runner import Runner
from mrcore.queue.scheduler import Scheduler
from mrcore.queue.why import Explanation
from mrcore.settings.config import Settings
from mrcore.state.progress import HeavyKey, Phase, Progress, RunDetail, ServerNow, ServerShare, TaskRow

SECTION = text_of("docs/operations.md").split("## Why does it not run?")[1].split("\n## ")[0]
ROWS = re.findall(r"^\| (`[a-z_]+`(?:, `[a-z_]+`)?) \|", SECTION, re.MULTILINE)


class World:
    """A queue with a Runner that is stepped by hand, on the stand-in for the cluster."""

    def __init__(self, scheduler: Scheduler, settings: Settings) -> None:
        self.scheduler, self.settings, self.store = scheduler, settings, scheduler.store
        self.runner = Runner(settings, FakeCluster(settings))
        self.runner._begin_cycle()
        self.runner._doorbell.wait(0)  # it is there
        self.now = time.time()

    def submit(self, *batch: dict[str, Any]) -> None:
        self.scheduler.submit_jobs(list(batch))

    def step(self) -> None:
        self.runner.step(time.time())

    def past_runs(self, name: str, *seconds: float, counts: Any = None, detail: RunDetail | None = None) -> None:
        """Successful runs of an hour ago."""
        for took in seconds:
            run = self.store.start_run(name, self.now - 3600)
            self.store.enter_phase(name, run, "MAP", self.now - 3600)
            self.store.end_run(name, run, "succeeded", self.now - 3600 + took, counts)
            if detail:
                self.store.set_detail(name, run, detail)

    def start(self, name: str, ago: float, **progress: Any) -> int:
        """A run that began `ago` seconds ago, as its Runner shows it."""
        run = self.store.start_run(name, self.now - ago)
        self.store.enter_phase(name, run, "MAP", self.now - ago)
        facts: dict[str, Any] = {"started": self.now - ago, "updated": self.now} | progress
        self.store.set_progress(Progress(job_name=name, run=run, job_type="mapreduce", **facts))
        return run

    def slow(self, **progress: Any) -> None:
        """`it` takes 120 s, usually 10."""
        detail = progress.pop("detail", None)
        self.submit(job("it", run_once=False))
        self.past_runs("it", 10, 12, counts={"input_bytes": 1000}, detail=detail)
        self.start("it", 120, **progress)


class Case(NamedTuple):
    make: Callable[[World], None]
    says: str
    then: str


CASES: dict[str, Case] = {}


def case(row: str, says: str, then: str) -> Callable[[Callable[[World], None]], None]:
    def add(make: Callable[[World], None]) -> None:
        CASES[row] = Case(make, says, then)

    return add


@pytest.fixture
def world(scheduler: Scheduler, settings: Settings) -> Iterator[World]:
    made = World(scheduler, settings)
    yield made
    made.runner._doorbell.close()
    made.runner.store.close()


def check(found: Explanation, row: str, says: str, then: str) -> None:
    """The code and the cause are those of the row; cause and next step stand in the first three lines."""
    code, _, cause = row.replace("`", "").partition(", ")
    assert found.code == code and (not cause or found.cause == cause), found
    assert re.search(says, found.lines[0]), found.lines
    assert f"next: {found.next_step}" in found.lines[:3] and re.search(then, found.next_step), found.lines
    json.dumps(found.facts)


# --- Waiting ---------------------------------------------------------------------------------------------------------


@case("`behind`", r"^it waits: behind first, which runs, and 2 more$", r"wait, about 4[12] s; .*force_run=true")
def behind(world: World) -> None:
    world.submit(job("first", run_once=False), job("second", run_once=False), job("third", run_once=False), job("it"))
    for name in ("first", "second", "third"):
        world.past_runs(name, 11, 11)
    world.start("first", 2, fraction=0.5, eta_seconds=20.0)
    world.store.set_job("third", last_start=None)
    world.store.set_job("second", last_start=None)
    found = world.scheduler.why("it")
    assert found.lines[2].startswith("ahead of it: first (runs, 50 %, about ")
    assert found.lines[2].endswith("left), second (usually 11.0 s), third (usually 11.0 s)")
    assert found.facts["ahead"] == ["first", "second", "third"] and 35 < found.facts["wait_seconds"] <= 42
    world.submit(job("second", run_once=False, force_run=True))
    assert "before all others by their force_run: second" in world.scheduler.why("it").lines


@case("`next`", "it is next", "nothing")
def next_(world: World) -> None:
    world.submit(job("it"))


@case("`no_runner`", "no Runner runs the queue", "`mrcore run`")
def no_runner(world: World) -> None:
    world.submit(job("it"))
    world.runner._doorbell.close()


@case("`no_runner`, `handed_back`", "no Runner runs the queue", "`mrcore run`")
def handed_back(world: World) -> None:
    world.submit(job("it", "wait"))
    world.runner._stopping = True
    world.step()
    world.runner._doorbell.close()
    assert any(
        line.startswith("its run 1 was handed back, and runs again: ") for line in world.scheduler.why("it").lines
    )


@case("`paused`", "the queue is paused", "`mrcore resume`")
def paused(world: World) -> None:
    world.submit(job("it"))
    world.scheduler.pause()


@case("`hold`, `nodes`", "the queue holds: no cluster is started", "`mrcore cluster start`")
def nodes(world: World) -> None:
    (world.settings.state_dir / "no-nodes").write_text("no cluster is started")
    world.submit(job("it"))
    world.step()
    assert world.scheduler.why("it").facts["tries"] == 1


@case("`hold`, `cluster`", "the queue holds: node-0 does not answer", "`mrcore doctor`.*`mrcore resume`")
def hold(world: World) -> None:
    world.submit(job("it", "down"))
    world.step()
    assert re.search(r"tried 1 times, and tries again .*no job starts", world.scheduler.why("it").lines[2])


@case("`drain`", "is being drained by process", "wait for the end")
def drain(world: World) -> None:
    world.submit(job("it"))
    mark_drain(world, {})


@case("`drain`, `cut_off`", "a drain of node node-1 was cut off", "`mrcore drain node-1`")
def cut_off(world: World) -> None:
    world.submit(job("it"))
    mark_drain(world, {"a": "b"})


def mark_drain(world: World, moves: Any) -> None:
    from os import getpid

    from mrcore.system import procfs

    mark = {"source": "node-1", "pid": getpid(), "start_ticks": procfs.start_ticks(getpid()), "moves": moves}
    world.store.put("drain", mark)


@case("`not_before`", r"its not_before, 2\d{3}-\d\d-\d\d \d\d:\d\d, comes in 11\d min", "wait")
def not_before(world: World) -> None:
    moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + 7000))
    world.submit(job("it", not_before=moment))


@case("`every`", r"it runs every 2 h at most, began \d+ s ago, and may begin again in 120 min", "force_run")
def every(world: World) -> None:
    world.submit(job("it", every="2h", run_once=False))
    world.step()


@case("`cycle`", r"it had its turn, and its next cycle begins in (29|30) s", "force_run")
def cycle(world: World) -> None:
    world.submit(job("it", run_once=False))
    world.step()
    assert "begins after the jobs of this one" in world.scheduler.why("it").lines[0]
    world.step()
    assert any(line.startswith("run 1 of it succeeded") for line in world.scheduler.why("it").lines)


@case("`retry`", "retry 1 of 2 comes in (29|30) s; its run 1 failed: map failed", "`mrcore requeue it` tries at once")
def retry(world: World) -> None:
    world.submit(job("it", "fail", retries=2))
    world.step()


@case(
    "`group`", "behind the retry of first, of its group g, in (29|30) s", "`mrcore why first`.*`mrcore requeue first`"
)
def group(world: World) -> None:
    world.submit(job("first", "fail", retries=1, group_name="g"), job("it", group_name="g"))
    world.step()


# --- Under way -------------------------------------------------------------------------------------------------------


@case(
    "`running`",
    r"run 3 of it runs: MAP, 40 %, about \d+ s left; usually 11.0 s, now 5\.\d s",
    "wait; .*mrcore cancel it",
)
def running(world: World) -> None:
    world.submit(job("it", run_once=False))
    world.past_runs("it", 10, 12)
    world.start("it", 5, fraction=0.4, eta_seconds=7.0, servers=[server("S_0", status="page 3"), server("S_1")])
    assert "says: page 3" in world.scheduler.why("it").lines[3]
    world.scheduler.submit_job(job("it", "fail", run_once=False))
    assert "the job was replaced meanwhile" in world.scheduler.why("it").lines[-1]
    world.scheduler.delete_job("it")
    assert "the job was deleted meanwhile" in world.scheduler.why("it").lines[-1]


def server(name: str, since: float = 10, **facts: Any) -> ServerNow:
    busy = {"phase": "MAP", "task": 4, "since": time.time() - since, "bytes": 2048, "records": 12}
    return ServerNow(server=name, node="node-0", **{"up": True} | busy | facts)


@case("`cancelling`", "run 1 of it was cancelled by a user", "nothing")
def cancelling(world: World) -> None:
    world.submit(job("it"))
    world.start("it", 5)
    world.scheduler.cancel("it")


@case("`runner_died`", "run 1 of it was under way when its Runner ended", "`mrcore run`")
def runner_died(world: World) -> None:
    world.submit(job("it"))
    world.start("it", 5)
    world.runner._doorbell.close()
    assert "handed back, and runs again" in world.scheduler.why("it").lines[2]
    assert world.scheduler.queue()[0]["why"]["code"] == "no_runner"


@case("`output_pending`", "run 1 of it is committed, and waits for its output", "`mrcore doctor`")
def output_pending(world: World) -> None:
    world.submit(job("it", "half"))
    world.step()
    world.store.set_hold(replace(world.store.hold(), until=time.time() + 60))  # type: ignore[type-var]
    assert world.scheduler.queue()[0]["why"]["code"] == "hold"


@case("`slow`", r"run 3 of it takes longer than usual: MAP; usually 11.0 s, now 2 min 00 s", "`mrcore watch it`")
def slow(world: World) -> None:
    world.slow()
    assert "MAP usually takes 11.0 s, now 2 min 00 s so far" in world.scheduler.why("it").lines


@case("`slow`, `servers_down`", "takes longer than usual", "`mrcore cluster start`")
def servers_down(world: World) -> None:
    world.slow(servers=[server("S_0"), server("S_1", up=False, task=None)])
    assert "1 of 2 servers do not answer: S_1" in world.scheduler.why("it").lines


@case("`slow`, `silent`", "takes longer than usual", "`mrcore doctor`")
def silent(world: World) -> None:
    world.slow(updated=time.time() - 60)


@case("`slow`, `deaths`", "takes longer than usual", "tried again; `mrcore logs`")
def deaths(world: World) -> None:
    world.slow(deaths=2)
    assert "2 tasks died, and were given out again" in world.scheduler.why("it").lines


@case("`slow`, `one_task`", "takes longer than usual", "`mrcore logs S_1` shows")
def one_task(world: World) -> None:
    world.slow(servers=[server("S_0", task=None), server("S_1", 90)])
    lines = world.scheduler.why("it").lines
    assert "all others wait for S_1" in lines
    assert any(line.startswith("S_1 on node-0: MAP task 4 since 1 min 30 s, 2.0 kB, 12 records") for line in lines)


@case("`slow`, `skew`", "takes longer than usual", "combine_function_name")
def skew(world: World) -> None:
    heavy = [HeavyKey(key="'the'", values=12345, partition=2)]
    world.slow(
        detail=RunDetail(largest_partition_bytes=90 << 20, median_partition_bytes=9 << 20, heavy_keys=heavy),
        servers=[server("S_0"), server("S_1")],
    )
    lines = world.scheduler.why("it").lines
    assert "in the last run the largest partition was 10 times the median (94.4 MB)" in lines
    assert "  key 'the': 12,345 values" in lines


@case("`slow`, `slow_server`", "takes longer than usual", "see what else runs on w1")
def slow_server(world: World) -> None:
    shares = [
        ServerShare(phase="MAP", server=f"S_{number}", node=f"w{number}", tasks=1, seconds=10, bytes=size, records=1)
        for number, size in enumerate((100 << 20, 20 << 20, 100 << 20))
    ]
    task = TaskRow(phase="MAP", task=7, try_=1, server="S_1", node="w1", started=1.0, seconds=70)
    world.slow(detail=RunDetail(servers=shares, slowest=[task]))
    lines = world.scheduler.why("it").lines
    assert "in the last run S_1 on w1 mapped 2.1 MB a second, the others 10.5 MB" in lines
    assert "slowest in the last run: MAP task 7 on S_1, 1 min 10 s" in lines


@case("`slow`, `more_input`", "takes longer than usual", "wait: it has more to do")
def more_input(world: World) -> None:
    world.slow(phases=[Phase(name="MAP", started=world.now - 120, total=3000)])
    assert "it reads 3.0 kB of input, 3.0 times as much as the last run" in world.scheduler.why("it").lines


# --- Out of the queue ------------------------------------------------------------------------------------------------


@case("`failed`, `bug`", "run 3 of it failed .*KeyError: .?'oops'", "report it, .*`mrcore requeue it`")
def bug(world: World) -> None:
    world.submit(job("it", "bug"))
    for _ in range(3):
        world.step()


@case("`failed`, `other`", "run 1 of it failed .*: map failed", "`mrcore show it`.*`mrcore requeue g` brings it back")
def other(world: World) -> None:
    world.submit(job("it", "fail", group_name="g"), job("next", group_name="g"))
    world.step()
    assert "with it left, of its group g: next" in world.scheduler.why("it").lines


@case("`failed`, `out_of_memory`", "tried 3 times", "more memory_bytes")
def out_of_memory(world: World) -> None:
    details = {"code": "task_died", "server": "S_0", "node": "node-0", "task": "map-0-3", "oom": True}
    details |= {"signal": 9, "memory_bytes": 300 << 20, "in_hand": "map function m, the lines from byte 8 of /x on"}
    fail(world, JobFault("a task was tried 3 times", **details))
    lines = world.scheduler.why("it").lines
    held, of = "it held 315 MB at most", f"in hand: {details['in_hand']}"
    for line in ("the kernel probably ended it for want of memory", held, of):
        assert line in lines


@case("`failed`, `large_group`", "the group of key 'the' does not fit in memory", "`disk_based_input: true`")
def large_group(world: World) -> None:
    fail(world, group_too_large("the", 1_000_000, 1 << 28))


def fail(world: World, error: JobFault) -> None:
    """A run that ended with this error."""
    world.submit(job("it"))
    run = world.store.start_run("it", world.now)
    world.store.end_run("it", run, "failed", world.now, exception=error.to_dict())
    world.store.move_job("it", "out", f"failed: {error.message}", world.now, "failed")


@case("`failed`, `forgotten`", "it left the queue .*: failed: map failed", "`mrcore requeue it` brings it back")
def forgotten(world: World) -> None:
    world.submit(job("it", "fail"), job("later"))
    world.step()
    world.step()
    world.store.prune(1)


@case("`failed`, `timeout`", "timeout: ran longer than its timeout_seconds", "`mrcore logs S_1`.*`mrcore requeue it`")
def timeout(world: World) -> None:
    world.submit(job("it", "wait", timeout_seconds=0.05))
    world.step()
    row = TaskRow(phase="MAP", task=4, try_=2, server="S_1", node="node-0", started=1.0, seconds=61, outcome="running")
    world.store.set_detail("it", 1, RunDetail(slowest=[row]))
    found = world.scheduler.why("it")
    assert "map task 4, try 2, on S_1 ran for 1 min 01 s" in found.lines
    assert {"server": "S_1", "task": "map-4-2"}.items() <= found.facts["failure"].items()


@case(
    "`group_failed`", "it left the queue .* with its group g: run 1 of first failed .*map failed", "`mrcore requeue g`"
)
def group_failed(world: World) -> None:
    world.submit(job("first", "fail", group_name="g"), job("it", group_name="g"))
    world.step()


@case("`cancelled`", "its run was cancelled by a user", "`mrcore requeue it`")
def cancelled(world: World) -> None:
    world.submit(job("it", "wait"))
    run = world.store.start_run("it", world.now)
    world.store.cancel_running()
    world.step()
    assert world.store.run("it", run).state == "cancelled"  # type: ignore[union-attr]


@case("`deleted`", "it was deleted", "submit it again")
def deleted(world: World) -> None:
    world.submit(job("it"))
    world.scheduler.delete_job("it")


@case("`succeeded`", r"run 1 of it succeeded \d s ago, in \d.\d+ s", "`mrcore cat it` prints its output")
def succeeded(world: World) -> None:
    world.submit(job("it"))
    world.step()


def left_out(counts: dict[str, Any], **keys: Any) -> Callable[[World], None]:
    """A run that succeeded with these counts."""

    def make(world: World) -> None:
        world.submit(job("it", **keys))
        world.past_runs("it", 5, counts={"output_items": 1} | counts)
        world.store.move_job("it", "out", "succeeded", world.now, "succeeded")

    return make


case("`partial`, `unfinished`", "but 1 files end inside of a character", "upload them again")(
    left_out({"unfinished_characters": 1})
)
case("`partial`, `sample`", "but it is a sample: of the lines 10 %", "downsample=1.0")(left_out({}, downsample=0.1))


@pytest.mark.parametrize("row", [row for row in ROWS if row in CASES])
def test_each_row_is_told_with_its_cause_and_the_next_step(row: str, world: World) -> None:
    CASES[row].make(world)
    check(world.scheduler.why("it"), row, CASES[row].says, CASES[row].then)


# --- Failures as a cluster makes them --------------------------------------------------------------------------------

MAP = """
import os, signal, time
from functools import partial

def function(line, auxiliary_data):
    print("have read", line.strip())
    return help(line)

def help(line):
    if "three" in line:
        raise ValueError("no three here")
    return [(line, 1)]

def bad_item(line, auxiliary_data):
    return [(line, {1, 2})]

def no_function(line, auxiliary_data, more):
    return []

def task_died(line, auxiliary_data):
    os.kill(os.getpid(), signal.SIGKILL)

def words(line, auxiliary_data):
    return [(word, 1) for word in line.split()]
"""
REDUCE = """
def add_up(group, auxiliary_data):
    return [(group[0][0], sum(value for _, value in group))]
"""


class Failed:
    """A real cluster on which a job for each cause, called like it, has run."""

    def __init__(self, cluster: TestCluster) -> None:
        self.cluster, self.settings, self.folder = cluster, cluster.settings, cluster.folder
        for name in ("mine", "import", "project", "packages"):
            self.project(name, "raise RuntimeError('not today')\n" if name == "import" else "")
        self.text("in.txt", b"one\ntwo\nthree\n")
        for name in ("more", "merged"):
            self.text(f"{name}/1.txt", b"a b\n")
        self.text("more/.hidden", b"")
        self.scheduler = Scheduler(self.settings)
        more = [str(self.folder / "more")]
        held = {"hold_state": True, "delete_job_data": False, "reduce_function_name": "add_up", "input_dirs": more}
        merged = held | {"delete_job_data": True, "merge_output": True, "input_dirs": [str(self.folder / "merged")]}
        kept = {"changed_input": held, "ledger": merged, "nothing_new": held}
        self.queue(*(self.job(name, **keys) for name, keys in kept.items()))
        script = self.text("script.py", b"print('on my way')\nraise SystemExit(3)\n")
        gone = self.text("gone.py", b"")
        upload = {"job_type": "file_transfer", "transfer_type": "upload", "input_dir": str(self.folder / "gone")}
        upload |= {"output_dir": "there", "job_name": "transfer", "run_once": True}
        (self.folder / "gone").mkdir()
        scripts = {"script": script, "no_script": gone}
        own = {"run_once": True, "job_type": "script"}
        self.queue(
            *(self.job(name, map_function_name=name) for name in ("function", "bad_item", "no_function", "task_died")),
            *(self.job(name, project_name=name) for name in ("import", "project", "packages")),
            self.job("input_file", input_dirs=[self.text("latin.txt", b"caf\xe9\n")]),
            self.job("bad_text", input_dirs=[str(self.folder / "latin.txt")], on_bad_text="replace"),
            self.job("skipped", input_dirs=[str(self.folder / "more")]),
            self.job("inputs", input_dirs=[str(self.folder / "nowhere")]),
            self.job("sample", downsample=1e-9),
            self.job("auxiliary", auxiliary_data_name_mapper="stop"),
            self.job("nothing_new", **held),
            *(own | {"job_name": name, "script_location": file} for name, file in scripts.items()),
            upload,
        )
        self.text("more/1.txt", b"another\n")
        self.text("merged/2.txt", b"c\n")
        self.queue(self.job("changed_input", **held), self.job("ledger", **merged, number_of_partitions=7))

    def project(self, name: str, first: str) -> None:
        folder = self.settings.projects_dir / name
        folder.mkdir()
        (folder / "map_functions.py").write_text(first + MAP)
        (folder / "reduce_functions.py").write_text(REDUCE)

    def text(self, name: str, content: bytes) -> str:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        return str(path)

    def job(self, name: str, **keys: Any) -> dict[str, Any]:
        base = {"job_name": name, "project_name": "mine", "run_once": True, "map_function_name": "words"}
        return base | {"input_dirs": [str(self.folder / "in.txt")]} | keys

    def queue(self, *batch: dict[str, Any]) -> None:
        """Submit these and run the queue; what some of them need is gone by then."""
        self.scheduler.submit_jobs(list(batch))
        if len(batch) > 5:
            for path in (self.settings.projects_dir / "project", self.folder / "gone.py", self.folder / "gone"):
                path.rename(f"{path}.away")
            (self.settings.projects_dir / "packages" / "requirements.txt").write_text("nothing-of-that-name\n")
        Runner(self.settings).run(once=True)


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Failed]:
    with TestCluster(tmp_path_factory.mktemp("cluster"), nodes=2, servers=1) as cluster:
        made = Failed(cluster)
        yield made
        made.scheduler.store.check()
        made.scheduler.store.close()


TRY = r"`mrcore try mine /\S+/in.txt --map {}` shows"
REAL = {
    "`failed`, `function`": (r"map function function failed at .*in.txt, byte 8: 'three'", TRY.format("function")),
    "`failed`, `import`": ("not today", r"`mrcore try import /\S+/in.txt --map words` shows"),
    "`failed`, `bad_item`": (r"emitted a bad item", TRY.format("bad_item")),
    "`failed`, `no_function`": ("its parameters are", TRY.format("no_function")),
    "`failed`, `task_died`": (r"tried 3 times .* SIGKILL", r"`mrcore logs S_\d` .*" + TRY.format("task_died")),
    "`failed`, `input_file`": ("latin.txt is not UTF-8 at byte 3", "on_bad_text: replace"),
    "`failed`, `inputs`": ("nowhere matches no file", "mend input_dirs"),
    "`failed`, `changed_input`": ("1.txt", "`mrcore ledger forget changed_input`"),
    "`failed`, `ledger`": ("cannot go on", "`mrcore ledger forget ledger`"),
    "`failed`, `sample`": ("holds no line", "larger downsample"),
    "`failed`, `auxiliary`": ("auxiliary data 'stop' is not on node", "`mrcore upload-auxiliary"),
    "`failed`, `project`": ("project folder .* does not exist", "mend the project's folder"),
    "`failed`, `packages`": ("requirements.txt", "`pip download`"),
    "`failed`, `script`": ("exit status 3|status 3", "`mrcore logs script`"),
    "`failed`, `no_script`": ("there is no script", "put the script back"),
    "`failed`, `transfer`": ("input_dir .* does not exist", "mend what it says"),
    "`partial`, `bad_text`": ("but 1 lines that are not UTF-8", "mend the files"),
    "`partial`, `skipped`": (r"but \d files of its inputs were not read: \d dotfile", "docs/jobs.md"),
    "`succeeded`, `nothing_new`": ("there was nothing new to read", "nothing; `mrcore cat nothing_new`"),
}


@pytest.mark.parametrize("row", [row for row in ROWS if row in REAL])
def test_each_failure_of_a_real_cluster_is_told_with_its_cause_and_the_next_step(row: str, failed: Failed) -> None:
    says, then = REAL[row]
    name = re.findall(r"`([a-z_]+)`", row)[-1]
    found = failed.scheduler.why(name, printed=True)
    check(found, row, says, then)
    if found.code == "failed":
        assert found.next_step.endswith(f"; then `mrcore requeue {name}` brings it back")


def test_a_failure_names_the_file_that_is_edited_the_input_and_the_line(failed: Failed) -> None:
    found = failed.scheduler.why("function")
    source = failed.settings.projects_dir / "mine" / "map_functions.py"
    assert f"your code: {source}, line 11" in found.lines
    assert f"the input: {failed.folder}/in.txt, byte 8" in found.lines and "the line: three\\n" in found.lines
    assert "  ValueError: no three here" in found.lines
    facts = found.facts["failure"]
    assert (facts["code_file"], facts["code_line"], facts["offset"]) == (str(source), 11, 8)
    assert re.fullmatch(r"S_[01]", facts["server"]) and facts["task"].startswith("map-")


def test_what_a_script_printed_last_is_told(failed: Failed) -> None:
    assert "  on my way" in failed.scheduler.why("script").lines


def test_what_a_task_printed_last_is_told_without_what_others_printed(failed: Failed) -> None:
    found = failed.scheduler.why("function", printed=True)
    assert found.facts["printed"] == ["have read one", "have read two", "have read three"]
    assert found.lines[-4:] == [f"it printed last (`mrcore logs {found.facts['failure']['server']}` has more):"] + [
        f"  {line}" for line in found.facts["printed"]
    ]


@pytest.mark.parametrize("hangs", [False, True])
def test_a_node_that_does_not_answer_costs_little_time_and_no_answer(
    hangs: bool, failed: Failed, monkeypatch: pytest.MonkeyPatch
) -> None:
    over = threading.Event()

    def read_log(*_: object) -> bytes:
        if hangs:
            over.wait(60)
        raise ClusterFault("w1 is away")

    monkeypatch.setattr(local, "read_log", read_log)
    monkeypatch.setattr(printed, "LOG_SECONDS", 0.1 if hangs else 60)
    found = failed.scheduler.why("function", printed=True)
    over.set()
    why = r"node node-\d gave no answer in 0.1 s" if hangs else "w1 is away"
    assert re.fullmatch(f"what it printed cannot be read: {why}", found.lines[-1])
    check(found, "`failed`, `function`", *REAL["`failed`, `function`"])


# --- What goes together ----------------------------------------------------------------------------------------------


def test_a_job_that_failed_and_stays_and_those_skipped_with_it_say_so(world: World) -> None:
    world.submit(*(job(name, does, group_name="g", run_once=False) for name, does in (("a", "fail"), ("it", "ok"))))
    world.step()
    world.step()
    for name, of in (("a", "its run 1 failed"), ("it", "it was skipped in this cycle, since run 1 of a failed")):
        found = world.scheduler.why(name)
        assert (found.code, found.cause) == ("cycle", "other")
        assert re.search(f"its next cycle begins in .*; {of}: map failed", found.lines[0])
        assert found.next_step.endswith("; `mrcore requeue g` runs it at once")


def test_what_holds_the_whole_queue_is_told_beside_a_jobs_own_reason(world: World) -> None:
    CASES["`not_before`"].make(world)
    world.scheduler.pause()
    world.runner._doorbell.close()
    besides = [line for line in world.scheduler.why("it").lines if line.startswith("besides, ")]
    assert [line.split(": ")[0] for line in besides] == [
        "besides, no Runner runs the queue",
        "besides, the queue is paused",
    ]


def test_what_the_runner_does_meanwhile_makes_no_answer_fail(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.submit(job("it", run_once=False))
    world.start("it", 5)
    before = world.scheduler._state()
    world.store.end_run("it", 1, "succeeded", world.now)
    monkeypatch.setattr(world.scheduler, "_state", lambda: before)
    assert (before.running, world.scheduler.why("it").code) == ("it", "next")


def test_a_run_that_was_cancelled_is_told_of_a_job_that_recurs(world: World) -> None:
    world.submit(job("it", run_once=False))
    world.store.start_run("it", world.now)
    world.store.cancel_running()
    world.step()
    assert any(line.startswith("its run 1 was cancelled by a user") for line in world.scheduler.why("it").lines)


def test_a_deployed_cluster_is_told_how_its_runner_is_started(world: World) -> None:
    CASES["`no_runner`"].make(world)
    world.scheduler.settings = world.settings.model_copy(update={"local": False})
    assert re.search("systemctl start mrcore-runner.*make start INVENTORY=", world.scheduler.why("it").next_step)


# --- The table -------------------------------------------------------------------------------------------------------


def test_each_row_has_a_test_and_each_test_a_row() -> None:
    assert len(ROWS) == len(set(ROWS)) > 50
    assert set(ROWS) == {*CASES, *REAL} and not CASES.keys() & REAL.keys()


def test_every_code_of_the_queue_and_of_an_error_has_its_row() -> None:
    told = {tuple(re.findall(r"`([a-z_]+)`", row)) for row in ROWS}
    assert {("failed", cause) for cause in STEPS.keys() - {"cluster"}} <= told, "a cluster's fault fails no job"
    assert why._WAITS.keys() <= {code for code, *_ in told}
    packages = ("engine", "cluster", "state", "project", "queue")
    texts = (path.read_text() for name in packages for path in (PROJECT / "mrcore" / name).glob("*.py"))
    codes = {code for text in texts for code in re.findall(r'\bcode"?[=:] ?"([a-z_]+)"', text)}
    assert codes and codes <= STEPS.keys()


def test_an_unknown_job_is_an_error_that_names_the_nearest(world: World) -> None:
    world.submit(job("word_count"))
    with pytest.raises(UsageError, match=r"'wrod_count' is not known \(did you mean 'word_count'"):
        world.scheduler.why("wrod_count")
