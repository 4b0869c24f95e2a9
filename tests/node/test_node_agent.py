"""The node agent as a real process over real TLS: listing, snapshots, publishing, removing, and what it refuses."""

from __future__ import annotations

import io
import json
import os
import signal
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from by_name import ByName
from conditions import wait_until
from daemons import Daemon, living

from mrcore import WIRE_VERSION
from mrcore.engine.spills import SpillWriter
from mrcore.errors import ClusterFault, MrcoreError, Refused, Unreachable
from mrcore.project import snapshot
from mrcore.queue.job import template
from mrcore.system import logs
from mrcore.system.paths import Layout
from mrcore.wire.tls import Pki


class Agent(Daemon):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder, ["-P", "-m", "mrcore.node.node_agent"], "agent")
        assert self.ready == b"ready\n", self.log.read_text()
        self.master = self.client()
        self.layout = Layout(folder / "node")

    def get(self, request: Any, holder: str = "master") -> bytes:
        """All bytes of one GET."""
        chunks: list[bytes] = []
        self.data_client(holder).get([request], lambda _, chunk: chunks.append(bytes(chunk)))
        return b"".join(chunks)


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    started = Agent(tmp_path)
    yield started
    started.close()


def pack(*members: tarfile.TarInfo | tuple[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for member in members:
            if isinstance(member, tuple):
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                archive.addfile(info, io.BytesIO(member[1]))
            else:
                archive.addfile(member)
    return buffer.getvalue()


def test_health_is_for_members_and_the_rest_for_the_master(agent: Agent) -> None:
    node = ByName(agent.address, agent.port, Pki(agent.pki / "n1", "node"), "n1")
    agent.clients.append(node)
    health = node.call("health")
    assert health["name"] == "n1" and health["wire_version"] == WIRE_VERSION and health["disk_free_bytes"] > 0
    assert health["served_bytes"] == {} and health["time"] > 1.7e9
    for method, arguments in (
        ("end_run", {"job": "j", "run": 1}),
        ("sweep", {"keep": []}),
        ("end_server", {"name": "S_0"}),
        ("publish", {"job": "j", "run": 1, "parts": [], "delete_job_data": True}),
    ):
        with pytest.raises(Refused, match="master"):
            node.call(method, **arguments)


# ---- inputs


def listing(agent: Agent, **job: Any) -> tuple[list[str], list[Any]]:
    """All pages of a listing: the names found, and the pages."""
    pages: list[Any] = []
    cursor = None
    while not pages or cursor:
        pages.append(
            agent.master.call("list_inputs", job=template("mapreduce") | job, node_names=["n1"], cursor=cursor)
        )
        cursor = pages[-1]["next"]
    return [entry[0] for page in pages for entry in page["files"]], pages


def test_inputs_come_in_pages_of_five_thousand(agent: Agent) -> None:
    folder = agent.layout.base_dir / "many"
    folder.mkdir()
    for number in range(10_001):
        (folder / f"f{number}").write_bytes(b"x")
    names, pages = listing(agent, input_dirs=["many"])
    pages = [page for page in pages if page["files"]]  # a walk of more than a second has empty ones first
    assert [len(page["files"]) for page in pages] == [5_000, 5_000, 1]
    assert sorted(names) == sorted(map(str, folder.iterdir()))
    found = next(entry for entry in pages[0]["files"] if entry[0] == names[0])
    state = Path(names[0]).stat()
    assert found[1:4] == [1, state.st_mtime_ns, state.st_ino]
    with pytest.raises(Refused, match="begin again"):
        agent.master.call("list_inputs", job=template("mapreduce"), node_names=["n1"], cursor=pages[0]["next"])
    for bad in ("x", "x:y", ":", "a:-1"):
        with pytest.raises(Refused, match="begin again"):
            agent.master.call("list_inputs", job=template("mapreduce"), node_names=["n1"], cursor=bad)


def test_an_input_that_matches_nothing_is_told(agent: Agent) -> None:
    _, pages = listing(agent, input_dirs=["nowhere"])
    assert pages[0]["files"] == [] and pages[0]["matched"] == {"nowhere": 0}


# ---- projects


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    (folder / "sub").mkdir(parents=True)
    (folder / "map_snapshot.py").write_text("def f(line, auxiliary_data):\n    return []\n")
    (folder / "sub/helper.py").write_text("X = 1\n")
    (folder / "empty").write_bytes(b"")
    return folder


def test_a_project_arrives_whole_and_twice_does_no_harm(agent: Agent, project: Path) -> None:
    content = snapshot.project_hash(project)
    assert agent.master.call("project_state", hash=content) is False
    for _ in range(2):
        agent.data_client().put({"project": content}, snapshot.pack_project(project))
        assert agent.master.call("project_state", hash=content) is True
    assert snapshot.project_hash(agent.layout.projects_dir / content) == content
    assert sorted(path.name for path in agent.layout.projects_dir.iterdir()) == sorted([".partial", content])
    assert not list((agent.layout.projects_dir / ".partial").iterdir())


def test_a_project_of_other_content_or_no_archive_is_refused(agent: Agent, project: Path) -> None:
    with pytest.raises(ClusterFault, match="arrived as"):
        agent.data_client().put({"project": "b" * 32}, snapshot.pack_project(project))
    for damaged in (b"no tar", snapshot.pack_project(project)[:700]):
        with pytest.raises((Refused, ClusterFault)):
            agent.data_client().put({"project": "b" * 32}, damaged)
    with pytest.raises(Refused):
        agent.data_client().put({"project": "../x"}, b"")
    assert not (agent.layout.projects_dir / ("b" * 32)).exists()
    assert not list((agent.layout.projects_dir / ".partial").iterdir())


def bad_members() -> Iterator[tarfile.TarInfo | tuple[str, bytes]]:
    for name in ("/tmp/absolute", "../outside", "a/../../outside", "a//b", "./a", "."):
        yield name, b"x"
    for kind, target in ((tarfile.SYMTYPE, "/etc/passwd"), (tarfile.LNKTYPE, "/etc/passwd"), (tarfile.FIFOTYPE, "")):
        member = tarfile.TarInfo("link")
        member.type, member.linkname = kind, target
        yield member


@pytest.mark.parametrize(
    "member",
    list(bad_members()),
    ids=lambda member: getattr(member, "name", member[0] if isinstance(member, tuple) else "?"),
)
def test_an_archive_that_would_leave_its_folder_is_refused(agent: Agent, tmp_path: Path, member: Any) -> None:
    with pytest.raises(Refused, match="no plain file inside"):
        agent.data_client().put({"project": "c" * 32}, pack(("good", b"x"), member))
    assert not (tmp_path / "outside").exists() and not (tmp_path / "node/outside").exists()
    assert not list((agent.layout.projects_dir / ".partial").iterdir())


def test_a_file_in_the_place_of_a_folder_is_refused(agent: Agent) -> None:
    with pytest.raises(Refused, match="cannot be unpacked"):
        agent.data_client().put({"project": "c" * 32}, pack(("a", b"x"), ("a/b", b"x")))


def test_a_node_may_not_put(agent: Agent) -> None:
    with pytest.raises(Refused, match="node"):
        agent.data_client("n1").put({"project": "c" * 32}, b"")


# ---- a run


def write_parts(layout: Layout, job: str, run: int, names: list[str]) -> None:
    folder = layout.parts_dir(job, run)
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text(name)


def publish(agent: Agent, run: int, parts: list[str], delete: bool) -> Any:
    return agent.master.call("publish", job="j", run=run, parts=parts, delete_job_data=delete)


def test_publishing_replaces_accumulates_and_can_be_repeated(agent: Agent) -> None:
    first, second = ["part-1-0-0.data", "part-1-1-0.data.gz"], ["part-2-0-0.data"]
    reduce_dir = agent.layout.reduce_dir("j")
    assert publish(agent, 1, [], True) == {"published": 0, "removed": 0}
    assert not reduce_dir.exists()
    write_parts(agent.layout, "j", 1, first)
    assert publish(agent, 1, first, True) == {"published": 2, "removed": 0}
    assert publish(agent, 1, first, True) == {"published": 0, "removed": 0}  # repeated after a crash
    (reduce_dir / "a user's note").write_text("stays")
    write_parts(agent.layout, "j", 2, second)
    assert publish(agent, 2, second, False) == {"published": 1, "removed": 0}
    assert publish(agent, 2, second, True) == {"published": 0, "removed": 2}
    assert sorted(path.name for path in reduce_dir.iterdir()) == ["a user's note", *second]
    assert agent.get({"part": {"job": "j", "name": second[0]}}) == second[0].encode()
    with pytest.raises(ClusterFault, match="neither"):
        publish(agent, 3, ["part-3-0-0.data"], True)
    assert (reduce_dir / second[0]).exists(), "a publish that fails removes nothing"
    assert publish(agent, 1, [], True) == {"published": 0, "removed": 0}  # late: newer parts stay
    assert publish(agent, 3, [], True) == {"published": 0, "removed": 1}


def test_a_publish_cut_in_its_middle_is_completed(agent: Agent) -> None:
    names = ["part-1-0-0.data", "part-1-1-0.data"]
    write_parts(agent.layout, "j", 1, names)
    agent.layout.reduce_dir("j").mkdir(parents=True)
    (agent.layout.parts_dir("j", 1) / names[0]).rename(agent.layout.reduce_dir("j") / names[0])
    assert publish(agent, 1, names, True) == {"published": 1, "removed": 0}


def test_what_a_release_before_left_in_a_runs_folder_is_published_and_swept(agent: Agent) -> None:
    """Its folders of a run had one more level; a run that has committed there is completed after an upgrade."""
    name = "part-1-0-0.data"
    for run in (1, 2):
        former = agent.layout.run_dir("j", run) / "1/parts"
        former.mkdir(parents=True)
        (former / name).write_text("of before")
    assert publish(agent, 1, [name], True) == {"published": 1, "removed": 0}
    assert agent.get({"part": {"job": "j", "name": name}}) == b"of before"
    assert agent.master.call("end_run", job="j", run=1) is True
    assert agent.master.call("sweep", keep=[]) == {"working": 1, "projects": 0, "venvs": 0}
    assert not list(agent.layout.working_dir.iterdir())


def test_start_end_and_sweep_remove_what_they_should(agent: Agent) -> None:
    for job, run in (("a", 1), ("a", 2), ("b", 7)):
        assert agent.master.call("start_run", job=job, run=run)["disk_free_bytes"] > 0
        (agent.layout.run_dir(job, run) / "runs").mkdir(parents=True)
    (agent.layout.working_dir / "stray").write_text("")
    for _ in range(2):
        assert agent.master.call("end_run", job="a", run=1) is True
    assert agent.layout.run_dir("a", 2).exists() and not agent.layout.run_dir("a", 1).exists()
    for number in range(25):
        snapshot = agent.layout.projects_dir / f"{number:032x}"
        snapshot.mkdir()
        os.utime(snapshot, (number, number))
    assert agent.master.call("project_state", hash=f"{0:032x}") is True  # used again: no longer the oldest
    assert agent.master.call("sweep", keep=[["b", 7]]) == {"working": 2, "projects": 5, "venvs": 0}
    assert agent.master.call("sweep", keep=[["b", 7]]) == {"working": 0, "projects": 0, "venvs": 0}
    assert agent.layout.run_dir("b", 7).exists() and sorted(os.listdir(agent.layout.working_dir)) == ["b"]
    assert (agent.layout.projects_dir / f"{0:032x}").exists() and not (agent.layout.projects_dir / f"{1:032x}").exists()
    agent.master.call("end_run", job="b", run=7)
    assert not list(agent.layout.working_dir.iterdir())


def test_auxiliary_data_is_found_by_name(agent: Agent) -> None:
    (agent.layout.auxiliary_dir / "words.data").write_text("[]")
    assert agent.master.call("auxiliary", name="words") is True
    assert agent.master.call("auxiliary", name="others") is False


def test_spill_runs_are_served_to_any_member_and_counted(agent: Agent) -> None:
    folder = agent.layout.runs_dir("j", 1)
    folder.mkdir(parents=True)
    writer = SpillWriter(folder, "map-0-1-0", 1 << 16)
    writer.write(0, ["a"], {"a": [1]}, False)
    writer.write(2, ["b", "c"], {"b": [2], "c": [3]}, False)
    told = writer.close()
    asked = {"job": "j", "run": 1, "id": told.id}
    whole = (folder / f"{told.id}.data").read_bytes()
    parts = [agent.get({"run": asked | {"partition": partition}}, "n1") for partition in range(3)]
    assert b"".join(parts) == whole and parts[1] == b"" and len(parts[0]) == told.partitions["0"]
    assert agent.master.call("health")["served_bytes"] == {"run": len(whole)}
    with pytest.raises(Refused, match="has no run"):
        agent.get({"run": asked | {"run": 2, "partition": 0}}, "n1")


@pytest.mark.parametrize(
    "request_",
    [
        {},
        {"file": "/etc/passwd"},
        {"run": {"job": "..", "run": 1, "id": "x", "partition": 0}},
        {"run": {"job": "j", "run": "../..", "id": "x", "partition": 0}},
        {"run": {"job": "j", "run": -1, "id": "x", "partition": 0}},
        {"run": {"job": "j", "run": 1, "id": "../x", "partition": 0}},
        {"run": {"job": "j", "run": True, "id": "x\n", "partition": 0}},
        {"run": {"job": "j"}},
        {"run": 7},
        {"part": {"job": "j", "name": "../../auxiliary/words.data"}},
        {"part": {"job": "j", "name": "a user's note"}},
        {"part": {"job": "..", "name": "part-1-0-0.data"}},
        [],
        "run",
        None,
    ],
)
def test_requests_that_name_anything_else_are_refused(agent: Agent, request_: Any) -> None:
    with pytest.raises(MrcoreError):
        agent.get(request_)
    assert agent.master.call("health")["served_bytes"] == {}


def test_parts_are_served_to_nodes_too_which_merge_them(agent: Agent) -> None:
    write_parts(agent.layout, "j", 1, ["part-1-0-0.data"])
    publish(agent, 1, ["part-1-0-0.data"], True)
    assert agent.get({"part": {"job": "j", "name": "part-1-0-0.data"}}, "n1") == b"part-1-0-0.data"


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("end_run", {"job": "..", "run": 1}),
        ("end_run", {"job": "a/b", "run": 1}),
        ("end_run", {"job": "", "run": 1}),
        ("end_run", {"job": ["j"], "run": 1}),
        ("end_run", {"job": "j", "run": "."}),
        ("start_run", {"job": "j", "run": 1.0}),
        ("sweep", {"keep": [["..", 1]]}),
        ("auxiliary", {"name": "../x"}),
        ("project_state", {"hash": ".."}),
        ("end_server", {"name": "../agent"}),
        ("publish", {"job": "j", "run": 1, "parts": ["../x"], "delete_job_data": True}),
    ],
)
def test_names_that_would_leave_their_folder_are_refused(agent: Agent, method: str, arguments: Any) -> None:
    with pytest.raises(Refused, match=f"{method}: not arguments of this method"):
        agent.master.call(method, **arguments)


