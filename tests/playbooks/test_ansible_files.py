"""The module mrcore_files, played as Ansible does: what it brings about, says, and leaves alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ansible", reason="the extra appliance is not installed")
MODULE = Path(__file__).resolve().parents[2] / "ansible/library/mrcore_files.py"
Json = dict[str, Any]


def play(folder: Path, *items: Json, **options: bool) -> Json:
    """Run the module on these items, below a folder and as whoever we are; give its answer."""
    given = [{"owner": "", **item, "path": str(folder / item["path"])} for item in items]
    arguments = {"items": given, "_ansible_remote_tmp": str(folder / ".tmp"), "_ansible_keep_remote_files": False}
    arguments |= {f"_ansible_{name}": value for name, value in options.items()}
    text = json.dumps({"ANSIBLE_MODULE_ARGS": arguments})
    code = (
        "import runpy, sys; from ansible.module_utils import basic; "
        "basic._ANSIBLE_ARGS = sys.stdin.buffer.read(); basic._ANSIBLE_PROFILE = 'legacy'; "
        f"runpy.run_path({str(MODULE)!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], input=text, capture_output=True, text=True, timeout=60)
    answer: Json = json.loads(done.stdout or "{}") or {"failed": True, "msg": done.stderr}
    return answer | {"names": [str(Path(path).relative_to(folder)) for path in answer.get("paths", ())]}


def mode(path: Path) -> int:
    return path.lstat().st_mode & 0o7777


WANTED: list[Json] = [
    {"path": "a/b", "state": "directory", "mode": "0750"},
    {"path": "a/b/text", "content": "one\ntwo\n"},
    {"path": "a/tool", "content": "#!/bin/sh\n", "mode": "0755"},
    {"path": "a/current", "state": "link", "target": "b"},
    {"path": "old", "state": "absent"},
]
CHANGED = ["a/b", "a/b/text", "a/tool", "a/current", "old"]


def test_all_is_brought_about_once(tmp_path: Path) -> None:
    (tmp_path / "old").touch()
    assert play(tmp_path, *WANTED)["names"] == CHANGED
    assert (tmp_path / "a/b/text").read_text() == "one\ntwo\n" and os.readlink(tmp_path / "a/current") == "b"
    assert [mode(tmp_path / path) for path in ("a", "a/b", "a/b/text", "a/tool")] == [0o750, 0o750, 0o644, 0o755]
    assert not (tmp_path / "old").exists()
    again = play(tmp_path, *WANTED)
    assert not again["changed"] and again["names"] == [] and again["diff"] == []


def test_check_mode_says_the_same_and_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "old").touch()
    played = play(tmp_path, *WANTED, check_mode=True)
    assert played["changed"] and played["names"] == CHANGED
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != ".tmp") == ["old"]


def test_whatever_has_drifted_is_put_right_and_told(tmp_path: Path) -> None:
    play(tmp_path, *WANTED)
    (tmp_path / "a/b/text").write_text("one\n")
    (tmp_path / "a/tool").chmod(0o777)
    (tmp_path / "a/b").chmod(0o777)
    (tmp_path / "a/current").unlink()
    (tmp_path / "a/current").symlink_to("elsewhere")
    played = play(tmp_path, *WANTED)
    assert played["names"] == CHANGED[:-1]
    assert [(each["before"], each["after"]) for each in played["diff"]] == [("one\n", "one\ntwo\n")]
    assert mode(tmp_path / "a/tool") == 0o755 and os.readlink(tmp_path / "a/current") == "b"
    assert not play(tmp_path, *WANTED)["changed"]


def test_a_link_in_the_place_of_a_file_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("one\n")
    (tmp_path / "file").symlink_to("secret")
    assert play(tmp_path, {"path": "file", "content": "two\n"})["changed"]
    assert not (tmp_path / "file").is_symlink() and (tmp_path / "secret").read_text() == "one\n"


def test_what_fails_its_validation_takes_no_place(tmp_path: Path) -> None:
    item = {"path": "file", "content": "good\n", "validate": "grep -q good %s"}
    assert play(tmp_path, item)["changed"]
    played = play(tmp_path, item | {"content": "bad\n"})
    assert played["failed"] and "failed to validate" in played["msg"]
    assert (tmp_path / "file").read_text() == "good\n"


def test_a_folder_that_is_there_already_keeps_its_rights_when_it_may(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir(mode=0o700)
    items: list[Json] = [{"path": path, "state": "directory", "only_new": True} for path in ("there", "new")]
    assert play(tmp_path, *items)["names"] == ["new"]
    assert (mode(tmp_path / "there"), mode(tmp_path / "new")) == (0o700, 0o755)


@pytest.mark.parametrize("item", [WANTED[0], WANTED[3], WANTED[1]])
def test_what_is_something_else_is_not_removed(tmp_path: Path, item: Json) -> None:
    (tmp_path / "a").mkdir()
    if item["path"] == "a/b/text":
        (tmp_path / item["path"]).mkdir(parents=True)
    else:
        (tmp_path / item["path"]).write_text("somebody's\n")
    played = play(tmp_path, item)
    assert played["failed"] and "remove it there" in played["msg"] and (tmp_path / item["path"]).exists()
