"""`mrcore demo` as a user meets it: what it prints is right, and it never leaves a cluster behind."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from commands import MRCORE
from conditions import wait_until
from daemons import own_address
from screen import Terminal

from mrcore.demo import demo

PROJECT = Path(__file__).resolve().parents[2]
SOURCE = {
    "one.py": "import os\n\n\ndef size(path):\n    return os.stat(path).st_size\n",
    "two.py": "# what os.stat says\nprint(len(size), size('two'))\n",
    "inner/three.py": "size = max(1, 2)\n",
    "inner/deep/four.py": "size = 'caf\xe9'\n",
    "site-packages/not_ours.py": "hidden = 1\nhidden = 2\n",
    "notes.txt": "hidden = 3\n",
}
USED = {
    "size": 4,
    "os": 2,
    "stat": 2,
    "st_size": 1,
    "print": 1,
    "len": 1,
    "max": 1,
}  # it does not parse: also in a comment


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder of source files, one of them in Latin-1, with some that are not to be read."""
    folder = tmp_path / "library"
    for name, text in SOURCE.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode("latin-1"))
    return folder


def start(home: Path, source: Path) -> subprocess.Popen[str]:
    address = own_address()
    assert int(own_address().split(".")[3]) == int(address.split(".")[3]) + 1, "the second node's address is ours too"
    folder = home.parent if home.name == ".mrcore" else home.parent / "folder"
    command = [MRCORE, "demo", "--folder", str(folder), "--home", str(home), "--source", str(source)]
    deployed = {"MRCORE_CONFIG": str(home / "another.yml")}  # whatever is configured, the demo has its own cluster
    pipes = {
        "env": os.environ | deployed,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
        "start_new_session": True,
    }
    # Tests that a shell runs in the background ignore Ctrl-C, and what they start would inherit that.
    heeding = ["env", "--default-signal=INT"]
    return subprocess.Popen([*heeding, *command, "--address", address], **pipes)  # type: ignore[call-overload, no-any-return]


def left_over(home: Path) -> list[str]:
    """Command lines of processes of this home's cluster: daemons and what they forked name a file below it."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return [line for line in found if f"{home}/" in line]


def check_nothing_left(home: Path) -> None:
    assert not left_over(home)
    assert not list(home.glob("nodes/*/pids/*")), "a record of a daemon is left"
    assert not list(home.glob("nodes/*/working/*")), "a working file is left"


def test_it_shows_the_right_counts_and_stops_the_cluster(home: Path, source: Path) -> None:
    process = start(home, source)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    shown = dict(re.findall(r"^(\w+) +([\d,]+) +[\d,]+ {3}\S", out, re.MULTILINE))
    assert {name: int(count) for name, count in shown.items()} == USED
    assert "Read 4 files" in out
    assert re.search(r"^size .*inner/three\.py", out, re.MULTILINE)
    for phase in ("PREFLIGHT", "MAP", "SORT", "REDUCE", "COMMIT"):
        assert phase in out
    assert "nodes/127." in out and "cluster stop" in out
    assert out.count("identifier_files run 1: succeeded") == 1
    assert "3 days; demo_page_visits read what was new: 3 files" in out
    assert "4 days; demo_page_visits read what was new: 1 file," in out
    assert out.count("demo_section_shares run 2: succeeded") == 1
    assert "\x1b" not in out, "no colours in a pipe"
    check_nothing_left(home)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_stops_the_cluster_when_interrupted(home: Path, source: Path, number: int) -> None:
    process = start(home, source)
    wait_until(lambda: list(home.glob("nodes/*/pids/S_*.server.json")), 60, "the cluster servers run")
    assert left_over(home), "as long as it runs there is something to find"
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "interrupted" in err
    check_nothing_left(home)


def test_it_stops_the_cluster_when_a_job_fails(home: Path, source: Path) -> None:
    with (source / "endless.py").open("wb") as stream:
        stream.truncate(70 << 20)  # one line of zero bytes, longer than the default max_line_bytes
    process = start(home, source)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "max_line_bytes" in out + err and "demo: mrcore run --once failed" in err
    assert "Traceback" not in out + err
    check_nothing_left(home)


def test_without_source_it_says_so(home: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    process = start(home, empty)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.strip().splitlines()[-1] == f"demo: there is no .py file in {empty}"
    check_nothing_left(home)


def test_it_takes_other_addresses_when_the_usual_ports_are_in_use(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    address = own_address()
    with socket.socket() as taken:
        taken.bind((address, 0))
        taken.listen()
        monkeypatch.setattr(demo, "addresses", lambda first: [address] if first == "127.0.0.1" else ["127.0.0.1"])
        monkeypatch.setattr(demo, "AGENT_PORT", taken.getsockname()[1])
        monkeypatch.setattr(demo, "SERVERS", 0)
        assert demo.free_address() == "127.0.1.1"
    assert "in use" in capsys.readouterr().out


@pytest.mark.slow
def test_the_whole_standard_library(home: Path) -> None:
    command = [MRCORE, "demo", "--home", str(home), "--address", own_address()]
    own_address()
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^self +[\d,]{5,}", done.stdout, re.MULTILINE)
    check_nothing_left(home)


def typed(text: str) -> list[str]:
    """The commands of a document: lines that are indented by four blanks, outside of blocks of code."""
    plain = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return [line[4:] for line in plain.splitlines() if line.startswith("    ") and line.strip()]


@pytest.mark.slow
def test_what_the_readmes_say_works_after_the_demo_in_the_same_home(home: Path, source: Path, tmp_path: Path) -> None:
    """In one folder, with one home, on a terminal: README.md's job from nothing, then every project's README.md."""
    work = tmp_path / "clone"
    shutil.copytree(PROJECT / "projects", work / "projects")
    (work / "mrcore").symlink_to(PROJECT / "mrcore")
    (work / ".venv").symlink_to(sys.prefix)
    process = start(work / ".mrcore", source)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, out + err
    own_address()  # the third node's
    readme = (PROJECT / "README.md").read_text()
    for name, content in re.findall(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", readme, re.DOTALL):
        (work / name).parent.mkdir(exist_ok=True)
        (work / name).write_text(content)
    commands = typed(readme.split("## A job from nothing")[1].split("\n## ")[0])
    assert commands[-1] == "mrcore cluster stop" and "mrcore run longest_words.yml" in commands
    documents = sorted(work.glob("projects/*/README.md"))
    assert len(documents) == 6
    for document in documents:
        commands[-1:-1] = typed(document.read_text())
    assert commands.count("mrcore run --once") == 6
    library = "/usr/lib/python3*/*.py"
    assert any(library in command for command in commands)
    script = "\n".join(commands).replace(library, f"{sysconfig.get_path('stdlib')}/a*.py")
    terminal = Terminal(["bash", "-ec", script], columns=200, cwd=work, env={"MRCORE_CONFIG": ""})
    try:
        assert terminal.wait(600) == 0, terminal.output[-3000:]
    finally:
        terminal.kill()
    shown = terminal.screen()
    assert '["b","boilerplate"]' in shown
    assert '[2,["Blaise","1005","1.75"]]' in shown
    shares = [json.loads(line) for line in shown if line.startswith('["docs",')]
    assert shares == [["docs", {"visits": 1, "share": 1.0, "popular": ["/docs/start"]}]], (
        "of one visit, not of the demo's"
    )
    assert any(line.startswith("1 visits of 1 pages") for line in shown)
    assert (work / "sorted.jsonl").stat().st_size > 10_000
    assert not [line for line in shown if "failed" in line or "Traceback" in line]
    check_nothing_left(work / ".mrcore")
