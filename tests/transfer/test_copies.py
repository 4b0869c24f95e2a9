"""Uploads and downloads against `cp -r`: the same names, contents, times and, but for what is masked, modes."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from clusters import TestCluster

from mrcore.admin import drain
from mrcore.cli.main import main
from mrcore.errors import JobFault
from mrcore.system import procfs
from mrcore.transfer.download import GATHERING
from mrcore.transfer.file_transfer import FileTransfer

# Names that mean something to mrcore, to a shell, or to nobody.
NAMES = {
    "plain": 0o644,
    "private": 0o600,
    "read only": 0o400,
    "shared": 0o664,
    "all may do all": 0o777,
    "program": 0o750,
    "film.partial": 0o640,
    ".partial/x": 0o644,
    "x.partial/c": 0o600,
    "x.partial/y.partial/z": 0o644,
    ".hidden/.more": 0o604,
    "empty": 0o640,
    "a.gz.partial": 0o600,
    "new\nline.partial": 0o644,
    "part-000001-00000-00000.data": 0o600,
    "large.partial": 0o600,
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestCluster]:
    with TestCluster(tmp_path_factory.mktemp("copies"), 2, 1) as running:
        yield running


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    for name, mode in NAMES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(3 << 20) if name.startswith("large") else b"" if name == "empty" else name.encode())
        path.chmod(mode)
    return folder


def seen(*folders: Path) -> dict[str, tuple[int, bytes, int]]:
    """Name → mode, content and time of every file below these folders, of which none may be in two."""
    found: dict[str, tuple[int, bytes, int]] = {}
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file():
                name, status = str(path.relative_to(folder)), path.stat()
                assert name not in found
                found[name] = stat.S_IMODE(status.st_mode), path.read_bytes(), status.st_mtime_ns
    return found


def copied(source: Path, target: Path) -> dict[str, tuple[int, bytes, int]]:
    subprocess.run(["cp", "-r", "--preserve=timestamps", source, target], check=True)
    return seen(target)


@pytest.mark.parametrize("bulk", [False, True])
def test_what_comes_back_is_what_cp_would_make(cluster: TestCluster, source: Path, tmp_path: Path, bulk: bool) -> None:
    oracle, transfer = copied(source, tmp_path / "oracle"), FileTransfer(cluster.settings)
    up, down = (transfer.upload_bulk, transfer.download_bulk) if bulk else (transfer.upload, transfer.download)
    assert up(str(source), "inputs/copies")["files"] == len(oracle)
    there = seen(*(node.layout.base_dir / "inputs/copies" for node in cluster.settings.nodes))
    assert {name: facts[1:] for name, facts in there.items()} == {name: facts[1:] for name, facts in oracle.items()}
    asked = {name: stat.S_IMODE((source / name).stat().st_mode) for name in oracle}
    assert {name: facts[0] for name, facts in there.items()} == {name: mode & 0o755 for name, mode in asked.items()}
    down("inputs/copies", str(tmp_path / "back"))
    back = seen(tmp_path / "back")
    masked = {name: (mode & 0o755 & ~procfs.umask(), *oracle[name][1:]) for name, mode in asked.items()}
    assert back == masked
    transfer.upload(str(source), "inputs/copies", reload_files=False)
    transfer.delete_files("inputs/copies")
    assert not seen(*(node.layout.base_dir for node in cluster.settings.nodes))


def test_a_mask_of_the_user_counts_for_what_he_fetches(cluster: TestCluster, source: Path, tmp_path: Path) -> None:
    transfer = FileTransfer(cluster.settings)
    transfer.upload(str(source), "inputs/masked")
    before = os.umask(0o077)
    try:
        transfer.download("inputs/masked", str(tmp_path / "back"))
    finally:
        os.umask(before)
    assert {facts[0] & 0o077 for facts in seen(tmp_path / "back").values()} == {0}
    transfer.delete_files("inputs/masked")


@pytest.mark.parametrize("name", [".partial", "film.partial", "private"])
def test_a_single_file_is_sent_whatever_its_name(
    cluster: TestCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    file = tmp_path / "up" / name
    file.parent.mkdir()
    file.write_text("1\n")
    file.chmod(0o600)
    monkeypatch.setenv("MRCORE_HOME", str(cluster.settings.home))
    for source in (file.parent, file):
        with pytest.raises(SystemExit, match="0"):
            main(["upload", str(source), "inputs/single", "--yes"])
        assert "uploaded 1 files, 2 bytes" in capsys.readouterr().out
        folders = [node.layout.base_dir / "inputs/single" for node in cluster.settings.nodes]
        ((found, (mode, content, _)),) = seen(*folders).items()
        assert (found, mode, content) == (name, 0o600, b"1\n")
    FileTransfer(cluster.settings).delete_files("inputs/single")


@pytest.mark.parametrize("kind", ["link", "dangling", "fifo", "socket", "device", "folder link"])
def test_what_is_no_plain_file_is_named_before_anything_is_sent(
    cluster: TestCluster, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    odd = source / "x.partial" / "odd one"
    if kind == "fifo":
        os.mkfifo(odd)
    elif kind == "socket":
        monkeypatch.chdir(odd.parent)  # a socket's whole path may have 107 bytes
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(odd.name)
    elif kind == "device":
        odd.symlink_to("/dev/null")
    else:
        odd.symlink_to({"link": source / "plain", "dangling": "nowhere", "folder link": source / ".hidden"}[kind])
    with pytest.raises(JobFault, match=r"odd one is (a symbolic link|no plain file)"):
        FileTransfer(cluster.settings).upload(str(source), "inputs/odd")
    assert not any((node.layout.base_dir / "inputs/odd").exists() for node in cluster.settings.nodes)
    assert not any(path.is_file() for node in cluster.settings.nodes for path in node.layout.incoming_dir.rglob("*"))


def test_a_name_that_is_the_transfers_own_is_refused_by_name(cluster: TestCluster, tmp_path: Path) -> None:
    cluster.write_inputs({"x": "text"}, node=0, entry=f"inputs/own/{GATHERING}")
    with pytest.raises(JobFault, match=rf"holds '{GATHERING}'"):
        FileTransfer(cluster.settings).download("inputs/own", str(tmp_path / "back"))
    FileTransfer(cluster.settings).delete_files("inputs/own")


def test_a_drain_takes_everything_along(cluster: TestCluster, source: Path) -> None:
    transfer, base = FileTransfer(cluster.settings), cluster.settings.nodes[1].layout.base_dir
    transfer.upload(str(source), "inputs/drained")
    (base / "loose.partial").write_text("x")
    (base / "loose.partial").chmod(0o660)
    before = seen(*(node.layout.base_dir for node in cluster.settings.nodes))
    assert drain.drain(cluster.settings, "node-1")["empty"]
    assert not seen(base) and seen(cluster.settings.nodes[0].layout.base_dir) == before
    for name in ("inputs", "loose.partial"):
        transfer.delete_files(name)
