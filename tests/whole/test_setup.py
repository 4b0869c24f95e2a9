"""`scripts/setup.sh` on machines that lack things: a PATH of its own, with a Python, apt-get and sudo that are played.

Everything else in that PATH is real, and so is what is asserted: commands that were run, files, exit statuses, words.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import PROJECT
from conditions import wait_until

TOOLS = ["cat", "cksum", "cp", "dirname", "env", "flock", "mkdir", "rm", "sed", "sleep", "tr", "true"]

# A Python 3.MINOR: can make a venv once `ensurepip` is there; notes what pip was asked to do.
PYTHON = """#!/bin/sh
state={state}
case "$1 ${{2:-}}" in
    *"version_info <"*) [ {minor} -ge 11 ] ;;
    *"import venv, ensurepip"*) [ -f $state/ensurepip ] ;;
    *"import mrcore, pip"*) [ -f "$(dirname "$0")/../installed" ] ;;
    *print*) echo 3.{minor} ;;
    "--version "*) echo Python 3.{minor}.9 ;;
    "-m venv") echo "$0 $*" >>$state/log && mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    "-m pip")
        shift 2
        echo "pip $*" >>$state/log
        if [ -f $state/slow ]; then : >$state/pip-runs; sleep 60; fi
        [ ! -f $state/no-network ] || {{ echo "no route to host" >&2; exit 1; }}
        : >"$(dirname "$0")/../installed"
        ;;
    *) echo "unexpected: $*" >&2; exit 99 ;;
