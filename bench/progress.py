"""What progress costs and how true it is: the age of what is read, the error of the time that is left, CPU.

`python bench/progress.py [--seconds 60] [--rounds 3]`: a job that computes for so long, on a local cluster of two nodes
with a server each, run by a Runner in a process of its own and watched from here. It runs twice, so that the second
run has an earlier one to learn from. Then shorter runs, in turn with and without any word of progress from the master,
for the CPU of the Runner; and what 96 servers that report once a second cost the master, without a cluster.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mrcore.cluster import coordinator
from mrcore.launchers import local
from mrcore.messages.tasks import Bundle, Progressed, RunIdentity, Split, TaskIdentity
from mrcore.queue import forecast, progress
from mrcore.queue.runner import Runner
from mrcore.queue.scheduler import Scheduler
from mrcore.settings.config import load_settings
from mrcore.state.board import Board
from mrcore.state.progress import Progress
from mrcore.state.store import Store

HERE = Path(__file__).resolve().parent
LINES, WORDS = 100_000, 5_000
NEVER_SECONDS = 1e9
WORK = "def work():\n    number = 7\n    for _ in range({rounds}):\n        number = number * number % 7919\n\n"
MAP = WORK + "def busy_words(line, auxiliary_data):\n    work()\n    return [(word, 1) for word in line.split()]\n"
REDUCE = WORK + (
    "def busy_sum(group, auxiliary_data):\n    for _ in group:\n        work()\n"
    "    return [(group[0][0], sum(value for _, value in group))]\n"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="about how long the watched job takes")
    parser.add_argument("--rounds", type=int, default=3, help="pairs of runs for the CPU")
    parser.add_argument("--folder", type=Path, default=HERE.parent / ".mrcore" / "bench")
    parser.add_argument("--runner", nargs=2, metavar=("CONFIG", "SECONDS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.runner:
        return run_queue(options.runner[0], float(options.runner[1]))
    cost_of_many_servers(options.folder / f"many-{os.getpid()}")
    home = options.folder / f"progress-{os.getpid()}"
    address = f"127.{101 + os.getpid() // 250 % 100}.{1 + os.getpid() % 250}.1"
    settings = local.configure(home, nodes=2, servers=1, address=address)
    try:
        local.start_cluster(settings)
        return measure(home, options.seconds, options.rounds)
    finally:
        local.kill_cluster(settings)
        shutil.rmtree(home, ignore_errors=True)


def run_queue(config: str, seconds: float) -> int:
    """Be the Runner, with a word of progress once in so many seconds; print the CPU that it took."""
    progress.WRITE_SECONDS = coordinator.PROGRESS_SECONDS = seconds
    Runner(load_settings(config)).run(once=True)
    usage = os.times()
    print(usage.user + usage.system)
    return 0


def measure(home: Path, seconds: float, rounds: int) -> int:
    config = home / "config.json"
    config.write_text(json.dumps({"home": str(home), "projects_dir": str(home / "projects")}))
    settings = load_settings(config)
    scheduler = Scheduler(settings)
    for number, node in enumerate(settings.nodes):
        folder = node.layout.base_dir / "inputs" / "busy"
        folder.mkdir(parents=True)
        words = ((number * LINES + at) * 7919 % WORDS for at in range(LINES))
        (folder / "text").write_text("".join(f"word{word} and{word % 7} {'x' * 90}\n" for word in words))
    for name, length in (("long", seconds), ("short", seconds / 4)):
        write_project(home / "projects" / name, length)
    for which in ("first run", "second run"):
        report(which, *watched(scheduler, config, "long"))
    cpu: dict[float, list[float]] = {progress.WRITE_SECONDS: [], NEVER_SECONDS: []}
    for _ in range(rounds):
        for pause in cpu:
            cpu[pause].append(watched(scheduler, config, "short", pause)[1])
    with_, without = (statistics.median(some) for some in cpu.values())
    print(f"CPU of the Runner, runs of about {seconds / 4:.0f} s, median of {rounds}: {with_:.2f} s with progress, "
          f"{without:.2f} s without, ratio {with_ / without:.3f}")  # fmt: skip
    return 0


def write_project(folder: Path, seconds: float) -> None:
    """Write functions that take about so long in all, two thirds of it for MAP, if there is a core for each server."""
    began, sample = time.process_time(), 200_000
    exec(WORK.format(rounds=sample) + "work()", {})
    per_round = (time.process_time() - began) / sample
    folder.mkdir(parents=True)
    share = {"map": 0.6, "reduce": 0.3 / 3}  # of the time; each line is three words
    for name, text in (("map", MAP), ("reduce", REDUCE)):
        (folder / f"{name}_functions.py").write_text(text.format(rounds=int(share[name] * seconds / LINES / per_round)))


def watched(
    scheduler: Scheduler, config: Path, project: str, pause: float = progress.WRITE_SECONDS
) -> tuple[list[tuple[float, Progress]], float]:
    """Run the job; return what was seen of it, with the time when it was read, and the Runner's CPU seconds."""
    job = {"job_name": project, "project_name": project, "input_dirs": ["inputs/busy"], "run_once": True}
    functions = {"map_function_name": "busy_words", "reduce_function_name": "busy_sum"}
    scheduler.submit_job(job | functions)
    command = [sys.executable, str(Path(__file__)), "--runner", str(config), str(pause)]
    seen: list[tuple[float, Progress]] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as runner:
        try:
            while runner.poll() is None:
                if now := scheduler.progress():
                    seen.append((time.time(), now))
                time.sleep(0.1)
        finally:
            runner.kill()  # which has ended, unless we are interrupted
        assert runner.stdout
        cpu_seconds = float(runner.stdout.read())
    (run,) = scheduler.history(project, 1)
    assert run["state"] == "succeeded", run
    return seen, cpu_seconds


