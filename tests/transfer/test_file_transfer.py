"""File transfer on a real local cluster: what lies where afterwards, and what a death in its middle leaves."""

from __future__ import annotations

import contextlib
import errno
import gzip
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from clusters import TestCluster

from mrcore.cli.main import main
from mrcore.engine.listing import rendezvous
from mrcore.errors import ClusterFault, JobFault, Malformed, MrcoreError, Refused, Unreachable, UsageError
from mrcore.launchers import local
from mrcore.messages.methods import ANNOUNCE, BEGIN_UPLOAD, COMMIT_UPLOAD, DELETE_FILES, LIST_FILES
from mrcore.messages.tasks import PlacedPart
from mrcore.node import files
from mrcore.queue.scheduler import Runner, Scheduler
from mrcore.settings.config import Settings
from mrcore.state import manifest
from mrcore.system.staging import Staging
from mrcore.transfer import batches
from mrcore.transfer.download import GATHERING
from mrcore.transfer.file_transfer import FileTransfer
from mrcore.transfer.session import Session
from mrcore.wire.channel import Connection
from mrcore.wire.client import Client
from mrcore.wire.stream import Stream
from mrcore.wire.tls import Pki

LARGE_BYTES = 24 << 20
ODD = ["plain", "with space", "new\nline", "ünïcode", "[brackets]*?", "sub/deeper/file", "-dash", ".hidden", "x" * 255]

Contents = dict[str, bytes]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestCluster]:
    with TestCluster(tmp_path_factory.mktemp("transfers"), 3, 1) as cluster:
        yield cluster


@pytest.fixture
def transfer(cluster: TestCluster) -> Iterator[FileTransfer]:
    local.start_cluster(cluster.settings)  # an agent that a test killed
    yield FileTransfer(cluster.settings)
    for node in cluster.settings.nodes:
        assert not list(node.layout.base_dir.rglob("*.partial"))
    FileTransfer(cluster.settings).delete_files("*", also_outputs=True)


def write(folder: Path, contents: Contents) -> str:
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return str(folder)


def read(folder: Path) -> Contents:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def on_nodes(settings: Settings, folder: str) -> dict[str, Contents]:
    return {node.name: read(node.layout.base_dir / folder) for node in settings.nodes}


def together(settings: Settings, folder: str) -> Contents:
    """All nodes' files, none of which may be on two."""
    found = on_nodes(settings, folder)
    merged = {name: content for each in found.values() for name, content in each.items()}
    assert len(merged) == sum(map(len, found.values())), "a file lies on two nodes"
    return merged


def staged(settings: Settings) -> list[Path]:
    return [path for node in settings.nodes for path in node.layout.incoming_dir.rglob("*") if path.is_file()]


def counts(told: dict[str, Any]) -> tuple[int, int]:
    return told["files"], told["bytes"]


def agent(cluster: TestCluster, node: int = 0) -> Client:
    at = cluster.settings.nodes[node]
    return Client(at.address, at.agent_port, Pki(cluster.settings.pki_dir, "master"), at.name)


def test_odd_names_empty_and_large_files_arrive_and_come_back(
    cluster: TestCluster, transfer: FileTransfer, tmp_path: Path
) -> None:
    contents = {name: name.encode() * number for number, name in enumerate(ODD)}
    contents |= {"empty": b"", "large": os.urandom(LARGE_BYTES)}
    source = write(tmp_path / "source", contents)
    counts = transfer.upload_bulk(source, "inputs/odd")
    assert (counts["files"], counts["bytes"]) == (len(contents), sum(map(len, contents.values())))
    assert together(cluster.settings, "inputs/odd") == contents
    names = [node.name for node in cluster.settings.nodes]
    for node, found in on_nodes(cluster.settings, "inputs/odd").items():
        assert all(rendezvous(name, names) == node for name in found)
    assert transfer.download_bulk("inputs/odd", str(tmp_path / "back"))["files"] == len(contents)
    assert read(tmp_path / "back") == contents
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "source").rglob("*") if path.is_file()}
    assert all((tmp_path / "back" / path.relative_to(source)).stat().st_mtime_ns == at for path, at in times.items())
    assert transfer.download("inputs/odd/[brackets]*?", str(tmp_path / "one"))["files"] == 1
    assert read(tmp_path / "one") == {"[brackets]*?": contents["[brackets]*?"]}
    assert not staged(cluster.settings)


