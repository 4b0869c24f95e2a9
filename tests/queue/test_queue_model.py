"""The queue against a simple model, in random order; many submitters at once; a long history."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from fake_cluster import ran
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from queues import job

from mrcore.errors import JobFault, MrcoreError, Unreachable, UsageError
from mrcore.queue.runner import Execution, Runner
from mrcore.queue.scheduler import Scheduler
from mrcore.settings.config import load_settings
from mrcore.state import manifest
from mrcore.state.store import FALLEN
from mrcore.system.paths import write_atomic

NAMES = ("a", "b", "c", "d", "e")
GROUPS = (None, None, "g", "h")
HOLD_SECONDS = 7.0
RETRY_SECONDS = 3.0
DIES = ("dies before commit", "dies after commit")
ENDS = ("ok", "ok", "fail", "down", "wait for cancel", *DIES, "down after commit")
KEYS = ("state", "number", "cycle", "last_run", "force_run", "cause", "tries", "retry_at")
MEANWHILE = (None, None, None, "delete", "replace")


class Killed(BaseException):
    """The Runner's process has died here."""


class Cluster:
    """Does what the machine tells it to for the next run; keeps what it was asked to do."""

    def __init__(self, state_dir: Path) -> None:
        self.state_dir, self.ends, self.finishing_fails = state_dir, "ok", False
        self.nodes_away = False
        self.meanwhile: Callable[[], None] = lambda: None
        self.begun: list[tuple[str, int]] = []

    def run(self, job: dict[str, Any], *, run: int, progress: Any, stop: threading.Event) -> Any:
        name = job["job_name"]
        assert not manifest.path_of(self.state_dir, name, run).exists(), "a committed run is repeated"
        self.begun.append((name, run))
        progress("MAP")
        self.meanwhile()
        if self.ends == "fail":
            raise JobFault("the job's fault")
        if self.ends == "down":
            raise Unreachable("a node is away")
        if self.ends == "wait for cancel":
            assert stop.wait(20)
            raise MrcoreError("stopped")
        if self.ends == "dies before commit":
            return {"counts": {}}
        path = manifest.path_of(self.state_dir, name, run)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"job": name, "run": run, "counts": {"items": 1}, "delete_job_data": False}
        write_atomic(path, json.dumps(content).encode())
        if self.ends == "down after commit":
            raise Unreachable("a node went away")
        return {"counts": {"items": 1}}

    def check_nodes(self) -> None:
        if self.nodes_away:
            raise Unreachable("no node answers")

    def finish(self, job: dict[str, Any], run: int) -> None:
        if self.finishing_fails:
            raise Unreachable("a node is still away")

    def abandon(self, job: str, run: int) -> None:
        assert not manifest.path_of(self.state_dir, job, run).exists()


class MortalRunner(Runner):
    """A Runner whose process dies, as far as the queue can tell, while a run is under way or just after it."""

    def _watch(self, execution: Execution, deadline: float) -> None:
        super()._watch(execution, deadline)
        if self._kinds.cluster().ends.startswith("dies"):  # type: ignore[attr-defined]
            raise Killed


