"""What a path is blocked by, seen by a user without special rights."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mrcore.cli import main as cli
from mrcore.errors import JobFault, UsageError
from mrcore.project.snapshot import project_hash
from mrcore.queue.job import validate
from mrcore.system.permissions import blocked, foreign_code
from mrcore.system.staging import walk


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


# ---- whose code `mrcore try` runs

ANNA = 61002  # a user id that is nobody's here


def project(folder: Path) -> Path:
    made = folder / "count"
    (made / "lib").mkdir(parents=True)
    (made / "map_functions.py").write_text("def m(line, auxiliary_data):\n    return [(line, 1)]\n")
    (made / "lib/helper.py").write_text("")
    (folder / "in.txt").write_text("a\n")
    return made


def by_mode(folder: Path, made: Path) -> None:
    made.chmod(0o777)


def by_file_mode(folder: Path, made: Path) -> None:
    (made / "lib/helper.py").chmod(0o646)


def by_owner(folder: Path, made: Path) -> None:
    os.chown(made / "lib/helper.py", ANNA, ANNA)


def by_folder_above(folder: Path, made: Path) -> None:
    os.chown(folder, ANNA, ANNA)


def by_group(folder: Path, made: Path) -> None:
    os.chown(made, -1, 61010)
    made.chmod(0o2770)


def by_link(folder: Path, made: Path) -> None:
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere/helper.py").write_text("")
    os.chown(folder / "elsewhere", ANNA, ANNA)
    (made / "lib/helper.py").unlink()
    (made / "lib/helper.py").symlink_to(folder / "elsewhere/helper.py")


def by_linked_folder(folder: Path, made: Path) -> None:
    (folder / "more").mkdir()
    (folder / "more/inner.py").write_text("")
    os.chown(folder / "more/inner.py", ANNA, ANNA)
    (made / "more").symlink_to(folder / "more")
    (made / "round").symlink_to(made)


WAYS = {
    by_mode: "everybody", by_file_mode: "everybody", by_owner: str(ANNA), by_folder_above: str(ANNA),
    by_group: "the group 61010", by_link: str(ANNA), by_linked_folder: str(ANNA),
}  # fmt: skip


def test_code_of_our_own_is_nobody_elses(tmp_path: Path) -> None:
    made = project(tmp_path)
    (made / "round").symlink_to(made)
    (made / "nowhere").symlink_to("/nonexistent")
    assert foreign_code(made) is None


@pytest.mark.needs_root
@pytest.mark.parametrize("way", WAYS)
def test_root_does_not_try_what_others_may_change_unless_told_to(
    tmp_path: Path, way: Callable[[Path, Path], None], capfd: pytest.CaptureFixture[str]
) -> None:
    made = project(tmp_path)
    way(tmp_path, made)
    call = ["try", str(made), str(tmp_path / "in.txt"), "--map", "m"]
    with pytest.raises(SystemExit) as ended:
        cli.main(call)
    out, err = capfd.readouterr()
    assert ended.value.code == 2 and out == ""
    assert re.match(rf"mrcore: {WAYS[way]} may change {tmp_path}.*as root.*--as-root\n$", err), err
    with pytest.raises(SystemExit) as ended:
        cli.main([*call, "--as-root"])
    out, err = capfd.readouterr()
    assert ended.value.code == 0 and out == '["a\\n", 1]\n'
    assert f"runs code of {made} with your rights; {WAYS[way]} may change" in err


@pytest.mark.needs_root
def test_another_user_is_told_whose_code_runs(open_folder: Path, as_nobody: None) -> None:
    os.seteuid(0)
    made = project(open_folder)
    open_folder.chmod(0o755)
    os.seteuid(65534)
    assert foreign_code(made) is None, "root may do everything anyway"
    os.seteuid(0)
    os.chown(made / "map_functions.py", ANNA, ANNA)
    os.seteuid(65534)
    assert foreign_code(made) == (made / "map_functions.py", str(ANNA))
