"""The local cluster's home is its owner's alone, wherever it lies: another user of the machine finds nothing in it."""

from __future__ import annotations

import json
import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from daemons import own_address
from fake_cluster import FakeCluster

from mrcore.launchers import local
from mrcore.queue.runner import Runner
from mrcore.queue.scheduler import Scheduler
from mrcore.settings.config import Settings, load_settings
from mrcore.system.paths import make_private

STRANGER = 61004  # a user id that is nobody's


@pytest.fixture(autouse=True)
def open_umask() -> Iterator[None]:
    """As most machines have it, or worse."""
    before = os.umask(0)
    yield
    os.umask(before)


def open_to_others(folder: Path) -> list[str]:
    """What of a folder and of all below it others than its owner may use, by mode."""
    return [
        f"{stat.filemode(path.lstat().st_mode)} {path.relative_to(folder)}"
        for path in (folder, *folder.rglob("*"))
        if not path.is_symlink() and path.lstat().st_mode & 0o077
    ]


def folders_open(folder: Path) -> list[str]:
    return [each for each in open_to_others(folder) if each.startswith("d")]


def script(home: Path) -> dict[str, Any]:
    file = home.parent / "s.py"
    file.write_text("print('secret')\n")
    return {"job_type": "script", "job_name": "s", "script_location": str(file), "run_once": True}


@pytest.fixture
def cluster(home: Path) -> Iterator[Settings]:
    """A local cluster of one node that runs, in a home that everybody could read before."""
    home.chmod(0o777)
    for name in ("state", "logs/scripts/s", "pki", "nodes/x"):
        (home / name).mkdir(parents=True)
    configured = local.configure(home, nodes=1, servers=1, address=own_address(), memory_bytes=256 << 20)
    local.start_cluster(configured)
    yield configured
    local.kill_cluster(configured)


def test_a_home_that_was_open_is_closed_at_start(cluster: Settings) -> None:
    assert stat.S_IMODE(cluster.home.stat().st_mode) == 0o700
    for name in ("state", "logs", "pki", "nodes"):
        assert stat.S_IMODE((cluster.home / name).stat().st_mode) == 0o700
    node = cluster.nodes[0].compute_dir
    made_by_daemons = [each for each in open_to_others(node / "pids") if "server" in each]
    assert not made_by_daemons, "the daemons' umask"
    for key in cluster.home.rglob("*.key"):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600


@pytest.fixture
def open_way(home: Path) -> Iterator[None]:
    """Everybody may go as far as the home itself."""
    modes = {folder: stat.S_IMODE(folder.stat().st_mode) for folder in home.parents}
    for folder, mode in modes.items():
        if mode & 0o005 != 0o005:
            folder.chmod(mode | 0o005)
    yield
    for folder, mode in modes.items():
        folder.chmod(mode)


@pytest.mark.needs_root
@pytest.mark.usefixtures("open_way")
def test_another_user_finds_nothing(cluster: Settings) -> None:
    Scheduler(cluster).submit_job(script(cluster.home))
    assert Runner(cluster, FakeCluster(cluster)).run(once=True) == {"succeeded": 1}
    become = ["setpriv", f"--reuid={STRANGER}", f"--regid={STRANGER}", "--clear-groups", "--"]
    look = f"cd / && test -e {cluster.home} && find {cluster.home} -mindepth 1 2>/dev/null; true"
    done = subprocess.run([*become, "sh", "-c", look], capture_output=True, text=True, check=True)
    assert done.stdout == "" and subprocess.run([*become, "ls", str(cluster.home.parent)], check=True).returncode == 0
    found = [path for path in cluster.home.rglob("*") if path.is_file()]
    assert {"queue.sqlite", "1.log", "ca.key", "agent.log", "cluster.json"} <= {path.name for path in found}
    reading = subprocess.run([*become, "cat", *map(str, found)], capture_output=True, cwd="/")
    assert reading.stdout == b"" and reading.returncode == 1
    assert reading.stderr.count(b"Permission denied") == len(found)


def test_a_new_home_is_private_from_the_first_command_on(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new = home.parent / "a/b"
    monkeypatch.setenv("MRCORE_HOME", str(new))
    settings = load_settings()
    Scheduler(settings).submit_job(script(home))
    assert Runner(settings, FakeCluster(settings)).run(once=True) == {"succeeded": 1}
    assert stat.S_IMODE((home.parent / "a").stat().st_mode) == 0o700 and not folders_open(new / "state")
    assert stat.S_IMODE(new.stat().st_mode) == 0o700


def test_a_queue_outside_of_the_home_is_private_too(home: Path) -> None:
    config = home.parent / "config.json"
    config.write_text(json.dumps({"state_dir": str(home.parent / "elsewhere/state")}))
    Scheduler(load_settings(config))
    assert not folders_open(home.parent / "elsewhere")


def test_what_is_everybodys_or_an_accounts_stays_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MRCORE_HOME=/tmp as root must not close /tmp to all others; what is ours in it is closed all the same."""
    shared, account = tmp_path / "tmp", tmp_path / "anna"
    for folder, mode in ((shared, 0o1777), (account, 0o755)):
        folder.mkdir()
        folder.chmod(mode)
        (folder / "state").mkdir(mode=0o755)
    monkeypatch.setenv("HOME", str(account))
    for folder, mode in ((shared, 0o1777), (account, 0o755)):
        monkeypatch.setenv("MRCORE_HOME", str(folder))
        Scheduler(load_settings())
        assert stat.S_IMODE(folder.stat().st_mode) == mode
        assert stat.S_IMODE((folder / "state").stat().st_mode) == 0o700


def test_a_private_folder_is_left_alone(tmp_path: Path) -> None:
    for mode in (0o700, 0o500):
        folder = tmp_path / str(mode)
        folder.mkdir(mode=mode)
        make_private(folder)
        assert stat.S_IMODE(folder.stat().st_mode) == mode