class QueueMachine(RuleBasedStateMachine):
    """The model is a dict of jobs and a list of runs; each rule acts on it and on the queue."""

    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="queue-model-"))
        project = self.folder / "projects/fake"
        project.mkdir(parents=True)
        (project / "map_functions.py").write_text("def ok(line, aux): ...\n")
        file = self.folder / "config.yml"
        file.write_text(f"home: {self.folder}\nprojects_dir: {self.folder}/projects\n")
        self.settings = load_settings(file).model_copy(
            update={"hold_backoff_first_seconds": HOLD_SECONDS, "hold_backoff_max_seconds": HOLD_SECONDS}
        )
        self.scheduler = Scheduler(self.settings)
        self.cluster = Cluster(self.settings.state_dir)
        self.now = time.time()
        self.jobs: dict[str, dict[str, Any]] = {}
        self.runs: list[list[Any]] = []  # name, run, state
        self.number = self.cycle = 0
        self.drained = True
        self.paused = self.cancelled = False
        self.held_until, self.held_for_nodes = 0.0, False
        self.new_runner()
        for name in NAMES:
            self.submit(name, "g" if name in "abc" else None, 0, False, name in "ad", None, name in "be")

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            self.scheduler.store.close()
            self.runner.store.close()
            shutil.rmtree(self.folder)

    # --- rules: users ---

    @rule(name=st.sampled_from(NAMES), group=st.sampled_from(GROUPS), priority=st.sampled_from((0, 0, 1, 2)),
          force=st.booleans(), run_once=st.booleans(), on_failure=st.sampled_from((None, None, "keep", "leave")),
          retries=st.sampled_from((0, 0, 1, 2)))  # fmt: skip
    def submit(
        self, name: str, group: str | None, priority: int, force: bool, run_once: bool,
        on_failure: str | None = None, retries: int = 0,
    ) -> None:  # fmt: skip
        before = self.jobs.get(name, {"state": "out", "last": 0})
        keys = {"group_name": group, "job_priority": priority, "force_run": force, "run_once": run_once}
        keys |= {"on_failure": on_failure, "retries": int(retries), "retry_delay": RETRY_SECONDS}
        answer = self.scheduler.submit_job(job(name, **keys))
        assert answer["replaced"] == (before["state"] != "out")
        self.number += 1
        self.jobs[name] = {
            "state": "queued", "group": group, "priority": priority, "force": force, "once": run_once,
            "number": self.number, "cycle": 0, "last": before["last"], "cause": None, "tries": 0, "retry": None,
        }  # fmt: skip

    @rule(name=st.sampled_from(NAMES))
    def delete(self, name: str) -> None:
        mine = self.jobs.get(name, {"state": "out", "cause": None})
        known = mine["state"] != "out" or mine["cause"] in FALLEN
        with contextlib.nullcontext() if known else pytest.raises(UsageError):
            self.scheduler.delete_job(name)
        if known:
            self.leaves(name, "deleted")

    @rule(group=st.sampled_from(("g", "h", *NAMES)))
    def requeue(self, group: str) -> None:
        there = {name: each for name, each in self.jobs.items() if each["state"] == "out" or each["cause"] in FALLEN}
        names = [name for name, each in there.items() if each["cause"] in FALLEN and each["group"] == group]
        names = names or [name for name in there if name == group]
        with contextlib.nullcontext() if names else pytest.raises(UsageError):
            assert sorted(self.scheduler.requeue(group)) == sorted(names)
        for name in names:
            self.jobs[name] |= {"state": "queued", "cycle": 0, "cause": None, "tries": 0, "retry": None}

    @rule(paused=st.booleans())
    def pause_or_resume(self, paused: bool) -> None:
        self.scheduler.pause() if paused else self.scheduler.resume()
        self.paused = paused
        if not paused:
            self.held_until = min(self.held_until, time.time())

    @rule(name=st.sampled_from(NAMES))
    def cancel(self, name: str) -> None:
        running = bool(self.runs) and self.runs[-1][0] == name and self.runs[-1][2] == "running"
        with contextlib.nullcontext() if running else pytest.raises(UsageError):
            self.scheduler.cancel(name)
        self.cancelled |= running

    @rule(seconds=st.sampled_from((1.0, HOLD_SECONDS + 1)))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    # --- rules: the Runner ---

    @rule()
    def new_runner(self) -> None:
        """The old one has died, or ended; the new one begins a cycle if the last one was done."""
        if hasattr(self, "runner"):
            self.runner.store.close()
        self.runner = MortalRunner(self.settings, self.cluster)
        self.runner._begin_cycle()
        if self.drained:
            self.cycle, self.drained = self.cycle + 1, False

    @rule(fails=st.booleans())
    def nodes_come_and_go(self, fails: bool) -> None:
        self.cluster.finishing_fails = fails

    @rule(away=st.sampled_from((True, False, False)))
    def all_nodes_come_and_go(self, away: bool) -> None:
        self.cluster.nodes_away = away

    @rule(plan=st.lists(st.tuples(st.sampled_from(ENDS), st.sampled_from(MEANWHILE)), min_size=1, max_size=8),
          patient=st.booleans())  # fmt: skip
    def steps(self, plan: list[tuple[str, str | None]], patient: bool) -> None:
        """Some steps of the Runner; a patient one waits for the end of holds and for the next cycle."""
        for ends, meanwhile in plan:
            if patient:
                self.now = max(self.now, self.held_until + 1)
                if self.drained:
                    self.new_runner()
            self.step(ends, meanwhile)
            self.same_as_the_model()

    def step(self, ends: str, meanwhile: str | None) -> None:
        self.now = max(self.now, time.time())
        holds = self.now < self.held_until
        if holds and not self.held_for_nodes:
            assert self.runner.step(self.now) == pytest.approx(self.held_until - self.now, abs=2.0)
            return
        if self.runs and self.runs[-1][2] == "running":
            self.recover()
            return
        if self.paused:
            self.runner.step(self.now)
            return
        for each in self.jobs.values():
            if each["state"] == "held":
                each |= {"state": "queued", "cause": None}
        waiting = [name for name, each in self.jobs.items() if each["state"] == "queued" and self.may_start(name, each)]
        if holds or (waiting and self.cluster.nodes_away):
            if not holds:
                self.held_until, self.held_for_nodes = self.now + HOLD_SECONDS, True
            assert self.runner.step(self.now) == pytest.approx(self.held_until - self.now, abs=2.0)
            return
        self.held_for_nodes = False
        if not waiting:
            assert self.runner.step(self.now) is None
            self.drained = True
            return
        chosen = min(
            waiting, key=lambda n: (not self.jobs[n]["force"], -self.jobs[n]["priority"], self.jobs[n]["number"])
        )
        self.execute(chosen, ends, meanwhile)

    def may_start(self, name: str, mine: dict[str, Any]) -> bool:
        """Whether it is a job's turn, no time of its own is to come, and it does not wait for a retry in its group."""
        if mine["force"]:
            return bool(mine["cycle"] < self.cycle or mine["retry"])
        if mine["retry"]:
            return bool(mine["retry"] <= self.now)
        queued = [each for each in self.jobs.values() if each["state"] != "out" and each["retry"]]
        return mine["cycle"] < self.cycle and not any(
            mine["group"] and each["group"] == mine["group"] for each in queued
        )

    def leaves(self, name: str, cause: str) -> None:
        self.jobs[name] |= {"state": "out", "cause": cause, "tries": 0, "retry": None}

    def execute(self, name: str, ends: str, meanwhile: str | None) -> None:
        mine = self.jobs[name]
        mine["last"] += 1
        self.runs.append([name, mine["last"], "running"])
        self.cluster.ends = ends
        user_acts = {
            "delete": lambda: self.delete(name),
            "replace": lambda: self.submit(name, mine["group"], 0, False, True),
        }.get(meanwhile or "", lambda: None)

        def act() -> None:
            user_acts()
            if ends == "wait for cancel":
                self.cancel(name)

        self.cluster.meanwhile = act
        dies = ends.startswith("dies")
        with pytest.raises(Killed) if dies else contextlib.nullcontext():
            self.runner.step(self.now)
        self.cluster.meanwhile = lambda: None
        assert self.cluster.begun[-1] == (name, mine["last"])
        if dies:
            self.new_runner()
        elif ends == "down after commit":
            self.held_until = time.time() + HOLD_SECONDS
        elif ends == "down":
            self.ended("handed back", mine)
            if self.jobs[name]["state"] == "queued":
                self.jobs[name] |= {"state": "held", "cause": "cluster"}
            self.held_until = time.time() + HOLD_SECONDS
        else:
            self.ended({"ok": "succeeded", "fail": "failed", "wait for cancel": "cancelled"}[ends], mine)

    def recover(self) -> None:
        name, run, _ = self.runs[-1]
        committed = manifest.path_of(self.settings.state_dir, name, run).exists()
        self.runner.step(self.now)
        number = self.scheduler.store.rows("SELECT number FROM runs WHERE job_name = ? AND run = ?", name, run)[0]
        mine = {"number": number["number"], "once": None}
        if committed and self.cluster.finishing_fails:
            self.held_until = self.now + HOLD_SECONDS
        elif committed:
            self.ended("succeeded", mine)
        else:
            self.ended("cancelled" if self.cancelled else "handed back", mine)

    def ended(self, state: str, mine: dict[str, Any]) -> None:
        """What the end of the run under way means for its job and its group."""
        name, run, _ = self.runs[-1]
        self.runs[-1][2], self.cancelled = state, False
        now = self.jobs[name]
        same = now["number"] == mine["number"]
        spec = json.loads(
            self.scheduler.store.rows("SELECT spec FROM runs WHERE job_name = ? AND run = ?", name, run)[0]["spec"]
        )
        group, before = spec["group_name"], dict(now)
        mates = [
            other for other, each in self.jobs.items() if other != name and group and each["group"] == group
        ]  # fmt: skip
        if state != "handed back":
            self.held_until = 0.0
            if same:
                now |= {"cycle": self.cycle, "force": False, "tries": 0, "retry": None, "cause": None}
                if now["state"] == "out":
                    now["cause"] = before["cause"]
                elif before["retry"]:
                    for other in mates:
                        each = self.jobs[other]
                        each["cycle"] = self.cycle if each["cycle"] >= before["cycle"] else each["cycle"]
        there = same and now["state"] != "out"
        if there and spec["run_once"] and state in ("succeeded", "cancelled"):
            self.leaves(name, state)
        if state == "failed":
            self.failed(name, spec, before if there else None, [m for m in mates if self.jobs[m]["state"] != "out"])

    def failed(self, name: str, spec: dict[str, Any], before: dict[str, Any] | None, mates: list[str]) -> None:
        now, keeps = self.jobs[name], spec["on_failure"] == "keep" or (not spec["on_failure"] and not spec["run_once"])
        if before and before["tries"] < spec["retries"]:
            retry = self.scheduler.store.job(name).retry_at  # type: ignore[union-attr]
            assert retry == pytest.approx(time.time() + RETRY_SECONDS * 2 ** before["tries"], abs=2.0)
            now |= {"tries": before["tries"] + 1, "retry": retry, "cause": "failed"}
            return
        if before and keeps:
            now["cause"] = "failed"
        elif before:
            self.leaves(name, "failed")
        for other in mates:
            if not keeps:
                self.leaves(other, "group failed")
            elif self.jobs[other]["cycle"] < self.cycle:
                self.jobs[other] |= {"cycle": self.cycle, "cause": "group failed", "tries": 0, "retry": None}

    # --- what must hold after each step ---

    @invariant()
    def same_as_the_model(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        store = self.scheduler.store
        rows = store.rows(
            "SELECT job_name, state, number, cycle, last_run, force_run, cause, tries, retry_at FROM jobs"
        )
        told = {row["job_name"]: tuple(row[key] for key in KEYS) for row in rows}
        wanted = {
            name: (
                *(each[key] for key in ("state", "number", "cycle", "last")),
                int(each["force"]),
                each["cause"],
                each["tries"],
                each["retry"],
            )
            for name, each in self.jobs.items()
        }
        assert told == wanted
        runs = store.rows("SELECT job_name, run, state FROM runs ORDER BY id")
        assert [list(row.values()) for row in runs] == self.runs
        assert len(set(self.cluster.begun)) == len(self.cluster.begun)
        assert sum(state == "running" for *_, state in self.runs) <= 1

    @invariant()
    def sound(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.store.check()


QueueMachine.TestCase.settings = hypothesis_settings(
    max_examples=int(os.environ.get("QUEUE_EXAMPLES", "40")),
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestQueueModel = pytest.mark.slow(QueueMachine.TestCase)


SUBMITTERS = """
import os, sys
from mrcore.settings.config import load_settings
from mrcore.queue.scheduler import Scheduler
settings = load_settings(sys.argv[1])
go, start = os.pipe()
pids = []
for number in range(50):
    pid = os.fork()
    if pid == 0:
        os.close(start)
        os.read(go, 1)  # until all are there
        scheduler = Scheduler(settings)
        for n in range(20):
            answer = scheduler.submit_job({"job_name": f"j{number}_{n}", "project_name": "fake", "input_dirs": ["x"],
                                           "map_function_name": "ok", "run_once": True})
            assert not answer["replaced"]
        os._exit(0)
    pids.append(pid)
os.close(start)
sys.exit(sum(os.waitpid(pid, 0)[1] != 0 for pid in pids))
"""


@pytest.mark.slow
def test_fifty_submitters_and_a_thousand_jobs(
    scheduler: Scheduler,
    config: Path,
    spawn: Any,
) -> None:
    runner = spawn("--once")
    began = time.monotonic()
    submitters = subprocess.run([sys.executable, "-c", SUBMITTERS, str(config)], timeout=250)
    print(f"1,000 jobs accepted from 50 processes: {time.monotonic() - began:.1f} s")
    assert submitters.returncode == 0
    runner.wait(250)
    while scheduler.queue():  # the cycle may have ended before the first job came
        spawn("--once").wait(250)
    print(f"and run: {time.monotonic() - began:.1f} s")
    counted = Counter(ran(scheduler.settings))
    wanted = {f"{what} j{p}_{n} 1" for what in ("start", "end") for p in range(50) for n in range(20)}
    assert set(counted) == wanted and set(counted.values()) == {1}
    assert len(scheduler.history()) == 1000


def test_a_long_history_is_listed_quickly(scheduler: Scheduler) -> None:
    store = scheduler.store
    scheduler.submit_jobs([job(f"j{n}", run_once=False) for n in range(100)])
    with store.change():
        for number in range(10_000):
            name = f"j{number % 100}"
            run = store.start_run(name, number)
            store.enter_phase(name, run, "MAP", number)
            store.end_run(name, run, "succeeded", number + 1.0, counts={"items": 1, "bytes": 2})
    figures = {}
    for what, ask in {
        "history, all 10,000": lambda: scheduler.history(),
        "history, newest 50": lambda: scheduler.history(limit=50),
        "history of one job": lambda: scheduler.history("j7"),
        "queue with estimates": lambda: (scheduler.queue(), scheduler.estimates()),
    }.items():
        began = time.process_time()
        assert ask()
        figures[what] = round((time.process_time() - began) * 1000, 1)
    print(f"milliseconds of processor time: {figures}")
    assert scheduler.estimate_next_runtime("j7")["median_seconds"] == 1.0
