"""What a task leaves behind, told as it is, whatever it wrote over it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mrcore import task
from mrcore.messages.kinds import convert
from mrcore.messages.tasks import Died, TaskIdentity
from mrcore.node import cluster_server
from mrcore.node.traces import MAX_DUMP_BYTES, Traces
from mrcore.system import procfs
from mrcore.system.logs import BoundedLog

DUMP = """Fatal Python error: Segmentation fault

Thread 0x1 (most recent call first):
  File "/usr/lib/threading.py", line 7 in wait

Current thread 0x2 (most recent call first):
  File "/p/map_functions.py", line 4 in count
  File "/m/mapper.py", line 5 in map

Extension modules: ujson (total: 1)
"""
WHO = TaskIdentity(job="j", run=1, phase="MAP", task=0, try_=1)


@pytest.fixture
def traces(tmp_path: Path) -> Iterator[Traces]:
    made = Traces("j/1 map-0-1", BoundedLog(tmp_path / "log", 1 << 20))
    yield made
    made.close()
    task.in_hand("")
    vars(task)["_note"] = None


def told(traces: Traces, number: int | None) -> tuple[Died, dict[str, Any]]:
    end = traces.end(number)
    return cluster_server._died(WHO, end | {"signal": number, "message": "was killed"}, "S_0"), end


def test_of_a_crash_the_error_has_the_stack_of_its_thread_and_the_log_all(traces: Traces, tmp_path: Path) -> None:
    os.write(traces.dump, DUMP.encode())
    os.write(traces.print_to, b"no end of this line")
    died, _ = told(traces, signal.SIGSEGV)
    assert died.stack.splitlines() == [
        "Fatal Python error: Segmentation fault",
        "Current thread 0x2 (most recent call first):",
        '  File "/p/map_functions.py", line 4 in count',
        '  File "/m/mapper.py", line 5 in map',
    ]
    lines = [line.partition(" j/1 map-0-1 | ")[2] for line in (tmp_path / "log").read_text().splitlines()]
    assert lines == ["no end of this line", *DUMP.splitlines()]


def test_a_signal_that_leaves_no_stack_has_none_whatever_is_in_the_file(traces: Traces) -> None:
    os.write(traces.dump, DUMP.encode())
    assert told(traces, signal.SIGKILL)[0].stack == ""


def test_the_file_of_a_stack_cannot_grow(traces: Traces) -> None:
    with pytest.raises(PermissionError):
        for _ in range(MAX_DUMP_BYTES):
            os.write(traces.dump, b"\xff" * 1000)
    with pytest.raises(PermissionError):
        os.ftruncate(traces.dump, 2 * MAX_DUMP_BYTES)
    died, _ = told(traces, signal.SIGSEGV)
    assert len(died.stack) < 5000 and died.stack.encode()


@pytest.mark.parametrize("grown", [0, 1])
def test_the_kernels_count_of_kills_tells_that_memory_was_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grown: int
) -> None:
    counts = iter([5, 5 + grown])
    monkeypatch.setattr(procfs, "oom_kills", lambda: next(counts))
    traces = Traces("j/1 map-0-1", BoundedLog(tmp_path / "log", 1 << 20))
    traces.share()
    task.note_memory(300 << 20, 256 << 20)
    task.in_hand("the heavy thing")
    vars(task)["_note"] = None
    died, _ = told(traces, signal.SIGKILL)
    assert died.oom == bool(grown) and died.in_hand == "the heavy thing"
    assert (died.memory_bytes, died.budget_bytes) == (300 << 20, 256 << 20)
    assert ("probably by the kernel for want of memory" in died.message) == bool(grown)
    assert (
        "it held up to 315 MB, with a budget of 268 MB; it had in hand: the heavy thing; see the log of S_0"
        in died.message
    )


def test_what_user_code_wrote_over_its_note_is_a_message_all_the_same(traces: Traces) -> None:
    traces.share()
    vars(task)["_note"][:] = b"\xff" * task.NOTE_BYTES
    died, _ = told(traces, signal.SIGSEGV)
    assert convert(Died, {"event": "died", "message": died.message} | died.details()) and died.in_hand.isprintable()