esac
"""
APT = """#!/bin/sh
echo "apt-get $*" >>{state}/log
case "$*" in *install*venv*) : >{state}/ensurepip ;; esac
"""
SUDO = """#!/bin/sh
[ "$1" = -n ] || exit 98
shift
[ "$1" = true ] || echo "sudo $*" >>{state}/log
exec "$@"
"""
QUIET = "pip install --quiet --quiet"
SUDO_ASKS = "#!/bin/sh\necho 'a password is required' >&2\nexit 1\n"


def installs(*extras: str) -> list[str]:
    """What pip is asked to do: the locked packages by their checksums, then mrcore itself and nothing else."""
    locked = " ".join(f"-r lock/{name}.txt" for name in ("base", *extras))
    return [
        f"{QUIET} --require-hashes -r lock/build.txt",
        f"{QUIET} --require-hashes --no-build-isolation {locked}",
        f"{QUIET} --no-deps --no-build-isolation -e .",
    ]


class Machine:
    """A copy of the set-up in a folder of its own, and a PATH that holds what the test says."""

    def __init__(self, folder: Path) -> None:
        self.state, self.bin, self.project = folder / "state", folder / "bin", folder / "pro ject"
        for each in (self.state, self.bin, self.project / "scripts"):
            each.mkdir(parents=True)
        shutil.copy(PROJECT / "scripts/setup.sh", self.project / "scripts")
        (self.project / "pyproject.toml").write_text("[project]\nname = 'x'\n")
        (self.project / "lock").mkdir()
        (self.project / "lock/base.txt").write_text("x==1\n")
        for name in TOOLS:
            real = shutil.which(name)
            assert real, name
            (self.bin / name).symlink_to(real)
        self.user(0)

    def has(self, name: str, text: str, **values: object) -> None:
        (self.bin / name).write_text(text.format(state=self.state, **values) if values or "{state}" in text else text)
        (self.bin / name).chmod(0o755)

    def user(self, number: int) -> None:
        self.has("id", f"#!/bin/sh\necho {number}\n")

    def python(self, name: str = "python3", minor: int = 11, ensurepip: bool = True) -> None:
        self.has(name, PYTHON, minor=minor)
        if ensurepip:
            (self.state / "ensurepip").touch()

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        command = ["/bin/sh", str(self.project / "scripts/setup.sh"), *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
        variables = {"PATH": str(self.bin), "HOME": str(self.state)} | environment
        return subprocess.Popen(command, env=variables, **pipes)  # type: ignore[call-overload, no-any-return]

    def set_up(self, *arguments: str, status: int = 0, **environment: str) -> str:
        """Run it; what it said."""
        process = self.start(*arguments, **environment)
        out, err = process.communicate(timeout=60)
        assert process.returncode == status, out + err
        assert out == "", "stdout is for the target that follows"
        return str(err)

    @property
    def log(self) -> list[str]:
        path = self.state / "log"
        return path.read_text().splitlines() if path.exists() else []

    def forget(self) -> None:
        (self.state / "log").unlink(missing_ok=True)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_a_machine_with_all_it_takes(machine: Machine) -> None:
    machine.python()
    said = machine.set_up()
    assert machine.log == [f"{machine.bin}/python3 -m venv .venv", *installs("dev")]
    assert "Python 3.11.9" in said and "done" in said
    machine.forget()
    assert machine.set_up() == "" and machine.log == [], "the second time there is nothing to do, and it says nothing"


def test_root_gets_the_missing_package_by_apt(machine: Machine) -> None:
    machine.python(ensurepip=False)
    machine.has("apt-get", APT)
    said = machine.set_up()
    assert "missing: python3.11-venv. Running: apt-get install" in said
    apt = [line for line in machine.log if line.startswith("apt-get")]
    assert apt == ["apt-get update -qq", "apt-get install --yes --no-install-recommends python3.11-venv"]
    assert machine.log[-3:] == installs("dev")


def test_sudo_without_a_password_is_used(machine: Machine) -> None:
    machine.user(1000)
    machine.python(ensurepip=False, minor=12)
    machine.has("apt-get", APT)
    machine.has("sudo", SUDO)
    said = machine.set_up()
    assert "Running: sudo -n apt-get install" in said
    install = "apt-get install --yes --no-install-recommends python3.12-venv"
    assert f"sudo env DEBIAN_FRONTEND=noninteractive {install}" in machine.log
    assert (machine.project / ".venv/.ready-dev").exists()


@pytest.mark.parametrize("sudo", [None, SUDO_ASKS])
def test_without_rights_it_prints_the_one_line_and_stops(machine: Machine, sudo: str | None) -> None:
    machine.user(1000)
    machine.python(ensurepip=False)
    machine.has("apt-get", APT)
    if sudo:
        machine.has("sudo", sudo)
    said = machine.set_up(status=1)
    assert "    sudo apt-get install --yes --no-install-recommends python3.11-venv\n" in said
    assert machine.log == [] and not (machine.project / ".venv").exists()


def test_programs_come_from_packages_of_their_own_names_or_others(machine: Machine) -> None:
    machine.python()
    machine.has("apt-get", APT)
    machine.has("here", "#!/bin/sh\n")
    machine.set_up("dev", "here", "gone", "tool=its-package", "/opt/nowhere/tool=another")
    assert "apt-get install --yes --no-install-recommends gone its-package another" in machine.log, "all in one go"


def test_programs_that_may_not_be_installed_have_a_status_of_their_own(machine: Machine) -> None:
    machine.user(1000)
    machine.python()
    machine.has("apt-get", APT)
    said = machine.set_up("dev", "gone", status=3)
    assert "    sudo apt-get install --yes --no-install-recommends gone\n" in said and machine.log == []


def test_without_apt_it_names_what_is_missing(machine: Machine) -> None:
    machine.python(ensurepip=False)
    assert "missing: python3.11-venv. There is no apt-get here" in machine.set_up(status=1)


def test_a_python_that_apt_cannot_complete_is_an_error(machine: Machine) -> None:
    machine.python(ensurepip=False)
    machine.has("apt-get", "#!/bin/sh\n")
    assert "still cannot make a venv" in machine.set_up(status=1)


def test_without_any_python_apt_brings_one(machine: Machine) -> None:
    machine.has("apt-get", APT)
    assert "older than 3.11" in machine.set_up(status=1)
    assert "apt-get install --yes --no-install-recommends python3 python3-venv" in machine.log


def test_the_first_python_that_is_new_enough_is_taken(machine: Machine) -> None:
    machine.python(minor=9)
    machine.has("python3.13", "#!/bin/sh\nexit 127\n")  # a version manager's stand-in for one that is not installed
    machine.python("python3.12", minor=12)
    machine.set_up()
    assert machine.log[0] == f"{machine.bin}/python3.12 -m venv .venv"


def test_the_user_may_choose_the_python(machine: Machine) -> None:
    machine.python()
    machine.python("mine", minor=13)
    machine.set_up(PYTHON="mine")
    assert machine.log[0] == f"{machine.bin}/mine -m venv .venv"


def test_a_chosen_python_that_is_too_old_is_refused(machine: Machine) -> None:
    machine.python()
    machine.python("old", minor=9)
    assert "PYTHON=old is no Python 3.11 or newer" in machine.set_up(status=1, PYTHON="old")
    assert machine.log == []


def test_an_unfinished_venv_is_made_anew(machine: Machine) -> None:
    machine.python()
    (machine.state / "slow").touch()
    process = machine.start()
    wait_until((machine.state / "pip-runs").exists, 30, "pip runs")
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    (machine.state / "slow").unlink()
    (machine.project / ".venv/half").touch()
    assert "unfinished, moved or broken" in machine.set_up()
    assert not (machine.project / ".venv/half").exists()
    assert (machine.project / ".venv/.ready-dev").exists()


def test_what_pip_cannot_do_is_told_and_tried_again(machine: Machine) -> None:
    machine.python()
    (machine.state / "no-network").touch()
    said = machine.set_up(status=1)
    assert "no route to host" in said and "pip could not install everything" in said
    (machine.state / "no-network").unlink()
    machine.forget()
    machine.set_up()
    assert machine.log[-3:] == installs("dev")


@pytest.mark.parametrize("name", ["pyproject.toml", "lock/base.txt"])
def test_another_pyproject_or_lock_brings_the_venv_up_to_date(machine: Machine, name: str) -> None:
    machine.python()
    machine.set_up()
    (machine.project / name).write_text("another")
    machine.forget()
    machine.set_up()
    assert machine.log == installs("dev")


def test_extras_are_added_to_what_is_there(machine: Machine) -> None:
    machine.python()
    machine.set_up()
    machine.forget()
    machine.set_up("dev,bench")
    assert machine.log == installs("dev", "bench")
    machine.forget()
    machine.set_up("dev,bench")
    machine.set_up("dev")
    assert machine.log == [], "both are there now"


def test_a_project_that_was_moved_gets_a_new_venv(machine: Machine) -> None:
    machine.python()
    machine.set_up()
    machine.project = machine.project.rename(machine.project.with_name("elsewhere"))
    machine.forget()
    machine.set_up()
    assert machine.log == [f"{machine.bin}/python3 -m venv .venv", *installs("dev")]


def test_a_venv_whose_python_is_gone_is_made_anew(machine: Machine) -> None:
    machine.python()
    machine.set_up()
    (machine.project / ".venv/bin/python").unlink()
    assert "unfinished, moved or broken" in machine.set_up()
    assert (machine.project / ".venv/bin/python").exists()


def test_the_projects_own_venv_does_not_make_itself(machine: Machine) -> None:
    machine.python()
    machine.set_up()
    (machine.project / ".venv/bin/python3").symlink_to("python")
    (machine.project / ".venv/.ready-dev").unlink()
    machine.forget()
    machine.set_up(PATH=f"{machine.project}/.venv/bin:{machine.bin}")  # the user has activated it
    assert machine.log[0] == f"{machine.bin}/python3 -m venv .venv"


def test_two_at_a_time_make_one_venv(machine: Machine) -> None:
    machine.python()
    both = [machine.start(), machine.start()]
    for process in both:
        process.communicate(timeout=60)
        assert process.returncode == 0
    assert len([line for line in machine.log if "venv" in line]) == 1
    assert [line for line in machine.log if line.startswith("pip")] == installs("dev")


def test_help_lists_every_target() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # of `make test`
    done = subprocess.run(["make", "help"], cwd=PROJECT, env=environment, capture_output=True, text=True, check=True)
    listed = done.stdout
    phony = re.search(r"^\.PHONY: (.*)$", (PROJECT / "Makefile").read_text(), re.MULTILINE)
    assert phony
    assert {line.split()[1] for line in listed.splitlines()} == set(phony[1].split())
    assert all(len(line.split()) > 3 for line in listed.splitlines()), "each with a line of explanation"


def test_no_package_index_is_named() -> None:
    locks = [f"lock/{path.name}" for path in (PROJECT / "lock").iterdir()]
    for name in ("scripts/setup.sh", "scripts/update_lock.py", "Makefile", ".ci/run", "pyproject.toml", *locks):
        text = (PROJECT / name).read_text()
        assert not re.search(r"https?://|index-url|pypi|trusted-host", text, re.IGNORECASE), name


@pytest.mark.parametrize("name", ["scripts/setup.sh", ".ci/run"])
def test_scripts_may_be_executed(name: str) -> None:
    assert os.access(PROJECT / name, os.X_OK)


@pytest.mark.parametrize("asked", ["script", "-c", "project", "its own Python"])
def test_a_folder_called_mrcore_beside_the_users_code_does_not_hide_the_package(tmp_path: Path, asked: str) -> None:
    """Such as a clone of this project, whose folder has no __init__.py, but the package one floor further down."""
    (tmp_path / "mrcore").symlink_to(PROJECT)
    code = "import mrcore\nfrom mrcore import Scheduler, __version__, task, scheduler\nprint(mrcore.__file__)\n"
    (tmp_path / "use.py").write_text(code)
    (tmp_path / "project").mkdir()
    (tmp_path / "project/map_functions.py").write_text(code + "def m(line, auxiliary_data):\n    return []\n")
    command = [sys.executable, "use.py"]
    if asked == "-c":
        command = [sys.executable, "-c", code]
    elif asked == "its own Python":  # as after `make demo`, from the folder that holds the checkout
        command = [f"mrcore/{Path(sys.prefix).relative_to(PROJECT)}/bin/python", "use.py"]
    elif asked == "project":
        command = [str(Path(sys.executable).with_name("mrcore")), "try", "project", "--map", "m", "use.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert Path(done.stdout.strip()).resolve() == PROJECT / "mrcore/__init__.py"
