"""`mrcore.connect()` in a user's own script, on a real local cluster, in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkout import text_of
from conditions import wait_until
from daemons import own_address

import mrcore
from mrcore.face import tables

SCRIPT = '''\
"""What a user writes: functions, a job, what comes out of it."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import mrcore

WORD = re.compile("[a-z]+")


def count_words(line: str, auxiliary_data: object) -> Iterator[tuple[tuple[str, int], int]]:
    for word in WORD.findall(line.lower()):
        yield (word, len(word)), 1


def add_up(group: list[tuple[tuple[str, int], int]], auxiliary_data: object) -> list[tuple[tuple[str, int], int]]:
    return [(group[0][0], sum(count for _, count in group))]


def fail(line: str, auxiliary_data: object) -> list[tuple[str, int]]:
    return [(line, int(line))]  # here


def main(home: str, address: str, text: str) -> None:
    cluster = mrcore.connect(home=home, nodes=2, servers=1, address=address)
    early = cluster.submit(map=count_words, inputs=Path(text), name="early")
    try:
        early.wait()
    except mrcore.ClusterFault as error:
        print(json.dumps(["not started", str(error), early.state]))
    early.cancel()
    cluster.start()
    try:
        job = cluster.submit(map=count_words, reduce=add_up, combine=add_up, inputs=[Path(text)], sort_values=True)
        before: str = job.state
        job.wait(120)
        done = job.progress()
        print(json.dumps([before, job.state, done.fraction, [phase.name for phase in done.phases], early.state]))
        print(json.dumps([[word, length, count] for (word, length), count in job.items()]))
        frame = job.to_polars()
        print(json.dumps([frame.columns, frame["value"].sum(), job.to_arrow().num_rows, job.counts["output_items"]]))
        (key, value), *_ = job.head(1)
        print(json.dumps([isinstance(key, tuple), value, job.name, cluster.job(job.name).state]))
        bad = cluster.submit(map=fail, inputs=Path(text), name="bad")
        try:
            bad.wait(120)
        except mrcore.JobFault as error:
            print(json.dumps([str(error), "".join(error.__notes__), bad.state, str(bad.progress())]))
        try:
            cluster.submit(map=count_words, inputs=Path(text), name="late", not_before="2099-01-01").wait(1)
        except TimeoutError as error:
            print(json.dumps(str(error)))
    finally:
        cluster.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