def test_only_a_server_of_this_cluster_is_ended(agent: Agent) -> None:
    record = agent.layout.pids_dir / "S_9.server.json"
    record.write_text(json.dumps({"pid": os.getpid(), "start_ticks": 1}))
    assert agent.master.call("end_server", name="S_9") is False
    record.write_text("{")
    assert agent.master.call("end_server", name="S_9") is False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_agent_though_clients_are_connected(agent: Agent, number: int) -> None:
    agent.master.call("health")
    agent.process.send_signal(number)
    assert agent.process.wait(9) == 0 and not living(agent.process.pid)
    with pytest.raises(Unreachable):
        agent.master.call("health")


def test_what_an_earlier_life_left_half_done_is_removed(tmp_path: Path) -> None:
    leftover = tmp_path / "node/projects/.partial/x/y"
    leftover.mkdir(parents=True)
    agent = Agent(tmp_path)
    try:
        wait_until(lambda: not leftover.exists())
    finally:
        agent.close()


def test_an_agent_that_was_frozen_for_longer_than_it_waits_goes_on(agent: Agent) -> None:
    """Python's sigtimedwait then gives an answer without a signal."""
    begun = time.monotonic()
    os.kill(agent.process.pid, signal.SIGSTOP)
    wait_until(lambda: time.monotonic() - begun > 1.5 * logs.WINDOW_SECONDS)
    os.kill(agent.process.pid, signal.SIGCONT)
    assert agent.client().call("health")["name"] == "n1" and agent.process.poll() is None
