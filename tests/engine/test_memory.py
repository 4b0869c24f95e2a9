"""Memory of real task processes, sampled from outside: at most 1.2 times the budget, whatever the data."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from oracle import read_part
from run_task import Task

from mrcore.engine.inputs import plan_bundles

BUDGET = 48 << 20  # what a server of 64 MiB leaves to its task
LIMIT = 1.2
pytestmark = pytest.mark.timeout(1200)  # machines differ, and nothing timed decides here
SAME = "def r(group, auxiliary):\n    return group\n"
SUM = "def r(group, auxiliary):\n    return [(group[0][0], sum(v for _, v in group))]\n"
LENGTH = "def r(group, auxiliary):\n    return [(next(iter(group))[0], sum(1 for _ in group))]\n"


def numbers(count: int) -> Callable[[Path], None]:
    return lambda path: path.write_text("".join(f"{n}\n" for n in range(count))) and None


def carry_out(folder: Path, make: Callable[[Path], None], emit: str, reduce: str, **job: Any) -> tuple[Task, Any]:
    """Map and reduce one file in child processes; checks their peaks; gives the task and its last result."""
    path = folder / "input"
    make(path)
    code = f"def m(line, auxiliary):\n    n = int(line) if line[:-1].isdigit() else 0\n    return {emit}\n"
    work = Task(folder, code, reduce, **job)
    work.memory_bytes = BUDGET
    result = work.map(plan_bundles(work.files([path]), 1))
    if reduce:
        result = work.reduce()
    path.unlink()
    for phase, peak in work.peaks.items():
        print(f"{phase}: {peak / BUDGET:.2f} of the budget, {len(work.runs)} runs")
        assert 0 < peak <= LIMIT * BUDGET, f"{phase} took {peak / BUDGET:.2f} times its budget"
    return work, result


def records(result: Any) -> int:
    return sum(int(part["records"]) for part in result["parts"])


def test_values_that_jump_from_50_bytes_to_1_megabyte(tmp_path: Path) -> None:
    emit = "[(n, 'x' * (1_000_000 if n > 7800 or n % 400 == 0 else 50))]"
    work, result = carry_out(tmp_path, numbers(8000), emit, SAME)
    assert records(result) == 8000 and len(work.runs) > 3


def test_large_keys(tmp_path: Path) -> None:
    work, result = carry_out(tmp_path, numbers(600), "[(line + 'k' * 300_000, 1)]", SAME)
    assert records(result) == 600 and len(work.runs) > 3


def test_large_outputs(tmp_path: Path) -> None:
    emit_many = "def r(group, auxiliary):\n    for n in range(50):\n        yield group[0][0], [[n] * 50] * 500\n"
    _, result = carry_out(tmp_path, numbers(10), "[(n, 1)]", emit_many)
    assert records(result) == 500
    _, result = carry_out(tmp_path, numbers(300), "[(n, [[1], [2], [3]] * 3000)]", "")
    assert records(result) == 300


def test_cycles_that_user_code_leaves(tmp_path: Path) -> None:
    cycle = "(lambda held: (held.append(held), [(n, 1)])[1])([line * 200])"
    _, result = carry_out(tmp_path, numbers(80_000), cycle, "")
    assert records(result) == 80_000


def test_one_long_line_after_the_other(tmp_path: Path) -> None:
    def make(path: Path) -> None:
        path.write_text("".join(f"{n} " * 300_000 + "\n" for n in range(60)))

    _, result = carry_out(tmp_path, make, "[(line[:9], line)]", SAME)
    assert records(result) == 60


@pytest.mark.slow
@pytest.mark.parametrize("partitioner", ["hash", "range"])
def test_sort_of_ten_times_the_budget(tmp_path: Path, partitioner: str) -> None:
    def make(path: Path) -> None:
        draw = random.Random(1)
        with path.open("w") as stream:
            for _ in range(10 * BUDGET // 100_000):
                text = draw.randbytes(49_500).hex()
                stream.write("".join(text[start : start + 99] + "\n" for start in range(0, 99_000, 99)))

    work, result = carry_out(tmp_path, make, "[(line[:10], line[10:])]", SAME, partitioner=partitioner)
    assert records(result) == 10 * BUDGET // 100_000 * 1000
    assert 50 < len(work.runs) < 200
    previous = ""
    for part in result["parts"]:
        for key, _ in read_part(work.layout.parts_dir("j", 1) / part["name"]):
            assert previous <= key
            previous = key


@pytest.mark.slow
@pytest.mark.parametrize("sort_values", [False, True])
def test_one_giant_group_on_disk(tmp_path: Path, sort_values: bool) -> None:
    job = {"disk_based_input": True, "sort_values": sort_values}
    work, result = carry_out(tmp_path, numbers(2_000_000), "[('k', n * 7919 % 2000003)]", LENGTH, **job)
    assert list(work.items(result)) == [("k", 2_000_000)] and len(work.runs) > 2


@pytest.mark.slow
def test_one_giant_group_with_a_combiner(tmp_path: Path) -> None:
    job = {"combine_function_name": "r"}
    work, result = carry_out(tmp_path, numbers(2_000_000), "[('k', 1)] * 3", SUM, **job)
    assert list(work.items(result)) == [("k", 6_000_000)]


@pytest.mark.slow
@pytest.mark.parametrize("combining", [False, True])
def test_many_distinct_keys(tmp_path: Path, combining: bool) -> None:
    job = {"combine_function_name": "r"} if combining else {}
    work, result = carry_out(tmp_path, numbers(1_000_000), "[(line, 1), (line[:-2], 1)]", SUM, **job)
    assert records(result) == 1_100_000 and len(work.runs) > 5  # the line ends of the former make them different


@pytest.mark.slow
@pytest.mark.parametrize(
    "emit",
    [
        "[(n % 5000, {'a': n, 'b': [n], 'c': {}})]",
        "[((n % 7 and line or None, n % 3 and n or line), n)]",
        "[((line, n), 'é😀' * 9)]",
    ],
    ids=["dict values", "mixed keys", "wide text"],
)
def test_small_texts_that_are_large_objects(tmp_path: Path, emit: str) -> None:
    work, result = carry_out(tmp_path, numbers(400_000), emit, SAME)
    assert records(result) == 400_000 and len(work.runs) > 5
