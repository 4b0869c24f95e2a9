"""Supervisor and cluster server as real processes over real TLS: orders, events, every way to die, nothing left."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conditions import wait_until
from daemons import ANY_POLL, Listener, living
from task_servers import STANDIN, TaskServer, order

from mrcore.errors import Refused, Unreachable
from mrcore.system import procfs
from mrcore.system.tags import parse_tag


@pytest.fixture
def server(tmp_path: Path) -> Iterator[TaskServer]:
    started = TaskServer(tmp_path)
    yield started
    started.close()


def left_pids(file: Path) -> list[int]:
    return [int(line) for line in file.read_text().split()]


def test_hello_says_who_it_is_and_an_idle_server_has_no_events(server: TaskServer) -> None:
    hello = server.master.call("hello")
    assert hello["name"] == "S_0" and hello["pid"] == server.child() and hello["anonymous_bytes"] > 0
    idle = server.master.call(ANY_POLL, incarnation=hello["incarnation"], after=0, wait_seconds=0)
    assert idle == {"incarnation": hello["incarnation"], "events": []}


def test_a_task_runs_in_its_own_group_within_the_rest_of_the_budget(server: TaskServer) -> None:
    listener, identity = server.start("done")
    started, done = listener.until("started"), listener.until("done")
    assert started["group"] == started["pid"] != server.process.pid
    assert started["memory_bytes"] == pytest.approx(
        (256 << 20) - server.master.call("hello")["anonymous_bytes"], rel=0.05
    )
    assert done["identity"] == identity and done["result"] == {"n": 1}
    wait_until(server.only_server_left)


def test_without_a_number_the_budget_is_a_share_of_the_daemons_own_machine(tmp_path: Path) -> None:
    server = TaskServer(tmp_path, memory_bytes=None, servers=3)
    try:
        listener, _ = server.start("done")
        share = 0.6 * procfs.machine_memory_bytes() / 3
        used = server.master.call("hello")["anonymous_bytes"]
        assert listener.until("started")["memory_bytes"] == pytest.approx(share - used, rel=0.05)
    finally:
        server.close()


def test_it_records_itself_while_it_lives(server: TaskServer) -> None:
    """What the node's agent needs to end it, also where systemd started it."""
    record = server.folder / "node/pids/S_0.json"
    known = json.loads(record.read_text())
    assert known == {"pid": server.process.pid, "start_ticks": procfs.start_ticks(server.process.pid)}
    server.process.terminate()
    assert server.process.wait(10) == 0
    assert not record.exists()


def test_bundles_reach_the_task_in_order_and_stale_ones_are_refused(server: TaskServer) -> None:
    listener, identity = server.start("echo")
    listener.until("want")
    bundle = {"id": 3, "pieces": [["/a", 0, 10, 10, 1, 2]]}
    assert server.master.call("give", identity=identity, bundles=[bundle], no_more=True) == {"given": 1}
    assert listener.until("got")["message"] == {"bundles": [bundle], "no_more": True}
    listener.until("done")
    for stale in (identity, identity | {"try": 2}):
        with pytest.raises(Refused, match="does not run this task"):
            server.master.call("give", identity=stale, bundles=[bundle])


def test_a_large_order_arrives_whole(server: TaskServer) -> None:
    listener, _ = server.start("done", filling="x" * 5_000_000)
    assert listener.until("started")["length"] > 5_000_000
    listener.until("done")


def test_what_a_task_process_finds(server: TaskServer) -> None:
    listener, _ = server.start("look")
    result = listener.until("done")["result"]
    assert result["stdin"] == "" and result["usual"]
    # Beside these that of the listing itself, and the memory for the stack of a crash.
    assert len(set(result["descriptors"]) - {0, 1, 2, result["kept"]}) == 2
    line = wait_until(lambda: re.search(".*printed by the task", server.log.read_text()))
    tag = parse_tag(line[0])
    assert tag and (tag.job, tag.run, tag.task, tag.text) == ("j", 1, "map-0-1", "printed by the task")


def test_breakpoint_without_a_terminal_fails_by_name(server: TaskServer) -> None:
    listener, _ = server.start("breakpoint")
    assert "breakpoint() needs a terminal and S_0 has none" in listener.until("failed")["error"]["message"]


