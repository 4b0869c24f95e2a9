"""Copies of backups on a node, over a real sshd and on a local cluster, and how many stay."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from ssh_nodes import DeployedCluster

from mrcore.admin import copies, doctor
from mrcore.cli.main import main
from mrcore.errors import UsageError
from mrcore.launchers import ssh
from mrcore.queue.scheduler import Scheduler
from mrcore.settings.config import load_settings
from mrcore.state import backup
from mrcore.wire import pki


@pytest.fixture
def deployed(tmp_path: Path) -> Iterator[DeployedCluster]:
    made = DeployedCluster(tmp_path, 2)
    yield made
    made.close()


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        main(list(arguments))
    assert isinstance(left.value.code, int)
    return left.value.code


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_copy_on_a_node_and_old_ones_removed_in_both_places(
    deployed: DeployedCluster, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config, here, there = str(deployed.config), tmp_path / "kept", deployed.nodes[1].compute_dir / "backups"
    here.mkdir()
    for other in ("notes.txt", "other-3.backup", "my-4.backup.partial"):
        (here / other).write_text("stays")
    for day in range(1, 5):
        file = here / f"my-2026110{day}.backup"
        assert call("--config", config, "backup", str(file), "--copy-to", "w2", "--keep", "2") == 0
        for place in (here, there):
            os.utime(place / file.name, (day, day))
    assert names(there) == ["my-20261103.backup", "my-20261104.backup"]
    assert names(here) == [
        "my-20261103.backup",
        "my-20261104.backup",
        "my-4.backup.partial",
        "notes.txt",
        "other-3.backup",
    ]
    assert (there / "my-20261104.backup").read_bytes() == (here / "my-20261104.backup").read_bytes()
    assert (there.stat().st_mode & 0o777, (there / "my-20261104.backup").stat().st_mode & 0o777) == (0o700, 0o600)
    assert not (deployed.nodes[0].compute_dir / "backups").exists()
    said = capfd.readouterr().out
    assert f"a copy is on w2: {there}/my-20261104.backup" in said and "older ones removed: 2" in said
    elsewhere = deployed.settings.model_copy(update={"state_dir": tmp_path / "new master"})
    with pytest.raises(UsageError, match=r"my-20261104\.backup: it is not signed"):  # there is no key
        backup.restore(elsewhere, there / "my-20261104.backup")
    assert backup.restore(elsewhere, there / "my-20261104.backup", verify=False)["version"]
    pki.make_backup_key(deployed.settings.pki_dir.parent)
    assert call("--config", config, "backup", str(here / "signed"), "--copy-to", "w2") == 0
    assert backup.restore(elsewhere, there / "signed", force=True)["version"]


def test_a_node_that_is_away_costs_the_copy_only(
    deployed: DeployedCluster, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    deployed.nodes[1].stop_sshd()
    file = tmp_path / "one.backup"
    assert call("--config", str(deployed.config), "backup", str(file), "--copy-to", "w2") == 1
    assert "w2" in capfd.readouterr().err and file.exists()
    facts = {"master": {"local": False, "time": 0.0, "backup": backup.last_backup(deployed.settings.state_dir)}}
    (finding,) = doctor.judge_backup(facts)
    assert finding.where == "node w2" and "--copy-to w2" in finding.do
    assert call("--config", str(deployed.config), "backup", str(file), "--copy-to", "w1") == 0
    facts["master"]["backup"] = backup.last_backup(deployed.settings.state_dir)
    assert not list(doctor.judge_backup(facts))


def test_a_node_that_there_is_not_is_told_before_anything_is_done(
    deployed: DeployedCluster, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert call("--config", str(deployed.config), "backup", str(tmp_path / "x"), "--copy-to", "w9") == 2
    assert "there is no node 'w9'" in capfd.readouterr().err and not (tmp_path / "x").exists()


def test_on_a_local_cluster(home: Path) -> None:
    (home / "cluster.json").write_text(json.dumps({"nodes": 2}))
    settings = load_settings()
    Scheduler(settings).store.close()
    place = settings.nodes[1].compute_dir / "backups"
    for number in (8, 9, 10):
        assert call("backup", f"b{number}", "--copy-to", "node-1", "--keep", "2") == 0
        os.utime(f"b{number}", (number, number))
        os.utime(place / f"b{number}", (number, number))
    assert names(place) == ["b10", "b9"] and sorted(path.name for path in Path().glob("b*")) == ["b10", "b9"]


def test_names_on_a_node_are_not_trusted(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever may write there cannot have anything removed but files of that name in that folder."""
    (home / "cluster.json").write_text(json.dumps({"nodes": 1}))
    local = load_settings()
    settings, folder = local.model_copy(update={"local": False}), local.nodes[0].compute_dir / "backups"
    folder.mkdir(parents=True)
    victims = [tmp_path / "b1", tmp_path / "cluster" / "b1", folder / "b1\n1.0 b2", folder / "x b1", folder / "b1;rm"]
    for victim in victims:
        victim.parent.mkdir(exist_ok=True)
        victim.write_text("dear")
    (folder / "b5").symlink_to(victims[0])
    (folder / "b6").mkdir()
    for number in (7, 8, 9):
        (folder / f"b{number}").write_text("old")
        os.utime(folder / f"b{number}", (number, number))
    asked: list[str] = []

    def run_here(settings: object, node: str, command: str) -> str:
        asked.append(command)
        return subprocess.run(["sh", "-c", command], check=True, capture_output=True).stdout.decode(errors="replace")

    monkeypatch.setattr(ssh, "run_on_node", run_here)
    file = tmp_path / "here" / "b10"
    file.parent.mkdir()
    (folder / file.name).write_text("new")
    file.write_text("new")
    assert copies.prune(settings, file, 2, "node-0") == 2
    assert all(victim.read_text() == "dear" for victim in victims)
    assert {each.name for each in folder.iterdir()} == {
        "b10", "b9", "b5", "b6", "b1\n1.0 b2", "x b1", "b1;rm"
    }  # fmt: skip
    folder.rename(tmp_path / "moved")
    folder.symlink_to(tmp_path / "moved")
    assert copies.prune(settings, file, 1, "node-0") == 0
    assert (tmp_path / "moved" / "b9").exists() and len(asked) == 3
