"""Backup and restore: all of it or nothing, whoever dies, whatever runs meanwhile."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path
from typing import Any

import fake_cluster
import pytest
from backups import contents, rewritten
from conditions import wait_until
from fake_cluster import FakeCluster
from queues import job, once
from stores import make_v2

from mrcore.cli import main as cli
from mrcore.errors import UsageError
from mrcore.queue.runner import Runner
from mrcore.queue.scheduler import Scheduler
from mrcore.settings.config import Settings
from mrcore.state import backup, manifest


@pytest.fixture
def config(home: Path, projects_dir: Path) -> Path:
    project = projects_dir / "fake"
    project.mkdir()
    (project / "map_functions.py").write_text("def ok(line, aux): ...\ndef fail(line, aux): ...\ndef wait(l, a): ...\n")
    path = home.parent / "config.json"
    path.write_text(json.dumps({"projects_dir": str(projects_dir), "hold_backoff_first_seconds": 0.05}))
    return path


@pytest.fixture
def elsewhere(settings: Settings, tmp_path: Path) -> Settings:
    """Settings of an empty master."""
    return settings.model_copy(update={"state_dir": tmp_path / "other" / "state"})


def but_for_the_cycle(known: dict[str, Any]) -> dict[str, Any]:
    return known | {"meta": [row for row in known["meta"] if row["key"] != "cycle"]}


@pytest.fixture
def filled(scheduler: Scheduler, settings: Settings) -> dict[str, Any]:
    scheduler.submit_jobs([job("a", run_once=False), job("b"), job("c", "fail", group_name="g")])
    once(settings)
    once(settings)
    scheduler.submit_job(job("d", job_priority=3))
    scheduler.pause()
    return contents(settings)


def test_restore_brings_everything_back(
    filled: dict[str, Any], scheduler: Scheduler, settings: Settings, elsewhere: Settings, tmp_path: Path
) -> None:
    file = tmp_path / "kept.backup"
    counts = backup.backup(settings, file)
    assert (counts["jobs"], counts["runs"], counts["manifests"]) == (4, 4, 3)
    assert file.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.glob("kept*")] == ["kept.backup"]
    backup.restore(elsewhere, file)
    assert contents(elsewhere) == filled
    assert sorted(path.name for path in elsewhere.state_dir.iterdir() if path.name.startswith("restore")) == []
    Scheduler(elsewhere).resume()
    assert once(elsewhere) == {"succeeded": 2}


def test_no_number_of_a_run_is_used_again(
    filled: dict[str, Any], scheduler: Scheduler, settings: Settings, tmp_path: Path
) -> None:
    file = tmp_path / "kept.backup"
    backup.backup(settings, file)
    scheduler.resume()
    for _ in range(5):
        once(settings)
    assert scheduler.history("a")[0]["run"] == 7
    backup.restore(settings, file, force=True)
    scheduler.resume()
    assert [row["run"] for row in scheduler.history("a")] == [2, 1]
    once(settings)
    assert scheduler.history("a")[0]["run"] == 8
    assert [each.counts for each in manifest.committed(settings.state_dir, "a")] == [{"items": 7}] * 3


def test_restore_refuses_a_running_runner_and_a_state_in_use(
    filled: dict[str, Any], scheduler: Scheduler, settings: Settings, config: Path, tmp_path: Path
) -> None:
    file = tmp_path / "kept.backup"
    backup.backup(settings, file)
    with pytest.raises(UsageError, match="holds 4 jobs, which a restore would replace: add --force"):
        backup.restore(settings, file)
    with subprocess.Popen([sys.executable, fake_cluster.__file__, str(config)]) as runner:
        try:
            wait_until(lambda: scheduler.state()["runner"], 20, "a Runner")
            with pytest.raises(UsageError, match=f"process {runner.pid}"):
                backup.restore(settings, file, force=True)
        finally:
            runner.kill()
    assert but_for_the_cycle(contents(settings)) == but_for_the_cycle(filled)


def damaged(file: Path, how: str) -> None:
    content = bytearray(file.read_bytes())
    randomness = random.Random(how)
    if how == "cut":
        content = content[: len(content) // 2]
    elif how == "empty":
        content.clear()
    elif how == "text":
        content[:] = b"this is no backup\n"
    elif how == "flipped":
        for _ in range(50):
            content[randomness.randrange(100, len(content))] ^= 1 << randomness.randrange(8)
    file.write_bytes(content)


@pytest.mark.parametrize("how", ["cut", "empty", "text", "flipped"])
def test_a_damaged_backup_changes_nothing(filled: dict[str, Any], settings: Settings, tmp_path: Path, how: str) -> None:
    file = tmp_path / "kept.backup"
    backup.backup(settings, file)
    damaged(file, how)
    with pytest.raises(UsageError, match=r"cannot restore .*kept\.backup: "):
        backup.restore(settings, file, force=True)
    assert contents(settings) == filled


@pytest.mark.parametrize(
    "name", ["../queue.sqlite", "/etc/x", "manifests/a/../../b/1.json", "manifests/.x/1.json", "manifests/a/x", "other"]
)
def test_a_hostile_backup_writes_nowhere(
    filled: dict[str, Any], settings: Settings, elsewhere: Settings, tmp_path: Path, name: str
) -> None:
    hostile = rewritten(settings, tmp_path, lambda archive: archive.addfile(tarfile.TarInfo(name), io.BytesIO()))
    with pytest.raises(UsageError, match="is no part of a backup"):
        backup.restore(elsewhere, hostile, verify=False)
    assert not (elsewhere.state_dir / "manifests").exists()


def test_a_backup_of_another_schema_is_refused(
    filled: dict[str, Any], settings: Settings, elsewhere: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "kept.backup"
    monkeypatch.setattr(backup, "SCHEMA_VERSION", 99)
    backup.backup(settings, file)
    monkeypatch.undo()
    with pytest.raises(UsageError, match="it is of schema 99"):
        backup.restore(elsewhere, file)


def backup_of_v2(folder: Path, schema: int = 2) -> Path:
    """A backup as the version before this one made it, whose own word on its schema may be wrong."""
    file = folder / f"v{schema}.backup"
    make_v2(folder / f"queue-{schema}.sqlite")
    about = json.dumps({"version": "1.0.0", "schema": schema, "time": time.time()}).encode()
    with tarfile.open(file, "w:gz") as archive:
        member = tarfile.TarInfo("backup.json")
        member.size = len(about)
        archive.addfile(member, io.BytesIO(about))
        archive.add(folder / f"queue-{schema}.sqlite", "queue.sqlite")
    return file


def test_a_backup_of_the_version_before_is_brought_up_to_this_one(elsewhere: Settings, tmp_path: Path) -> None:
    assert backup.restore(elsewhere, backup_of_v2(tmp_path), verify=False)["schema"] == 2
    scheduler = Scheduler(elsewhere)
    scheduler.store.check()
    assert {row["job_name"] for row in scheduler.fallen()} == {"bad", "with_it", "old"}
    assert scheduler.requeue("g") == ["bad", "with_it"]
    assert scheduler.store.get("schema") == 4
    scheduler.store.close()


def test_a_queue_in_a_backup_of_a_later_version_is_refused(elsewhere: Settings, tmp_path: Path) -> None:
    file = tmp_path / "later.backup"
    backup_of_v2(tmp_path)
    with contextlib.closing(sqlite3.connect(tmp_path / "queue-2.sqlite")) as db:
        db.execute("UPDATE meta SET value = '7' WHERE key = 'schema'")
        db.commit()
    with tarfile.open(tmp_path / "v2.backup") as source, tarfile.open(file, "w:gz") as target:
        target.addfile(source.getmember("backup.json"), source.extractfile("backup.json"))
        target.add(tmp_path / "queue-2.sqlite", "queue.sqlite")
    with pytest.raises(UsageError, match="its queue is of schema 7, this mrcore knows 4: update mrcore"):
        backup.restore(elsewhere, file, verify=False)
    assert not Scheduler(elsewhere).queue()


@pytest.mark.parametrize("point", ["restore ready", "restore manifests", "restore queue"])
def test_a_restore_that_is_killed_is_finished_by_the_next_runner(
    filled: dict[str, Any], scheduler: Scheduler, settings: Settings, config: Path, tmp_path: Path, point: str
) -> None:
    file = tmp_path / "kept.backup"
    backup.backup(settings, file)
    scheduler.resume()
    scheduler.submit_job(job("later"))
    once(settings)
    code = "import sys; from mrcore.cli.main import main; main(['--config', *sys.argv[1:]])"
    command = [sys.executable, "-c", code, str(config), "restore", str(file), "--force", "--yes"]
    done = subprocess.run(command, env=os.environ | {"MRCORE_FAULT": point})
    assert done.returncode == -signal.SIGKILL
    assert once(settings) == {}  # the backup's queue is paused
    found = contents(settings)
    assert but_for_the_cycle(found) == but_for_the_cycle(filled)  # the Runner has begun another


def test_backups_while_jobs_are_submitted_and_run_are_whole(
    scheduler: Scheduler, settings: Settings, tmp_path: Path
) -> None:
    end = threading.Event()
    runner = Runner(settings, FakeCluster(settings))

    def submit() -> None:
        other = Scheduler(settings)
        number = 0
        while not end.is_set() and number < 20:
            other.submit_jobs([job(f"j{number}_{n}") for n in range(5)])
            number += 1
        other.store.close()

    threads = [threading.Thread(target=submit), threading.Thread(target=runner.run)]
    for thread in threads:
        thread.start()
    try:
        for number in range(3):
            wait_until(lambda n=number: len(scheduler.history()) > 10 * n, 60, "runs")
            backup.backup(settings, tmp_path / f"{number}.backup")
    finally:
        end.set()
        runner.stop()
        for thread in threads:
            thread.join(30)
    for number in range(3):
        other = settings.model_copy(update={"state_dir": tmp_path / f"state{number}"})
        backup.restore(other, tmp_path / f"{number}.backup")
        found = Scheduler(other)
        found.store.check()
        assert len({row["job_name"] for row in found.store.rows("SELECT job_name FROM jobs")}) % 5 == 0
        for row in found.history():
            if row["state"] == "succeeded":
                assert manifest.read(other.state_dir, row["job_name"], row["run"])
    once(other)
    assert not found.queue()
    assert len(found.history()) >= len(found.store.rows("SELECT * FROM jobs"))
    found.store.close()


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        cli.main(list(arguments))
    assert isinstance(left.value.code, int)
    return left.value.code


def test_the_commands(
    filled: dict[str, Any], settings: Settings, config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    file = str(tmp_path / "kept.backup")
    assert call("--config", str(config), "backup", file) == 0
    assert "4 jobs, 4 runs, 3 manifests" in capfd.readouterr().out
    assert call("--config", str(config), "restore", file) == 2
    assert "add --force" in capfd.readouterr().err
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert call("--config", str(config), "restore", file, "--force") == 2
    said = capfd.readouterr().err
    assert "the jobs that wait in it: 2" in said and "  a: mapreduce, submitted by" in said and "--yes" in said
    assert contents(settings) == filled
    assert call("--config", str(config), "restore", file, "--force", "--yes") == 0
    assert capfd.readouterr().out.startswith("restored as of 20")
    assert call("--config", str(config), "backup", str(tmp_path / "no/such/folder")) == 1
    assert "No such file or directory" in capfd.readouterr().err
