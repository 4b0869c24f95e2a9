"""Who may call mrcore on a master whose settings name a user, and as whom it runs: real users, and the real sudo."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conditions import wait_until
from people import TOP, People

from mrcore.cli import main as cli
from mrcore.errors import UsageError
from mrcore.queue.runner import Runner
from mrcore.queue.scheduler import Scheduler
from mrcore.settings import sudo
from mrcore.settings.config import Settings, load_settings

SETTINGS = {
    "user": "mrcore",
    "home": f"{TOP}/home/mrcore",
    "projects_dir": f"{TOP}/projects",
    "nodes": [{"name": "a", "address": "127.0.0.9", "servers": 1, "compute_dir": f"{TOP}/compute"}],
}


@pytest.fixture(scope="module")
def people() -> Iterator[People]:
    """A world with a master's users in it, and their settings."""
    made = People()
    made.shell(f"cat >{TOP}/cluster.json", json.dumps(SETTINGS))
    made.shell("chmod 711 ~; echo 'print(1)' >~/script.py", user="alice")
    yield made
    made.close()


def script(name: str, **keys: str) -> str:
    return json.dumps({"job_type": "script", "job_name": name, "script_location": "~/script.py", **keys})


@pytest.mark.needs_root
def test_a_submitters_file_is_read_as_the_submitter_and_runs_as_the_user(people: People) -> None:
    people.shell("cat >~/job.json && chmod 600 ~/job.json", script("wc", job_submitter="somebody else"), "alice")
    done = people.mrcore("alice", "submit", "job.json", "--set", "job_priority=3", "--json")
    assert (done.returncode, json.loads(done.stdout)[0]["job_name"]) == (0, "wc"), done.stderr
    story = json.loads(people.mrcore("erin", "show", "wc", "--json").stdout)["job"]
    assert story["job_submitter"] == "alice"
    assert story["script_location"] == f"{TOP}/home/alice/script.py"
    assert story["job_priority"] == 3
    assert "mrcore" in people.shell(f"stat -c %U {TOP}/home/mrcore/state/queue.sqlite")
    done = people.mrcore("alice", "submit", "-", input=script("piped").replace("~", f"{TOP}/home/alice"))
    assert (done.returncode, done.stdout.split(":")[0]) == (0, "piped")


@pytest.mark.needs_root
def test_run_and_plan_take_a_submitters_file_as_well(people: People) -> None:
    text = script("quick", script_location="~/quick.py")
    people.shell("echo pass >~/quick.py; cat >~/quick.json && chmod 600 ~/quick.json", text, "alice")
    planned = people.mrcore("alice", "plan", "quick.json")
    assert planned.returncode == 0 and f"{TOP}/home/alice/quick.py" in planned.stdout, planned.stderr
    done = people.mrcore("alice", "run", "quick.json")
    assert done.returncode == 0 and "quick run 1: succeeded" in done.stdout, done.stderr
    people.mrcore("alice", "delete", "quick")


@pytest.mark.needs_root
def test_who_the_user_himself_or_root_submits_for(people: People) -> None:
    text = script("own", script_location=str(TOP / "home/alice/script.py"))
    assert people.mrcore("mrcore", "submit", "-", input=text).returncode == 0  # LOGNAME and USER are the caller's
    assert json.loads(people.mrcore("mrcore", "show", "own", "--json").stdout)["job"]["job_submitter"] == "mrcore"
    call = f"cd /; {TOP}/mrcore --config {TOP}/cluster.json submit -"
    people.shell(call, text)
    assert json.loads(people.mrcore("mrcore", "show", "own", "--json").stdout)["job"]["job_submitter"] == "root"


@pytest.mark.needs_root
def test_whoever_is_in_no_group_gets_one_line(people: People) -> None:
    for arguments in (["queue"], ["submit", "-"], ["cat", "wc"], ["run"]):
        done = people.mrcore("mallory", *arguments, input=script("x"))
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == (
            "mrcore: mallory may not use this cluster: mrcore runs as user mrcore here, for members of the group "
            "mrcore-users; the operator adds mallory to mrcore_users of the inventory and deploys\n"
        )
    assert "state" not in people.mrcore("mallory", "backup", "x").stdout
    refused = subprocess.run(people.enter("mallory", "ls", f"{TOP}/home/mrcore"), capture_output=True, text=True)
    assert refused.returncode != 0 and refused.stdout == ""


@pytest.mark.needs_root
def test_what_needs_no_rights_runs_as_the_caller(people: People) -> None:
    assert people.mrcore("mallory", "template", "script").returncode == 0
    assert people.mrcore("mallory", "submit", "--help").returncode == 0
    assert json.loads(people.mrcore("mallory", "settings", "--json").stdout)["user"] == "mrcore"
    people.shell(
        "mkdir -p ~/p; echo 'def f(l, a): yield l.strip(), 1' >~/p/map_functions.py; echo hi >~/in", user="mallory"
    )
    done = people.mrcore("mallory", "try", "p", "in", "--map", "f")
    assert (done.returncode, done.stdout) == (0, '["hi", 1]\n'), done.stderr


