"""User code that forks: children that end by themselves do no harm, those that come back never speak for the task."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import MRCORE
from oracle import bag
from run_task import Failed, Task

from mrcore.engine.inputs import plan_bundles

LINES = 3000  # several looks of 512, and several spills and batches
FORK = """
import multiprocessing, os, sys
from mrcore import task

def fork(n, every=700):
    "True in a child that was forked for one line in so many; its parent waits for it, as one that wants no zombie."
    if n % every:
        return False
    pid = os.fork()
    if pid == 0:
        return True
    os.waitpid(pid, 0)
    return False

def raises(n):
    raise ValueError("the child's own trouble")
"""
MAPS = {
    "returns items": "def m(line, aux):\n    n = int(line)\n    return [('child', n)] if fork(n) else [(n, n)]",
    "returns nothing, again and again": "def m(line, aux):\n    n = int(line)\n"
    "    return [] if fork(n, 50) else [(n, n)]",
    "raises": "def m(line, aux):\n    n = int(line)\n    return raises(n) if fork(n) else [(n, n)]",
    "exits by an exception": "def m(line, aux):\n    n = int(line)\n    if fork(n): sys.exit(0)\n    return [(n, n)]",
    "is interrupted": "def m(line, aux):\n    n = int(line)\n"
    "    if fork(n): raise KeyboardInterrupt\n    return [(n, n)]",
    "goes on in a generator": "def m(line, aux):\n    n = int(line)\n    child = fork(n)\n"
    "    for _ in range(5000 if child else 1):\n"
    "        yield ('child' if child else n), n",
    "ends as it should": "def m(line, aux):\n    n = int(line)\n    if fork(n): os._exit(0)\n    return [(n, n)]",
    "asks where it is": "def m(line, aux):\n    n = int(line)\n    before = task.offset\n"
    "    if fork(n): os._exit(task.offset != before)\n    return [(n, n)]",
    "is a worker of multiprocessing": "def m(line, aux):\n    n = int(line)\n    if n % 1000 == 0:\n"
    "        with multiprocessing.get_context('fork').Pool(2) as pool:\n            n = pool.map(abs, [n])[0]\n"
    "    return [(n, n)]",
}  # fmt: skip
REDUCES = {
    "returns items": "def r(group, aux):\n    n = group[0][0]\n    return [('child', 1)] if fork(n) else group",
    "raises": "def r(group, aux):\n    return raises(1) if fork(group[0][0]) else group",
    "goes on in a generator": "def r(group, aux):\n    child = fork(group[0][0])\n"
    "    for _ in range(3000 if child else 1):\n"
    "        yield ('child', 1) if child else group[0]",
}
PLAIN_MAP = "def m(line, aux): return [(int(line), int(line))]\n"
PLAIN_REDUCE = "def r(group, aux): return group\n"
EXPECTED = bag((n, n) for n in range(LINES))


@pytest.fixture
def numbers(tmp_path: Path) -> Path:
    path = tmp_path / "numbers"
    path.write_text("".join(f"{n}\n" for n in range(LINES)))
    return path


@pytest.mark.parametrize("reducing", [True, False], ids=["map and reduce", "map only"])
@pytest.mark.parametrize("child", MAPS)
def test_a_child_of_a_map_function_adds_and_replaces_nothing(
    tmp_path: Path, numbers: Path, child: str, reducing: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    more = {"max_number_dumped_items_shuffler": 900} if reducing else {}
    work = Task(tmp_path, FORK + MAPS[child], PLAIN_REDUCE if reducing else "", **more)
    result = work.map(plan_bundles(work.files([numbers]), 1))
    assert result["counters"]["lines"] == LINES and result["counters"]["items"] == LINES
    if reducing:
        result = work.reduce()
    assert bag(work.items(result)) == EXPECTED
    ended = "came back from it and is ended" in capfd.readouterr().err
    assert ended == (child not in ("ends as it should", "asks where it is", "is a worker of multiprocessing"))


@pytest.mark.parametrize("child", REDUCES)
def test_a_child_of_a_reduce_function_adds_and_replaces_nothing(tmp_path: Path, numbers: Path, child: str) -> None:
    work = Task(tmp_path, PLAIN_MAP, FORK + REDUCES[child], max_number_dumped_items_reducer=100)
    work.map(plan_bundles(work.files([numbers]), 1))
    result = work.reduce()
    assert bag(work.items(result)) == EXPECTED and result["counters"]["groups"] == LINES


def test_a_child_of_a_combiner_writes_into_no_run(tmp_path: Path, numbers: Path) -> None:
    combiner = FORK + "def c(group, aux):\n    return [(group[0][0], -1)] if fork(group[0][0], 500) else group\n"
    work = Task(tmp_path, PLAIN_MAP, combiner + PLAIN_REDUCE, combine_function_name="c")
    work.map(plan_bundles(work.files([numbers]), 1))
    assert bag(work.items(work.reduce())) == EXPECTED


def test_a_child_that_is_forked_while_a_project_is_loaded_does_not_work(tmp_path: Path, numbers: Path) -> None:
    work = Task(tmp_path, FORK + "fork(0)\n" + PLAIN_MAP, PLAIN_REDUCE)
    work.map(plan_bundles(work.files([numbers]), 1))
    assert bag(work.items(work.reduce())) == EXPECTED


def test_a_child_cannot_fill_its_parent_s_disk_list(tmp_path: Path, numbers: Path) -> None:
    fills = "def r(group, lists):\n    out, _ = lists\n    out.extend(group * 10)\n    if fork(group[0][0], 1000):\n"
    fills += "        try: out.extend(group * 10)\n        finally: os._exit(0)\n    return out\n"
    work = Task(
        tmp_path, PLAIN_MAP.replace("int(line), int", "int(line) % 3, int"), FORK + fills, disk_based_output=True
    )
    work.map(plan_bundles(work.files([numbers]), 1))
    assert bag(work.items(work.reduce())) == bag((n % 3, n) for n in range(LINES) for _ in range(10))


def test_the_parent_s_own_failure_is_told_as_ever(tmp_path: Path, numbers: Path) -> None:
    both = "def m(line, aux):\n    fork(int(line), 2999)\n    if line == '2999\\n': raises(1)\n    return []\n"
    work = Task(tmp_path, FORK + both, PLAIN_REDUCE)
    with pytest.raises(Failed, match="the child's own trouble"):
        work.map(plan_bundles(work.files([numbers]), 1))
    assert [message["event"] for message in work.messages].count("failed") == 1


@pytest.mark.parametrize("ending", ["sys.exit(0)", "raises(1)", "return [('child', 1)]"])
def test_a_trial_is_not_doubled_by_a_child(tmp_path: Path, numbers: Path, ending: str) -> None:
    project = tmp_path / "p"
    project.mkdir()
    code = f"def m(line, aux):\n    n = int(line)\n    if fork(n): {ending}\n    return [(n, n)]\n"
    (project / "map_functions.py").write_text(FORK + code)
    (project / "reduce_functions.py").write_text(PLAIN_REDUCE)
    done = subprocess.run(
        [MRCORE, "try", str(project), "--map", "m", "--reduce", "r", str(numbers)], capture_output=True, text=True
    )
    items: Callable[[str], list[list[int]]] = lambda out: [json.loads(line) for line in out.splitlines()]  # noqa: E731
    assert done.returncode == 0, done.stderr
    assert bag(items(done.stdout)) == EXPECTED
