"""The master's own files: what is written is read back, what is damaged is named, what is of before is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mrcore.admin import doctor
from mrcore.errors import UsageError
from mrcore.messages.tasks import PlacedPart
from mrcore.settings.config import load_settings
from mrcore.state import backup, manifest
from mrcore.state.manifest import LedgerUpdate, Manifest, Read

PART = {
    "name": "part-000001-00000-00000.data", "partition": 0, "records": 1, "bytes": 2, "text_bytes": 2,
    "batch_bytes": 2, "max_decoded": 9, "crc32": 7, "node": "n",
}  # fmt: skip


def test_a_manifest_is_read_as_it_was_written(tmp_path: Path) -> None:
    made = Manifest(
        "a", 1, parts=[PlacedPart(**PART)], cuts=["\ud800", 1 << 80, [None, 1.5]], partitions=4,
        ledger=LedgerUpdate(True, [Read("", "/x\udcff", 1, 2, 1 << 63, 4)]), shuffle=[("n", "m", 5)],
    )  # fmt: skip
    manifest.write(tmp_path, made)
    assert manifest.read(tmp_path, "a", 1) == made
    assert json.loads(manifest.path_of(tmp_path, "a", 1).read_text())["format"] == 1
    assert manifest.read(tmp_path, "a", 2) is None


def test_a_manifest_of_the_release_before_is_read(tmp_path: Path) -> None:
    keys: dict[str, Any] = {
        "job": "a",
        "run": 1,
        "attempt": 1,
        "committed": 1.5,
        "merged_run": None,
        "project": "f" * 32,
    }
    path = manifest.path_of(tmp_path, "a", 1)
    path.parent.mkdir(parents=True)
    path.write_text(
        json.dumps(keys | {"parts": [PART], "ledger": {"replace": False, "entries": [["", "/x", 1, 2, 3, 4]]}})
    )
    found = manifest.read(tmp_path, "a", 1)
    assert found and found.parts == [PlacedPart(**PART)] and found.format == 1
    assert found.ledger == LedgerUpdate(False, [Read("", "/x", 1, 2, 3, 4)])


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"\xff", b"[" * 100_000, b"{}", b'{"job": "../a", "run": 1}', b'{"job": "a", "run": -1}',
        b'{"job": "a", "run": "1"}',
        json.dumps({"job": "a", "run": 1, "parts": [PART | {"name": "../../etc/passwd"}]}).encode(),
        json.dumps({"job": "a", "run": 1, "parts": [PART | {"bytes": -1}]}).encode(),
        json.dumps({"job": "a", "run": 1, "ledger": {"replace": True, "entries": [["", "/x"]]}}).encode(),
    ],
)  # fmt: skip
def test_a_damaged_manifest_is_named_with_what_to_do(tmp_path: Path, content: bytes) -> None:
    path = manifest.path_of(tmp_path, "a", 1)
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    for ask in (manifest.newest, manifest.parts, manifest.output):
        with pytest.raises(UsageError, match=r"manifests/a/1\.json is damaged: .*from a backup") as told:
            ask(tmp_path, "a")
        assert len(told.value.message.splitlines()) == 1
    with pytest.raises(UsageError):
        manifest.prune(tmp_path, "a", set())
    assert path.read_bytes() == content


def test_a_manifest_of_a_later_release_is_refused(tmp_path: Path) -> None:
    manifest.write(tmp_path, Manifest("a", 1, format=2))
    with pytest.raises(UsageError, match="is of format 2, this mrcore reads 1: update mrcore"):
        manifest.newest(tmp_path, "a")


@pytest.mark.parametrize("content", ["", "[]", '{"time": -1}', '{"time": 1, "copied": "yes"}'])
def test_a_damaged_note_of_the_last_backup_is_named(home: Path, tmp_path: Path, content: str) -> None:
    assert backup.last_backup(tmp_path) is None
    (tmp_path / "last_backup.json").write_text(content)
    note = doctor._last_backup(load_settings().model_copy(update={"state_dir": tmp_path}))
    (finding,) = doctor.judge_backup({"master": {"backup": note, "time": 2.0, "local": True}})
    assert "last_backup.json is damaged" in finding.what
    with pytest.raises(UsageError, match=r"last_backup\.json is damaged: .*`mrcore backup FILE` writes it again"):
        backup.last_backup(tmp_path)
