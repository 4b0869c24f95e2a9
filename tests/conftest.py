"""Fixtures of all tests: a home of their own, a small project, its queue; and which tests cannot run here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import fake_cluster
import pytest

from mrcore.queue.scheduler import Scheduler
from mrcore.settings.config import Settings, load_settings


def left_out() -> dict[str, str]:
    """Return the markers of what cannot be run here, and why. With CI=true nothing is left out: it fails instead."""
    reasons = {}
    if os.geteuid() != 0:
        reasons["needs_root"] = "the tests marked needs_root: `pytest -m needs_root` as root runs them"
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    for program in ("strace", "sshd"):
        if shutil.which(program, path=path) is None:
            reasons[f"needs_{program}"] = f"the tests marked needs_{program}: there is no {program} here"
    if "needs_root" in reasons and may_become_root():
        reasons["needs_root"] = ""  # scripts/test.sh runs them by sudo
        return reasons
    return {} if os.environ.get("CI") == "true" else reasons


def may_become_root() -> bool:
    """Return whether sudo works without a password."""
    if shutil.which("sudo") is None:
        return False
    return subprocess.run(["sudo", "-n", "true"], capture_output=True, check=False).returncode == 0


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what cannot be run here."""
    markers = left_out()
    out = [item for item in items if any(item.get_closest_marker(marker) for marker in markers)]
    if out:
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if item not in out]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """List what was left out, for scripts/test.sh as well."""
    reasons = [reason for reason in left_out().values() if reason]
    for line in reasons:
        terminalreporter.write_line(f"not run: {line}")
    if reasons and (file := os.environ.get("MRCORE_NOT_RUN")):
        with open(file, "a") as stream:
            stream.writelines(f"{line}\n" for line in reasons)


@pytest.fixture(scope="session", autouse=True)
def _left(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Remove the folders that modules share if all tests passed: pytest does not for a worker of xdist."""
    yield
    if hasattr(request.config, "workerinput") and not request.session.testsfailed:
        shutil.rmtree(tmp_path_factory.getbasetemp(), ignore_errors=True)  # what is not ours to remove is no failure


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty MRCORE_HOME, with the current folder beside it, so that no test meets the user's own cluster."""
    folder = tmp_path / "home"
    work = tmp_path / "work"
    folder.mkdir()
    work.mkdir()
    monkeypatch.setenv("MRCORE_HOME", str(folder))
    monkeypatch.delenv("MRCORE_CONFIG", raising=False)
    monkeypatch.chdir(work)
    return folder


@pytest.fixture
def projects_dir(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`projects/` of the current folder, holding `word_count` in the original's style."""
    folder = home.parent / "work" / "projects"
    project = folder / "word_count"
    project.mkdir(parents=True)
    (project / "map_functions.py").write_text(
        "class MapFunctions():\n"
        "    def __init__(self, map_function_name):\n"
        "        self.map_function = globals()[map_function_name]\n"
        "    def get_map_function(self):\n"
        "        return self.map_function\n\n"
        "def count_map(line, auxiliary_data):\n"
        "    return [(word, 1) for word in line.split()]\n"
    )
    (project / "reduce_functions.py").write_text(
        "def count_reduce(group, auxiliary_data):\n    return [(group[0][0], sum(value for _, value in group))]\n"
    )
    return folder


@pytest.fixture
def settings(config: Path) -> Settings:
    """Return the settings of the test module's own `config`."""
    return load_settings(config)


@pytest.fixture
def scheduler(settings: Settings) -> Iterator[Scheduler]:
    """Yield the queue of the test module's settings, and check its invariants at the end."""
    opened = Scheduler(settings)
    yield opened
    opened.store.check()
    opened.store.close()


@pytest.fixture
def spawn(config: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start Runners on a stand-in for the cluster, as processes that do not outlive the test."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, fake_cluster.__file__, str(config), *arguments]
        started.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()
