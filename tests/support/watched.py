"""A job that computes for some seconds, and two processes beside it: a Runner, and one that watches its progress.

`python watched.py run CONFIG [SECONDS]` runs the queue to the end (SECONDS: between two writes of the progress);
`python watched.py watch CONFIG FILE` appends to FILE, as JSON lines, every state of `Scheduler.progress` that it sees
and how old it was, until its standard input ends.
"""

from __future__ import annotations

import json
import os
import select
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from mrcore.queue import progress
from mrcore.queue.runner import Runner
from mrcore.queue.scheduler import Scheduler
from mrcore.settings.config import load_settings

LINE = "word{0} word{1} word{2} and so on, until the line is as long as lines are\n"
WORK = """
def work(rounds):
    number = 7
    for _ in range(rounds):
        number = number * number % 7919
    return number
"""
MAP = (
    WORK
    + """
def slow_words(line, auxiliary_data):
    for word in line.split()[:3]:
        yield word, 1 if work({rounds}) is not None else 0
"""
)
REDUCE = (
    WORK
    + """
def slow_sum(group, auxiliary_data):
    yield group[0][0], sum(value for _, value in group if work({rounds}) is not None)
"""
)


def write_project(projects: Path, map_rounds: int, reduce_rounds: int) -> None:
    """Write the project `busy`, whose functions compute so many rounds for a word."""
    folder = projects / "busy"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "map_functions.py").write_text(MAP.replace("{rounds}", str(map_rounds)))
    (folder / "reduce_functions.py").write_text(REDUCE.replace("{rounds}", str(reduce_rounds)))


def text(lines: int, words: int, first: int) -> str:
    """Return lines with three words each, of `words` different ones."""
    return "".join(
        LINE.format(*((3 * number + at) * 7919 % words for at in range(3))) for number in range(first, first + lines)
    )


def job(**keys: Any) -> dict[str, Any]:
    """Return a job of the project."""
    names = {"map_function_name": "slow_words", "reduce_function_name": "slow_sum"}
    base = {"job_name": "busy", "project_name": "busy", "input_dirs": ["inputs/busy"], "run_once": True}
    return base | names | keys


def watch(config: str, file: str) -> None:
    """Append what is seen to a file, each state once."""
    scheduler, last = Scheduler(load_settings(config)), 0.0
    with open(file, "a") as out:
        while not select.select([0], [], [], 0.1)[0]:
            seen = scheduler.progress()
            if seen:
                age = time.time() - seen.updated
                row = {"age": age, "at": time.time()} | (msgspec.to_builtins(seen) if seen.updated != last else {})
                out.write(json.dumps(row) + "\n")
                out.flush()
                last = seen.updated


if __name__ == "__main__":
    if sys.argv[1] == "watch":
        watch(*sys.argv[2:])
    else:
        progress.WRITE_SECONDS = float(sys.argv[3]) if len(sys.argv) > 3 else progress.WRITE_SECONDS
        Runner(load_settings(sys.argv[2])).run(once=True)
        usage = os.times()
        print(json.dumps({"cpu_seconds": usage.user + usage.system}))
