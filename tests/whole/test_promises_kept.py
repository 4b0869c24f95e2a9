"""Promises of the documents that no other test module is about (docs/promises.md has all of them)."""

from __future__ import annotations

import configparser
import contextlib
import io
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
from by_name import ByName
from checkout import PROJECT, commands, text_of
from clusters import TestCluster
from daemons import own_address
from msgspec.structs import replace
from peers import make_certificates
from task_servers import TaskServer

from mrcore.cli.main import cli, main
from mrcore.cluster.manage_cluster import ManageCluster
from mrcore.cluster.preflight import input_faults
from mrcore.engine.process import Process
from mrcore.engine.spills import SpillWriter, select
from mrcore.errors import ClusterFault, JobFault, MrcoreError, Refused
from mrcore.launchers import local
from mrcore.messages.nodes import InputPage
from mrcore.messages.tasks import Order, Source, SpillShare, TaskIdentity
from mrcore.project.snapshot import project_files, project_hash
from mrcore.queue.scheduler import Runner, Scheduler
from mrcore.state import backup
from mrcore.system.paths import Layout
from mrcore.wire import pki
from mrcore.wire.service import Server
from mrcore.wire.tls import RPC_PROTOCOL, client_context

TEXT = "b a\nc a\n"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestCluster]:
    """One node with one server, and a text."""
    with TestCluster(tmp_path_factory.mktemp("promises"), 1, 1) as made:
        made.write_inputs({"text.txt": TEXT})
        yield made


def functions(cluster: TestCluster, **codes: str) -> None:
    """Write the project's map and reduce functions."""
    for kind, code in codes.items():
        (cluster.settings.projects_dir / f"gated/{kind}_functions.py").write_text(code)


COUNT = {
    "map": "def count_words(line, auxiliary_data):\n    return [(word, 1) for word in line.split()]\n",
    "reduce": "def add_up(group, auxiliary_data):\n    return [(group[0][0], len(group))]\n",
}


# --- Trust -----------------------------------------------------------------------------------------------------------


def test_tls_1_2_is_refused(tmp_path: Path) -> None:
    certificates = make_certificates(tmp_path)
    server = Server("127.0.0.1", 0, certificates.pki("a"), {"a", "b"}, {})
    server.start()
    context = client_context(certificates.pki("b"), RPC_PROTOCOL)
    try:
        with socket.create_connection(("127.0.0.1", server.port)) as raw:
            context.wrap_socket(raw, server_hostname="127.0.0.1").close()
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
        with (
            socket.create_connection(("127.0.0.1", server.port)) as raw,
            pytest.raises((ssl.SSLError, ConnectionResetError)),
        ):
            context.wrap_socket(raw, server_hostname="127.0.0.1")
    finally:
        server.close()


