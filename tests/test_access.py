"""What a path is blocked by, seen by a user without special rights."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mrcore.access import blocked
from mrcore.errors import JobFault, UsageError
from mrcore.job import validate
from mrcore.staging import walk
from mrcore.usercode import project_hash


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that everybody may reach; what is below belongs to us."""
    with tempfile.TemporaryDirectory(prefix="mrcore-test-") as name:
        folder = Path(name)
        folder.chmod(0o777)
        yield folder


@pytest.fixture
def as_nobody(open_folder: Path) -> Iterator[None]:
    """Without root's rights, if we have them."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    yield
    if before == 0:
        os.seteuid(0)


def make(folder: Path, name: str, mode: int) -> Path:
    path = folder / name
    if name.endswith("/"):
        path.mkdir()
    else:
        path.write_text("x")
    path.chmod(mode)
    return path


def test_what_is_open_is_not_blocked(open_folder: Path, as_nobody: None) -> None:
    for path in (make(open_folder, "file", 0o644), make(open_folder, "folder/", 0o755)):
        assert blocked(path) is None
    assert blocked(open_folder / "folder" / "not there" / "yet") is None
    assert blocked(open_folder / "new" / "deep", write=True) is None
    assert blocked(open_folder, write=True) is None


def test_the_component_that_blocks_is_named(open_folder: Path, as_nobody: None) -> None:
    private = make(open_folder, "private/", 0o700)
    (private / "deep").mkdir()
    private.chmod(0o600)
    reason = blocked(private / "deep" / "file") or ""
    assert re.match(
        rf"user \S+ may not enter {private}, which is on the way to {private}/deep/file \(drw-------,", reason
    )
    assert f":x {private}`" in reason
    (open_folder / "link").symlink_to(private / "deep")
    assert str(private) in (blocked(open_folder / "link" / "file") or "")
    private.chmod(0o700)


@pytest.mark.parametrize(
    ("name", "mode", "write", "said"),
    [
        ("file", 0o200, False, "may not read"),
        ("folder/", 0o300, False, "may not read"),
        ("folder/", 0o400, False, "may not read"),
        ("folder/", 0o500, True, "may not write into"),
        ("folder/", 0o600, True, "may not write into"),
    ],
)
def test_the_target_itself_may_block(
    open_folder: Path, as_nobody: None, name: str, mode: int, write: bool, said: str
) -> None:
    path = make(open_folder, name, mode)
    assert said in (blocked(path, write) or "")
    if write and mode & 0o100:
        assert f"may not write into {path} " in (blocked(path / "new" / "one", write) or "")


def test_all_blocked_paths_of_a_job_are_told_at_once(open_folder: Path, as_nobody: None) -> None:
    private = make(open_folder, "private/", 0o000)
    job = {"job_type": "file_transfer", "job_name": "t", "job_priority": "high", "output_dir": "x"}
    with pytest.raises(UsageError) as caught:
        validate(job | {"transfer_type": "upload_bulk", "input_dir": str(private / "a")}, "projects")
    assert len(caught.value.details["faults"]) == 2
    assert "input_dir: user" in caught.value.message and "job_priority" in caught.value.message
    for kind, keys in {
        "download": {"transfer_type": "download", "input_dir": "x", "output_dir": str(private)},
        "upload_auxiliary": {"input_file_name": str(private / "a"), "auxiliary_data_name": "a"},
    }.items():
        with pytest.raises(UsageError, match=f"user .* may not .*{private}"):
            validate({"job_type": "file_transfer", "job_name": "t", "transfer_type": kind} | keys, "projects")
    with pytest.raises(UsageError, match=f"script_location: user .* may not enter {private}"):
        validate({"job_type": "script", "job_name": "t", "script_location": str(private / "s.py")}, "projects")
    private.chmod(0o755)
    assert validate(job | {"transfer_type": "upload", "job_priority": 1, "input_dir": str(private)}, "projects")


@pytest.mark.parametrize(("name", "mode"), [("file", 0o200), ("folder/", 0o300)])
def test_a_transfer_names_what_it_may_not_read_inside_its_folder(
    open_folder: Path, as_nobody: None, name: str, mode: int
) -> None:
    make(open_folder, "a", 0o644)
    path = make(open_folder, name, mode)
    with pytest.raises(JobFault, match=f"user .* may not read {path} "):
        list(walk(open_folder))


def test_a_project_file_that_may_not_be_read_is_named(open_folder: Path, as_nobody: None) -> None:
    path = make(open_folder, "helper.py", 0o200)
    with pytest.raises(JobFault, match=f"project file: user .* may not read {path} "):
        project_hash(open_folder)