def report(which: str, seen: list[tuple[float, Progress]], cpu_seconds: float) -> None:
    """Print the age of what was read, and how wrong the time that is left was, a third and two thirds through."""
    begin, end = seen[0][1].started, seen[-1][0]
    errors = []
    for share in (1 / 3, 2 / 3):
        at, now = next((at, now) for at, now in seen if at >= begin + share * (end - begin))
        left = None if now.eta_seconds is None else now.eta_seconds - (at - now.updated)
        errors.append("none" if left is None else f"{left / (end - at) - 1:+.0%}")
    distinct = {
        name: len({phase.done for _, now in seen for phase in now.phases if phase.name == name})
        for name in ("MAP", "SORT", "REDUCE")
    }
    age = max(at - now.updated for at, now in seen)
    print(f"{which}: {end - begin:.0f} s, max age {age:.2f} s, CPU of the Runner {cpu_seconds:.2f} s")
    print(f"    error of the time left at 1/3 {errors[0]}, at 2/3 {errors[1]}; different values seen: {distinct}")


def cost_of_many_servers(folder: Path, servers: int = 96, seconds: int = 300) -> None:
    """Print the share of a core that so many reports, a view and a write a second take."""
    names = {f"S_{number}": f"node-{number // 8}" for number in range(servers)}
    bundles = [Bundle(number, [Split("/f", 0, 1 << 26, 1 << 26, 0, 0)]) for number in range(servers)]
    board, store = Board(RunIdentity(job="many", run=1), names, {"all": bundles}, time.time), Store(folder)
    for number, name in enumerate(names):
        identity = TaskIdentity(job="many", run=1, phase="MAP", task=number, try_=1)
        board.start(name, identity, [bundles[number]], None)
    shown, began = forecast.Forecast(), time.process_time()
    for second in range(seconds):
        for event in events(second):
            for name in names:
                board.progressed(name, event)
        seen = board.view()
        left = forecast.seconds_left(seen, [], 0.5)
        shown.show(left, second, second)
        store.set_progress(seen)
    share = (time.process_time() - began) / seconds
    store.close()
    shutil.rmtree(folder)
    print(f"{servers} servers, one report a second of each: {share:.2%} of a core on the master, beside the polls")


def events(second: int) -> Iterator[Progressed]:
    counters: dict[str, Any] = {f"counter {at}": second for at in range(5)}
    yield Progressed(phase="MAP", bytes=second << 17, records=second, status="page 17 of 90", user_counters=counters)


if __name__ == "__main__":
    sys.exit(main())