@pytest.mark.parametrize("holder", ["server", "client"])
def test_an_expired_certificate_is_a_fault_of_the_cluster(
    tmp_path: Path, holder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the queue waits and no job fails, whichever side has it."""
    certificates = make_certificates(tmp_path)
    name, role = ("a", "node") if holder == "server" else ("master", "master")
    with monkeypatch.context() as patched:
        patched.setattr(pki, "VALID_DAYS", -0.5)
        pki.issue(tmp_path / "own", tmp_path / name, name, name, role, ["127.0.0.1"])  # type: ignore[arg-type]
    server = Server("127.0.0.1", 0, certificates.pki("a"), {"a"}, {})
    server.start()
    try:
        with pytest.raises(ClusterFault, match=r"(?i)expired"):
            ByName("127.0.0.1", server.port, certificates.pki("master"), "a").call("anything")
    finally:
        server.close()


def listening(pid: int) -> set[str]:
    """The local addresses, as the kernel writes them, that a process listens on."""
    inodes = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            inodes |= set(re.findall(r"socket:\[(\d+)\]", os.readlink(descriptor)))
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {row[1].split(":")[0] for row in rows if row[3] == "0A" and row[9] in inodes}


def test_a_local_cluster_listens_on_loopback_addresses_only(cluster: TestCluster) -> None:
    found = [listening(pid) for pid in cluster.processes()]
    assert sum(map(bool, found)) == 2, "the agent and the server"
    assert all(re.fullmatch("[0-9A-F]{6}7F", address) for addresses in found for address in addresses), found


def test_the_controller_takes_no_unknown_host_key() -> None:
    settings = configparser.ConfigParser()
    settings.read(PROJECT / "ansible.cfg")
    assert settings.getboolean("defaults", "host_key_checking")
    folders = [PROJECT / name for name in ("ansible", "roles", "scripts", "inventory/sample", "inventory/local")]
    texts = [path.read_text(errors="replace") for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert len(texts) > 20 and "StrictHostKeyChecking=yes" in "".join(texts)
    for text in [*texts, (PROJECT / "ansible.cfg").read_text()]:
        assert not re.search(
            r"StrictHostKeyChecking[= ]*(no|accept-new|off)|host_key_checking *[=:] *(false|no)", text, re.I
        )


def test_a_backup_is_readable_by_its_owner_only(home: Path) -> None:
    Scheduler().store.close()
    with pytest.raises(SystemExit) as ended:
        main(["backup", "made.backup"])
    assert ended.value.code in (0, None)
    assert Path("made.backup").stat().st_mode & 0o777 == 0o600


def test_what_is_stopped_on_a_node_stays_so_after_a_reboot(tmp_path: Path) -> None:
    """The helper that the master calls, with a systemctl that notes what it is asked."""
    program = (PROJECT / "roles/mrcore_node/files/units").read_text()
    for name in ("bin", "daemons"):
        (tmp_path / name).mkdir()
    (tmp_path / "daemons/S_3.json").touch()
    (tmp_path / "bin/systemctl").write_text(f'#!/bin/sh\necho "$*" >>{tmp_path}/asked\n')
    (tmp_path / "bin/systemctl").chmod(0o755)
    played = program.replace("PATH=/usr/sbin", f"PATH={tmp_path}/bin:/usr/sbin").replace("/etc/mrcore", str(tmp_path))
    for verb, first in (("stop", "disable"), ("kill", "disable"), ("start", "enable")):
        (tmp_path / "asked").unlink(missing_ok=True)
        subprocess.run(["sh", "-c", played, "units", verb], check=True, timeout=60)
        asked = (tmp_path / "asked").read_text().splitlines()
        assert asked[0] == f"{first} --quiet mrcore-agent.service mrcore-server@S_3.service"
        assert any(re.match(f"{'start' if verb == 'start' else 'stop'} mrcore-agent", line) for line in asked)


# --- Jobs ------------------------------------------------------------------------------------------------------------


def test_no_more_ranges_are_asked_for_at_a_time_than_the_job_says(tmp_path: Path) -> None:
    asked: list[int] = []

    def fetch(source: Any, requests: list[Any], sink: Any) -> None:
        asked.append(len(requests))
        for number, request in enumerate(requests):
            sink(number, memoryview(request["run"].encode()))

    ours, theirs = socket.socketpair()
    identity = TaskIdentity(job="j", run=1, phase="REDUCE", task=0, try_=1)
    for wanted, counts in ((3, [3, 3, 3, 1]), (512, [10]), (1, [1] * 10)):
        asked.clear()
        keys = {"simultaneous_files_in_redis": wanted}
        order = Order(identity=identity, node="m", job=keys, project="a" * 32, partitions=1)
        process = Process(order, ours, Layout(tmp_path), fetch, "S_0")
        source = Source(node="n", address="", port=0, runs=[SpillShare(id="x", max_decoded=1, most_bytes=10)] * 10)
        lengths = process._fetch_into(tmp_path / "fetched", source, [{"run": "x" * number} for number in range(10)])
        assert asked == counts and lengths == list(range(10))
        assert (tmp_path / "fetched").read_bytes() == b"x" * sum(range(10))
    ours.close()
    theirs.close()


def test_what_the_system_fills_is_ignored_when_it_is_given(cluster: TestCluster) -> None:
    functions(cluster, **COUNT)
    keys = ("start_time", "end_time", "exception", "current_phase")
    job = cluster.job(**dict.fromkeys(keys, "of the run before"))
    assert {job[key] for key in keys} == {None}


def test_what_is_part_of_a_project(tmp_path: Path) -> None:
    project = tmp_path / "project"
    for name in ("map_functions.py", ".hidden", "__pycache__/map.pyc", "sub/helper.py", "sub/.git/config", "data.txt"):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text(name)
    (project / "inside.txt").symlink_to("data.txt")
    named = {name for name, _ in project_files(project)}
    assert named == {"map_functions.py", "sub/helper.py", "data.txt", "inside.txt"}
    before = project_hash(project)
    (project / ".hidden").write_text("other")
    (project / "__pycache__/map.pyc").write_text("other")
    assert project_hash(project) == before
    (tmp_path / "outside.txt").write_text("secret")
    (project / "sub/link.txt").symlink_to("../../outside.txt")
    with pytest.raises(JobFault, match=r"sub/link\.txt is a link that leads out of the project"):
        list(project_files(project))


def test_changed_code_is_used_from_the_next_run_on(cluster: TestCluster) -> None:
    functions(cluster, **COUNT)
    cluster.run(cluster.job(job_name="changing"))
    assert cluster.items("changing") == [["a", 2], ["b", 1], ["c", 1]]
    functions(cluster, map=COUNT["map"].replace("(word, 1)", "(word.upper(), 1)"))
    cluster.run(cluster.job(job_name="changing"))
    assert cluster.items("changing") == [["A", 2], ["B", 1], ["C", 1]]


def test_output_stays_when_a_later_run_fails(cluster: TestCluster) -> None:
    functions(cluster, **COUNT)
    cluster.run(cluster.job(job_name="failing"))
    before = cluster.items("failing")
    for code in (
        "def add_up(group, auxiliary_data):\n    1 / (group[0][0] != 'c')\n    return group\n",
        COUNT["reduce"] + "1 / 0\n",
    ):
        functions(cluster, reduce=code)
        with pytest.raises(JobFault, match="ZeroDivisionError"):
            cluster.run(cluster.job(job_name="failing"))
        assert cluster.items("failing") == before == [["a", 2], ["b", 1], ["c", 1]]


def test_auxiliary_data_is_read_once_per_task(cluster: TestCluster) -> None:
    body = "    auxiliary_data.append(line)\n    return [(len(auxiliary_data), 1)]\n"
    functions(cluster, map=f"def count_words(line, auxiliary_data):\n{body}", reduce=COUNT["reduce"])
    (cluster.settings.nodes[0].layout.auxiliary_dir / "seen.data").write_text("[]")
    cluster.write_inputs({f"{n}.txt": "x\n" * 10 for n in range(3)}, entry="inputs/three")
    cluster.run(cluster.job(job_name="once", input_dirs=["inputs/three"], auxiliary_data_name_mapper="seen"))
    assert sorted(cluster.items("once")) == [[n, 1] for n in range(1, 31)], "one list for all files of the task"


def test_a_sample_without_a_line_names_the_smallest_useful_value(cluster: TestCluster) -> None:
    functions(cluster, **COUNT)
    with pytest.raises(JobFault, match=r"sample of 1e-09 of 8 bytes holds no line; .* is about 1$"):
        cluster.run(cluster.job(job_name="sampled", downsample=1e-9))
    cluster.write_inputs({"long.txt": TEXT * 1000}, entry="inputs/long")
    with pytest.raises(JobFault, match=r"of 8,000 bytes holds no line; .* is about 0\.037$") as caught:
        cluster.run(cluster.job(job_name="sampled", downsample=1e-9, input_dirs=["inputs/long"]))
    useful = float(caught.value.message.rpartition(" ")[2])
    cluster.run(cluster.job(job_name="sampled", downsample=useful, input_dirs=["inputs/long"]))
    assert cluster.items("sampled")


@pytest.mark.parametrize(("shared", "refused"), [(None, True), (True, False), (False, False)])
def test_the_same_files_on_every_machine_are_refused_until_it_is_said_what_they_are(
    shared: bool | None, refused: bool
) -> None:
    job = {"input_dirs": ["/data"], "shared_input": shared}
    settings: Any = SimpleNamespace(local=False)
    listing = InputPage(files=[], matched={"/data": 2}, skipped={}, fingerprint="same", faults=[], next=None)
    faults = input_faults(settings, job, [listing, listing])
    assert ["set shared_input: true" in fault for fault in faults] == [True] * refused
    assert not input_faults(settings, job, [listing, replace(listing, fingerprint="other")])


def test_output_that_a_restored_history_does_not_know_is_said_and_the_next_run_mends_it(
    cluster: TestCluster, tmp_path: Path
) -> None:
    functions(cluster, **COUNT)
    scheduler = Scheduler(cluster.settings)
    try:
        for _ in range(2):
            scheduler.submit_job(cluster.job(job_name="restored"))
            assert Runner(cluster.settings).run(once=True) == {"succeeded": 1}
            if not (tmp_path / "first").exists():
                backup.backup(cluster.settings, tmp_path / "first")
        backup.restore(cluster.settings, tmp_path / "first", force=True)
        with pytest.raises(MrcoreError, match=r"part-\d+"):
            cluster.manager.cat("restored", io.BytesIO())
        scheduler.submit_job(cluster.job(job_name="restored"))
        assert Runner(cluster.settings).run(once=True) == {"succeeded": 1}
        assert cluster.items("restored") == [["a", 2], ["b", 1], ["c", 1]]
    finally:
        scheduler.store.close()


def test_a_run_exists_when_its_index_does(tmp_path: Path) -> None:
    writer = SpillWriter(tmp_path, "run", 1000)
    writer.write(0, ["a", "b"], {"a": [1], "b": [2]}, False)
    assert not list(tmp_path.glob("*.index*"))
    with pytest.raises(FileNotFoundError):
        select(tmp_path, "run", {"partition": 0})
    replaced: list[str] = []
    with pytest.MonkeyPatch.context() as patched:
        real = os.replace
        patched.setattr(
            "mrcore.engine.spills.os.replace", lambda old, new: (replaced.append(Path(new).name), real(old, new))
        )
        told = writer.close()
    assert replaced == ["run.data", "run.index"]
    assert select(tmp_path, "run", {"partition": 0}) == [(0, told.bytes)]


def test_cat_refuses_a_damaged_part(cluster: TestCluster) -> None:
    functions(cluster, **COUNT)
    cluster.run(cluster.job(job_name="damaged"))
    (part, *_) = cluster.settings.nodes[0].layout.reduce_dir("damaged").glob("part-*")
    content = bytearray(part.read_bytes())
    content[2] ^= 1
    part.write_bytes(content)
    with pytest.raises(Refused, match=rf"part {part.name} on node-0 is damaged"):
        cluster.manager.cat("damaged", io.BytesIO())


def test_outside_a_job_the_surroundings_are_none() -> None:
    names = set(re.findall(r"`task\.(\w+)`", text_of("docs/jobs.md"))) - {"counters", "said"}
    assert names == {"input_file", "offset", "job", "run", "attempt", "phase", "server", "node", "partition"}
    code = f"from mrcore import task\nprint({{getattr(task, name) for name in {names}}})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "{None}\n"


def test_print_and_breakpoint_work_in_try(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    code = "def m(line, auxiliary_data):\n    print('seen:', line)\n    breakpoint()\n    return []\n"
    (tmp_path / "p/map_functions.py").write_text(code)
    (tmp_path / "in.txt").write_text("one\n")
    command = [str(Path(sys.executable).with_name("mrcore")), "try", "p", "--map", "m", "in.txt"]
    done = subprocess.run(command, cwd=tmp_path, input="p line * 2\nc\n", capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "seen: one" in done.stdout and "(Pdb) 'one\\none\\n'" in done.stdout


# --- What the documents show ----------------------------------------------------------------------------------------


@pytest.fixture
def at_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home without a cluster; what is started there is ended."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    yield home
    subprocess.run(["mrcore", "cluster", "kill"], capture_output=True, check=True, timeout=60)


def test_the_example_of_the_readme_leads_from_nothing_to_its_output(at_home: Path, tmp_path: Path) -> None:
    readme = text_of("README.md")
    for name, content in re.findall(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", readme, re.DOTALL):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(content.replace("/usr/share/common-licenses", str(tmp_path / "texts")))
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/one.txt").write_text("An ape ate apples.\nBees buzz; bears\n")
    (tmp_path / "texts/two.txt").write_text("became boring, aardvark.\n")
    (block,) = re.findall(r"^Start a cluster.*?\n\n((?:    .*\n)+)", readme, re.MULTILINE)
    typed = block.replace("cluster start", f"cluster start --address {own_address()}")
    own_address(), own_address()  # of the other nodes
    done = subprocess.run(["bash", "-ec", typed], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert {'["a","aardvark"]', '["b","boring"]'} <= set(done.stdout.splitlines())
    assert "longest_words: out (succeeded)" in done.stdout


def test_the_python_example_of_the_document_queues_and_runs_its_job(at_home: Path, tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(from mrcore import Runner.*?)```", text_of("docs/jobs.md"), re.DOTALL)
    shutil.copytree(PROJECT / "projects/word_count", "projects/word_count")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/one.txt").write_text(TEXT)
    settings = local.configure(at_home, nodes=1, servers=1, address=own_address())
    local.start_cluster(settings)
    code = code.replace("/usr/share/common-licenses", str(tmp_path / "texts"))
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=120)
    out = io.BytesIO()
    ManageCluster(settings).cat("word_count", out)
    assert sorted(map(json.loads, out.getvalue().splitlines())) == sorted(map(list, Counter(TEXT.split()).items()))


@pytest.mark.parametrize("command", commands(cli))
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command.split()[1:], "--help"])
    out = capsys.readouterr().out
    assert not ended.value.code and out.startswith("Usage:") and len(out.splitlines()) > 4


def test_listings_take_json(at_home: Path) -> None:
    def options(command: str) -> list[str]:
        found: Any = cli
        for name in command.split()[1:]:
            found = found.get_command(click.Context(found), name)
        return [option for parameter in found.params for option in parameter.opts]

    with_json = {command.removeprefix("mrcore ") for command in commands(cli) if "--json" in options(command)}
    assert with_json >= {"queue", "history", "show", "cluster status", "ledger show", "drain", "doctor", "settings"}
    for command in ("queue", "history", "cluster status", "settings"):
        done = subprocess.run(["mrcore", *command.split(), "--json"], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, (command, done.stderr)
        json.loads(done.stdout)


def test_a_cluster_of_another_home_is_left_alone(cluster: TestCluster, tmp_path: Path) -> None:
    before = set(cluster.processes())
    for end in (local.stop_cluster, local.kill_cluster):
        other = local.configure(tmp_path / end.__name__, nodes=1, servers=1, address=own_address())
        local.start_cluster(other)
        assert end(other) == 2
        assert set(cluster.processes()) == before


def test_a_task_that_does_not_read_is_killed(tmp_path: Path) -> None:
    server = TaskServer(tmp_path)
    try:
        listener, identity = server.start("spin")
        listener.until("started")
        bundles = [{"id": number, "pieces": [["/x" * 2_000, 0, 1, 1, 1, 1]] * 25} for number in range(50)]
        with pytest.raises(Refused, match="does not listen"):
            server.master.call("give", identity=identity, bundles=bundles, timeout_seconds=60)
        assert listener.until("died", 60)["signal"] == 9
    finally:
        server.close()
