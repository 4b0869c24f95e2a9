"""Increments: f(A + B) from f(A) and B, on real clusters, and the rules of the ledger over random histories."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from clusters import TestCluster
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import bag, grouped

from mrcore.engine.disk_sort import DiskSort
from mrcore.engine.memory import MemoryWatch
from mrcore.engine.output import Parts, PartWriter
from mrcore.engine.shuffler import Shuffle
from mrcore.engine.spills import Segment, SpillWriter
from mrcore.errors import ClusterFault, JobFault, UsageError
from mrcore.launchers import local
from mrcore.messages.nodes import InputFile, ReadFile, Tail
from mrcore.messages.tasks import PlacedPart
from mrcore.node import inputs
from mrcore.queue.scheduler import Runner, Scheduler
from mrcore.state import ledger, manifest

OLD = 1_000_000_000  # ns after 1970: nobody has written since
MERGE = {"hold_state": True, "merge_output": True}
ACCUMULATE = {"hold_state": True, "delete_job_data": False}


# --- Real clusters ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["1x2", "3x1"])
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestCluster]:
    nodes, servers = map(int, request.param.split("x"))
    with TestCluster(tmp_path_factory.mktemp("increments"), nodes, servers) as running:
        yield running


class Increments:
    """One job over files of its own, on a shared cluster, and the words that it should have counted."""

    numbers = iter(range(1, 10**6))

    def __init__(self, cluster: TestCluster, **keys: Any) -> None:
        self.cluster = cluster
        self.name = f"job{next(self.numbers)}"
        self.entry = f"inputs/{self.name}"
        self.keys: dict[str, Any] = {"job_name": self.name, "input_dirs": [self.entry]} | keys

    def write(self, **texts: str) -> None:
        self.cluster.write_inputs(texts, entry=self.entry)

    def path(self, name: str) -> Path:
        (found,) = [path for path in self.paths() if path.name == name]
        return found

    def paths(self) -> list[Path]:
        nodes = self.cluster.settings.nodes
        return sorted(path for node in nodes for path in (node.layout.base_dir / self.entry).glob("*"))

    def grow(self, name: str, text: str) -> None:
        with self.path(name).open("a") as stream:
            stream.write(text)

    def run(self, **changes: Any) -> dict[str, Any]:
        found = self.cluster.run(self.cluster.job(**self.keys | changes), run=next(self.numbers))
        self.cluster.assert_clean()
        return found

    def counted(self) -> dict[str, int]:
        """The job's output; counts of several parts add up, as they lie side by side when outputs accumulate."""
        total: Counter[str] = Counter()
        for key, value in self.cluster.items(self.name):
            total[key] += value
        return total

    def words(self) -> dict[str, int]:
        texts = [gzip.decompress(p.read_bytes()).decode() if p.suffix == ".gz" else p.read_text() for p in self.paths()]
        return Counter(word for text in texts for word in text.split())

    def state(self) -> dict[str, tuple[bytes, int]]:
        """Content and time of every manifest and part of the job."""
        folders = [node.layout.reduce_dir(self.name) for node in self.cluster.settings.nodes]
        folders.append(self.cluster.settings.state_dir / "manifests" / self.name)
        return {
            str(path): (path.read_bytes(), path.stat().st_mtime_ns) for folder in folders for path in folder.glob("*")
        }

    def scheduler(self) -> Scheduler:
        return Scheduler(self.cluster.settings)


