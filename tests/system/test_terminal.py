"""Commands whose standard streams are closed, full or cannot write a letter: one clear line at most, no traceback."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from commands import MRCORE, UNFIT
from fake_cluster import FakeCluster

from mrcore.errors import JobFault
from mrcore.queue.runner import Runner
from mrcore.queue.scheduler import Scheduler
from mrcore.settings.config import load_settings
from mrcore.system import terminal

HOSTILE = "Größe \ud83d \x1b[31mred\x1b]0;title\x07 \u202egpj.exe [bold]markup[/bold] \x9b2J line\nmrcore: all is well"


@pytest.fixture
def hostile(home: Path, projects_dir: Path) -> Path:
    """A queue with a job whose history holds all that a terminal, a file or a JSON parser could choke on."""

    class Cluster(FakeCluster):
        def run(self, job: dict[str, Any], **facts: Any) -> dict[str, Any]:
            raise JobFault(HOSTILE, line=HOSTILE, traceback=HOSTILE)

    settings = load_settings()
    scheduler = Scheduler(settings)
    job = {"project_name": "word_count", "map_function_name": "count_map", "input_dirs": [HOSTILE[:6] + "\u202e[b]"]}
    scheduler.submit_job({"job_name": "bad", "run_once": True} | job)
    Runner(settings, Cluster(settings)).run(once=True)
    scheduler.submit_job({"job_name": "waits", "run_once": True} | job)
    scheduler.store.put("hold", {"reason": HOSTILE, "until": 0, "since": 0, "tries": 1})
    scheduler.store.close()
    log = settings.nodes[0].layout.logs_dir / "S_0.log"
    log.parent.mkdir(parents=True)
    log.write_bytes(HOSTILE.encode(errors="surrogatepass") + b"\xff\n")
    return home


COMMANDS: Sequence[Sequence[str]] = (
    ["queue"], ["queue", "--json"], ["history"], ["history", "--json"], ["show", "bad"], ["show", "bad", "--json"],
    ["settings"], ["template", "mapreduce"], ["--help"], ["--version"], ["logs"], ["logs", "S_0"], ["nonsense"],
    ["show", "nothing"], ["delete", "waits"], ["run", "--once"], ["cluster", "status"],
)  # fmt: skip
FEW = [COMMANDS[number] for number in (0, 3, 4, 7, 11, 12, 14, 15)]  # of each way to print one


def mrcore(*arguments: str | bytes, shell: str = "", **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run the real command, with its streams as `shell` redirects them."""
    command: Any = ["sh", "-c", f'exec "$@" {shell}', "sh", MRCORE, *arguments]
    done = subprocess.run(command, capture_output=True, timeout=120, check=False, env=os.environ | environment)
    for bad in (b"Traceback", b"internal error", b"Exception ignored", b"Logging error", b"Errno"):
        assert bad not in done.stderr + done.stdout, (arguments, done)
    return done


@pytest.mark.parametrize(
    ("shell", "unbuffered"),
    [(each, "") for each in ("", ">&-", "2>&-", "<&- >&- 2>&-", ">/dev/full", ">/dev/full 2>/dev/full")]
    + [(">/dev/full", "1")],
)
def test_streams_that_are_closed_or_full(hostile: Path, shell: str, unbuffered: str) -> None:
    for command in FEW:
        done = mrcore(*command, shell=shell, PYTHONUNBUFFERED=unbuffered)
        if shell == ">/dev/full" and command[0] in ("queue", "history", "settings", "template"):
            assert (done.returncode, done.stderr) == (1, b"mrcore: standard output: No space left on device\n")
        elif command[0] in ("queue", "history", "settings", "template", "logs") and "full" not in shell:
            assert done.returncode == 0
        assert done.stderr.count(b"\n") <= 4
    assert json.loads(mrcore("queue", "--json").stdout)["jobs"] == []  # `delete` and `run` did their work all the same


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment",
    [
        {"LC_ALL": "C.UTF-8"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONIOENCODING": "ascii:strict"},
        {"PYTHONIOENCODING": "latin-1"},
        {"PYTHONIOENCODING": "utf-16"},
        {
            "LC_ALL": "no_SUCH.locale",
            "LANG": "\x1b[31m",
            "LANGUAGE": "xx",
            "TERM": "\x1b",
            "COLUMNS": "²",
            "LINES": "-1",
        },
        {"TERM": "dumb", "COLUMNS": "1"},
    ],
)
def test_surroundings_that_cannot_write_a_letter(hostile: Path, environment: dict[str, str]) -> None:
    encoding = environment.get("PYTHONIOENCODING", "utf-8").split(":")[0]
    encoding = "ascii" if "PYTHONUTF8" in environment else encoding
    for command in [*FEW, ["queue", "--json"]]:
        done = mrcore(*command, **environment)
        out = done.stdout.decode(encoding)
        assert not UNFIT.search(out), (command, out)
        if command[-1] == "S_0":  # a log has lines of its own
            assert out.endswith("\nmrcore: all is well\\xff\n")
            continue
        assert not UNFIT.search(done.stderr.decode(encoding)), done.stderr
        assert "\nmrcore: all is well" not in out and b"\nmrcore: all is well" not in done.stderr
        if "--json" in command:
            told = json.dumps(json.loads(out))
            assert "\\u00f6" in told and "[bold]markup[/bold]" in told, told