def test_reload_replaces_the_destination_as_a_whole_and_otherwise_only_changes_are_sent(
    cluster: TestCluster, transfer: FileTransfer, tmp_path: Path
) -> None:
    first = {f"f{number}": b"old" * number for number in range(30)}
    source = write(tmp_path / "source", first)
    transfer.upload(source, "inputs/logs")
    (tmp_path / "source/f3").write_bytes(b"changed")
    (tmp_path / "source/f4").unlink()
    write(tmp_path / "source", {"new": b"new one"})
    counts = transfer.upload(source, "inputs/logs", reload_files=False)
    assert (counts["files"], counts["sent_bytes"], counts["skipped"], counts["removed"]) == (2, 14, 28, 0)
    now = first | {"f3": b"changed", "new": b"new one"}
    assert together(cluster.settings, "inputs/logs") == now
    counts = transfer.upload_bulk(source, "inputs/logs")
    assert (counts["files"], counts["removed"]) == (30, 1)
    del now["f4"]
    assert together(cluster.settings, "inputs/logs") == now


@pytest.mark.parametrize("reload_files", [True, False])
def test_a_node_that_joined_since_gets_no_second_copy(
    cluster: TestCluster, transfer: FileTransfer, tmp_path: Path, reload_files: bool
) -> None:
    two = cluster.settings.model_copy(update={"nodes": cluster.settings.nodes[:2]})
    old = {f"f{number}": os.urandom(10) for number in range(40)}
    source = write(tmp_path / "source", old)
    FileTransfer(two).upload_bulk(source, "inputs/grown")
    before = {node: set(found) for node, found in on_nodes(two, "inputs/grown").items()}
    new = {name: os.urandom(11) for name in old} | {f"g{number}": b"new" for number in range(40)}
    write(tmp_path / "source", new)
    transfer.upload_bulk(source, "inputs/grown", reload_files)
    assert together(cluster.settings, "inputs/grown") == new
    after = on_nodes(cluster.settings, "inputs/grown")
    assert all(names <= set(after[node]) for node, names in before.items())
    assert any(name.startswith("g") for name in after[cluster.settings.nodes[2].name])


def test_what_would_be_read_twice_is_refused(cluster: TestCluster, transfer: FileTransfer, tmp_path: Path) -> None:
    for node in (0, 1):
        cluster.write_inputs({"twice": "x"}, node=node, entry="inputs/copies")
    source = write(tmp_path / "source", {"twice": b"new"})
    with pytest.raises(JobFault, match="'twice' lies on node-0, node-1: it would be read twice"):
        transfer.upload(source, "inputs/copies", reload_files=False)
    transfer.upload(source, "inputs/copies")
    assert together(cluster.settings, "inputs/copies") == {"twice": b"new"}
    with pytest.raises(JobFault, match="lies there as 'twice' already"):
        transfer.upload_bulk(source, "inputs/copies", reload_files=False, compress=True)


def test_compressed_files_arrive_as_gz_and_are_not_sent_again(
    cluster: TestCluster, transfer: FileTransfer, tmp_path: Path
) -> None:
    contents = {"text": b"a line\n" * 1000, "large": b"another line\n" * 500_000, "packed.gz": gzip.compress(b"is")}
    source = write(tmp_path / "source", contents)
    counts = transfer.upload_bulk(source, "inputs/packed", compress=True)
    assert counts["sent_bytes"] < counts["bytes"] / 10
    found = together(cluster.settings, "inputs/packed")
    assert found["packed.gz"] == contents["packed.gz"]
    assert {name: gzip.decompress(found[f"{name}.gz"]) for name in ("text", "large")} == {
        name: contents[name] for name in ("text", "large")
    }
    assert transfer.upload_bulk(source, "inputs/packed", False, True)["skipped"] == 3


def test_equal_names_land_in_a_folder_per_node(cluster: TestCluster, transfer: FileTransfer, tmp_path: Path) -> None:
    for node in (0, 2):
        cluster.write_inputs({"same": f"of {node}", f"own{node}": "x"}, node=node, entry="inputs/both")
    target = tmp_path / "target"
    write(target, {"stale": b"", "old/stale": b""})
    transfer.download_bulk("inputs/both", str(target), delete_files=False)
    expected = {"node-0/same": b"of 0", "node-2/same": b"of 2", "own0": b"x", "own2": b"x"}
    assert read(target) == expected | {"stale": b"", "old/stale": b""}
    assert transfer.download("inputs/both", str(target))["removed"] == 2
    assert read(target) == expected