VARIANTS: dict[str, dict[str, Any]] = {
    "merge": MERGE,
    "range": MERGE | {"partitioner": "range", "number_of_partitions": 3},
    "many parts": MERGE | {"max_number_dumped_items_reducer": 3, "compress": True},
    "disk based": MERGE | {"disk_based_input": True, "disk_based_output": False, "sort_values": True},
    "combined": MERGE | {"combine_function_name": "add_up", "max_number_dumped_items_shuffler": 5},
    "accumulate": ACCUMULATE,
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_second_cycle_reads_only_what_is_new_and_the_third_changes_nothing(
    cluster: TestCluster, variant: str
) -> None:
    job = Increments(cluster, **VARIANTS[variant])
    rng = random.Random(variant)
    vocabulary = [f"w{number}é" for number in range(40)]

    def text(lines: int) -> str:
        return "".join(" ".join(rng.choices(vocabulary, k=6)) + "\n" for _ in range(lines))

    job.write(**{f"a{number}": text(30) for number in range(7)}, empty="")
    first = job.run()
    assert job.counted() == job.words() and first["counts"]["files_read_before"] == 0
    vocabulary += [f"new{number}" for number in range(10)]
    more, fresh = text(5), text(20)
    job.grow("a0", more)
    job.grow("a3", more)
    job.write(b0=fresh)
    job.grow("empty", more)
    second = job.run()
    expected = 3 * len(more.encode()) + len(fresh.encode())
    assert second["counts"]["bytes"] == second["counts"]["input_bytes"] == expected
    assert (second["counts"]["input_files"], second["counts"]["files_read_before"]) == (4, 5)
    assert job.counted() == job.words()
    if job.keys.get("merge_output"):  # the same items, part by part, as a run from scratch
        whole = [part["name"] for part in second["parts"]]
        assert len(whole) == len({path for path in job.state() if "/reduce/" in path})
        items = cluster.items(job.name)
        scratch = {"job_name": f"{job.name}-scratch", "hold_state": False, "merge_output": False}
        cluster.run(cluster.job(**job.keys | scratch | {"number_of_partitions": first["partitions"]}), run=1)
        assert bag(items) == bag(cluster.items(f"{job.name}-scratch"))
        assert second["counts"]["merged_items"] == first["counts"]["output_items"]
        if variant == "range":
            assert items == sorted(items) and second["cuts"] == first["cuts"]
    before = job.state()
    third = job.run()
    assert third["nothing_new"] and third["counts"]["input_files"] == third["counts"]["bytes"] == 0
    assert third["counts"]["files_read_before"] == 9
    assert job.state() == before


def test_a_queued_job_with_nothing_new_succeeds(cluster: TestCluster) -> None:
    job = Increments(cluster, **MERGE, run_once=False)
    job.write(a="x y\n", b="y\n")
    scheduler = job.scheduler()
    scheduler.submit_job(cluster.job(**job.keys))
    states = []
    for number in range(3):
        Runner(cluster.settings, manage_cluster=cluster.manager).run(once=True)
        if number == 0:
            job.grow("a", "z\n")
        states.append(job.state())
        with scheduler.store.change() as db:  # the next cycle, without waiting for it
            db.execute("UPDATE jobs SET cycle = 0, last_start = NULL")
    runs = scheduler.history(job.name)
    assert [run["state"] for run in runs] == ["succeeded"] * 3
    assert [run["counts"]["bytes"] for run in runs] == [0, 2, 6]
    assert states[1] == states[2] and job.counted() == job.words()
    scheduler.delete_job(job.name)


def test_partitions_with_only_old_or_only_new_items(cluster: TestCluster) -> None:
    job = Increments(cluster, **MERGE, number_of_partitions=7)
    job.write(a="old\n", b="older\n")
    job.run()
    for word in ("one", "two", "three", "old", "#"):
        job.grow("a", f"{word}\n")
        job.run()
        assert job.counted() == job.words()
    job.write(nothing="\n\n")  # read, but there is no item in it
    found = job.run()
    assert found["counts"]["items"] == 0 and job.counted() == job.words()


def test_merging_gives_a_reduce_task_to_the_node_that_has_the_earlier_output(cluster: TestCluster) -> None:
    job = Increments(cluster, **MERGE, number_of_partitions=6)
    job.write(**{f"f{n}": "".join(f"w{number}\n" for number in range(n, 99)) for n in range(3)})
    first = job.run()
    for _ in range(2):
        job.grow("f0", "w1\nw7\nw50\n")
        second = job.run()
        assert job.counted() == job.words()
    assert {part["partition"] for part in first["parts"]} == {part["partition"] for part in second["parts"]}


# --- What cannot go on from the earlier output -----------------------------------------------------------------------


def test_each_refusal_says_the_way_out_which_helps(cluster: TestCluster) -> None:
    job = Increments(cluster, **MERGE, number_of_partitions=3)
    job.write(a="x y z\n")
    job.run()
    before = job.state()
    job.grow("a", "more\n")
    way_out = f"`mrcore ledger forget {job.name}`"
    for why, changes in {
        "3 partitions by hash, the job wants 4": {"number_of_partitions": 4},
        "wants 3 by range": {"partitioner": "range"},
    }.items():
        with pytest.raises(JobFault, match=re.escape(why)) as refused:
            job.run(**changes)
        assert way_out in refused.value.message and job.state() == before
    assert job.scheduler().forget_ledger(job.name) == 1
    found = job.run(number_of_partitions=4)
    assert found["partitions"] == 4 and job.counted() == job.words()
    assert found["counts"]["bytes"] == len("x y z\nmore\n")


def test_output_made_in_another_way_is_refused(cluster: TestCluster) -> None:
    job = Increments(cluster, **ACCUMULATE)
    job.write(a="x y z\n")
    job.run()
    job.grow("a", "more\n")
    with pytest.raises(JobFault, match="made without merge_output"):
        job.run(**MERGE, delete_job_data=True)
    job.run()
    job.run(hold_state=False, delete_job_data=True)  # its output is all there is now: what was accumulated has gone
    job.grow("a", "and more\n")
    with pytest.raises(JobFault, match=r"went into run \d+, and its output is of run \d+.*ledger forget"):
        job.run()
    job.scheduler().forget_ledger(job.name)
    job.run()
    assert job.counted() == job.words()


def test_changed_keys_are_refused(cluster: TestCluster) -> None:
    project = cluster.settings.projects_dir / "gated"
    code = project / "reduce_functions.py"
    if "upside_down" not in code.read_text():
        with code.open("a") as stream:
            stream.write("\ndef upside_down(group, auxiliary_data):\n    return [(group[0][0][::-1], len(group))]\n")
    job = Increments(cluster, **MERGE, reduce_function_name="upside_down")
    job.write(a="ab\n")
    job.run()
    job.grow("a", "cd\n")
    with pytest.raises(JobFault, match=r"other keys than those of the groups.*ledger forget"):
        job.run()


def test_the_folder_of_a_merging_job_is_no_input_for_increments(cluster: TestCluster) -> None:
    producer = Increments(cluster, **MERGE)
    producer.write(a="x\n")
    producer.run()
    base = cluster.settings.nodes[0].layout.base_dir
    entries = [
        f"{producer.name}/reduce",
        f"{producer.name}/*/part*",
        f"{base}/{producer.name}/reduce/*",
    ]
    for entry in entries[: 2 if len(cluster.settings.nodes) > 1 else 3]:
        consumer = Increments(cluster, **ACCUMULATE, input_dirs=[entry])
        with pytest.raises(JobFault, match=f"holds the output of {producer.name}, a job with merge_output"):
            consumer.run()
        assert consumer.run(hold_state=False)["counts"]["lines"] == 1
    accumulating = Increments(cluster, **ACCUMULATE)
    accumulating.write(a="x\n")
    accumulating.run()
    consumer = Increments(cluster, **ACCUMULATE, input_dirs=[f"{accumulating.name}/reduce"])
    assert consumer.run()["counts"]["lines"] == 1
    accumulating.grow("a", "y\n")
    accumulating.run()
    assert consumer.run()["counts"]["lines"] == 1


@pytest.mark.parametrize("harm", ["flipped", "cut", "missing"])
@pytest.mark.parametrize("compress", [False, True])
def test_earlier_output_that_is_damaged_is_named_and_not_merged(
    cluster: TestCluster, harm: str, compress: bool
) -> None:
    job = Increments(cluster, **MERGE, number_of_partitions=1, compress=compress)
    job.write(a="x y z\n")
    (part,) = job.run()["parts"]
    node = next(node for node in cluster.settings.nodes if node.name == part["node"])
    path = node.layout.reduce_dir(job.name) / part["name"]
    content = path.read_bytes()
    if harm == "missing":
        path.unlink()
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        path.write_bytes(content[:-4] if harm == "cut" else flipped)
    job.grow("a", "more\n")
    with pytest.raises(JobFault, match=r"earlier output.*"):
        job.run()
    path.write_bytes(content)
    job.run()
    assert job.counted() == job.words()


# --- Files that changed ----------------------------------------------------------------------------------------------


def replace(path: Path, text: str) -> None:
    other = path.with_name(f".{path.name}.new")
    other.write_text(text)
    other.rename(path)


@pytest.mark.parametrize("keys", [MERGE, ACCUMULATE], ids=["merge", "accumulate"])
def test_a_changed_file_goes_by_the_rule(cluster: TestCluster, keys: dict[str, Any]) -> None:
    job = Increments(cluster, **keys)
    job.write(a="a b c\n", b="b\n", c="c\n", d="d\n")
    job.run()
    before, counted = job.state(), job.counted()
    replace(job.path("a"), "a b c\nd\n")
    job.path("b").write_text("")
    job.path("c").write_text("C\nand more\n")
    job.grow("d", "only grown\n")
    with pytest.raises(
        JobFault, match=r"/a was replaced; .*/[bc] .*; .*/[bc] .*reprocess_all to read.*ignore"
    ) as failed:
        job.run()
    assert "shrank from 2 to 0 bytes" in failed.value.message
    assert "is not what it was before byte 2" in failed.value.message
    assert job.state() == before
    found = job.run(on_changed_input="ignore")
    assert found["skipped"] == {"changed since it was read": 3} and found["counts"]["bytes"] == len("only grown\n")
    assert job.counted() == counted + Counter({"only": 1, "grown": 1})
    assert job.run(on_changed_input="ignore")["nothing_new"]
    found = job.run(on_changed_input="reprocess_all")
    assert found["counts"]["bytes"] == sum(path.stat().st_size for path in job.paths())
    assert job.counted() == job.words()
    assert job.run(on_changed_input="reprocess_all")["nothing_new"]
    job.grow("a", "now it only grew\n")
    assert job.run()["counts"]["bytes"] == len("now it only grew\n") and job.counted() == job.words()


def test_a_compressed_file_is_read_once_and_whole(cluster: TestCluster) -> None:
    job = Increments(cluster, **MERGE)
    job.write(a="x\n")
    packed = job.path("a").with_name("p.gz")
    packed.write_bytes(gzip.compress(b"x y\nlast line without an end"))
    job.run()
    assert job.counted() == job.words()
    assert job.run()["nothing_new"]
    with packed.open("ab") as stream:
        stream.write(gzip.compress(b" z\n"))
    with pytest.raises(JobFault, match=r"p\.gz was written to"):
        job.run()


def test_an_unfinished_last_line_waits_until_it_has_an_end_or_is_old(cluster: TestCluster) -> None:
    job = Increments(cluster, **MERGE)
    job.write(a="x y\nhal", b="no line at all")
    found = job.run()
    assert found["skipped"]["unfinished last line"] == 2 and job.counted() == {"x": 1, "y": 1}
    assert job.run()["nothing_new"]
    job.grow("a", "f a line\nnex")
    assert job.run()["counts"]["bytes"] == len("half a line\n")
    assert job.counted() == {"x": 1, "y": 1, "half": 1, "a": 1, "line": 1}
    for path in job.paths():
        os.utime(path, ns=(OLD, OLD))
    job.run()
    assert job.counted() == job.words()
    job.grow("b", "\ngoes on\n")  # the line did end there
    job.run()
    assert job.counted() == job.words()
    job.grow("a", "t word\n")  # this one did not
    with pytest.raises(JobFault, match="is not what it was before byte"):
        job.run()
    job.run(on_changed_input="reprocess_all")
    assert job.counted() == job.words()


# --- Crashes, forgetting, nodes that come and go ---------------------------------------------------------------------


def test_a_commit_without_its_ledger_is_completed_and_as_often_as_one_likes(
    cluster: TestCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Increments(cluster, **MERGE)
    job.write(a="x\n", b="y\n")
    job.run()
    older = manifest.newest(cluster.settings.state_dir, job.name)
    assert older is not None
    rows = job.scheduler().ledger(job.name)
    job.grow("a", "z\n")
    with monkeypatch.context() as patch:

        def die(*_: Any) -> None:
            raise ClusterFault("the master is gone")

        patch.setattr(ledger, "commit", die)
        with pytest.raises(ClusterFault):
            job.run()
    assert job.scheduler().ledger(job.name) == rows
    with pytest.raises(JobFault, match="went into run"):  # not read twice, even if nobody completed it
        job.run()
    newest = manifest.newest(cluster.settings.state_dir, job.name)
    assert newest is not None and newest.run > older.run
    state = job.state()
    for _ in range(2):
        cluster.manager.finish(cluster.job(**job.keys), newest.run)
        assert job.state() == state
    rows = job.scheduler().ledger(job.name)
    assert [row["bytes"] for row in rows] == [4, 2] or [row["bytes"] for row in rows] == [2, 4]
    ledger.commit(job.scheduler().store, older)  # of a run before: too late
    assert job.scheduler().ledger(job.name) == rows
    assert job.run()["nothing_new"] and job.counted() == job.words()


@pytest.mark.slow
@pytest.mark.parametrize("point", ["before ledger", "after ledger", "nodes finished", "finish begun"])
def test_a_runner_killed_after_the_commit_leaves_what_the_next_one_completes(cluster: TestCluster, point: str) -> None:
    job = Increments(cluster, **MERGE, run_once=False)
    job.write(a="x\n", b="y\n")
    scheduler = job.scheduler()
    command = [sys.executable, "-c", RUNNER, str(cluster.settings.home), str(cluster.settings.projects_dir)]
    scheduler.submit_job(cluster.job(**job.keys))
    for fault in ("", point, "", ""):  # the third only completes what the second left
        job.grow("a", "z\n") if fault else None
        done = subprocess.run(command, env=os.environ | {"MRCORE_FAULT": fault}, capture_output=True, timeout=120)
        assert done.returncode == (-9 if fault else 0), done.stderr.decode()
        with scheduler.store.change() as db:
            db.execute("UPDATE jobs SET cycle = 0, last_start = NULL")
    assert job.counted() == job.words()
    runs = scheduler.history(job.name)
    assert [run["counts"]["bytes"] for run in runs] == [0, 2, 4], "a run was repeated after its commit"
    assert sum(row["bytes"] for row in scheduler.ledger(job.name)) == sum(p.stat().st_size for p in job.paths())
    scheduler.delete_job(job.name)


RUNNER = """
import sys
from pathlib import Path
from mrcore.launchers import local
from mrcore.queue.runner import Runner

settings = local.configure(Path(sys.argv[1])).model_copy(update={"projects_dir": Path(sys.argv[2])})
Runner(settings).run(once=True)
"""


def test_forgetting_also_holds_for_a_run_that_is_under_way(cluster: TestCluster) -> None:
    job = Increments(cluster, **ACCUMULATE)
    job.write(a="x\n", b="y\n")
    scheduler = job.scheduler()
    with pytest.raises(UsageError, match="has no ledger"):
        scheduler.forget_ledger(job.name)
    job.run()
    scheduler.submit_job(cluster.job(**job.keys))
    with scheduler.store.change() as db:
        db.execute("UPDATE jobs SET last_run = ? WHERE job_name = ?", (next(job.numbers) + 1, job.name))
    job.grow("a", "more\n")
    assert scheduler.forget_ledger(job.name) == 2
    job.run()  # has a number that was given out before
    with pytest.raises(UsageError, match="has no ledger"):
        scheduler.ledger(job.name)
    next(job.numbers)
    found = job.run()
    assert found["counts"]["input_files"] == 2 and found["delete_job_data"]
    assert job.counted() == job.words() and len(scheduler.ledger(job.name)) == 2
    scheduler.delete_job(job.name)


@pytest.mark.slow
def test_nodes_that_come_and_go(tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    for number in range(12):
        (folder / f"f{number}").write_text(f"w{number} x\n")
    with TestCluster(tmp_path, 2, 1) as cluster:
        job = Increments(cluster, **MERGE, input_dirs=[str(folder)])
        own = Increments(cluster, **ACCUMULATE)
        own.write(a="x\n", b="y\n")
        job.run()
        own.run()
        nodes = cluster.settings.nodes
        assert {row["holder"] for row in job.scheduler().ledger(job.name)} == {None}

        def reshape(count: int, **address: Any) -> None:
            local.stop_cluster(cluster.settings)
            configured = local.configure(cluster.settings.home, nodes=count, **address)
            cluster.settings = configured.model_copy(update={"projects_dir": cluster.settings.projects_dir})
            cluster.manager = type(cluster.manager)(cluster.settings)
            local.start_cluster(cluster.settings)

        reshape(4)
        assert job.run()["nothing_new"] and own.run()["nothing_new"]
        (folder / "f3").write_text("w3 x\nmore\n")
        assert job.run()["counts"]["bytes"] == len("more\n")
        assert sum(job.counted().values()) == 25
        reshape(1, address=nodes[1].address)  # node-1 is node-0 now, and the others are gone
        (folder / "f4").write_text("w4 x\nmore\n")
        assert own.run()["nothing_new"]
        with pytest.raises(JobFault, match=r"lies on node-\d.*no node of the cluster any more.*ledger forget"):
            job.run()
        job.scheduler().forget_ledger(job.name)
        job.run()
        assert sum(job.counted().values()) == 26


@pytest.mark.slow
def test_the_ledger_is_shown_and_forgotten_on_the_command_line(
    cluster: TestCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Increments(cluster, **MERGE)
    job.write(a="x\n", b="y\nz")
    job.run()
    environment = os.environ | {"MRCORE_HOME": str(cluster.settings.home)}

    def mrcore(*arguments: str) -> tuple[int, str]:
        script = [sys.executable, "-c", "import sys; from mrcore.cli.main import main; main(sys.argv[1:])", *arguments]
        done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout + done.stderr

    status, text = mrcore("ledger", "show", job.name, "--json")
    assert status == 0
    assert [(row["path"], row["bytes"]) for row in json.loads(text)] == [(str(path), 2) for path in job.paths()]
    status, text = mrcore("ledger", "show", job.name)
    assert status == 0 and str(job.path("b")) in text
    status, text = mrcore("ledger", "forget", job.name)
    assert status == 0 and "2 files forgotten" in text
    for command in ("show", "forget"):
        status, text = mrcore("ledger", command, f"{job.name}x")
        assert status == 2 and "has no ledger" in text and len(text.splitlines()) == 1


# --- Random histories of files, without a cluster --------------------------------------------------------------------


class History:
    """Files on disk that things happen to, and a plain model of what a `hold_state` job has read of each."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.now = folder, 10_000.0
        self.entries: dict[tuple[str, str], ledger.Entry] = {}
        self.read: dict[str, bytes] = {}  # what was read of each file
        self.spoilt: set[str] = set()  # what did not only grow since it was read
        self.touched: set[str] = set()  # what was opened for writing since: a change, unless it also grew

    def touch(self, path: Path) -> None:
        self.now += 1.0
        os.utime(path, ns=(0, int(self.now * 1e9)))

    def step(self, what: str, name: str, content: bytes) -> None:
        path = self.folder / name
        before = path.read_bytes() if path.exists() else None
        known = self.read.get(name)
        if what == "wait":
            self.now += inputs.SETTLE_SECONDS + 1
            return
        if what == "grow" or before is None:
            with path.open("ab") as stream:
                stream.write(content)
            # A line that was taken for whole as it stood, and goes on.
            harmed = bool(known and content) and before == known and known[-1:] != b"\n" and content[:1] != b"\n"
            self.touched |= {name} if known else set()
        elif what == "replace":
            path.rename(path.with_name(".old"))  # its inode is not free again before the new one has its own
            path.write_bytes(content)
            harmed = bool(known)
        elif what == "remove":
            path.rename(path.with_name(f".gone{len(list(self.folder.iterdir()))}"))
            self.spoilt |= {name} if known else set()  # should the name come back
            return
        else:  # in place, as long as before: an earlier byte becomes another
            harmed = bool(known)
            with path.open("r+b") as stream:
                size = min(len(known or before), len(before))
                if not size:
                    return
                where = size - 1 - len(content) % min(size, inputs.BLOCK_BYTES)
                stream.seek(where)
                stream.write(bytes([(before[where] + 1) % 256 or 1]))
        self.touch(path)
        if harmed:
            self.spoilt.add(name)

    def run(self, anew: bool) -> None:
        """One run by the rule `ignore`, or one that reads everything anew; compared with the model."""
        if anew:
            self.entries, self.read, self.spoilt, self.touched = {}, {}, set(), set()
        listed = []
        for path in sorted(self.folder.glob("[a-z]*")):
            status = path.stat()
            listed.append(InputFile(str(path), status.st_size, status.st_mtime_ns, status.st_ino))

        def look(node: str, asked: list[ReadFile]) -> list[Tail]:
            return [inputs.check_tail(file, self.now) for file in asked]

        news = ledger.compare({"n": listed}, self.entries, look, {"n": ""})
        changed = {Path(text.split(" ")[0]).name for text in news.changed}
        touched = {
            name for file in listed for name in [Path(file.path).name] if file.size == len(self.read.get(name, b""))
        }
        spoilt = {name for name in self.spoilt if (self.folder / name).exists()} | (touched & self.touched)
        assert changed == spoilt
        for path, end, begin in ((file.path, file.size, file.read) for file in news.files["n"]):
            name, content = Path(path).name, Path(path).read_bytes()
            known = self.read.get(name, b"")
            assert begin == len(known) < end <= len(content) and content[:begin] == known
            assert known.endswith(b"\n") or not known or content[begin : begin + 1] == b"\n"
            self.read[name] = content[:end]
            self.touched.discard(name)
        self.entries |= {(holder, path): ledger.Entry(*entry) for holder, path, *entry in news.entries}
        for path in self.folder.glob("[a-z]*"):
            if path.name not in spoilt:
                content = path.read_bytes()
                fresh = self.now - path.stat().st_mtime < inputs.SETTLE_SECONDS
                whole = content[: content.rfind(b"\n") + 1] if fresh else content
                assert self.read.get(path.name, b"") == max(whole, self.read.get(path.name, b""), key=len)
        assert not ledger.compare({"n": listed}, self.entries, look, {"n": ""}).files["n"], "read twice"


LINES = st.lists(st.sampled_from([b"a", b"b c", b"\n", b"\n\n", b"\xc3\xa9", b"x" * 40]), max_size=6).map(b"".join)
STEPS = st.tuples(
    st.sampled_from(["grow", "grow", "grow", "grow", "replace", "remove", "in place", "wait", "run", "run", "anew"]),
    st.sampled_from(["f", "g", "h"]),
    LINES,
)


@pytest.mark.slow
@given(st.lists(STEPS, max_size=30), st.sampled_from([8, 64 * 1024]))
@settings(max_examples=150, deadline=None)
def test_whatever_happens_to_files_each_line_is_read_once_or_the_file_told(
    steps: list[tuple[str, str, bytes]], block_bytes: int
) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "BLOCK_BYTES", block_bytes)
        history = History(Path(folder))
        for what, name, content in [*steps, ("run", "f", b"")]:
            if what in ("run", "anew"):
                history.run(what == "anew")
            else:
                history.step(what, name, content)


# --- The earlier output as a run -------------------------------------------------------------------------------------


KEYS = st.recursive(
    st.none() | st.integers(-3, 3) | st.sampled_from([0.5, -1.5]) | st.text("ab\n]é", max_size=3),
    lambda inner: st.lists(inner, max_size=2).map(tuple),
    max_leaves=3,
)
VALUES = st.integers(0, 9) | st.lists(st.text("],[\n", max_size=3), max_size=2)
ITEMS = st.lists(st.tuples(KEYS, VALUES), max_size=60)


@pytest.mark.slow
@given(ITEMS, ITEMS, st.none() | st.integers(1, 5), st.booleans(), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_parts_merge_as_runs_do(
    old: list[tuple[Any, Any]], new: list[tuple[Any, Any]], max_items: int | None, compress: bool, batch: int
) -> None:
    with tempfile.TemporaryDirectory() as name, MemoryWatch(256 << 20) as watch:
        folder = Path(name)
        writer = PartWriter(folder, run=1, partition=0, attempt_try=1, max_items=max_items, compress=compress)
        ordered = [(key, value) for key, values in grouped(old) for value in values]
        for start in range(0, len(ordered), batch):
            writer.write(ordered[start : start + batch])
        told = [PlacedPart(**msgspec.structs.asdict(part), node="n") for part in writer.close()]
        assert sum(part.records for part in told) == len(old)
        sorter = DiskSort(folder, watch)
        sorter.add_spill(Parts([folder / part.name for part in told], told))
        sink = Shuffle(folder, "new", watch, partitions=1)
        for key, value in new:
            sink.append(key, value)
        for spill in sink.shuffle():
            sorter.add_spill(Segment(folder / f"{spill.id}.data", 0, spill.bytes, spill.max_decoded))
        found = [(key, value) for key, values in sorter.groups() for value in values]
        expected = grouped(old + new)
        assert [key for key, _ in grouped(found)] == [key for key, _ in expected]
        assert bag(found) == bag((key, value) for key, values in expected for value in values)


def test_a_large_earlier_output_needs_little_memory(tmp_path: Path) -> None:
    writer = PartWriter(tmp_path, run=1, partition=0, attempt_try=1, max_items=None, compress=False)
    for start in range(0, 300_000, 1000):
        writer.write([(f"{number:08}", 1) for number in range(start, start + 1000)])
    told = [PlacedPart(**msgspec.structs.asdict(part), node="n") for part in writer.close()]
    run = SpillWriter(tmp_path, "new", 64 * 1024)
    run.write(0, ["00000007", "x"], {"00000007": [1], "x": [1]}, False)
    new = run.close()
    with MemoryWatch(1 << 30) as watch:
        floor = watch.anonymous_bytes()
        sorter = DiskSort(tmp_path, watch)
        sorter.add_spill(Parts([tmp_path / part.name for part in told], told))
        sorter.add_spill(Segment(tmp_path / "new.data", 0, new.bytes, new.max_decoded))
        count = total = 0
        for _, values in sorter.groups():
            count, total = count + 1, total + len(values)
        assert (count, total) == (300_001, 300_002)
        assert watch.peak_bytes - floor < 8 << 20
        assert Parts([], told).max_decoded < 2 << 20
