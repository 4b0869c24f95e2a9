"""What a task says of itself while it works: how far it is, counters and status of the user's function."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from clusters import TestCluster
from conditions import wait_until
from hypothesis import given
from hypothesis import strategies as st
from run_task import Failed, Task

from mrcore import task
from mrcore.engine.inputs import plan_bundles
from mrcore.messages.kinds import convert
from mrcore.messages.tasks import Progressed
from mrcore.text import one_line

HEAD = "import pathlib, time\nfrom mrcore import task\n"
WAIT = "        while not GATE.exists():\n            time.sleep(0.01)\n"
REDUCE = "def r(group, aux):\n    return [(group[0][0], len(group))]\n"


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    task.forget()
    yield
    task.forget()


def tasked(folder: Path, map_code: str, reduce_code: str = "", **job: Any) -> Task:
    """A task whose functions may wait for the file GATE."""
    head = f"{HEAD}GATE = pathlib.Path({str(folder / 'gate')!r})\n"
    return Task(folder, head + map_code, head + reduce_code if reduce_code else "", **job)


def until(work: Task, order: Any, folder: Path, event: Any) -> Any:
    """Carry out an order, open the gate once `event` of a progress message holds, and give it with the result."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(order()))
    thread.start()
    try:
        told = wait_until(lambda: next((m for m in work.messages if m["event"] == "progress" and event(m)), None), 60)
    finally:
        (folder / "gate").touch()
        thread.join(60)
    return told, results[0]


def test_a_function_that_takes_long_for_one_line_lets_its_status_through(tmp_path: Path) -> None:
    code = (
        "def m(line, aux):\n    task.count('lines')\n    task.status('at ' + line)\n"
        "    if line == 'line 700\\n':\n" + WAIT + "    return [(line, 1)]\n"
    )
    work = tasked(tmp_path, code, REDUCE)
    content = "".join(f"line {n}\n" for n in range(1000))
    (tmp_path / "in.txt").write_text(content)
    (bundle,) = plan_bundles(work.files([tmp_path / "in.txt"]), 1)
    told, result = until(
        work, lambda: work.map([bundle]), tmp_path, lambda event: event.get("status") == "at line 700\\n"
    )
    assert (told["phase"], told["records"], told["user_counters"]) == ("MAP", 701, {"lines": 701})
    assert told["bytes"] == content.index("line 701")
    assert result["user_counters"] == {"lines": 1000} and result["counters"]["lines"] == 1000
    assert [m["event"] for m in work.messages][-1] == "done", "nothing follows the result"


def test_a_reduce_task_tells_what_the_merge_has_read(tmp_path: Path) -> None:
    code = "def r(group, aux):\n    task.count(group[0][0][:1])\n    if group[0][0] == 'k0500':\n" + WAIT
    work = tasked(tmp_path, "def m(line, aux):\n    return [(line.strip(), 1)]\n", code + "    return []\n")
    (tmp_path / "in.txt").write_text("".join(f"k{n:04}\n" for n in range(5000)) * 2)
    work.map(plan_bundles(work.files([tmp_path / "in.txt"]), 1))
    told, result = until(work, work.reduce, tmp_path, lambda event: event["phase"] == "REDUCE")
    assert told["records"] == 1002 and told["user_counters"] == {"k": 501}
    assert 0 < told["bytes"] < sum(run["bytes"] for run in work.runs)
    assert result["user_counters"] == {"k": 5000}


def test_counts_of_a_killed_try_do_not_count(tmp_path: Path) -> None:
    code = (
        "import os, signal\ndef m(line, aux):\n    task.count('lines')\n    task.count('bytes', len(line))\n"
        "    if line == '7000\\n' and not GATE.exists():\n        GATE.touch()\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n    return [(line, 1)]\n"
    )
    work = tasked(tmp_path, code, REDUCE)
    content = "".join(f"{n}\n" for n in range(10_000))
    (tmp_path / "in.txt").write_text(content)
    bundles = plan_bundles(work.files([tmp_path / "in.txt"]), 1)
    with pytest.raises(KeyError):  # it says nothing
        work.map(bundles)
    assert (tmp_path / "gate").exists()
    assert work.map(bundles)["user_counters"] == {"lines": 10_000, "bytes": len(content)}


MAP_AND_DIE = """
import os, signal
from mrcore import task
from gates import gate

def m(line, auxiliary_data):
    task.count("lines")
    task.count("bytes", len(line))
    if line.startswith("GATE"):
        gate("map")
    return [(line[:2], 1)]
"""
REDUCE_AND_DIE = """
from mrcore import task
from gates import gate

def r(group, auxiliary_data):
    task.count("groups")
    task.count("values", len(group))
    if group[0][0] == "GA":
        gate("reduce")
    return [(group[0][0], len(group))]
"""


