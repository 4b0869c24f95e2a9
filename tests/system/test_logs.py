"""Logs are bounded as they are written, and keep what was printed last; who prints never waits for long nor fails."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pty
import random
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from clusters import TestCluster
from conditions import wait_until
from daemons import Daemon
from fake_cluster import FakeCluster
from task_servers import STANDIN, TaskServer

from mrcore.cli import main as cli
from mrcore.errors import Unreachable
from mrcore.queue import scripts
from mrcore.queue.runner import Runner
from mrcore.queue.scheduler import Scheduler
from mrcore.settings.config import Settings
from mrcore.system import logs
from mrcore.system.logs import BoundedLog, TextLog

LIMIT = logs.MIN_LOG_BYTES
TAG = re.compile(rb"^\S+ [\w.-]+/\d+ map-\d+-\d+ \| ", re.MULTILINE)  # of a line that a task printed
LEFT_OUT = re.compile(rb"\[\xe2\x80\xa6 ([\d,]+) bytes left out \xe2\x80\xa6\]\n")


@pytest.fixture
def config(home: Path, projects_dir: Path) -> Path:
    path = home.parent / "config.json"
    path.write_text(json.dumps({"log_bytes": LIMIT, "projects_dir": str(projects_dir)}))
    return path


def taken(file: Path) -> int:
    """What a log takes of the disk, with whatever lies beside it under a name that begins like its own."""
    return sum(each.stat().st_size for each in file.parent.glob(f"{file.name}*"))


def whole(file: Path) -> bytes:
    """Both parts of a log that turned round, of which the newer begins with the next line."""
    earlier = Path(f"{file}.1")
    return b"".join(part.read_bytes() for part in (earlier, file) if part.exists())


def printed(file: Path) -> bytes:
    """What tasks printed into a log, each line of which says whose it is."""
    return TAG.sub(b"", whole(file))


def accounted(content: bytes) -> int:
    """The bytes that a log has or says that it left out; the lines that say so, and their line ends, not counted."""
    left_out = sum(int(count.replace(b",", b"")) for count in LEFT_OUT.findall(content))
    return left_out + len(LEFT_OUT.sub(b"", content))


# ---- one log


def test_little_is_written_at_once_and_as_it_is(tmp_path: Path) -> None:
    log, expected = BoundedLog(tmp_path / "a.log", LIMIT), b""
    for piece in (b"one\n", b"\x00\xff\x1b[2J without an end", b"", b" of line\r\n"):
        log.write(piece)
        expected += piece
        assert (tmp_path / "a.log").read_bytes() == expected and not log.held
    log.settle()
    BoundedLog(tmp_path / "a.log", LIMIT).write(b"two\n")
    assert (tmp_path / "a.log").read_bytes() == expected + b"two\n", "another process goes on with it"


@pytest.mark.parametrize("seed", range(20))
def test_of_a_flood_every_byte_is_kept_or_counted_in_order(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seconds end where the test says; what is kept are pieces of what was printed, in order, and the very end."""
    monkeypatch.setattr(logs, "WINDOW_SECONDS", 3600.0)
    chance, file = random.Random(seed), tmp_path / "a.log"
    log, text = BoundedLog(file, 64 << 20), bytearray()
    for number in range(chance.randrange(3, 400)):
        piece = b"%d %s\n" % (number, b"x" * chance.choice([0, 10, 80, 3000, 200_000])) * chance.randrange(1, 20)
        piece = piece[: chance.randrange(1, len(piece) + 1)]
        text += piece
        log.write(piece)
        if chance.random() < 0.2:
            log.settle()
    text += b"the end\n"
    log.write(b"the end\n")
    log.settle()
    content, at = file.read_bytes(), 0
    pieces = LEFT_OUT.split(content)
    assert 0 <= accounted(content) - len(text) <= len(pieces) // 2 and not log.held
    for kept, left_out in zip(pieces[::2], [*pieces[1::2], b"0"], strict=True):
        if not text.startswith(kept, at):  # a line end was added before the next note
            kept = kept[:-1]
        assert text.startswith(kept, at)
        at += len(kept) + int(left_out.replace(b",", b""))
    assert at == len(text)