def test_a_jobs_output_comes_as_it_was_committed(cluster: TestCluster, transfer: FileTransfer, tmp_path: Path) -> None:
    counts = {"partition": 0, "records": 1, "bytes": 2, "text_bytes": 2, "batch_bytes": 2, "max_decoded": 2, "crc32": 0}
    parts = [
        PlacedPart(name=f"part-000001-{number:05}-00000.data", node=f"node-{number % 3}", **counts)
        for number in range(7)
    ]
    for number, part in enumerate(parts):
        cluster.write_inputs({part.name: f"{number}\n"}, node=number % 3, entry="committed/reduce")
    cluster.write_inputs({"part-000002-00000-00000.data": "of a run to come"}, node=0, entry="committed/reduce")
    manifest.write(cluster.settings.state_dir, manifest.Manifest("committed", 1, parts=parts, delete_job_data=True))
    transfer.download("committed/reduce", str(tmp_path / "out"))
    texts = [path.read_text() for path in sorted((tmp_path / "out").iterdir())]
    assert "".join(texts) == "0\n1\n2\n3\n4\n5\n6\n"
    (cluster.settings.nodes[1].layout.base_dir / f"committed/reduce/{parts[4].name}").unlink()
    with pytest.raises(ClusterFault, match=r"part-000001-00004-00000\.data of committed is not on node-1"):
        transfer.download("committed/reduce", str(tmp_path / "out"))
    assert len(read(tmp_path / "out")) == 7


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["..", "../x", "a/../../x", "/etc", "", ".", "a//b", "a\0b", "./x", "a\nb/../../x"])
def test_a_name_that_would_leave_its_folder_is_refused_on_both_ends(
    cluster: TestCluster, transfer: FileTransfer, tmp_path: Path, path: str
) -> None:
    source = write(tmp_path / "source", {"x": b""})
    for call in (
        lambda: transfer.upload(source, path),
        lambda: transfer.download(path, str(tmp_path / "out")),
        lambda: transfer.delete_files(path),
    ):
        with pytest.raises(UsageError, match="relative path"):
            call()
    with contextlib.closing(agent(cluster)) as client:
        for method in (BEGIN_UPLOAD, LIST_FILES, DELETE_FILES):
            with pytest.raises(Refused, match="not a name inside"):
                client.call(method, **{"folder" if method is BEGIN_UPLOAD else "path": path})
        upload = client.call(BEGIN_UPLOAD, folder="inputs/n").upload
        with pytest.raises(Refused, match="not arguments of this method"):
            client.call(ANNOUNCE, files=[[path, 0, 0, 0o600]], upload=upload)