@pytest.mark.slow
def test_counters_of_a_run_are_exact_though_its_tasks_are_killed(tmp_path: Path) -> None:
    lines = [f"{n % 60:02} {n}\n" for n in range(30_000)]
    lines[15_000] = "GATE\n"
    with TestCluster(tmp_path, 1, 2) as made:
        made.write_inputs({"lines.txt": "".join(lines)})
        (tmp_path / "projects/gated/map_functions.py").write_text(MAP_AND_DIE)
        (tmp_path / "projects/gated/reduce_functions.py").write_text(REDUCE_AND_DIE)
        job = made.job(map_function_name="m", reduce_function_name="r", number_of_partitions=3)
        manifests: list[Any] = []
        thread = threading.Thread(target=lambda: manifests.append(made.run(job)))
        for gate in ("map", "reduce"):
            made.close_gate(gate)
        thread.start()
        for gate in ("map", "reduce"):
            for pid in made.waiting(gate):
                os.kill(pid, signal.SIGKILL)  # in the middle of its work, after thousands of counts
                (made.gates / f"{gate}-{pid}").unlink()
            made.waiting(gate)
            made.open_gate(gate)
        thread.join(60)
        (manifest,) = manifests
    counted = {"lines": len(lines), "bytes": sum(map(len, lines)), "groups": 61, "values": len(lines)}
    assert manifest["counts"]["counters"] == counted and manifest["counts"]["task_deaths"] == 2


def test_the_101st_name_of_a_counter_fails_the_job_by_name(tmp_path: Path) -> None:
    work = tasked(tmp_path, "def m(line, aux):\n    task.count('name ' + line.strip())\n    return []\n", REDUCE)
    (tmp_path / "in.txt").write_text("".join(f"{n}\n" for n in range(101)))
    with pytest.raises(Failed, match=r"map function m failed .*task.count\('name 100'\): a task has at most 100 names"):
        work.map(plan_bundles(work.files([tmp_path / "in.txt"]), 1))


def test_try_prints_the_counters_at_its_end(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    code = "from mrcore import task\ndef m(line, aux):\n    task.count('a word', 600)\n    return [(line, 1)]\n"
    (tmp_path / "p/map_functions.py").write_text(code)
    (tmp_path / "in.txt").write_text("x\ny\n")
    command = [str(Path(sys.executable).with_name("mrcore")), "try", str(tmp_path / "p"), "--map", "m"]
    done = subprocess.run([*command, str(tmp_path / "in.txt")], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr == "counter a word: 1,200\n" and len(done.stdout.splitlines()) == 2


def test_counters_are_bounded_and_clean() -> None:
    for n in range(99):
        task.count(str(n), n)
    task.count("\x1b[31m" + "x" * 1000)
    with pytest.raises(ValueError, match="at most 100 names"):
        task.count("one more")
    task.count("5", -7)
    assert task.counters["5"] == -2 and len(task.counters) == 100
    assert all(len(name) <= 200 and name.isprintable() for name in task.counters)
    task.status("é\n\x1b" * 1000)
    assert len(task.said) <= 500 and task.said.isprintable()


def test_a_sum_beyond_what_a_message_holds_is_refused() -> None:
    task.count("much", 1 << 62)
    with pytest.raises(ValueError, match=r"task.count\('much'\): the sum is beyond"):
        task.count("much")
    with pytest.raises(TypeError):
        task.count("much", 1.5)  # type: ignore[arg-type]
    assert task.counters == {"much": 1 << 62}


def test_counts_of_threads_are_exact() -> None:
    def many() -> None:
        for _ in range(50_000):
            task.count("n")

    threads = [threading.Thread(target=many) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert task.counters == {"n": 200_000}


@given(st.text(), st.text())
def test_what_a_task_counts_and_says_passes_as_a_message_and_what_it_would_clean_does_not(name: str, said: str) -> None:
    sent = {"phase": "MAP", "bytes": 0, "records": 0}
    try:
        task.count(name)
        task.status(said)
        told = sent | {"user_counters": task.counters, "status": task.said}
        assert convert(Progressed, told).user_counters == task.counters
    finally:
        task.forget()
    if one_line(name) != name and len(name) <= 200 and "\\" not in name:
        with pytest.raises(ValueError, match="user_counters"):
            convert(Progressed, sent | {"user_counters": {name: 1}})