@pytest.mark.parametrize(
    ("act", "status", "number", "text"),
    [
        ("os._exit", 7, None, "ended with exit status 7 without a result"),
        ("sys.exit", 1, None, "ended with exit status 1 without a result"),
        ("raise", 1, None, "ended with exit status 1 without a result"),
        ("signal", None, signal.SIGSEGV, "was killed by SIGSEGV without a result"),
        ("hang up", None, signal.SIGKILL, "without a result"),
        ("garbage", None, signal.SIGKILL, "without a result"),
        ("no event", None, signal.SIGKILL, "without a result"),
    ],
)
def test_a_task_that_ends_without_a_result_died(
    server: TaskServer, act: str, status: int | None, number: int | None, text: str
) -> None:
    listener, identity = server.start(act)
    died = listener.until("died")
    assert (died.get("status"), died.get("signal"), died["identity"]) == (status, number, identity)
    assert text in died["message"] and "S_0" in died["message"]
    if act == "raise":
        assert "ValueError: a fault of the process itself" in server.log.read_text()
    wait_until(server.only_server_left)


def test_a_task_killed_from_outside_died(server: TaskServer) -> None:
    listener, _ = server.start("spin")
    os.kill(listener.until("started")["pid"], signal.SIGKILL)
    assert listener.until("died")["signal"] == signal.SIGKILL


@pytest.mark.parametrize("act", ["done", "os._exit", "hang"])
def test_all_that_a_task_started_ends_with_it(server: TaskServer, tmp_path: Path, act: str) -> None:
    file = tmp_path / "left"
    listener, _ = server.start(act, leave=str(file))
    listener.until("left")
    pids = left_pids(file)
    assert len(pids) == 2
    if act == "hang":
        assert all(map(living, pids))
        assert server.master.call("cancel", job="j", run=1) == {"cancelled": True}
        assert not any(map(living, pids)), "cancel returned before all was gone"
        assert listener.client.call(ANY_POLL, incarnation=listener.incarnation, after=0, wait_seconds=0)["events"] == []
    else:
        listener.until("done" if act == "done" else "died")
    wait_until(lambda: not any(map(living, pids)))
    wait_until(server.only_server_left)


def test_cancel_ends_a_stopped_or_spinning_task_and_the_server_is_usable_at_once(server: TaskServer) -> None:
    for run, (act, stop) in enumerate([("spin", False), ("hang", True)], 1):
        listener, _ = server.start(act, run=run)
        pid = listener.until("started")["pid"]
        if stop:
            os.kill(pid, signal.SIGSTOP)
        assert server.master.call("cancel", job="j", run=run + 7) == {"cancelled": False}
        assert living(pid)
        assert server.master.call("cancel", job="j", run=run) == {"cancelled": True}
        assert not living(pid)
        assert server.master.call("cancel", job="j", run=run) == {"cancelled": False}
    listener, _ = server.start("done", run=3)
    assert listener.until("done")["identity"]["run"] == 3


def test_daemons_that_fork_for_ever_are_caught(server: TaskServer) -> None:
    listener, _ = server.start("fork for ever", chains=3)
    listener.until("forking")
    assert server.master.call("cancel", job="j", run=1) == {"cancelled": True}
    assert server.only_server_left()
    listener, _ = server.start("fork for ever", chains=3, run=2)
    listener.until("forking")
    server.process.terminate()
    assert server.process.wait(9) == 0


def test_newer_orders_replace_and_older_ones_are_refused(server: TaskServer) -> None:
    listener, _ = server.start("hang", run=2, tried=2)
    pid = listener.until("started")["pid"]
    with pytest.raises(Refused, match="older"):
        server.master.call("order", order=order("done", run=1, tried=9))
    for beside in (order("done", run=2, task=1), order("done", run=2, tried=1)):
        with pytest.raises(Refused, match="busy"):
            server.master.call("order", order=beside)
    assert server.master.call("order", order=order("hang", run=2, tried=2)) == {"accepted": True}  # repeated
    assert living(pid)
    for newer in (order("hang", run=2, tried=3), order("hang", run=3), order("hang", job="other")):
        assert server.master.call("order", order=newer) == {"accepted": True}
        assert not living(pid)
        started = listener.until("started")
        assert started["identity"] == newer["identity"]
        pid = started["pid"]
    assert not [event for event in listener.events if event["event"] == "died"], "nobody asked about replaced tasks"