@pytest.mark.needs_root
def test_the_exit_status_is_the_commands_own(people: People) -> None:
    done = people.mrcore("alice", "show", "nothing")
    assert done.returncode == 2 and done.stderr.startswith("mrcore: job 'nothing' is not known")


@pytest.mark.needs_root
def test_a_path_that_the_user_may_not_enter_is_named_at_submit(people: People) -> None:
    done = people.mrcore("erin", "submit", "-", input=script("x", script_location=f"{TOP}/home/erin/s.py"))
    assert done.returncode == 2
    assert f"script_location: user mrcore may not enter {TOP}/home/erin, which is on the way to" in done.stderr
    done = people.mrcore("erin", "upload", f"{TOP}/home/erin", "x")
    assert (done.returncode, done.stdout) == (2, "") and "user mrcore may not read" in done.stderr


@pytest.mark.needs_root
def test_settings_named_by_the_environment_go_along(people: People) -> None:
    other = SETTINGS | {"home": f"{TOP}/home/mrcore/other", "cluster_name": "other"}
    people.shell(f"cat >{TOP}/other.json", json.dumps(other))
    call = f"cd; MRCORE_CONFIG=../../other.json {TOP}/mrcore submit -"
    people.shell(call, script("elsewhere").replace("~", f"{TOP}/home/alice"), "alice")
    assert people.shell(f"ls {TOP}/home/mrcore/other/state")
    assert people.mrcore("alice", "show", "elsewhere").returncode == 2


@pytest.mark.parametrize("links", [("/opt/current/bin/mrcore",), ("mine", "/opt/current/bin/mrcore"), ()])
def test_sudo_is_given_the_path_of_its_rule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: tuple[str, ...]
) -> None:
    program = tmp_path / "opt/current/bin/mrcore"
    (tmp_path / "opt/releases/1/bin").mkdir(parents=True)
    (tmp_path / "opt/releases/1/bin/mrcore").touch()
    (tmp_path / "opt/current").symlink_to("releases/1")
    called = tmp_path / "bin/mrcore" if links else program
    (tmp_path / "bin").mkdir()
    for number, target in enumerate(links):
        name = called if number == 0 else called.with_name(links[number - 1])
        name.symlink_to(f"{tmp_path}{target}" if target.startswith("/") else target)
    monkeypatch.setattr("sys.argv", [str(called), "queue"])
    assert sudo._ourselves() == str(program)


def runner(people: People) -> dict[str, object]:
    return json.loads(people.mrcore("mrcore", "queue", "--json").stdout)["runner"]


@pytest.mark.needs_root
@pytest.mark.parametrize("how", ["SIGTERM", "terminal"])
def test_signals_and_the_terminal_are_the_commands_own(people: People, how: str) -> None:
    people.mrcore("mrcore", "pause")
    command = people.enter("alice", f"{TOP}/mrcore", "--config", f"{TOP}/cluster.json", "run")
    ours, theirs = pty.openpty()
    terminal = {"stdin": theirs, "stdout": theirs, "stderr": theirs, "preexec_fn": lambda: os.login_tty(theirs)}
    with subprocess.Popen(command, **(terminal if how == "terminal" else {})) as process:  # type: ignore[call-overload]
        wait_until(lambda: runner(people), 20, "alice's Runner")
        if how == "terminal":
            os.write(ours, b"\x03")
        else:
            process.send_signal(signal.SIGTERM)
        assert process.wait(20) == (130 if how == "terminal" else 0)
    os.close(ours)
    os.close(theirs)
    assert not runner(people)


@pytest.fixture
def settings(home: Path) -> Settings:
    (home / "cluster.json").write_text('{"user": "daemon" }')
    return load_settings()


def test_a_user_whom_the_machine_does_not_have_is_named(home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (home / "cluster.json").write_text('{"user": "no-such-user"}')
    with pytest.raises(SystemExit, match="2"):
        cli.main(["queue"])
    assert "runs as user no-such-user, whom this machine does not have" in capfd.readouterr().err


def test_a_machine_without_sudo(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit, match="2"):
        cli.main(["queue"])
    assert "install sudo" in capfd.readouterr().err


def test_what_is_called(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A sudo that is played says what it was asked."""
    played = tmp_path / "sudo"
    played.write_text('#!/bin/sh\n[ "$2" = -l ] || exit 9\n')
    played.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    called: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda file, arguments: called.append([file, *arguments]))
    monkeypatch.setattr(sudo, "_is_submitter", lambda: False)
    with pytest.raises(SystemExit):
        cli.main(["--config", str(settings.home / "cluster.json"), "queue", "--json"])
    ((file, name, *arguments),) = called[:1]
    assert file == name == str(played)
    assert arguments[:4] == ["-n", "-u", "daemon", "--"]
    assert arguments[5:] == ["--config", str(settings.home / "cluster.json"), "queue", "--json"]
    assert Path(arguments[4]).name == "mrcore"


@pytest.mark.parametrize("kind", [Scheduler, Runner])
def test_a_python_program_of_another_user_is_refused(settings: Settings, kind: type) -> None:
    with pytest.raises(UsageError, match=r"belongs to user daemon.*sudo -u daemon"):
        kind(settings)
    assert not settings.state_dir.exists()
