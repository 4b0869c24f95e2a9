"""Profiles and heavy groups: what a task's result says of where its time and its values went."""

from __future__ import annotations

import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest
from run_task import Task

from mrcore.engine import profile
from mrcore.engine.inputs import plan_bundles
from mrcore.engine.profile import OTHERS, Sampler
from mrcore.messages.kinds import decode
from mrcore.messages.tasks import TaskResult

SPIN = (
    "import time\ndef spin(seconds):\n    end = time.thread_time() + seconds\n    while time.thread_time() < end:\n"
    "        pass\n"
)
MAP = SPIN + "def m(line, aux):\n    spin(0.01)\n    return [(line.strip(), 1)]\n"
REDUCE = SPIN + "def r(group, aux):\n    spin(0.01)\n    return []\n"


def bundles(work: Task, folder: Path, content: str) -> Any:
    (folder / "in.txt").write_text(content)
    return plan_bundles(work.files([folder / "in.txt"]), 1)


def test_a_profile_says_where_map_and_reduce_spend_their_time(tmp_path: Path) -> None:
    work = Task(tmp_path, MAP, REDUCE, profile=True)
    mapped = work.map(bundles(work, tmp_path, "".join(f"{n}\n" for n in range(100))))
    results = {"map": mapped, "reduce": work.reduce()}
    for kind, root in (("map", "Process._map (mrcore/engine/process.py:"), ("reduce", "Process._reduce (")):
        stacks = decode(TaskResult, msgspec.json.encode(results[kind])).profile
        spinning = sum(count for stack, count in stacks.items() if f";spin ({kind}_functions.py:2)" in stack)
        assert spinning > 20 and spinning > 0.6 * sum(stacks.values()), stacks
        (hottest,) = [stack for stack, count in stacks.items() if count == max(stacks.values())]
        assert hottest.startswith(root) and f";{kind[0]} ({kind}_functions.py:6)" in hottest


def test_waiting_and_calls_of_the_system_have_their_true_shares(tmp_path: Path) -> None:
    code = SPIN + (
        "import os\ndef look():\n    os.stat('/')\ndef rest():\n    time.sleep(0.03)\n"
        "def m(line, aux):\n    for _ in range(10):\n        spin(0.002)\n        look()\n    rest()\n    return []\n"
    )
    work = Task(tmp_path, code, reduce_function_name=None, profile=True)
    stacks = work.map(bundles(work, tmp_path, "line\n" * 60))["profile"]
    counts = {name: sum(n for stack, n in stacks.items() if f";{name} (" in stack) for name in ("spin", "look", "rest")}
    assert counts["spin"] > 40 and counts["rest"] > 40 and counts["look"] < 0.2 * counts["spin"], counts


def test_without_profile_nothing_is_sampled(tmp_path: Path) -> None:
    code = "import threading\ndef m(line, aux):\n    return [(each.name, 1) for each in threading.enumerate()]\n"
    for more in ({}, {"profile": True}):
        (folder := tmp_path / str(len(more))).mkdir()
        work = Task(folder, code, reduce_function_name=None, **more)
        if not more:
            del work.job["profile"]  # a job of an earlier release
        result = work.map(bundles(work, folder, "line\n"))
        assert bool("profile" in dict(work.items(result))) == bool(more)


def test_deep_and_many_stacks_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "MAX_STACKS", 8)
    names = {f"f{n};é" + "x" * 200: n for n in range(20)}
    with Sampler() as sampler:
        for name in names:
            code = compile(
                f"def f(left):\n    return f(left - 1) if left else look()\nf({150 if '1' in name else 3})",
                name,
                "exec",
            )
            exec(code, {"look": lambda: sampler._take(sys._getframe())})
    stacks = sampler.stacks()
    assert len(stacks) <= 8 and stacks[OTHERS] >= 13
    for stack in stacks:
        assert len(stack) <= 10_000 and stack.count(";") <= 99 and all(len(frame) <= 99 for frame in stack.split(";"))


def test_rare_stacks_are_counted_together_where_a_profile_would_be_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "MAX_PROFILE_BYTES", 300)
    with Sampler() as sampler:
        for number in range(20):
            code = compile("look()", f"file-{number}", "exec")
            for _ in range(20 - number):
                exec(code, {"look": lambda: sampler._take(sys._getframe())})
    stacks = sampler.stacks()
    assert stacks[OTHERS] > 0 and sum(stacks.values()) >= 210
    assert any("file-0" in stack for stack in stacks) and not any("file-19" in stack for stack in stacks)


@pytest.mark.parametrize("keys", [{}, {"disk_based_input": True}], ids=str)
def test_the_groups_with_the_most_values_are_named(tmp_path: Path, keys: Any) -> None:
    draw = random.Random(7)
    words = [f"w{min(int(draw.expovariate(0.2)), 60)}" for _ in range(5000)] + [f"once{n}" for n in range(100)]
    work = Task(
        tmp_path, "def m(line, aux):\n    return [(line.strip(), 1)]\n", "def r(group, aux):\n    return []\n", **keys
    )
    work.map(bundles(work, tmp_path, "".join(f"{word}\n" for word in words)))
    heavy = [(group["key"], group["values"]) for group in work.reduce()["heavy"]]
    counts = Counter(map(repr, words))
    assert [values for _, values in heavy] == sorted(counts.values(), reverse=True)[:10]
    assert all(counts[key] == values for key, values in heavy)


def test_of_groups_with_one_value_none_is_heavy(tmp_path: Path) -> None:
    work = Task(tmp_path, "def m(line, aux):\n    return [(line, 1)]\n", "def r(group, aux):\n    return []\n")
    work.map(bundles(work, tmp_path, "a\nb\nc\n"))
    assert "heavy" not in work.reduce() or not work.reduce()["heavy"]
