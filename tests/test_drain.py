"""Draining a node: nothing is lost or read twice, whatever dies; on real clusters, and the plan over random rooms."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from clusters import TestCluster

from mrcore import drain, manifest
from mrcore.cli import main
from mrcore.config import Settings
from mrcore.errors import UsageError
from mrcore.scheduler import Scheduler

MERGE = {"hold_state": True, "merge_output": True}
ACCUMULATE = {"hold_state": True, "delete_job_data": False}
_numbers = iter(range(1, 10**6))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestCluster]:
    with TestCluster(tmp_path_factory.mktemp("drains"), 3, 1) as running:
        yield running


def empty(settings: Settings) -> None:
    for node in settings.nodes:
        for folder in (node.layout.base_dir, node.layout.auxiliary_dir, node.layout.incoming_dir):
            for path in sorted(folder.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


@pytest.fixture(params=["local", "deployed"])
def settings(cluster: TestCluster, request: pytest.FixtureRequest) -> Iterator[Settings]:
    """The cluster as it is, and as if its nodes were machines of their own, whose names the ledger then has."""
    made = cluster.settings.model_copy(update={"local": request.param == "local"})
    cluster.settings = cluster.manager.settings = made
    empty(made)
    yield made
    scheduler = Scheduler(made)
    scheduler.store.check()
    assert scheduler.state()["drain"] is None
    scheduler.store.close()
    for node in made.nodes:
        assert not [path for path in node.layout.incoming_dir.rglob("*") if path.is_file()]


def files_of(settings: Settings, node: str) -> dict[str, bytes]:
    (root,) = [each.layout.base_dir for each in settings.nodes if each.name == node]
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def every_file(settings: Settings) -> Counter[tuple[str, bytes]]:
    return Counter(each for node in settings.nodes for each in files_of(settings, node.name).items())


class Words:
    """One counting job over files of its own, and the words that it should have counted."""

    def __init__(self, cluster: TestCluster, **keys: Any) -> None:
        self.cluster, self.name = cluster, f"job{next(_numbers)}"
        self.keys = {"job_name": self.name, "input_dirs": [f"inputs/{self.name}"], "number_of_partitions": 12} | keys
        self.settings = cluster.settings

    def write(self, node: int | None = None, /, **texts: str) -> None:
        self.cluster.write_inputs(texts, node, f"inputs/{self.name}")

    def paths(self) -> list[Path]:
        return [
            path
            for node in self.settings.nodes
            for path in sorted((node.layout.base_dir / "inputs" / self.name).glob("*"))
        ]

    def run(self) -> dict[str, Any]:
        return self.cluster.run(self.cluster.job(**self.keys), run=next(_numbers))

    def holder(self) -> str:
        """A node that has part of the output."""
        return str(next(iter(manifest.parts(self.settings.state_dir, self.name)))["node"])

    def bytes(self) -> bytes:
        path = self.cluster.folder / "output"
        with path.open("wb") as out:
            self.cluster.manager.cat(self.name, out)
        return path.read_bytes()

    def counted(self) -> dict[str, int]:
        total: Counter[str] = Counter()
        for line in self.bytes().decode().splitlines():
            key, value = json.loads(line)
            total[key] += value
        return total

    def words(self) -> dict[str, int]:
        return Counter(word for path in self.paths() for word in path.read_text().split())


def texts(count: int, salt: str = "") -> dict[str, str]:
    return {f"f{n}": f"some words{salt} of file {n} and w{n % 7}é\n" * (n + 1) for n in range(count)}


def test_all_that_a_node_holds_goes_to_the_others_and_nothing_else_changes(
    cluster: TestCluster, settings: Settings
) -> None:
    job = Words(cluster)
    job.write(**texts(12))
    job.run()
    before, output = every_file(settings), job.bytes()
    node = job.holder()
    held = drain.look(settings, node)
    assert not held["empty"] and held["jobs"] == [{"job_name": job.name} | held["kinds"]["output"]]
    inputs = [content for name, content in files_of(settings, node).items() if name.startswith("inputs")]
    assert held["kinds"]["input"] == {"files": 4, "bytes": sum(map(len, inputs))}
    told = drain.drain(settings, node)
    assert told["empty"] and not told["left"] and not told["renamed"]
    assert sum(each["files"] for each in told["moved"].values()) == sum(
        kind["files"] for kind in held["kinds"].values()
    )
    assert not files_of(settings, node) and every_file(settings) == before
    assert job.bytes() == output
    assert drain.look(settings, node)["empty"]
    assert drain.drain(settings, node)["moved"] == {}
    job.run()
    assert job.counted() == job.words()


VARIANTS: dict[str, dict[str, Any]] = {
    "merge": MERGE,
    "many parts": MERGE | {"max_number_dumped_items_reducer": 3, "number_of_partitions": 2, "compress": True},
    "accumulate": ACCUMULATE,
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_increments_go_on_after_a_drain(cluster: TestCluster, settings: Settings, variant: str) -> None:
    job = Words(cluster, **VARIANTS[variant])
    job.write(**texts(9))
    job.run()
    output = job.bytes()
    first = job.holder()
    drain.drain(settings, first)
    assert job.bytes() == output
    assert job.run()["counts"] == {"input_files": 0, "input_bytes": 0, "bytes": 0, "files_read_before": 9}
    for path in job.paths()[::2]:
        with path.open("a") as stream:
            stream.write("they grew\n")
    others = [number for number, node in enumerate(settings.nodes) if node.name != first]
    job.write(others[0], new="one more file")
    for path in job.paths():
        if path.name == "new":
            os.utime(path, (1, 1))  # nobody writes to it any more
    counts = job.run()["counts"]
    assert (counts["input_files"], counts["input_bytes"]) == (6, 5 * len("they grew\n") + len("one more file"))
    assert counts["files_read_before"] == 4
    assert job.counted() == job.words()
    drain.drain(settings, first)  # the run has put parts there again
    two = tuple(settings.nodes[number] for number in others)
    job.cluster.manager.settings = settings.model_copy(update={"nodes": two})  # the operator has removed the node
    job.run()
    drain.drain(job.cluster.manager.settings, two[1].name)
    assert [bool(files_of(settings, node.name)) for node in settings.nodes].count(True) == 1
    assert job.run()["counts"]["input_files"] == 0
    assert job.counted() == job.words()


def command(cluster: TestCluster, capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Run `mrcore drain`; gives exit status and what it printed."""
    config = cluster.folder / "config.json"
    keys = ("home", "projects_dir", "state_dir", "logs_dir")
    config.write_text(json.dumps({key: str(getattr(cluster.settings, key)) for key in keys}))
    with pytest.raises(SystemExit) as ended:
        main(["--config", str(config), "drain", *arguments])
    out, err = capfd.readouterr()
    return int(ended.value.code or 0), out, err