def test_poll_waits_wakes_acknowledges_and_knows_its_incarnation(server: TaskServer) -> None:
    listener, identity = server.start("echo")
    listener.until("want")
    ask = {"incarnation": listener.incarnation, "after": listener.after}
    assert server.master.call(ANY_POLL, **ask, wait_seconds=0.05)["events"] == []
    other = server.master.call(ANY_POLL, incarnation="of yesterday", after=0, wait_seconds=30)
    assert other == {"incarnation": listener.incarnation, "events": []}
    waiting = server.client()
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(waiting.call(ANY_POLL, **ask, wait_seconds=9)))
    thread.start()
    server.master.call("give", identity=identity, no_more=True)
    thread.join(8)
    assert answers and answers[0]["events"][0][1]["event"] == "got"
    listener.until("done")
    ask["after"] = listener.after
    assert server.master.call(ANY_POLL, **ask, wait_seconds=0)["events"] == []


def test_a_flood_of_events_is_bounded_and_complete(server: TaskServer) -> None:
    listener, _ = server.start("flood", count=25_000)
    wait_until(lambda: server.held() == 10_000, 30)
    done = listener.until("done", 60)
    assert done["result"] == {}
    assert [event["number"] for event in listener.events if event["event"] == "count"] == list(range(25_000))


def test_of_progress_that_nobody_fetched_the_newest_is_kept(server: TaskServer) -> None:
    listener, identity = server.start("progress", count=15_000)

    def all_told() -> Any:
        ask = {"incarnation": listener.incarnation, "after": 0, "wait_seconds": 0.1}
        told = [event for _, event in server.master.call(ANY_POLL, **ask)["events"]]
        return told if told and told[-1]["event"] == "done" else None

    progress, rest = [], []
    for event in wait_until(all_told, 60):
        (progress if event["event"] == "progress" else rest).append(event)
    assert [event["event"] for event in rest] == ["started", "told", "done"]
    (newest,) = progress
    assert (newest["records"], newest["identity"]) == (15_000, identity)


def test_cancel_frees_a_task_that_waits_for_its_events_to_be_read(server: TaskServer) -> None:
    server.start("flood", count=25_000)
    wait_until(lambda: server.held() == 10_000, 30)
    assert server.master.call("cancel", job="j", run=1) == {"cancelled": True}
    listener, _ = server.start("done", run=2)
    listener.until("done")


def test_a_killed_server_child_is_started_afresh_and_its_tasks_end(server: TaskServer, tmp_path: Path) -> None:
    file = tmp_path / "left"
    listener, _ = server.start("hang", leave=str(file))
    pid = listener.until("started")["pid"]
    listener.until("left")
    child = server.child()
    os.kill(child, signal.SIGKILL)
    wait_until(lambda: server.child() != child)
    assert not living(pid) and not any(map(living, left_pids(file)))

    def answers() -> Any:
        try:
            return server.master.call("hello")
        except Unreachable:
            return None

    hello = wait_until(answers)
    assert hello["incarnation"] != listener.incarnation
    assert server.master.call(ANY_POLL, incarnation=listener.incarnation, after=0, wait_seconds=9)["events"] == []
    listener, _ = server.start("done")
    listener.until("done")


def test_a_stopped_server_child_is_replaced_once_killed(server: TaskServer) -> None:
    child = server.child()
    os.kill(child, signal.SIGSTOP)
    with pytest.raises(Unreachable):
        server.master.call("hello", timeout_seconds=0.3)
    os.kill(child, signal.SIGKILL)
    wait_until(lambda: server.child() != child)

    def ready() -> bool:
        try:
            return bool(server.master.call("hello"))
        except Unreachable:
            return False

    wait_until(ready)
    listener, _ = server.start("done")
    listener.until("done")