def test_no_terminal_obeys_what_data_hold(hostile: Path) -> None:
    for command in COMMANDS:
        ours, theirs = os.openpty()
        process = subprocess.Popen([MRCORE, *command], stdin=theirs, stdout=theirs, stderr=theirs)
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # EIO: the last process that had the terminal has ended
            while chunk := os.read(ours, 65536):
                shown += chunk
        os.close(ours)
        assert process.wait(60) in (0, 1, 2)
        text = shown.decode()
        assert "\nmrcore: all is well" not in text or command[0] == "logs"  # of which each line is data
        for obeyed in ("\x1b]0;", "\x1b[31mred", "\x07", "\u202e", "\x9b", "Traceback"):
            assert obeyed not in text, (command, text)
        if command in (["show", "bad"], ["history"]):
            assert "[bold]markup[/bold]" in "".join(text.split()), text


def test_a_reader_that_stops_early_leaves_no_complaint(hostile: Path) -> None:
    for command in COMMANDS[:11]:
        read, write = os.pipe()
        os.close(read)
        done = subprocess.run([MRCORE, *command], stdout=write, stderr=subprocess.PIPE, timeout=60, check=False)
        os.close(write)
        assert done.stderr == b"" and done.returncode == 1, command


@pytest.mark.parametrize("argument", [b"caf\xe9", b"\xff\xfe", "\udce9".encode(errors="surrogatepass")])
@pytest.mark.parametrize(
    "command", [["show"], ["submit"], ["submit", "-", "--set"], ["rm"], ["upload", "x"], ["logs"], ["--config"], []]
)
def test_arguments_that_are_no_text_are_refused_in_one_line(home: Path, command: list[str], argument: bytes) -> None:
    done = mrcore(*command, argument)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.startswith(b"mrcore: the argument '") and done.stderr.endswith(b" is not UTF-8\n")
    assert done.stderr.count(b"\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["a\nmrcore: all is well", "\x1b[31m", "[bold]", "x" * 5000, "-", "", " ", "\u202e", "%s{0}"]
)
def test_arguments_that_are_odd_names_get_one_clear_line(home: Path, name: str) -> None:
    for command in (["show", "--", name], ["cat", "--", name], ["cancel", "--", name], ["logs", "--", name],
                    ["submit", "--", name + "/x"], ["--config", name or "/", "queue"], ["ledger", "show", "--", name],
                    ["drain", "--list", "--", name], ["requeue", "--", name]):  # fmt: skip
        done = mrcore(*command)
        assert done.returncode in (1, 2) or command[0] == "--config", done
        assert not UNFIT.search(done.stderr.decode())
        assert b"\nmrcore: all is well" not in done.stderr
        assert done.stderr.count(b"\n") <= 1 or done.stderr.startswith(b"Usage:"), done


def test_a_nul_in_an_argument_is_refused(home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from mrcore.cli.main import main

    with pytest.raises(SystemExit) as left:
        main(["show", "a\0b"])
    assert left.value.code == 2
    assert capfd.readouterr().err == "mrcore: the argument 'a\\x00b' holds a NUL character\n"


def test_a_current_folder_that_is_gone_is_named(home: Path, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    for command in FEW:
        gone.mkdir()
        shell = f'cd "{gone}" && rmdir "{gone}" && exec "$@"'
        done = subprocess.run(["sh", "-c", shell, "sh", MRCORE, *command], capture_output=True, timeout=60, check=False)
        assert b"Traceback" not in done.stderr and b"internal error" not in done.stderr, (command, done)
        if command[0] in ("queue", "history"):
            said = b"mrcore: the current folder does not exist any more: change to another one\n"
            assert (done.returncode, done.stderr) == (1, said), command


@pytest.mark.parametrize(
    "value", [b"/tmp/caf\xe9", b"/dev/null/x", b"/" + b"x" * 300, b"/proc/1/a\nb", b"\x1b[31m", b"~nobody\xff"]
)
def test_a_home_that_is_no_folder_or_no_text_is_refused_in_one_line(home: Path, value: bytes) -> None:
    for variable in (b"MRCORE_HOME", b"MRCORE_CONFIG"):
        environment = os.environb.copy() | {variable: value}
        for command in (["queue"], ["settings"], ["cluster", "status"]):
            done = subprocess.run([MRCORE, *command], env=environment, capture_output=True, timeout=60, check=False)
            assert b"Traceback" not in done.stderr and b"internal error" not in done.stderr, (command, done)
            assert not UNFIT.search(done.stderr.decode())
            assert done.stderr.count(b"\n") <= 1, done.stderr
    shutil.rmtree(Path.cwd() / "\x1b[31m", ignore_errors=True)


def test_output_on_a_terminal_is_the_same_json_without_what_it_would_obey(capsys: pytest.CaptureFixture[str]) -> None:
    items = [["a\x9b2J\u202e", {"Größe": "\x7f日本"}], ["b", 1]]
    content = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items).encode()
    out = terminal.JsonOutput()
    for byte in content:  # chunks may end within a character
        out.write(bytes([byte]))
    shown = capsys.readouterr().out
    assert not UNFIT.search(shown) and "Größe" in shown
    assert [json.loads(line) for line in shown.splitlines()] == items


def test_log_lines_hold_nothing_that_passes_for_another(capfd: pytest.CaptureFixture[str]) -> None:
    class Broken:
        def __str__(self) -> str:
            raise KeyError

    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(terminal.LineFormatter("%(levelname)s %(message)s"))
    log = logging.Logger("test")
    log.addHandler(handler)
    log.error("said %s", HOSTILE)
    log.error("too few %s %s", 1)
    log.error("broken %s", Broken())
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        log.exception("failed")
    text = stream.getvalue()
    assert not UNFIT.search(text)
    assert [line[:6] for line in text.splitlines() if not line.startswith(" ")] == ["ERROR "] * 4
    assert "Logging error" not in capfd.readouterr().err