def test_what_is_left_out_is_counted_to_the_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "WINDOW_SECONDS", 3600.0)  # all in one second
    log, line = BoundedLog(tmp_path / "a.log", 64 << 20), b"0123456789abcde\n"
    for _ in range(1000):
        log.write(line * 1000)
    log.settle()
    content = (tmp_path / "a.log").read_bytes()
    assert accounted(content) == 16_000_000
    assert len(LEFT_OUT.findall(content)) == 1 and len(content) <= logs.RATE_BYTES + logs.TAIL_BYTES + 100
    assert LEFT_OUT.sub(b"", content) == line * (len(LEFT_OUT.sub(b"", content)) // 16), "whole lines"


@pytest.mark.parametrize("before", [0, 10, LIMIT // 2, 20 * LIMIT])
def test_a_log_takes_no_more_than_its_limit_whatever_there_was_before(
    tmp_path: Path, before: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "RATE_BYTES", 100 << 20)
    file = tmp_path / "a.log"
    file.write_bytes(b"o" * before)
    log = BoundedLog(file, LIMIT)
    for number in range(300):
        log.write(b"%d\n" % number + b"x" * 50_000 + b"\n")
        if number > 30:
            assert taken(file) <= LIMIT
    log.write(b"the end\n")
    assert whole(file).endswith(b"the end\n") and len(whole(file)) >= LIMIT // 2
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.log", "a.log.1"]
    assert re.fullmatch(rb"x+\nthe end\n", logs.last_lines(file, 2))


def test_two_processes_may_write_one_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hooks run at the same time; the one whose file another has turned round goes on in the new one."""
    monkeypatch.setattr(logs, "RATE_BYTES", 100 << 20)
    file = tmp_path / "a.log"
    both = BoundedLog(file, LIMIT), BoundedLog(file, LIMIT)
    for number in range(2000):
        both[number % 2].write(b"%d " % number + b"x" * 3000 + b"\n")
        assert taken(file) <= LIMIT
    assert whole(file).splitlines()[-2:] == [b"1998 " + b"x" * 3000, b"1999 " + b"x" * 3000]


@pytest.mark.parametrize("size", [0, 1, LIMIT - 2 * logs.TAIL_BYTES, LIMIT, LIMIT + 1, 5 * LIMIT])
def test_a_log_with_ends_has_the_first_part_and_the_last(tmp_path: Path, size: int) -> None:
    file, text = tmp_path / "1.log", b"".join(b"%07d\n" % number for number in range(size // 8 + 1))[:size]
    log = BoundedLog(file, LIMIT, keep_ends=True)
    for start in range(0, size, 9999):
        log.write(text[start : start + 9999])
        assert taken(file) <= LIMIT
        if start % 7 == 0:
            log.settle()  # as each second
    log.settle()
    content = file.read_bytes()
    assert accounted(content) - size in (0, 1), "one line end more where a line was cut"
    if size <= LIMIT - 2 * logs.TAIL_BYTES:
        assert content == text
        return
    head, count, tail = LEFT_OUT.split(content) if LEFT_OUT.search(content) else (content, b"0", b"")
    assert text.startswith(head.rstrip(b"\n")) and text.endswith(tail), count
    assert taken(file) <= LIMIT and len(head) >= LIMIT // 2


def test_a_full_disk_does_not_reach_who_prints(tmp_path: Path) -> None:
    log = BoundedLog(Path("/dev/full"), LIMIT)
    for _ in range(100):
        log.write(b"x" * 100_000)
    log.settle()
    assert log.held, "what was last is written when there is room"


def test_a_terminal_that_is_halted_holds_nobody_up(tmp_path: Path) -> None:
    master, slave = pty.openpty()
    os.set_blocking(slave, False)
    log = BoundedLog(tmp_path / "a.log", LIMIT, terminal=slave)
    log.write(b"seen\n")
    assert os.read(master, 100) == b"seen\r\n"
    done = threading.Event()

    def flood() -> None:
        for _ in range(200):
            log.write(b"x" * 10_000)
        log.settle()
        done.set()

    threading.Thread(target=flood, daemon=True).start()
    assert done.wait(60)
    os.close(master)
    log.write(b"after its end\n")
    assert (tmp_path / "a.log").read_bytes().endswith(b"after its end\n")
    os.close(slave)


def test_messages_of_many_threads_stay_whole(tmp_path: Path) -> None:
    stream = TextLog(BoundedLog(tmp_path / "a.log", LIMIT))
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(message)s"))
    threads = [
        threading.Thread(target=lambda: [handler.handle(logging.makeLogRecord({"msg": "y" * 500})) for _ in range(50)])
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stream.write("\ud800\n")  # what no file takes
    assert (tmp_path / "a.log").read_text().splitlines() == ["y" * 500] * 400 + ["\\ud800"]


# ---- daemons and their tasks


@pytest.fixture
def server(tmp_path: Path) -> Iterator[TaskServer]:
    started = TaskServer(tmp_path, log_bytes=LIMIT)
    yield started
    started.close()


@pytest.mark.parametrize("crash", [False, True])
def test_a_task_that_prints_300_mb_takes_a_bounded_log_and_its_last_line_is_there(
    server: TaskServer, crash: bool
) -> None:
    listener, _ = server.start("print", mebibytes=300, crash=crash)
    listener.until("died" if crash else "done", 120)
    stack = b"the last line\nFatal Python error: "  # of the crash, which comes last then
    wait_until(
        lambda: (stack in printed(server.log)) if crash else printed(server.log).endswith(b"the last line\n"), 60
    )
    assert taken(server.log) <= LIMIT
    content = printed(server.log)
    assert accounted(content) <= 320 << 20  # tags are counted where lines are left out
    if not Path(f"{server.log}.1").exists():
        assert content.startswith(b"the first line\n") and accounted(content) >= 300 << 20
    listener, _ = server.start("print", mebibytes=0, run=2)  # what follows is whole
    listener.until("done")
    wait_until(lambda: printed(server.log).endswith(b"\nthe first line\nthe last line\n"))


def test_floods_of_many_tasks_in_a_row_stay_within_the_limit(server: TaskServer) -> None:
    for run in range(1, 16):
        listener, _ = server.start("print", mebibytes=8, run=run)
        listener.until("done", 60)
        assert taken(server.log) <= LIMIT
    wait_until(lambda: whole(server.log).endswith(b"the last line\n"))


def test_in_a_window_all_is_seen_and_kept(tmp_path: Path) -> None:
    """As the unit of a cluster server has it: standard error is the log, the rest a terminal."""
    first = TaskServer(tmp_path, log_bytes=LIMIT)  # for its spec and certificates
    first.process.terminate()
    first.process.wait()
    log, (master, slave) = tmp_path / "S_0.log", pty.openpty()
    with log.open("ab") as stream:
        window = subprocess.Popen(
            [sys.executable, STANDIN, str(tmp_path / "spec.json")], stdin=slave, stdout=slave, stderr=stream,
            start_new_session=True,
        )  # fmt: skip
    os.close(slave)
    seen = bytearray()
    reader = threading.Thread(target=lambda: read_all(master, seen), daemon=True)
    reader.start()
    try:
        wait_until(lambda: answers(first), 30, "it answers")
        listener, _ = first.start("print", mebibytes=0)
        listener.until("done")
        wait_until(lambda: b"the last line\r\n" in seen, 20, "it is seen")
        wait_until(lambda: printed(log) == b"the first line\nthe last line\n", 20, "it is kept")
        listener, _ = first.start("print", mebibytes=30, run=2)
        listener.until("done", 60)
        wait_until(lambda: whole(log).endswith(b"the last line\n") and seen.endswith(b"the last line\r\n"), 20)
        assert taken(log) <= LIMIT
        listener, _ = first.start("breakpoint", run=3)
        wait_until(lambda: b"(Pdb)" in seen, 20, "the debugger's prompt")
        os.write(master, b"p 6 * 111\n")
        wait_until(lambda: b"666" in seen, 20, "the debugger's answer")
        os.write(master, b"c\n")
        listener.until("died")
        assert b"(Pdb)" not in whole(log)
        listener, _ = first.start("ask", run=4)
        wait_until(lambda: b"your name? " in seen, 20, "a question without the end of a line")
        os.write(master, b"me\n")
        assert listener.until("done")["result"] == {"answer": "me\n"}
    finally:
        window.terminate()
        assert window.wait(20) == 0
        first.close()
        reader.join(20)
        os.close(master)


def answers(server: TaskServer) -> bool:
    try:
        return bool(server.master.call("hello"))
    except Unreachable:
        return False


def read_all(terminal: int, into: bytearray) -> None:
    with contextlib.suppress(OSError):  # its other side is closed
        while data := os.read(terminal, 65536):
            into += data


def test_a_log_that_was_removed_is_made_anew(server: TaskServer) -> None:
    server.log.unlink()
    listener, _ = server.start("print", mebibytes=0)
    listener.until("done")
    wait_until(lambda: printed(server.log) == b"the first line\nthe last line\n")


def test_an_agents_log_turns_round_and_a_message_of_megabytes_is_cut(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"")
    agent = Daemon(tmp_path, ["-m", "mrcore.node.node_agent"], "agent", log_bytes=LIMIT)
    try:
        agent.log.write_bytes(b"o" * 3 * LIMIT)  # by somebody else
        client = agent.client()
        assert client.call("health")
        (tmp_path / "pki/members.json").write_text("no JSON")
        wait_until(lambda: client.call("health") and taken(agent.log) <= LIMIT, 30, "a bounded log")
        wait_until(lambda: b"members.json" in whole(agent.log)[-2000:])
    finally:
        agent.close()


def test_a_map_function_that_floods_neither_fails_nor_fills_the_disk(tmp_path: Path) -> None:
    code = (
        "import os\ndef m(line, auxiliary_data):\n"
        "    for _ in range(60):\n        print(('z' * 1023 + '\\n') * 1024)\n    return [(line, 1)]\n"
    )
    with TestCluster(tmp_path, 1, 1) as cluster:
        (tmp_path / "projects/gated/map_functions.py").write_text(code)
        cluster.write_inputs({"one": "a\nb\nc\n"})
        settings = cluster.settings
        Scheduler(settings).submit_job(
            cluster.job(map_function_name="m", reduce_function_name=None, combine_function_name=None)
        )
        assert Runner(settings).run(once=True) == {"succeeded": 1}
        log = settings.nodes[0].layout.logs_dir / "S_0.log"
        assert taken(log) <= settings.log_bytes
        assert b"bytes left out" in whole(log)


# ---- scripts and hooks


def script(home: Path, text: str, name: str = "s", **keys: Any) -> dict[str, Any]:
    file = home.parent / f"{name}.py"
    file.write_text(text)
    return {"job_type": "script", "job_name": name, "script_location": str(file), "run_once": True} | keys


def once(settings: Settings) -> dict[str, int]:
    return Runner(settings, FakeCluster(settings)).run(once=True)


FLOOD = """
import os, sys
print("the first line", flush=True)
for _ in range(100):
    os.write(1, (b"x" * 1023 + b"\\n") * 1024)
print("the last line", file=sys.stderr)
"""


def test_a_scripts_log_has_its_first_and_its_last_part(home: Path, scheduler: Scheduler, settings: Settings) -> None:
    scheduler.submit_job(script(home, FLOOD))
    assert once(settings) == {"succeeded": 1}
    file = scripts.log_of(settings, "s", 1)
    content = file.read_bytes()
    assert taken(file) <= LIMIT and content.startswith(b"the first line\n") and content.endswith(b"the last line\n")
    assert accounted(content) - (100 << 20) - len("the first line\nthe last line\n") in (0, 1)


def test_a_script_that_fails_after_a_flood_tells_its_last_lines(
    home: Path, scheduler: Scheduler, settings: Settings
) -> None:
    scheduler.submit_job(script(home, FLOOD + "raise ValueError('the very end')\n"))
    assert once(settings) == {"failed": 1}
    assert "the very end" in scheduler.history("s")[0]["exception"]["message"]


def test_a_script_that_closes_its_output_or_leaves_it_to_others_is_waited_for(
    home: Path, scheduler: Scheduler, settings: Settings
) -> None:
    text = "import os, time\nprint('a', flush=True)\nos.close(1); os.close(2)\ntime.sleep(0.2)\nos._exit(0)\n"
    scheduler.submit_job(script(home, text))
    forks = "import os, time\nif os.fork() == 0:\n    time.sleep(600)\nprint('b', flush=True)\nos._exit(0)\n"
    scheduler.submit_job(script(home, forks, "t"))
    assert once(settings) == {"succeeded": 2}
    assert scripts.log_of(settings, "s", 1).read_text() == "a\n"
    assert scripts.log_of(settings, "t", 1).read_text() == "b\n"


def test_all_runs_of_a_script_take_a_bounded_part_of_the_disk(
    home: Path, scheduler: Scheduler, settings: Settings
) -> None:
    for _ in range(7):
        scheduler.submit_job(script(home, FLOOD))
        assert once(settings) == {"succeeded": 1}
        found = list(scripts.log_of(settings, "s", 0).parent.iterdir())
        assert sum(file.stat().st_size for file in found) <= scripts.LOGS_OF_A_JOB * LIMIT
    assert sorted(file.name for file in found)[-1] == "7.log" and len(found) >= scripts.LOGS_OF_A_JOB


def test_a_hook_that_floods_does_not_fail_and_what_it_leaves_running_may_print(
    home: Path, scheduler: Scheduler, settings: Settings
) -> None:
    stay = home.parent / "stay"
    stay.touch()
    left = (
        "import os, sys, time\nwhile os.path.exists(sys.argv[1]): time.sleep(0.01)\nprint('long after', flush=True)\n"
    )
    code = FLOOD + f"import subprocess\nsubprocess.Popen([sys.executable, '-c', {left!r}, {str(stay)!r}])\n"
    scheduler.submit_job({"job_type": "mapreduce", "job_name": "a", "project_name": "word_count",
                          "input_dirs": ["i"], "map_function_name": "count_map", "run_once": True})  # fmt: skip
    assert once(settings.model_copy(update={"on_success": [sys.executable, "-c", code]})) == {"succeeded": 1}
    file = settings.logs_dir / "hooks.log"
    assert not any("hook" in event["text"] for event in scheduler.show("a")["events"])
    assert taken(file) <= LIMIT
    stay.unlink()
    wait_until(lambda: whole(file).endswith(b"long after\n"), 20, "what the hook left running printed")
    wait_until(lambda: not keepers(file), 20, "the end of what kept the log")


def keepers(file: Path) -> list[str]:
    """The processes that keep a log."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if f"mrcore.system.logs\0{file}" in entry.read_text(errors="replace"):
                found.append(entry.parent.name)
    return found


# ---- mrcore logs


def test_logs_shows_nothing_that_a_terminal_obeys_unless_asked(
    home: Path, settings: Settings, config: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = settings.nodes[0].layout.logs_dir
    folder.mkdir(parents=True)
    content = b"\x1b]0;title\x07\x1b[2Jred\r\nbad \xff byte\x9b1m\ttab\n" + "ü \u202e\n".encode()
    (folder / "S_0.log").write_bytes(content)

    def shown(*more: str) -> bytes:
        with pytest.raises(SystemExit):
            cli.main(["--config", str(config), "logs", "S_0", *more])
        return capfd.readouterr().out.encode(errors="surrogateescape")

    assert shown() == "\\x1b]0;title\\x07\\x1b[2Jred\nbad \\xff byte\\x9b1m\ttab\nü \\u202e\n".encode()
    assert shown("--lines", "1") == "ü \\u202e\n".encode()
    capfd.readouterr()
    done = subprocess.run(
        [
            *(sys.executable, "-c", "from mrcore.cli.main import main; main()"),
            *("--config", str(config), "logs", "S_0", "--raw"),
        ],
        capture_output=True,
        check=True,
    )
    assert done.stdout == content


def test_logs_goes_on_in_the_part_before_when_a_log_has_just_turned_round(
    home: Path, settings: Settings, config: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = settings.nodes[0].layout.logs_dir
    folder.mkdir(parents=True)
    (folder / "S_0.log.1").write_text("".join(f"line {number}\n" for number in range(50)))
    (folder / "S_0.log").write_text("line 50\n")
    with pytest.raises(SystemExit):
        cli.main(["--config", str(config), "logs", "S_0", "--lines", "3"])
    assert capfd.readouterr().out == "line 48\nline 49\nline 50\n"