'''
WAITING = """\
import sys
import time
from pathlib import Path

import mrcore


def slow(line, auxiliary_data):
    time.sleep(0.05)
    return [(line, 1)]


cluster = mrcore.connect(home=sys.argv[1])
cluster.submit(map=slow, inputs=Path(sys.argv[2]), name="slow").wait()
"""


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("to be or not to be\nthat is the question\n" * 500)
    return file


@contextlib.contextmanager
def cluster(home: Path) -> Iterator[mrcore.Cluster]:
    """A local cluster of one node that runs."""
    made = mrcore.connect(home=home, servers=1, address=own_address())
    made.start()
    try:
        yield made
    finally:
        made.stop()


def test_a_script_submits_its_functions_and_reads_what_they_made(home: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    address = own_address()
    own_address()  # of the second node
    command = [sys.executable, "script.py", str(home), address, str(text)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "nothing is shown where there is no terminal"
    early, states, items, frame, first, failed, late = map(json.loads, done.stdout.splitlines())
    assert early[0] == "not started" and "is not started: call start()" in early[1] and early[2] == "queued"
    phases = ["PREFLIGHT", "MAP", "SORT", "REDUCE", "COMMIT"]
    assert states == ["queued", "succeeded", 1.0, phases, "deleted"]
    oracle = Counter(re.findall("[a-z]+", text.read_text()))
    assert sorted(items) == sorted([word, len(word), count] for word, count in oracle.items())
    assert frame == [["key_0", "key_1", "value"], oracle.total(), len(oracle), len(oracle)]
    assert first[0] is True and re.fullmatch("count_words-[0-9a-f]{8}", first[2]) and first[3] == "succeeded"
    line = SCRIPT.splitlines().index("    return [(line, int(line))]  # here") + 1
    assert f"(script.py, line {line})" in failed[0] and f'script.py", line {line}, in fail' in failed[1]
    assert "return [(line, int(line))]  # here" in failed[1]
    assert failed[2] == "failed" and failed[3].startswith("bad: failed: map function fail failed at")
    assert late.startswith("after 1 s late: queued: ") and "2099" in late


@pytest.mark.slow
def test_a_users_script_is_clean_for_a_strict_type_checker(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--cache-dir=cache", "script.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ctrl_c_hands_the_run_back_that_a_waiting_program_was_at(home: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "waiting.py").write_text(WAITING)
    with cluster(home) as made:
        command = ["env", "--default-signal=INT", sys.executable, "waiting.py", str(home), str(text)]
        process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        try:
            wait_until(lambda: _state(made, "slow") == "running", 60, "the program runs its job")
            assert made.job("slow").progress().run == 1
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
        assert "KeyboardInterrupt" in err
        assert _state(made, "slow") == "queued"
        (run,) = mrcore.Scheduler(made.settings).history("slow")
        assert run["state"] == "handed back"
        made.job("slow").cancel()


def _state(made: mrcore.Cluster, name: str) -> str | None:
    try:
        return made.job(name).state
    except mrcore.UsageError:
        return None


def test_with_a_runner_elsewhere_a_program_only_waits(home: Path, text: Path, tmp_path: Path) -> None:
    with cluster(home) as made:
        runner = subprocess.Popen(
            [Path(sys.executable).with_name("mrcore"), "run"], env=os.environ | {"MRCORE_CONFIG": ""}
        )
        try:
            wait_until(lambda: mrcore.Scheduler(made.settings).state()["runner"], 60, "there is a Runner")
            job = made.submit(map=_first, inputs=text)
            job.wait(60, progress=False)
            assert sum(1 for _ in job.items()) == 1000
            assert runner.poll() is None and mrcore.Scheduler(made.settings).state()["runner"]
        finally:
            runner.terminate()
            runner.wait(60)


def test_a_job_that_waits_behind_another_is_not_begun_for_nothing(home: Path, text: Path) -> None:
    with cluster(home) as made:
        first, second = (made.submit(map=_first, inputs=text, name=name) for name in ("one", "two"))
        assert first.wait(60).state == "succeeded"
        assert second.state == "queued" and mrcore.Scheduler(made.settings).history("two") == []
        second.wait(60)
        assert [run["state"] for run in mrcore.Scheduler(made.settings).history()] == ["succeeded", "succeeded"]


def _first(line: str, auxiliary_data: object) -> list[tuple[str, int]]:
    return [(line[0], 1)]


def _zähle_was_auf_einer_Zeile_steht(line: str, auxiliary_data: object) -> list[tuple[str, int]]:
    return [(line, len(line))]


def test_a_project_by_name_and_what_is_wrong_with_a_call(home: Path, tmp_path: Path) -> None:
    made = mrcore.connect(home=home, address=own_address())
    with pytest.raises(mrcore.UsageError, match="say project=… too, or give the function itself"):
        made.submit(map="count_words", inputs="x")
    with pytest.raises(mrcore.UsageError, match="functions are given by name: map_function_name is none"):
        made.submit(project="word_count", map=_first, inputs="x")
    with pytest.raises(mrcore.UsageError, match="'input_dir'"):
        made.submit(map=_first, inputs="x", input_dir="y")
    with pytest.raises(mrcore.UsageError, match="'nothing' is not known"):
        made.job("nothing")
    with pytest.raises(mrcore.UsageError, match="leave one out"):
        mrcore.connect(config=tmp_path / "cluster.yml", nodes=2)
    job = made.submit(map=_first, inputs=["logs/*.txt", Path("here")], name="mine", group_name="g")
    spec = mrcore.Scheduler(made.settings).show("mine")["job"]
    assert spec["input_dirs"] == ["logs/*.txt", str(Path("here").absolute())]
    assert spec["run_once"] is True and spec["group_name"] == "g"
    again = made.submit(map=_first, inputs="x", name="mine")
    assert job.state == "replaced" and again.state == "queued"
    assert again.why().code == "no_runner" and str(again.why()).startswith("mine"), again.why()
    again.cancel()
    with pytest.raises(mrcore.MrcoreError, match="job mine was deleted"):
        again.wait(5)
    projects = made.settings.home / "notebooks"
    assert [path.name for path in projects.iterdir()] == [spec["project_name"]]


def test_the_same_job_again_has_the_same_name(home: Path) -> None:
    made = mrcore.connect(home=home, address=own_address())
    first, again = (made.submit(map=_first, inputs="x") for _ in range(2))
    assert again.name == first.name and first.state == "replaced" and again.state == "queued"
    foreign = made.submit(map=_zähle_was_auf_einer_Zeile_steht, inputs="x")
    assert re.fullmatch("_z_hle_was_auf_einer_Zeile_steht-[0-9a-f]{8}", foreign.name)
    others = [made.submit(map=_first, inputs="y"), made.submit(map=_first, inputs="x", compress=True)]
    assert len({first.name, *(other.name for other in others)}) == 3


def test_functions_for_a_deployed_cluster_go_into_its_projects(home: Path, tmp_path: Path) -> None:
    node = {"name": "w1", "address": "127.0.0.1", "servers": 1, "compute_dir": str(tmp_path / "compute")}
    settings = {"home": str(home), "projects_dir": str(tmp_path / "projects"), "nodes": [node]}
    (tmp_path / "cluster.json").write_text(json.dumps(settings))
    made = mrcore.connect(config=tmp_path / "cluster.json")
    assert not made.settings.local
    made.submit(map=_first, inputs="x", name="mine")
    project = mrcore.Scheduler(made.settings).show("mine")["job"]["project_name"]
    assert [path.name for path in (tmp_path / "projects").iterdir()] == [project]
    n = 1
    with pytest.raises(mrcore.UsageError, match="map function: the lambda closes over n"):
        made.submit(map=lambda line, auxiliary_data: [(line, n)], inputs="x")


def test_a_damaged_part_gives_no_item(home: Path, text: Path) -> None:
    with cluster(home) as made:
        job = made.submit(map=_first, inputs=text, name="mine").wait(60)
        (part, *_) = home.glob("nodes/*/cluster/mine/reduce/*.data")
        content = bytearray(part.read_bytes())
        content[-3] ^= 1  # in its last item
        part.write_bytes(content)
        with pytest.raises(mrcore.ClusterFault, match="damaged"):
            next(job.items())


@pytest.mark.slow
@pytest.mark.parametrize("document", ["README.md", "docs/python.md"])
def test_examples_of_the_documents_run(home: Path, tmp_path: Path, document: str) -> None:
    blocks = re.findall(r"```python\n(.*?)```", text_of(document), re.DOTALL)
    (code,) = [block for block in blocks if "mrcore.connect(" in block]
    address = own_address()
    own_address()  # of the second node
    (tmp_path / "example.py").write_text(code.replace("local=True", f"local=True, address={address!r}"))
    try:
        done = subprocess.run(
            [sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False
        )
        assert done.returncode == 0, done.stderr
    finally:
        mrcore.connect(home=home).stop()
    licences = [file.read_text() for file in Path("/usr/share/common-licenses").iterdir() if not file.is_symlink()]
    words = Counter(re.findall("[a-z]+", "".join(licences).lower()))
    common = {word: count for word, count in words.items() if count > 700}
    head, *rest = done.stdout.splitlines()
    assert head.startswith("[(") and len(common) > 3
    if document != "README.md":
        assert {word: int(count) for word, count in (line.split() for line in rest)} == common


def test_columns_of_a_table_and_a_column_that_is_none() -> None:
    table = tables.to_arrow([(("a", 1), {"n": 1}), (("b", 2), {"n": None})], "job")
    assert table.column_names == ["key_0", "key_1", "value"]
    assert table["value"].to_pylist() == [{"n": 1}, {"n": None}]
    assert tables.to_arrow([("a", 1), (None, 2.5)], "job")["value"].to_pylist() == [1.0, 2.5]
    assert tables.to_arrow([], "job").column_names == ["key", "value"]
    with pytest.raises(mrcore.UsageError, match="column value of job j is no column of one type"):
        tables.to_arrow([("a", 1), ("b", "text")], "j")
    with pytest.raises(mrcore.UsageError, match="column key of job j is no column of one type"):
        tables.to_arrow([(("a",), 1), ("b", 2)], "j")
    with pytest.raises(mrcore.UsageError, match="column value"):
        tables.to_arrow([("a", 1 << 80)], "j")


def test_without_the_extra_tables_say_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(mrcore.UsageError, match=re.escape("pip install 'mrcore[notebook]'")):
        tables.to_arrow([], "job")