@pytest.mark.parametrize("settings", ["local"], indirect=True)
def test_the_command_lists_and_moves_and_tells_by_its_exit_status(
    cluster: TestCluster, settings: Settings, capfd: pytest.CaptureFixture[str]
) -> None:
    job = Words(cluster)
    job.write(**texts(6))
    job.run()
    node = job.holder()
    status, out, _ = command(cluster, capfd, node, "--list")
    assert status == 1 and f"output of {job.name}" in out and f"{node} holds input: 2 files" in out
    status, out, _ = command(cluster, capfd, node, "--list", "--json")
    assert status == 1 and json.loads(out) == drain.look(settings, node)
    status, out, _ = command(cluster, capfd, node)
    assert status == 0 and f"{node} holds nothing" in out and out.count("to node-") == 2
    assert command(cluster, capfd, node, "--list")[0] == 0
    assert json.loads(command(cluster, capfd, node, "--json")[1])["moved"] == {}
    status, _, err = command(cluster, capfd, "node-9")
    assert (status, err.count("\n")) == (2, 1) and "there is no node 'node-9'" in err


def test_the_only_node_is_not_drained(cluster: TestCluster, settings: Settings) -> None:
    one = settings.model_copy(update={"nodes": settings.nodes[:1]})
    cluster.write_inputs({"f": "x"}, node=0)
    with pytest.raises(UsageError, match="node-0 is the only node"):
        drain.drain(one, "node-0")
    assert drain.look(one, "node-0")["kinds"]["input"]["files"] == 1