@pytest.mark.parametrize("name", ["../stolen", "/tmp/stolen", "a/../../stolen", "a\nb/../../stolen", "a/.."])
def test_a_name_that_a_node_gives_is_checked_here(
    cluster: TestCluster, transfer: FileTransfer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    cluster.write_inputs({"x": "text"}, node=1, entry="inputs/evil")
    call = Connection.call

    def evil(connection: Connection, method: str, text: str, most_bytes: int) -> str:
        answer = call(connection, method, text, most_bytes)
        if method != "list_files":
            return answer
        page = json.loads(answer)["result"]
        return json.dumps({"result": page | {"files": [[name, 4, 0, 0o600] for _ in page["files"]]}})

    monkeypatch.setattr(Connection, "call", evil)
    with pytest.raises(Malformed, match=r"node node-\d gave no answer to list_files"):
        transfer.download("inputs/evil", str(tmp_path / "target"))
    assert not (tmp_path / "stolen").exists()


def test_symbolic_links_are_refused_everywhere(cluster: TestCluster, transfer: FileTransfer, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    write(outside, {"precious": b"precious"})
    source = write(tmp_path / "source", {"x": b"new"})
    base = cluster.settings.nodes[0].layout.base_dir
    (tmp_path / "source/link").symlink_to(outside / "precious")
    with pytest.raises(JobFault, match="link is a symbolic link"):
        transfer.upload(source, "inputs/linked")
    (tmp_path / "source/link").unlink()
    (base / "linked").symlink_to(outside)
    for path in ("linked", "linked/sub", "linked/precious", "linked/*"):
        with pytest.raises(JobFault, match="symbolic link"):
            transfer.download(path, str(tmp_path / "out"))
        if "*" not in path:
            with pytest.raises(JobFault, match="symbolic link"):
                transfer.upload(source, path)
    with pytest.raises(JobFault, match="symbolic link"):
        transfer.delete_files("linked/precious")
    transfer.delete_files("linked")
    assert not (base / "linked").is_symlink()
    cluster.write_inputs({"x": "x"}, node=0, entry="inputs/deep/sub")
    target = tmp_path / "target"
    target.mkdir()
    (target / "sub").symlink_to(outside)
    with pytest.raises(JobFault, match="stands in the way"):
        transfer.download("inputs/deep", str(target), delete_files=False)
    transfer.download("inputs/deep", str(target))
    assert read(target) == {"sub/x": b"x"} and not (target / "sub").is_symlink()
    assert read(outside) == {"precious": b"precious"}


@pytest.mark.parametrize("path", ["**", "inputs/**", "inputs/**/x", "**/*.log"])
def test_links_that_lead_back_end_no_agent(
    cluster: TestCluster, transfer: FileTransfer, tmp_path: Path, path: str
) -> None:
    cluster.write_inputs({"x": "1"}, node=0, entry="inputs/round")
    folder = cluster.settings.nodes[0].layout.base_dir / "inputs/round"
    for name in ("a", "b", "c"):
        (folder / name).symlink_to("..")
    try:
        with pytest.raises(JobFault, match=r"inputs/round/. is a symbolic link"):
            transfer.delete_files(path, also_outputs=True)
        with pytest.raises(JobFault, match=r"inputs/round/. is a symbolic link"):
            transfer.download(path, str(tmp_path / "out"))
        assert (folder / "x").exists()
    finally:
        for name in ("a", "b", "c"):
            (folder / name).unlink()
    assert transfer.delete_files(path, also_outputs=True)["files"] == (path != "**/*.log")


def test_a_download_never_clears_what_is_dear(cluster: TestCluster, transfer: FileTransfer, tmp_path: Path) -> None:
    cluster.write_inputs({"x": "x"}, entry="inputs/dear")
    for target in (Path("/"), Path.home(), Path.cwd(), cluster.settings.state_dir, cluster.settings.home.parent):
        with pytest.raises(UsageError, match="would be cleared"):
            transfer.download("inputs/dear", str(target))


def test_delete_takes_wildcards_and_follows_no_link(
    cluster: TestCluster, transfer: FileTransfer, tmp_path: Path
) -> None:
    write(tmp_path / "outside", {"precious": b"x"})
    source = write(
        tmp_path / "source", {"a.log": b"12", "b.log": b"345", "c.txt": b"", "d/e.log": b"6", "[a].log": b""}
    )
    transfer.upload(source, "inputs/wild")
    (cluster.settings.nodes[0].layout.base_dir / "inputs/wild/away.log").symlink_to(tmp_path / "outside")
    assert counts(transfer.delete_files("inputs/wild/[a].log")) == (1, 0)  # and a.log on no node
    assert "a.log" in together(cluster.settings, "inputs/wild")
    assert transfer.delete_files("inputs/wild/*.log")["files"] == 3
    assert together(cluster.settings, "inputs/wild") == {"c.txt": b"", "d/e.log": b"6"}
    assert counts(transfer.delete_files("inputs/wild/**")) == (2, 1)
    assert counts(transfer.delete_files("inputs/wild")) == (0, 0)
    assert read(tmp_path / "outside") == {"precious": b"x"}


# --- deaths, damage, shortage ----------------------------------------------------------------------------------------


def at_bytes(count: int, action: Any) -> Any:
    """A stand-in for Session.moved that acts once, when so many bytes went over the wire."""
    moved, seen = Session.moved, [0]

    def acting(session: Session, more: int) -> None:
        before, seen[0] = seen[0], seen[0] + more
        if before < count <= seen[0]:
            action()
        moved(session, more)

    return acting


@pytest.mark.parametrize("way", ["up", "down"])
def test_an_agent_killed_in_mid_file(
    cluster: TestCluster, transfer: FileTransfer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    content = os.urandom(LARGE_BYTES)
    source = write(tmp_path / "source", {"large": content, "large.old": b"old"})
    transfer.upload(source, "inputs/killed")
    if way == "up":
        content = os.urandom(LARGE_BYTES + 1)
        write(tmp_path / "source", {"large": content})
    (holder,) = (number for number, found in enumerate(on_nodes(cluster.settings, "inputs/killed").values())
                 if "large" in found)  # fmt: skip
    before = on_nodes(cluster.settings, "inputs/killed")

    def move() -> Any:
        if way == "up":
            return transfer.upload(source, "inputs/killed")
        return transfer.download("inputs/killed", str(tmp_path / "back"))

    with monkeypatch.context() as patch:
        patch.setattr(Session, "moved", at_bytes(LARGE_BYTES // 2, lambda: os.kill(cluster.agent_pid(holder), 9)))
        with pytest.raises(Unreachable, match=f"node node-{holder}"):
            move()
    assert on_nodes(cluster.settings, "inputs/killed") == before
    assert [name for name in read(tmp_path / "back") if not name.startswith(GATHERING)] == []
    local.start_cluster(cluster.settings)
    counts = move()
    assert counts["sent_bytes"] < counts["bytes"] - LARGE_BYTES // 4  # it went on where it was
    found = together(cluster.settings, "inputs/killed") if way == "up" else read(tmp_path / "back")
    assert found == {"large": content, "large.old": b"old"}


KILLED = """
import os, sys
from mrcore import FileTransfer, load_settings
from mrcore.transfer.session import Session
moved, seen = Session.moved, [0]
def dying(session, more):
    seen[0] += more
    if seen[0] > int(sys.argv[1]):
        os.kill(os.getpid(), 9)
    moved(session, more)
Session.moved = dying
getattr(FileTransfer(load_settings()), sys.argv[2])(*sys.argv[3:])
"""


@pytest.mark.parametrize("way", ["upload_bulk", "download_bulk"])
def test_a_client_killed_in_mid_file(cluster: TestCluster, transfer: FileTransfer, tmp_path: Path, way: str) -> None:
    contents = {"large": os.urandom(LARGE_BYTES), **{f"small{number}": b"small" for number in range(100)}}
    source, target = write(tmp_path / "source", contents), tmp_path / "back"
    if way == "download_bulk":
        transfer.upload_bulk(source, "inputs/dead")
    arguments = (source, "inputs/dead") if way == "upload_bulk" else ("inputs/dead", str(target))
    command = [sys.executable, "-c", KILLED, str(LARGE_BYTES // 2), way, *arguments]
    died = subprocess.run(command, env=os.environ | {"MRCORE_HOME": str(cluster.settings.home)}, check=False)
    assert died.returncode == -signal.SIGKILL
    if way == "upload_bulk":
        assert together(cluster.settings, "inputs/dead") == {}
        assert staged(cluster.settings)
    else:
        assert [name for name in read(target) if not name.startswith(GATHERING)] == []
    counts = getattr(transfer, way)(*arguments)
    assert counts["sent_bytes"] < counts["bytes"] - LARGE_BYTES // 4
    assert (together(cluster.settings, "inputs/dead") if way == "upload_bulk" else read(target)) == contents
    assert not staged(cluster.settings)


def test_what_was_staged_and_went_bad_is_found_and_sent_anew(
    cluster: TestCluster, transfer: FileTransfer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = os.urandom(LARGE_BYTES)
    source, stop = write(tmp_path / "source", {"large": content}), threading.Event()
    monkeypatch.setattr(Session, "moved", at_bytes(LARGE_BYTES // 2, stop.set))
    with pytest.raises(MrcoreError, match="was stopped"):
        FileTransfer(cluster.settings, stop=stop).upload(source, "inputs/bad")
    (partial,) = staged(cluster.settings)
    with partial.open("r+b") as stream:
        stream.seek(1000)
        stream.write(bytes([content[1000] ^ 1]))
    with pytest.raises(Refused, match="arrived corrupt"):
        transfer.upload(source, "inputs/bad")
    assert together(cluster.settings, "inputs/bad") == {}
    assert transfer.upload(source, "inputs/bad")["sent_bytes"] == LARGE_BYTES
    assert together(cluster.settings, "inputs/bad") == {"large": content}


@pytest.mark.parametrize("size", [1000, LARGE_BYTES])
@pytest.mark.parametrize("way", ["up", "down"])
def test_a_byte_flipped_on_the_wire_is_found(
    cluster: TestCluster, transfer: FileTransfer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, size: int
) -> None:
    content = os.urandom(size)
    source = write(tmp_path / "source", {"file": content})
    if way == "down":
        transfer.upload(source, "inputs/flipped")
    take, write_ = Stream.take, Stream.write

    def flipping_take(stream: Stream, count: int) -> memoryview:
        view = take(stream, count)
        if count >= 1000:
            view[count // 2] ^= 4
        return view

    def flipping_write(stream: Stream, data: bytes | memoryview) -> None:
        changed = bytearray(data)
        if len(changed) >= 1000:
            changed[len(changed) // 2] ^= 4
        write_(stream, bytes(changed))

    with monkeypatch.context() as patch:
        if way == "up":
            patch.setattr(Stream, "write", flipping_write)
        else:
            patch.setattr(Stream, "take", flipping_take)
        with pytest.raises(Refused, match="arrived corrupt"):
            if way == "up":
                transfer.upload(source, "inputs/flipped")
            else:
                transfer.download("inputs/flipped", str(tmp_path / "back"))
    if way == "up":
        assert together(cluster.settings, "inputs/flipped") == {}
        transfer.upload(source, "inputs/flipped")
        assert together(cluster.settings, "inputs/flipped") == {"file": content}
    else:
        assert "file" not in read(tmp_path / "back")
        transfer.download("inputs/flipped", str(tmp_path / "back"))
        assert read(tmp_path / "back") == {"file": content}


def test_short_of_disk_is_the_clusters_fault_and_leaves_nothing(
    cluster: TestCluster, transfer: FileTransfer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "source", {"file": b"text", "large": bytes(2 << 20)})
    transfer.upload(source, "inputs/short")
    before = together(cluster.settings, "inputs/short")
    with monkeypatch.context() as patch:
        patch.setattr(batches, "MIN_FREE_DISK_BYTES", 1 << 60)
        with pytest.raises(ClusterFault, match=r"node node-\d has .* make room"):
            transfer.upload(source, "inputs/short")
        with pytest.raises(ClusterFault, match="the master has"):
            transfer.download("inputs/short", str(tmp_path / "out"))

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("put", "take"):
        with monkeypatch.context() as patch:
            patch.setattr(Staging, name, full)
            with pytest.raises(ClusterFault, match="on the master: disk: No space left"):
                transfer.download("inputs/short", str(tmp_path / "out"))
        assert read(tmp_path / "out") == {}
    assert together(cluster.settings, "inputs/short") == before
    assert not staged(cluster.settings)


def test_a_node_that_cannot_write_on_keeps_nothing(
    cluster: TestCluster, transfer: FileTransfer, tmp_path: Path
) -> None:
    """A limit on the size of files stands in for a full disk: the node's write fails in mid-file."""
    source = write(tmp_path / "source", {"large": os.urandom(LARGE_BYTES), "small": b"text"})
    pids = [cluster.agent_pid(node) for node in range(3)]
    before = resource.prlimit(pids[0], resource.RLIMIT_FSIZE)
    for pid in pids:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (LARGE_BYTES // 2, before[1]))
    try:
        with pytest.raises(ClusterFault, match=r"node node-\d: cannot serve the bytes: .*File too large"):
            transfer.upload(source, "inputs/full")
    finally:
        for pid in pids:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, before)
    assert together(cluster.settings, "inputs/full") == {}
    assert not [path for path in staged(cluster.settings) if path.stat().st_size > 1000]
    assert transfer.upload(source, "inputs/full")["files"] == 2


def test_what_dead_uploads_left_is_swept(cluster: TestCluster, transfer: FileTransfer, tmp_path: Path) -> None:
    source, left = write(tmp_path / "source", {"x": b""}), cluster.settings.nodes[0].layout.incoming_dir
    for name, age in (("old", files.INCOMING_SECONDS + 60), ("young", 60)):
        write(left / name, {"half.partial": b"x"})
        for path in (left / name / "half.partial", left / name):
            os.utime(path, (time.time() - age, time.time() - age))
    transfer.upload(source, "inputs/swept")
    assert "old" not in os.listdir(left) and read(left / "young") == {"half.partial": b"x"}


def test_a_second_upload_into_a_folder_makes_the_first_void(cluster: TestCluster, transfer: FileTransfer) -> None:
    client = agent(cluster)
    first = client.call(BEGIN_UPLOAD, folder="inputs/race").upload
    other = client.call(BEGIN_UPLOAD, folder="inputs/else").upload
    second = client.call(BEGIN_UPLOAD, folder="inputs/race").upload
    with pytest.raises(Refused, match="not known any more"):
        client.call(COMMIT_UPLOAD, upload=first, replace=True)
    for upload in (second, other):
        client.call(COMMIT_UPLOAD, upload=upload, replace=False)
    client.close()


# --- auxiliary data, jobs, commands ----------------------------------------------------------------------------------


def test_auxiliary_data_reaches_every_node_or_none(
    cluster: TestCluster, transfer: FileTransfer, tmp_path: Path
) -> None:
    write(tmp_path, {"good.json": b'{"a": [1]}', "bad.json": b'{"a": ', "deep.json": b"[" * 100_000})
    transfer.upload_auxiliary(str(tmp_path / "good.json"), "words")
    for name, error in (("bad.json", "is no JSON"), ("deep.json", "is no JSON"), ("none.json", "cannot read")):
        with pytest.raises(JobFault, match=error):
            transfer.upload_auxiliary(str(tmp_path / name), "words")
    with pytest.raises(UsageError):
        transfer.upload_auxiliary(str(tmp_path / "good.json"), "../words")
    for node in cluster.settings.nodes:
        assert read(node.layout.auxiliary_dir) == {"words.data": b'{"a": [1]}'}


def test_a_missing_or_empty_source_changes_nothing(
    cluster: TestCluster, transfer: FileTransfer, tmp_path: Path
) -> None:
    cluster.write_inputs({"x": "x"}, entry="inputs/kept")
    (tmp_path / "empty").mkdir()
    for name, error in (("empty", "holds no file"), ("none", "does not exist")):
        with pytest.raises(JobFault, match=error):
            transfer.upload(str(tmp_path / name), "inputs/kept")
    with pytest.raises(JobFault, match="matches no file"):
        transfer.download("inputs/none", str(tmp_path / "empty"))
    assert together(cluster.settings, "inputs/kept") == {"x": b"x"}


def job(settings: Settings, **keys: Any) -> None:
    scheduler = Scheduler(settings)
    scheduler.submit_job(scheduler.get_file_transfer_template() | {"run_once": True} | keys)


def test_a_group_of_transfers_runs_in_the_queue(cluster: TestCluster, transfer: FileTransfer, tmp_path: Path) -> None:
    source = write(tmp_path / "source", {f"f{number}": b"text" for number in range(10)})
    write(tmp_path, {"aux.json": b"[1]"})
    keys = {"group_name": "g", "output_dir": "inputs/queued"}
    job(cluster.settings, job_name="t1", transfer_type="upload_bulk", input_dir=source, **keys)
    job(cluster.settings, job_name="t2", transfer_type="download", group_name="g", input_dir="inputs/queued",
        output_dir=str(tmp_path / "out"))  # fmt: skip
    job(cluster.settings, job_name="t3", transfer_type="upload_auxiliary", group_name="g",
        input_file_name=str(tmp_path / "aux.json"), auxiliary_data_name="queued")  # fmt: skip
    job(cluster.settings, job_name="t4", transfer_type="delete", **keys)
    assert Runner(cluster.settings).run(once=True) == {"succeeded": 4}
    assert read(tmp_path / "out") == read(Path(source))
    assert together(cluster.settings, "inputs/queued") == {}
    assert (cluster.settings.nodes[2].layout.auxiliary_dir / "queued.data").read_bytes() == b"[1]"
    told = Scheduler(cluster.settings).history("t1")[0]
    assert (told["counts"]["files"], told["counts"]["bytes"]) == (10, 40)
    assert {"LIST", "TRANSFER", "PUBLISH"} <= set(told["phases"])


def test_a_transfer_job_is_cancelled_within_a_second(
    cluster: TestCluster, transfer: FileTransfer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, asked = write(tmp_path / "source", {"large": os.urandom(LARGE_BYTES)}), list[float]()
    frozen = [cluster.agent_pid(node) for node in range(3)]

    def freeze() -> None:  # the worst case: nobody answers any more
        for pid in frozen:
            os.kill(pid, signal.SIGSTOP)
        asked.append(time.monotonic())
        Scheduler(cluster.settings).cancel("slow")

    monkeypatch.setattr(Session, "moved", at_bytes(LARGE_BYTES // 4, freeze))
    job(cluster.settings, job_name="slow", transfer_type="upload", input_dir=source, output_dir="inputs/slow")
    try:
        assert Runner(cluster.settings).run(once=True) == {"cancelled": 1}
        assert time.monotonic() - asked[0] < 5  # a second, on a machine that has nothing else to do
    finally:
        for pid in frozen:
            os.kill(pid, signal.SIGCONT)
    assert together(cluster.settings, "inputs/slow") == {}
    monkeypatch.undo()
    transfer.upload(source, "inputs/slow")  # the cluster is usable at once


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"transfer_type": "upload", "input_dir": "x", "output_dir": "/etc"}, "must be relative"),
        ({"transfer_type": "download", "input_dir": "../x", "output_dir": "x"}, "must be relative"),
        ({"transfer_type": "delete", "output_dir": "a/../.."}, "must be relative"),
        ({"transfer_type": "move", "input_dir": "x", "output_dir": "y"}, "transfer_type"),
        ({"transfer_type": "download_bulk", "input_dir": "x"}, "needs 'output_dir'"),
    ],
)
def test_bad_jobs_are_refused_at_submit(home: Path, keys: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        scheduler = Scheduler()
        scheduler.submit_job(scheduler.get_file_transfer_template() | {"job_name": "bad"} | keys)


def test_the_commands_move_files_and_say_one_line(
    cluster: TestCluster, transfer: FileTransfer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("MRCORE_HOME", str(cluster.settings.home))
    monkeypatch.chdir(tmp_path)
    write(tmp_path, {"logs/a": b"12", "logs/b": b"345", "aux.json": b"{}"})

    def mrcore(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    assert mrcore("upload", "logs", "inputs/cli") == (0, "uploaded 2 files, 5 bytes\n", "")
    assert mrcore("upload", "logs", "inputs/cli", "--changed") == (0, "uploaded 0 files, 0 bytes, 2 unchanged\n", "")
    assert mrcore("upload-auxiliary", "aux.json", "cli") == (0, "uploaded 3 files, 6 bytes\n", "")
    write(tmp_path, {"back/old": b""})
    assert mrcore("download", "inputs/cli", "back")[1] == "downloaded 2 files, 5 bytes, 1 others removed\n"
    assert read(tmp_path / "back") == {"a": b"12", "b": b"345"}
    assert mrcore("rm", "inputs/cli/*") == (0, "removed 2 files, 5 bytes\n", "")
    code, out, err = mrcore("upload", "nowhere", "inputs/cli")
    assert (code, out) == (1, "") and "does not exist" in err
    assert mrcore("rm", "/etc")[0] == 2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_many_thousand_small_files(cluster: TestCluster, transfer: FileTransfer, tmp_path: Path) -> None:
    contents = {
        f"{number % 100}/file {number}": str(number).encode() * (number % 3) for number in range(22_000)
    }  # pages have 5,000
    source = write(tmp_path / "source", contents)
    assert transfer.upload_bulk(source, "inputs/many")["files"] == 22_000
    assert transfer.upload_bulk(source, "inputs/many", reload_files=False)["skipped"] == 22_000
    assert transfer.download_bulk("inputs/many", str(tmp_path / "back"))["files"] == 22_000
    assert read(tmp_path / "back") == contents
    assert transfer.delete_files("inputs/many")["files"] == 22_000


def test_the_request_for_numbers_that_were_not_given_is_refused(cluster: TestCluster, transfer: FileTransfer) -> None:
    cluster.write_inputs({"x": "text"}, node=0, entry="inputs/numbers")
    client, node = agent(cluster), cluster.settings.nodes[0]
    listing = client.call(LIST_FILES, path="inputs/numbers").listing
    with Session(cluster.settings) as session:
        for asked in ([listing, 1, 0], [listing, -1, 0], ["no", 0, 0], [listing, 0, 5], [listing, "0", 0], [listing]):
            with pytest.raises(Refused), session.data(node) as channel:
                channel.get([{"file": asked}], lambda index, chunk: None)
        upload = client.call(BEGIN_UPLOAD, folder="inputs/numbers").upload
        for batch in ([upload, 1], ["no", 1], [upload, "1"], [upload]):
            with pytest.raises(Refused), session.data(node) as channel:
                channel.put({"batch": batch}, b"text")
        number = client.call(ANNOUNCE, upload=upload, files=[["a", 2, 0, 0o600], ["b", 1, 0, 0o600]])
        with pytest.raises(Refused, match="not what was announced"), session.data(node) as channel:
            channel.put({"batch": [upload, number]}, b"text")
        for files in (
            [["a", -1, 0, 0]], [["a", 1, 0]], ["a"], [["a", "1", 0, 0]], [["a", 1 << 63, 0, 0]], [["a", 1, 0, 0o4755]]
        ):  # fmt: skip
            with pytest.raises(Refused):
                client.call(ANNOUNCE, upload=upload, files=files)
    client.close()
    assert on_nodes(cluster.settings, "inputs/numbers")["node-0"] == {"x": b"text"}
