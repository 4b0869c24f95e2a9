"""What manifests name does not go without a word: rm, delete jobs, uploads, drains; and the doctor compares."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from clusters import TestCluster
from commands import mrcore, on_terminal
from hypothesis import given
from hypothesis import strategies as st

from mrcore.admin import doctor, drain
from mrcore.errors import JobFault, UsageError
from mrcore.messages.tasks import PlacedPart
from mrcore.queue.scheduler import Runner, Scheduler
from mrcore.state import manifest, outputs
from mrcore.transfer.file_transfer import FileTransfer

MERGE = {"hold_state": True, "merge_output": True}
ACCUMULATE = {"hold_state": True, "delete_job_data": False}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestCluster]:
    with TestCluster(tmp_path_factory.mktemp("outputs"), 2, 1) as running:
        yield running


@pytest.fixture(autouse=True)
def clean(cluster: TestCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MRCORE_HOME", str(cluster.settings.home))
    yield
    FileTransfer(cluster.settings).delete_files("*", also_outputs=True)
    assert held(cluster) == set()


def held(cluster: TestCluster) -> set[str]:
    """Every file of the nodes, as `node/name`."""
    return {
        f"{node.name}/{path.relative_to(node.layout.base_dir)}"
        for node in cluster.settings.nodes
        for path in node.layout.base_dir.rglob("*")
        if path.is_file()
    }


def counted(cluster: TestCluster, name: str, **keys: Any) -> dict[str, Any]:
    """Run a job that counts words; its manifest."""
    cluster.write_inputs({f"f{n}": f"some words {n}\n" for n in range(4)}, entry=f"inputs/{name}")
    job = cluster.job(job_name=name, input_dirs=[f"inputs/{name}"], number_of_partitions=4, **keys)
    return cluster.run(job)


# --- rm --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["*", "counts", "counts/reduce", "counts/reduce/*", "counts/*", "**", "c*", "*/reduce"]
)
def test_output_goes_only_when_it_is_agreed_to(cluster: TestCluster, path: str) -> None:
    made = counted(cluster, "counts")
    before, parts = held(cluster), len(made["parts"])
    size = sum(part["bytes"] for part in made["parts"])
    code, out, err = mrcore("rm", path)
    assert (code, out, held(cluster)) == (2, "", before)
    assert f"among them output of counts (run {made['run']}): {parts} parts, {size} bytes" in err
    assert "--yes" in err and re.search(r"node-\d: \d+ files", err)
    code, out, err = mrcore("rm", path, "--dry-run", "--yes")
    assert (code, held(cluster)) == (0, before) and "among them output of counts" in err
    status, seen = on_terminal("n", "rm", path)
    assert (status, held(cluster)) == (1, before) and "nothing was done" in seen
    assert cluster.items("counts")
    status, seen = on_terminal("y", "rm", path)
    assert status == 0 and "among them output of counts" in seen
    assert not [name for name in held(cluster) if "/counts/reduce/" in name]
    with pytest.raises(
        UsageError, match=rf"output of job 'counts' was removed on 20.* by `mrcore rm {re.escape(path)}`"
    ):
        cluster.items("counts")
    code, _, err = mrcore("download", "counts/reduce", "somewhere")
    assert code == 2 and "was removed on 20" in err
    assert mrcore("rm", path, "--yes")[0] == 0  # nothing is left to ask for
    if path.startswith("counts"):
        counted(cluster, "counts")
        assert cluster.items("counts")


def test_everything_is_asked_for_also_without_output(cluster: TestCluster) -> None:
    cluster.write_inputs({"a": "1", "b": "2"})
    for path in ("*", "in*", "**/a", "[i]nputs/text"):
        assert mrcore("rm", path)[0] == 2
    assert len(held(cluster)) == 2
    assert mrcore("rm", "inputs/*") == (0, "removed 2 files, 2 bytes\n", "")  # is what it says
    cluster.write_inputs({"a": "1"})
    assert mrcore("rm", "*", "--yes")[:2] == (0, "removed 1 files, 1 bytes\n")


def test_one_part_of_several_runs(cluster: TestCluster) -> None:
    first = counted(cluster, "more", **ACCUMULATE)
    cluster.write_inputs({"new": "other words\n"}, entry="inputs/more")
    os.utime(next(path for path in _paths(cluster, "inputs/more/new")), (1, 1))
    job = cluster.job(job_name="more", input_dirs=["inputs/more"], **ACCUMULATE)
    second = cluster.run(job)
    items = [item for item in cluster.items("more") if item[0] in ("other", "words")]
    code, _, err = mrcore("rm", f"more/reduce/part-{first['run']:06}-*", "--yes")
    assert code == 0, err
    left = cluster.items("more")
    assert sorted(left) == [["other", 1], ["words", 1]] and all(item in items for item in left)
    assert cluster.run(job)["nothing_new"]  # what was read stays read
    assert mrcore("rm", "more/reduce", "--yes")[0] == 0
    with pytest.raises(UsageError, match="mrcore ledger forget more"):
        cluster.items("more")
    Scheduler(cluster.settings).forget_ledger("more")
    again = cluster.run(job)
    assert again["counts"]["input_files"] == 5 and second["counts"]["input_files"] == 1


def _paths(cluster: TestCluster, name: str) -> list[Path]:
    return [path for node in cluster.settings.nodes if (path := node.layout.base_dir / name).exists()]


def test_what_is_left_of_output_is_nobodys(cluster: TestCluster) -> None:
    """One part goes: the others are no output, are not fetched as one, and are named by the doctor."""
    parts = counted(cluster, "halved")["parts"]
    assert mrcore("rm", f"halved/reduce/{parts[0]['name']}", "--yes")[0] == 0
    for command in (["cat", "halved"], ["download", "halved/reduce", "somewhere"]):
        code, _, err = mrcore(*command)
        assert code == 2 and "was removed on 20" in err
    assert any("in halved/reduce are no part" in each["what"] for each in findings())
    assert mrcore("rm", "halved/reduce")[0] == 0
    assert not [name for name in held(cluster) if "/halved/reduce" in name]


def test_a_job_that_goes_on_from_its_output_has_a_way_out(cluster: TestCluster) -> None:
    counted(cluster, "merged", **MERGE)
    job, before = cluster.job(job_name="merged", input_dirs=["inputs/merged"], **MERGE), cluster.items("merged")
    assert mrcore("rm", "merged", "--yes")[0] == 0
    for _ in range(2):  # with nothing new, and with something
        with pytest.raises(JobFault, match=r"was removed on 20.* by `mrcore rm merged`.*mrcore ledger forget merged"):
            cluster.run(job)
        cluster.write_inputs({"later": ""}, entry="inputs/merged")
    assert mrcore("ledger", "forget", "merged")[0] == 0
    cluster.run(job)
    assert cluster.items("merged") == before


def test_output_of_a_run_that_came_meanwhile_stays(cluster: TestCluster) -> None:
    counted(cluster, "raced")
    transfer = FileTransfer(cluster.settings)

    def another(told: dict[str, Any]) -> None:
        counted(cluster, "raced")

    transfer._agree = another
    with pytest.raises(Exception, match=r"holds output of raced \(run \d+\) by now: look again"):
        transfer.delete_files("raced")
    assert [name for name in held(cluster) if "/raced/" in name]
    counted(cluster, "raced")
    assert cluster.items("raced")


def test_output_of_a_run_under_way_is_not_removed(cluster: TestCluster) -> None:
    counted(cluster, "busy")
    scheduler = Scheduler(cluster.settings)
    scheduler.submit_job(cluster.job(job_name="busy", input_dirs=["inputs/busy"]))
    scheduler.store.start_run("busy", 1.0)
    try:
        code, _, err = mrcore("rm", "busy", "--yes")
        assert code == 2 and "run 1 of busy is under way" in err
        assert cluster.items("busy")
    finally:
        scheduler.store.end_run("busy", 1, "cancelled", 2.0)
        scheduler.delete_job("busy")


def test_missing_output_can_be_given_up(cluster: TestCluster) -> None:
    made = counted(cluster, "lost")
    for part in made["parts"]:
        _paths(cluster, f"lost/reduce/{part['name']}")[0].unlink()
    assert mrcore("rm", "lost/reduce")[0] == 2
    assert mrcore("rm", "lost/reduce", "--yes")[0] == 0
    assert not [each for each in doctor.gather(cluster.settings)["outputs"] if each["job"] == "lost"]


def test_output_that_no_manifest_names_any_more_goes_like_any_file(cluster: TestCluster) -> None:
    cluster.write_inputs({"part-000009-00000-00000.data": "x", "x.csv": "y"}, entry="nobodys/reduce")
    assert mrcore("rm", "nobodys/reduce") == (0, "removed 2 files, 2 bytes\n", "")


# --- jobs, programs, uploads -----------------------------------------------------------------------------------------


def test_a_delete_job_says_so_or_fails(cluster: TestCluster) -> None:
    counted(cluster, "kept")
    cluster.write_inputs({"x": "1"}, entry="inputs/old")
    scheduler, runner = Scheduler(cluster.settings), Runner(cluster.settings)
    base = {"job_type": "file_transfer", "transfer_type": "delete", "run_once": True}
    for number, path in enumerate(("kept", "kept/reduce/*", "*", "ke??")):
        scheduler.submit_job(base | {"job_name": f"d{number}", "output_dir": path})
        assert runner.run(once=True).pop("failed")
        runner.ended.clear()
        message = scheduler.history(f"d{number}")[0]["exception"]["message"]
        assert "output of" in message and "also_outputs: true" in message
    assert cluster.items("kept")
    scheduler.submit_job(base | {"job_name": "old", "output_dir": "inputs/old"})
    scheduler.submit_job(base | {"job_name": "kept", "output_dir": "kept", "also_outputs": True})
    assert Runner(cluster.settings).run(once=True) == {"succeeded": 2}
    with pytest.raises(UsageError, match=r"was removed on 20.* by the job kept"):
        cluster.items("kept")
    assert any("its output is removed by the job kept" in each["text"] for each in _events(scheduler, "kept"))


def _events(scheduler: Scheduler, job: str) -> list[dict[str, Any]]:
    return scheduler.store.rows("SELECT text FROM events WHERE job_name = ?", job)


def test_a_program_says_so_or_fails(cluster: TestCluster) -> None:
    counted(cluster, "api")
    transfer = FileTransfer(cluster.settings)
    with pytest.raises(JobFault, match=r"is output of api \(run \d+\)"):
        transfer.delete_files("api")
    assert transfer.delete_files("api", dry_run=True)["outputs"][0]["job_name"] == "api"
    assert cluster.items("api")
    assert transfer.delete_files("api", also_outputs=True)["outputs"]


@pytest.mark.parametrize("options", [[], ["--changed"], ["--yes"], ["--yes", "--compress"]])
@pytest.mark.parametrize("folder", ["shown/reduce", "shown"])
def test_an_upload_does_not_replace_output(
    cluster: TestCluster, tmp_path: Path, folder: str, options: list[str]
) -> None:
    name = counted(cluster, "shown")["parts"][0]["name"]
    below = tmp_path / "up" / ("reduce" if folder == "shown" else "")
    below.mkdir(parents=True)
    (below / name).write_text("mine")
    before = cluster.items("shown")
    code, _, err = mrcore("upload", str(tmp_path / "up"), folder, *options)
    assert code == 1 and "holds output of shown" in err
    assert cluster.items("shown") == before


def test_an_upload_asks_before_it_takes_other_files_away(cluster: TestCluster, tmp_path: Path) -> None:
    up = tmp_path / "up"
    up.mkdir()
    (up / "a").write_text("1")
    cluster.write_inputs({"a": "0", "other": "12"}, entry="inputs/up")
    before = held(cluster)
    code, _, err = mrcore("upload", str(up), "inputs/up")
    assert code == 2 and held(cluster) == before and "--yes" in err and "1 files, 2 bytes" in err
    assert mrcore("upload", str(up), "inputs/up", "--dry-run")[0] == 0 and held(cluster) == before
    assert on_terminal("n", "upload", str(up), "inputs/up")[0] == 1 and held(cluster) == before
    assert mrcore("upload", str(up), "inputs/up", "--changed")[0] == 0 and held(cluster) == before
    assert on_terminal("y", "upload", str(up), "inputs/up")[0] == 0
    assert {name.partition("/")[2] for name in held(cluster)} == {"inputs/up/a"}
    assert mrcore("upload", str(up), "inputs/up")[0] == 0  # nothing would go


# --- the doctor ------------------------------------------------------------------------------------------------------


def findings(*options: str) -> list[dict[str, str]]:
    code, out, _ = mrcore("doctor", "--json", *options)
    found: list[dict[str, str]] = json.loads(out)["findings"]
    assert code == bool(found)
    return found


def test_the_doctor_compares_manifests_with_parts(cluster: TestCluster) -> None:
    made = {name: counted(cluster, name, compress=name == "gz") for name in ("well", "gone", "short", "flipped", "gz")}
    assert findings("--deep") == []
    first = {name: each["parts"][0] for name, each in made.items()}
    path = {name: _paths(cluster, f"{name}/reduce/{part['name']}")[0] for name, part in first.items()}
    path["gone"].unlink()
    path["short"].write_bytes(path["short"].read_bytes()[:-1])
    path["flipped"].write_bytes(path["flipped"].read_bytes()[:-2] + b"x\n")
    content = bytearray(path["gz"].read_bytes())
    content[len(content) // 2] ^= 255
    path["gz"].write_bytes(content)
    (path["well"].parent / "notes.txt").write_text("mine")
    (path["well"].parent / "part-999999-00000-00000.data").write_text("[1,1]\n")
    found = {re.search(r"output of (\w+)", each["what"])[1]: each for each in findings()}  # type: ignore[index]
    assert set(found) == {"gone", "short", "well"}
    for name, kind in (("gone", "missing"), ("short", "damaged")):
        assert kind in found[name]["what"] and first[name]["name"] in found[name]["what"]
        assert found[name]["where"] == f"node {first[name]['node']}" and f"run {name} again" in found[name]["do"]
    assert "2 files in well/reduce" in found["well"]["what"] and "notes.txt" in found["well"]["what"]
    deep = {re.search(r"output of (\w+)", each["what"])[1] for each in findings("--deep")}  # type: ignore[index]
    assert deep == {"gone", "short", "well", "flipped", "gz"}
    told = drain.look(cluster.settings, first["gone"]["node"])["faults"]
    assert ("missing", "gone") in {(each["kind"], each["job"]) for each in told}
    code, out, _ = mrcore("drain", first["short"]["node"], "--dry-run")
    assert code == 1 and "output of short" in out and "is damaged" in out


def test_output_on_a_node_that_left_is_missing(cluster: TestCluster) -> None:
    made = counted(cluster, "left")
    found = manifest.read(cluster.settings.state_dir, "left", made["run"])
    assert found
    found.parts[0] = msgspec.structs.replace(found.parts[0], node="w9")
    manifest.write(cluster.settings.state_dir, found)
    assert any(each["where"] == "node w9" and "left" in each["what"] for each in findings())


NODES = st.sampled_from(["n1", "n2"])
PATHS = st.sampled_from([f"{job}/reduce/part-00000{run}-00000-00000.data" for job in "ab" for run in (1, 2)])


@given(
    st.dictionaries(PATHS, st.tuples(NODES, st.integers(0, 2))),
    st.dictionaries(st.tuples(NODES, PATHS), st.integers(0, 2)),
)
def test_a_comparison_names_each_file_once_and_rightly(
    wanted: dict[str, tuple[str, int]], there: dict[tuple[str, str], int]
) -> None:
    known: outputs.Parts = {}
    for path, (node, size) in wanted.items():
        job, _, name = path.split("/")
        counts = {"partition": 0, "records": 0, "text_bytes": 0, "batch_bytes": 0, "max_decoded": 0, "crc32": 0}
        part = PlacedPart(name=name, node=node, bytes=size, **counts)
        known.setdefault(node, {})[path] = outputs.JobPart(job, part)
    files: dict[str, dict[str, int]] = {"n1": {}, "n2": {}}
    for (node, path), size in there.items():
        files[node][path] = size
    said = {
        (each["kind"], each["node"], f"{each['job']}/reduce/{name}")
        for each in outputs.compare(known, files, None)
        for name in each["names"]
    }
    right = {("missing", node, path) for path, (node, _) in wanted.items() if path not in files[node]}
    right |= {("damaged", node, path) for path, (node, size) in wanted.items() if files[node].get(path, size) != size}
    right |= {("foreign", node, path) for node, path in there if wanted.get(path, ("",))[0] != node}
    assert said == right
    assert all(each["job"] == "a" for each in outputs.compare(known, files, "b"))


def test_a_drain_asks_on_a_terminal_and_wants_yes_elsewhere(cluster: TestCluster) -> None:
    made = counted(cluster, "moves")
    node = made["parts"][0]["node"]
    before = {path: path.read_bytes() for path in _paths(cluster, "moves/reduce/*")}
    code, _, err = mrcore("drain", node)
    assert code == 2 and "--yes" in err
    code, shown = on_terminal("n", "drain", node)
    assert code == 1 and "output of moves" in shown and f"Move all of this from {node}" in shown
    assert {path: path.read_bytes() for path in _paths(cluster, "moves/reduce/*")} == before
    code, shown = on_terminal("y", "drain", node)
    assert code == 0 and {part.node for part in manifest.output(cluster.settings.state_dir, "moves")[-1].parts} == {
        each.name for each in cluster.settings.nodes if each.name != node
    }
