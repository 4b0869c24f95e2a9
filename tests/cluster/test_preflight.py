"""What comes before a run, on a real cluster: it ends when it is told to, and says what it left out."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from clusters import TestCluster
from conditions import wait_until
from daemons import made_spec, own_address
from task_servers import TaskServer

from mrcore.cluster.preflight import Stopped
from mrcore.errors import JobFault, UsageError
from mrcore.launchers import local
from mrcore.node.cluster_server import main as server_main
from mrcore.project import snapshot
from mrcore.project.snapshot import pack_project, project_hash
from mrcore.queue.scheduler import Scheduler
from mrcore.system import procfs

RUNNER = "from mrcore import Runner, load_settings; Runner(load_settings()).run(once=True)"
MRCORE = "import sys; from mrcore.cli.main import main; main(sys.argv[1:])"
LONG = 120  # seconds until a test gives up


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestCluster]:
    with TestCluster(tmp_path_factory.mktemp("preflight"), 2, 1) as made:
        yield made


@pytest.fixture
def scheduler(cluster: TestCluster) -> Iterator[Scheduler]:
    made = Scheduler(cluster.settings)
    yield made
    made.store.check()
    made.store.close()


def environment(cluster: TestCluster) -> dict[str, str]:
    return os.environ | {"MRCORE_HOME": str(cluster.settings.home)}


def ran(cluster: TestCluster, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    work = cluster.settings.projects_dir.parent
    return subprocess.run(
        command, env=environment(cluster), cwd=work, capture_output=True, text=True, timeout=LONG, check=False
    )


def long_walk(cluster: TestCluster, name: str) -> list[str]:
    """Entries that an agent would walk for minutes: patterns that match nothing in many folders."""
    for folder in range(400):
        (cluster.settings.nodes[0].layout.base_dir / name / f"d{folder}/e").mkdir(parents=True)
    return [f"{name}/**/*.none{number}" for number in range(20_000)]


def walking(cluster: TestCluster) -> bool:
    """Whether the first node's agent is at work: it used processor time in half a second."""

    def used() -> int:
        fields = Path(f"/proc/{cluster.agent_pid(0)}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    before = used()
    threading.Event().wait(0.5)
    return used() - before > 3


@pytest.mark.parametrize("how", ["cancel", "timeout", "SIGTERM"])
def test_a_long_walk_obeys(cluster: TestCluster, scheduler: Scheduler, how: str) -> None:
    job = cluster.job(job_name=f"walks-{how}", input_dirs=long_walk(cluster, f"inputs/{how}"))
    scheduler.submit_job(job | ({"timeout_seconds": 2} if how == "timeout" else {}))
    work = cluster.settings.projects_dir.parent
    runner = subprocess.Popen([sys.executable, "-c", RUNNER], env=environment(cluster), cwd=work)
    try:
        if how != "timeout":
            wait_until(lambda: walking(cluster), LONG, "the agent walks")
        if how == "cancel":
            scheduler.cancel(job["job_name"])
        elif how == "SIGTERM":
            runner.terminate()
        assert runner.wait(LONG) == 0
    finally:
        runner.kill()
        runner.wait()
    run = scheduler.history(job["job_name"])[0]
    expected = {"cancel": "cancelled", "timeout": "failed", "SIGTERM": "handed back"}
    assert run["state"] == expected[how] and list(run["phases"]) == ["PREFLIGHT"]
    assert how != "timeout" or "timeout: ran longer" in run["exception"]["message"]
    wait_until(lambda: not walking(cluster), LONG, "the agent has given up the walk")
    scheduler.delete_job(job["job_name"]) if how == "SIGTERM" else None
    cluster.assert_clean()


def test_an_agent_that_does_not_answer_holds_nobody_up(cluster: TestCluster) -> None:
    """It is frozen in the middle of a call that may take minutes."""
    job, stop = cluster.job(job_name="frozen", input_dirs=long_walk(cluster, "inputs/frozen")), threading.Event()
    errors: list[BaseException] = []

    def run() -> None:
        try:
            cluster.manager.run(job, run=900, stop=stop)
        except BaseException as error:  # noqa: BLE001  looked at below
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    wait_until(lambda: walking(cluster), LONG, "the agent walks")
    os.kill(cluster.agent_pid(0), signal.SIGSTOP)
    try:
        stop.set()
        thread.join(50)  # below the 60 s that the answer to one slice may take
        assert not thread.is_alive() and isinstance(errors[0], Stopped), errors
    finally:
        os.kill(cluster.agent_pid(0), signal.SIGCONT)
    cluster.write_inputs({"a": "x\n"}, entry="inputs/after")
    assert cluster.run(cluster.job(job_name="after", input_dirs=["inputs/after"]))["counts"]["lines"] == 1


def test_what_was_skipped_is_in_the_history_and_shown(cluster: TestCluster, scheduler: Scheduler) -> None:
    for number, node in enumerate(cluster.settings.nodes):
        folder = node.layout.base_dir / "inputs/odd"
        folder.mkdir(parents=True)
        (folder / f"f{number}").write_text("x\n")
        (folder / "g").symlink_to(f"f{number}")
        os.mkfifo(folder / "pipe")
        (folder / ".hidden").write_text("x\n")
    keys = {"job_name": "skips", "input_dirs": ["inputs/odd"]}
    scheduler.submit_job(cluster.job(**keys))
    assert ran(cluster, RUNNER).returncode == 0
    skipped = {"fifo": 2, "dotfile": 2, "same file under another name": 2}
    assert scheduler.history("skips")[0]["counts"]["skipped"] == skipped
    shown = ran(cluster, MRCORE, "show", "skips").stdout
    (line,) = [line for line in shown.splitlines() if "skipped" in line]
    assert sorted(line.strip().removeprefix("skipped: ").split(", ")) == sorted(f"2 {each}" for each in skipped)
    assert cluster.items("skips") == [["x", 2]]
    clean = cluster.job(job_name="clean", input_dirs=["inputs/odd/f?"])
    assert "skipped" not in cluster.run(clean)["counts"]


def test_one_file_in_the_folders_of_two_nodes_is_read_once(cluster: TestCluster, tmp_path: Path) -> None:
    first, second = (node.layout.base_dir / "inputs/both" for node in cluster.settings.nodes)
    for folder in (first, second):
        folder.mkdir(parents=True)
    outside = tmp_path / "outside"
    outside.write_text("outside\n")
    (first / "a").write_text("linked\n")
    (second / "b").symlink_to(first / "a")
    (first / "c").write_text("hard\n")
    os.link(first / "c", second / "c")
    (second / "d").symlink_to(outside)
    (first / "own").write_text("own\n")
    (second / "own").write_text("own\n")
    found = cluster.run(cluster.job(job_name="both", input_dirs=["inputs/both", str(tmp_path), f"/{tmp_path}/outside"]))
    assert sorted(cluster.items("both")) == [["hard", 1], ["linked", 1], ["outside", 1], ["own", 2]]
    assert found["skipped"] == {"same file under another name": 3}


# --- A character that is not finished --------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", [b"\xc3", b"\xe2\x82", b"\xf0\x9f\x98"])
@pytest.mark.parametrize("on_bad_text", ["fail", "replace"])
def test_a_log_that_ends_inside_of_a_character_is_read_up_to_it(
    cluster: TestCluster, tmp_path: Path, tail: bytes, on_bad_text: str
) -> None:
    (tmp_path / "growing.log").write_bytes(b"ok\nhalf " + tail)
    (tmp_path / "only.log").write_bytes(tail)
    (tmp_path / "other.log").write_bytes("whole é".encode())
    found = cluster.run(cluster.job(job_name="cut", input_dirs=[str(tmp_path)], on_bad_text=on_bad_text))
    assert sorted(cluster.items("cut")) == [["half", 1], ["ok", 1], ["whole", 1], ["é", 1]]
    assert found["counts"]["unfinished_characters"] == 2 and found["counts"]["lines"] == 3


@pytest.mark.parametrize(
    "content", [b"bad \xc3\nnext\n", b"bad \xff", b"bad \xc3\x28", b"half \xc3\n", b"\xe2\x28\xa1"]
)
def test_what_is_bad_anywhere_else_still_fails(cluster: TestCluster, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(JobFault, match="f is not UTF-8 at byte"):
        cluster.run(cluster.job(job_name="bad", input_dirs=[str(tmp_path)]))


def test_with_a_ledger_the_unfinished_character_waits_however_old_it_is(cluster: TestCluster, tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"one\nhalf \xc3")
    os.utime(path, (1, 1))
    keys = {"job_name": "waits", "input_dirs": [str(tmp_path)], "hold_state": True, "merge_output": True}
    found = cluster.run(cluster.job(**keys))
    assert cluster.items("waits") == [["one", 1]] and found["skipped"] == {"unfinished last line": 1}
    assert cluster.run(cluster.job(**keys))["nothing_new"]
    with path.open("ab") as log:
        log.write(b"\xa9 word\n")
    cluster.run(cluster.job(**keys))
    assert sorted(cluster.items("waits")) == [["half", 1], ["one", 1], ["word", 1], ["é", 1]]


# --- Projects --------------------------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "map_functions.py").write_text("def m(line, aux): return []\n")
    return folder


@pytest.mark.parametrize("name", ["pipe", "requirements.txt", "sub/helper.py", "link", "socket", "huge"])
def test_what_cannot_be_packed_into_a_project_is_refused_by_name(project: Path, name: str) -> None:
    path = project / name
    path.parent.mkdir(exist_ok=True)
    if name == "link":
        os.mkfifo(project / "target")
        path.symlink_to("target")
    elif name == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
    elif name == "huge":
        with path.open("wb") as sparse:
            sparse.truncate(1 << 40)
    else:
        os.mkfifo(path)
    message = "larger than 512 MiB" if name == "huge" else "it is a (fifo|socket), no plain file: remove it"
    for pack in (project_hash, pack_project):
        with pytest.raises(JobFault, match=rf"project.*{name}.*{message}"):
            pack(project)


def test_the_files_of_a_project_are_bounded_together(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "MAX_PROJECT_BYTES", 1000)
    (project / "a").write_bytes(bytes(900))
    assert project_hash(project)
    (project / "b").write_bytes(bytes(100))
    with pytest.raises(JobFault, match="is larger than"):
        project_hash(project)


@pytest.mark.parametrize("name", ["pipe", "requirements.txt"])
def test_a_fifo_in_a_project_fails_the_job_and_not_the_runner(
    cluster: TestCluster, scheduler: Scheduler, name: str
) -> None:
    cluster.write_inputs({"f": "x\n"}, entry="inputs/piped")
    project = cluster.settings.projects_dir / f"piped-{name[:4]}"
    project.mkdir()
    (project / "map_functions.py").write_text("def count_words(line, aux): return [(line, 1)]\n")
    os.mkfifo(project / name)
    keys = {"project_name": project.name, "input_dirs": ["inputs/piped"], "reduce_function_name": None}
    scheduler.submit_job(cluster.job(job_name=project.name, **keys))
    ran(cluster, RUNNER)
    run = scheduler.history(project.name)[0]
    assert run["state"] == "failed" and f"{name} cannot be read: it is a fifo" in run["exception"]["message"]


# --- Memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("servers", "mebibytes", "least"), [(2, 64, 128), (1, 63, 64), (3, 191, 192)])
def test_a_cluster_that_cannot_work_in_its_memory_does_not_start(
    home: Path, servers: int, mebibytes: int, least: int
) -> None:
    settings = local.configure(home, nodes=1, servers=servers, address=own_address(), memory_bytes=mebibytes << 20)
    with pytest.raises(UsageError, match=rf"{servers} servers.*need 64: set {least << 20} or more.*fewer servers"):
        local.start_cluster(settings)
    assert {row["state"] for row in local.status(settings)} == {"absent"}


def test_on_a_machine_too_small_for_its_servers_none_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(procfs, "machine_memory_bytes", lambda: 512 << 20)
    (tmp_path / "spec.json").write_bytes(msgspec.json.encode(msgspec.structs.replace(made_spec(tmp_path), servers=8)))
    assert server_main(str(tmp_path / "spec.json")) == 1
    assert "S_0 does not start: memory_bytes: 8 servers on a machine get 38 MiB each" in caplog.text


def test_the_least_memory_does_for_more_data_than_it_holds(tmp_path: Path) -> None:
    with TestCluster(tmp_path, 1, 2, memory_bytes=128 << 20) as small:
        words = [f"{number * 2654435761 % 2**32:x}" for number in range(400_000)]
        small.write_inputs({"words": "".join(f"{word}\n" for word in words)})
        found = small.run(small.job())
        assert small.items() and found["counts"]["output_items"] == len(set(words))
        assert found["counts"]["spills"] > 1


def test_a_task_s_budget_is_never_less_than_it_needs(tmp_path: Path) -> None:
    server = TaskServer(tmp_path, memory_bytes=1 << 20)
    try:
        listener, _ = server.start("done")
        assert listener.until("started")["memory_bytes"] == procfs.MIN_TASK_BYTES
    finally:
        server.close()
