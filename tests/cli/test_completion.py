"""Completion in real shells: what is offered, how soon, and that it leaves nothing behind."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest
from commands import MRCORE, mrcore

from mrcore.queue import job as jobs
from mrcore.queue.scheduler import Scheduler
from mrcore.settings.config import load_settings

MODULES = 450  # that an answer may load, those of Python's start included


def words(typed: str, **environment: str) -> list[str]:
    """What bash is told when TAB is pressed behind `typed`."""
    given = shlex.split(typed)
    number = len(given) if typed.endswith(" ") else len(given) - 1
    environment = {
        **os.environ,
        "_MRCORE_COMPLETE": "bash_complete",
        "COMP_WORDS": typed,
        "COMP_CWORD": str(number),
    } | environment
    done = subprocess.run([MRCORE], env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""
    return [line.partition(",")[2] for line in done.stdout.splitlines() if line.startswith("plain,")]


@pytest.fixture
def queued(home: Path) -> Path:
    Path("script.py").write_text("pass\n")
    scheduler = Scheduler(load_settings())
    for name, group in (("nightly_visits", "night"), ("nightly_pages", "night"), ("weekly", None)):
        scheduler.submit_job(
            {"job_type": "script", "job_name": name, "script_location": "script.py", "group_name": group}
        )
    scheduler.store.close()
    Path("projects/visits").mkdir(parents=True)
    return home


def files(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("mrcore hist", ["history"]),
        ("mrcore cluster st", ["start", "status", "stop"]),
        ("mrcore show ni", ["nightly_pages", "nightly_visits"]),
        ("mrcore cat we", ["weekly"]),
        ("mrcore requeue nig", ["night", "nightly_pages", "nightly_visits"]),
        ("mrcore attach ", ["S_0", "S_1"]),
        ("mrcore logs ag", ["agent@node-0"]),
        ("mrcore drain n", ["node-0"]),
        ("mrcore try v", ["visits"]),
        ("mrcore template s", ["script"]),
        ("mrcore submit job.yml --set hold", ["hold_state="]),
        ("mrcore completion z", ["zsh"]),
    ],
)
def test_what_is_offered(queued: Path, typed: str, offered: list[str]) -> None:
    before = files(queued)
    assert words(typed) == offered
    assert files(queued) == before, "nothing is made or changed"


def test_it_is_offered_from_the_queue_that_config_names(queued: Path, tmp_path: Path) -> None:
    (tmp_path / "other.yml").write_text(f"home: {queued}\n")
    empty = {"MRCORE_HOME": str(tmp_path / "none")}
    assert words("mrcore show we", **empty) == []
    assert words(f"mrcore --config {tmp_path}/other.yml show we", **empty) == ["weekly"]


def test_jobs_are_offered_while_the_queue_is_open_and_changes(queued: Path) -> None:
    scheduler = Scheduler(load_settings())
    with scheduler.store.change():
        assert words("mrcore show we") == ["weekly"]
    scheduler.store.close()


def test_all_keys_are_offered(home: Path) -> None:
    offered = {word.rstrip("=") for word in words("mrcore submit job.yml --set ")}
    assert offered >= {key for kind in ("mapreduce", "script", "file_transfer") for key in jobs.template(kind)}


@pytest.mark.parametrize("content", ["nodes: [", "nodes: 0\n", "user: nobody_of_this_name\n"])
def test_what_is_wrong_is_no_error_and_nothing_is_made(home: Path, tmp_path: Path, content: str) -> None:
    """Settings with faults or of another user's cluster, with no queue: no sudo, no word, no file."""
    settings = tmp_path / "faulty.yml"
    settings.write_text(content)
    assert words(f"mrcore --config {settings} show ") == []
    (home / "state").mkdir()
    (home / "state/queue.sqlite").write_text("no database at all, but a text that is long enough for one" * 20)
    before = files(home)
    assert words("mrcore show ") == []
    assert files(home) == before
    sudo = tmp_path / "bin/sudo"
    sudo.parent.mkdir()
    sudo.write_text(f"#!/bin/sh\ntouch {tmp_path}/called\n")
    sudo.chmod(0o755)
    words(f"mrcore --config {settings} show ", PATH=f"{sudo.parent}:{os.environ['PATH']}")
    assert not (tmp_path / "called").exists()


def test_an_answer_loads_nothing_that_takes_long(queued: Path) -> None:
    """What is counted is modules: seconds would be those of whatever else the machine does."""
    asked = {"_MRCORE_COMPLETE": "bash_complete", "COMP_WORDS": "mrcore show ", "COMP_CWORD": "2"}
    environment = {**os.environ, **asked, "PYTHONPROFILEIMPORTTIME": "1"}
    done = subprocess.run([MRCORE], env=environment, capture_output=True, text=True, timeout=60, check=True)
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "nightly_pages" in done.stdout and "mrcore.cli.completion" in loaded
    heavy = {"cryptography", "fabric", "jinja2", "paramiko", "prometheus_client", "rich", "rpyc", "starlette"}
    assert not heavy & loaded  # settings need pydantic and yaml, no more
    assert len(loaded) < MODULES


def test_a_real_bash_completes(queued: Path) -> None:
    """With the script that the command prints, and none of the package bash-completion."""
    press = """
        complete_line() {
            COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}; COMPREPLY=()
            _mrcore_completion "$1" "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}" 2>/dev/null
            echo "${COMPREPLY[*]}"
        }
        complete_line mrcore show nightly_v
        complete_line mrcore submit job.yml --set merge_
        complete -p mrcore
    """
    script = mrcore("completion", "bash")[1] + press
    path = f"{Path(MRCORE).parent}:{os.environ['PATH']}"
    command = ["bash", "--norc", "--noprofile", "-c", script]
    done = subprocess.run(command, env=os.environ | {"PATH": path}, capture_output=True, text=True, check=True)
    offered, keys, how = done.stdout.splitlines()
    assert (offered, keys) == ("nightly_visits", "merge_output=")
    assert how == "complete -o nosort -F _mrcore_completion mrcore"


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_other_shells_get_a_script(home: Path, shell: str) -> None:
    status, out, _ = mrcore("completion", shell)
    assert status == 0 and f"_MRCORE_COMPLETE={shell}_complete" in out


def test_no_name_of_a_folder_becomes_a_command(queued: Path) -> None:
    """Bash inserts what it is offered as it is: others choose names of projects, and Enter would obey them."""
    for name in (
        "visits$(id)",
        "visits;id",
        "visits`id`",
        "vis its",
        "visits\nplain,vis",
        "visits*",
        "-visits",
        "vis\x1b[2J",
    ):
        Path("projects", name).mkdir()
    assert words("mrcore try vis") == ["visits"]
    assert "-visits" not in words("mrcore try -")