def test_a_server_child_that_keeps_dying_is_given_up(server: TaskServer) -> None:
    record, killed = server.folder / "node/pids/S_0.server.json", set()

    def kill_the_next() -> bool:
        if record.exists() and (child := server.child()) not in killed:
            os.kill(child, signal.SIGKILL)
            killed.add(child)
        return server.process.poll() is not None

    wait_until(kill_the_next)
    assert server.process.wait() == 1 and len(killed) == 6
    assert "giving up" in server.log.read_text()
    assert not list((server.folder / "node/pids").iterdir())


def test_nothing_outlives_a_killed_supervisor(server: TaskServer) -> None:
    listener, _ = server.start("spin")
    pids = [listener.until("started")["pid"], server.child()]
    server.process.kill()
    server.process.wait()
    wait_until(lambda: not any(map(living, pids)))


@pytest.mark.parametrize("stopped_child", [False, True])
def test_sigterm_ends_everything_and_gives_zero(server: TaskServer, tmp_path: Path, stopped_child: bool) -> None:
    file = tmp_path / "left"
    listener, _ = server.start("spin", leave=str(file))
    listener.until("left")
    pids = [*left_pids(file), *procfs.descendants(server.process.pid)]
    if stopped_child:
        os.kill(server.child(), signal.SIGSTOP)
    server.process.terminate()
    assert server.process.wait(9) == 0
    assert not any(map(living, pids))
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((server.address, server.port))


def test_a_port_in_use_ends_the_daemon_with_the_reason_in_its_log(tmp_path: Path, server: TaskServer) -> None:
    (tmp_path / "second").mkdir()
    file = tmp_path / "second/spec.json"
    file.write_text(json.dumps(server.spec | {"name": "S_1"}))
    ended = subprocess.run(
        [sys.executable, STANDIN, str(file)], capture_output=True, text=True, timeout=20, check=False
    )
    assert ended.returncode == 1
    assert f"{server.address}:{server.port}" in ended.stderr and "in use" in ended.stderr


def test_in_a_terminal_the_task_has_the_foreground_and_gives_it_back(tmp_path: Path) -> None:
    first = TaskServer(tmp_path)  # for its spec and certificates
    first.process.terminate()
    first.process.wait()
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ["MRCORE_SERVER"] = "x"
        os.execv(sys.executable, [sys.executable, STANDIN, str(tmp_path / "spec.json")])
    try:
        output = b""

        def answers() -> bool:
            try:
                return bool(first.master.call("hello"))
            except Unreachable:
                return False

        wait_until(answers)
        listener, _ = first.start("hang", run=1)
        task = listener.until("started")["pid"]
        wait_until(lambda: os.tcgetpgrp(terminal) == task)
        os.write(terminal, b"\x03")  # Ctrl-C reaches the task alone
        assert listener.until("died")["status"] == 1
        wait_until(lambda: os.tcgetpgrp(terminal) == pid)
        listener, _ = first.start("breakpoint", run=2)
        while b"(Pdb)" not in output:
            output += os.read(terminal, 4096)
        os.write(terminal, b"c\n")
        listener.until("died" if b"Error" in output else lambda event: event["event"] in ("died", "failed"))
    finally:
        os.kill(pid, signal.SIGTERM)
        _drain(terminal)
        assert os.waitpid(pid, 0)[1] == 0
        os.close(terminal)
        first.close()


def _drain(terminal: int) -> None:
    def read() -> None:
        try:
            while os.read(terminal, 4096):
                pass
        except OSError:
            return

    threading.Thread(target=read, daemon=True).start()


def test_orders_are_fast_enough_to_say_so(server: TaskServer) -> None:
    """Prints latencies and memory (`pytest -s`); decides nothing."""
    listener = Listener(server.client())
    taken = []
    for run in range(1, 21):
        begin = time.perf_counter()
        server.master.call("order", order=order("done", run=run))
        listener.until("started")
        taken.append(time.perf_counter() - begin)
        listener.until("done")
    hello = server.master.call("hello")
    sizes = [procfs.anonymous_bytes(pid) >> 10 for pid in (server.process.pid, server.child())]
    print(f"\norder → first event: median {sorted(taken)[10] * 1e3:.1f} ms, most {max(taken) * 1e3:.1f} ms")
    print(
        f"anonymous memory: supervisor {sizes[0]} KiB, server {sizes[1]} KiB, told {hello['anonymous_bytes'] >> 10} KiB"
    )
