"""What a working day asks of a cluster that runs: plans that change nothing, output of one run, lines of one job."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest
from clusters import TestCluster
from commands import MRCORE, UNFIT, mrcore
from conditions import wait_until
from screen import Terminal

from mrcore.cluster.plan import GUESS, NodePlan, expected_seconds, needed_bytes
from mrcore.messages.nodes import InputFile
from mrcore.state.store import RunRow


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestCluster]:
    """Two nodes with a server each, which the command line finds by MRCORE_HOME."""
    with TestCluster(tmp_path_factory.mktemp("day"), 2, 1) as made:
        file = made.folder / "home/cluster.json"
        more = {"projects_dir": str(made.folder / "projects")}
        file.write_text(json.dumps(json.loads(file.read_text()) | more))
        yield made


@pytest.fixture
def here(cluster: TestCluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of the test, where job files are written."""
    monkeypatch.setenv("MRCORE_HOME", str(cluster.folder / "home"))
    monkeypatch.delenv("MRCORE_CONFIG", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Started:
    """A command that runs beside the test, its output in files of its own."""

    def __init__(self, *arguments: str) -> None:
        self._out, self._err = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")
        command = ["env", "--default-signal=INT", MRCORE, *arguments]
        self.process = subprocess.Popen(command, stdout=self._out, stderr=self._err)

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        self.process.wait(10)

    def wait(self) -> int:
        return self.process.wait(60)

    def text(self) -> str:
        return _read(self._out)

    def errors(self) -> str:
        return _read(self._err)


def _read(stream: IO[str]) -> str:
    """What is in a file, without moving where its writer writes."""
    return os.pread(stream.fileno(), 1 << 20, 0).decode()


def write(name: str, **keys: Any) -> str:
    """Write a job of the gated project; return the file's name."""
    job = {"job_name": name, "project_name": "gated", "input_dirs": [f"in/{name}"], "map_function_name": "count_words"}
    Path(f"{name}.json").write_text(json.dumps(job | {"reduce_function_name": "add_up", "run_once": True} | keys))
    return f"{name}.json"


def everything(cluster: TestCluster) -> dict[str, tuple[bytes, int, int]]:
    """All files of home, nodes and projects: content, time and mode; of folders the time."""
    found = {}
    for base, folders, files in os.walk(cluster.folder):
        for name in (*files, *folders):
            path = Path(base, name)
            status = path.lstat()
            found[str(path)] = (path.read_bytes() if path.is_file() else b"", status.st_mtime_ns, status.st_mode)
    return found


def plan(*arguments: str) -> tuple[int, list[dict[str, Any]]]:
    code, out, err = mrcore("plan", "--json", *arguments)
    assert out, err
    return code, json.loads(out)


@pytest.mark.slow
def test_a_plan_says_what_is_read_where_and_changes_no_byte_on_any_disk(cluster: TestCluster, here: Path) -> None:
    cluster.write_inputs({f"{number}.txt": f"a b {number}\n" * 100 for number in range(5)}, entry="in/planned")
    cluster.write_inputs({".hidden": "x\n"}, node=0, entry="in/planned")
    script = here / "s.py"
    script.write_text("open('must-not-be', 'w')\n")
    others: list[dict[str, Any]] = [
        {"job_type": "script", "job_name": "s", "script_location": str(script), "script_arguments": [1, "b"]},
        {"job_type": "script", "job_name": "gone", "script_location": str(here / "nowhere.py")},
        {"job_type": "file_transfer", "job_name": "up", "transfer_type": "upload", "input_dir": ".", "output_dir": "u"},
        {"job_type": "file_transfer", "job_name": "rm", "transfer_type": "delete", "output_dir": "in/planned"},
        {"job_type": "file_transfer", "job_name": "down", "transfer_type": "download", "input_dir": "in/planned",
         "output_dir": "fetched"},
        {"job_name": "odd", "colour": "blue"},
    ]  # fmt: skip
    (here / "others.json").write_text(json.dumps(others))
    files = [
        write("planned"),
        write("lost", input_dirs=["in/lost"]),
        write("new", hold_state=True, merge_output=True),
        "others.json",
    ]
    cluster.write_inputs({"a.txt": "a\nb"}, entry="in/new")
    before, local = everything(cluster), sorted(path.name for path in here.iterdir())
    code, plans = plan(*files)
    by_name = {each["job_name"]: each for each in plans}
    text = mrcore("plan", *files)[1]
    assert everything(cluster) == before
    assert sorted(path.name for path in here.iterdir()) == local
    assert code == 1, "some would fail"
    planned = by_name["planned"]
    assert (planned["faults"], planned["files"], planned["skipped"]) == ([], 5, {"dotfile": 1})
    assert [(node["files"], node["bytes"], node["splits"]) for node in planned["nodes"]] == [(3, 1800, 3), (2, 1200, 2)]
    assert planned["partitions"] == 1 and planned["expected_seconds"] is None
    assert planned["disk_from"] == GUESS and planned["nodes"][0]["disk_needed_bytes"] == 1800 + 1500
    assert "matches no file" in by_name["lost"]["faults"][0]
    assert by_name["new"]["files"] == 1 and by_name["new"]["bytes"] == 2, "an unfinished last line waits"
    assert "odd" in by_name and by_name["odd"]["faults"]
    assert by_name["s"]["notes"][0].endswith(f"{script} 1 b") and "there is no file" in by_name["gone"]["faults"][0]
    assert (by_name["up"]["files"], by_name["rm"]["files"], by_name["down"]["files"]) == (5, 6, 6)
    for part in ("planned: would run, mapreduce", "  skipped: 1 dotfile", "lost: would fail", "DISK NEEDED"):
        assert part in text, part


@pytest.mark.slow
def test_a_plan_knows_from_earlier_runs_how_long_and_what_a_job_has_read(cluster: TestCluster, here: Path) -> None:
    cluster.write_inputs({"a.txt": "a b\n" * 50, "b.txt": "c\n" * 50}, entry="in/grown")
    file = write("grown", hold_state=True, merge_output=True)
    assert plan(file)[1][0]["files"] == 2
    code, out, err = mrcore("run", file)
    assert code == 0 and "grown run 1: succeeded" in out and "`mrcore cat grown --head 5`" in out, err
    assert "grown run 1: MAP" in err
    again = plan(file)[1][0]
    assert again["nothing_new"] and again["read_before"] == 2 and again["files"] == 0
    cluster.write_inputs({"c.txt": "d\n" * 50}, entry="in/grown")
    before = everything(cluster)
    code, (grown,) = plan(file)
    assert everything(cluster) == before
    assert (code, grown["files"], grown["bytes"], grown["read_before"], grown["goes_on_from_run"]) == (0, 1, 100, 2, 1)
    assert grown["expected_seconds"] > 0 and grown["expected_from"] == "the pace of 1 earlier runs"
    assert grown["disk_from"] != GUESS


@pytest.mark.slow
def test_cat_prints_what_one_run_added(cluster: TestCluster, here: Path) -> None:
    file = write("kept", delete_job_data=False)
    for number, word in enumerate(("one", "two"), 1):
        cluster.write_inputs({"a.txt": f"{word}\n"}, node=0, entry="in/kept")
        assert mrcore("run", file)[0] == 0
        assert mrcore("cat", "kept", "--run", str(number))[1] == f'["{word}",1]\n'
    assert mrcore("cat", "kept")[1] == '["one",1]\n["two",1]\n'
    code, _, err = mrcore("cat", "kept", "--run", "3")
    assert code == 2 and "runs whose output is there: 1, 2" in err
    assert mrcore("run", file, "--set", "delete_job_data=true")[0] == 0
    code, _, err = mrcore("cat", "kept", "--run", "1")
    assert code == 2 and "runs whose output is there: 3" in err and "a later run has replaced it" in err


def test_estimates_from_plain_numbers() -> None:
    node = NodePlan(node="a", servers=1, files=2, bytes=200)
    files = {"a": [InputFile("/x", 100, 0, 1), InputFile("/y.gz", 100, 0, 2)]}
    assert needed_bytes({}, [node], files) == ({"a": 1200}, GUESS)
    counts = {"input_bytes": 1000, "spilled_bytes": 500, "output_bytes": 100}
    assert needed_bytes(counts, [node], files)[0] == {"a": 120}
    run = RunRow("j", 1, "succeeded", 1, 0, 0.0, 10.0, 1, {}, {"input_bytes": 100}, None, "mapreduce", None)
    assert expected_seconds([run], 200) == (20.0, "the pace of 1 earlier runs")
    assert expected_seconds([run._replace(counts={})], 200) == (10.0, "the time of 1 earlier runs")
    assert expected_seconds([], 200)[0] is None


PRINTING = """
import os, sys, time
from gates import gate

def talk(line, auxiliary_data):
    print("I read", line, flush=True)
    print("\\x1b]0;title\\x07", file=sys.stderr, flush=True)
    if line.startswith("GATE"):
        gate("talk")
    return [(line, 1)]
"""


def talking(cluster: TestCluster, name: str, text: str, **keys: Any) -> str:
    """A job that prints each line that it reads."""
    project = cluster.folder / "projects/talking"
    if not project.exists():
        project.mkdir()
        (project / "map_functions.py").write_text(PRINTING)
        (project / "gates.py").write_text((cluster.folder / "projects/gated/gates.py").read_text())
    cluster.write_inputs({f"{name}-{number}": text for number in range(2)}, entry=f"in/{name}")
    return write(name, project_name="talking", map_function_name="talk", reduce_function_name=None, **keys)


@pytest.mark.slow
def test_logs_of_a_job_are_its_own_lines_of_its_last_run_from_all_nodes(cluster: TestCluster, here: Path) -> None:
    for name in ("quiet", "loud", "loud"):
        code, _, err = mrcore("run", talking(cluster, name, f"line of {name}\n"))
        assert code == 0, err
    code, out, err = mrcore("logs", "loud")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert sum("| I read line of loud" in line for line in lines) == 2
    assert all(" loud/2 map-" in line for line in lines) and "quiet" not in out
    assert "\\x1b]0;title\\x07" in out and not UNFIT.search(out)
    assert len(mrcore("logs", "loud", "--lines", "1")[1].splitlines()) == 1
    assert "loud" in mrcore("logs", "nobody")[2]


@pytest.mark.slow
def test_logs_f_follows_a_job_to_the_end_of_its_run(cluster: TestCluster, here: Path) -> None:
    cluster.close_gate("talk")
    file = talking(cluster, "followed", "first\nGATE\nlast\n", run_once=False)
    assert mrcore("submit", file)[0] == 0
    with Started("logs", "-f", "followed") as follows, Started("run", file) as runs:
        wait_until(lambda: follows.text().count("I read first") == 2, 60, "the lines before the gate")
        assert "I read last" not in follows.text() and follows.process.poll() is None
        cluster.open_gate("talk")
        assert runs.wait() == 0
        assert follows.wait() == 0
        assert follows.text().count("I read last") == 2
        assert "followed run 1: succeeded" in follows.errors()
    assert mrcore("delete", "followed")[0] == 0
    code, out, err = mrcore("logs", "-f", "followed")
    assert code == 0 and "neither runs nor waits" in err and out.count("I read last") == 2


@pytest.mark.slow
def test_logs_f_follows_a_script_and_a_server(cluster: TestCluster, here: Path) -> None:
    script = here / "s.py"
    script.write_text("import os, time\nprint('begun', flush=True)\nwhile not os.path.exists('go'): time.sleep(.02)\n"
                      "print('done')\n")  # fmt: skip
    job = {"job_type": "script", "job_name": "script", "script_location": str(script), "run_once": True}
    (here / "script.json").write_text(json.dumps(job))
    server = cluster.settings.servers()[0].name
    with Started("logs", "-f", server) as of_server, Started("run", "script.json") as runs:
        wait_until(lambda: "begun" in mrcore("logs", "script")[1], 60, "the script")
        with Started("logs", "-f", "script") as follows:
            wait_until(lambda: follows.text() == "begun\n", 60, "what it printed before")
            (here / "go").touch()
            assert (runs.wait(), follows.wait()) == (0, 0)
            assert follows.text() == "begun\ndone\n"
        assert mrcore("run", talking(cluster, "seen", "seen by the server\n"))[0] == 0
        wait_until(lambda: "I read seen by the server" in of_server.text(), 60, "the server's lines")
        of_server.process.send_signal(signal.SIGINT)
        assert of_server.wait() == 130


@pytest.mark.slow
def test_on_a_terminal_a_real_run_is_shown_in_place_and_leaves_only_its_result(
    cluster: TestCluster, here: Path
) -> None:
    cluster.write_inputs({"a": "a b\n" * 1000, "b": "GATE\n", "c": "c\n"}, entry="in/shown")
    cluster.close_gate("map")
    terminal, watch = (Terminal([MRCORE, *given], rows=24) for given in (["run", write("shown")], ["watch"]))
    try:
        cluster.waiting("map")
        terminal.until(lambda: any("of 2 servers at work" in line for line in terminal.display()))
        shown = [line for line in terminal.display() if line]
        assert shown[0] == "shown: queued; it runs once" and shown[1].startswith("shown run 1: ")
        assert [line.split()[0] for line in shown[2:4]] == ["PREFLIGHT", "MAP"] and " % " in shown[3]
        watch.until(lambda: any(line.startswith("  node-") and " MAP " in line for line in watch.display()))
        watch.type("q")
        assert watch.wait() == 0
        cluster.open_gate("map")
        assert terminal.wait() == 0
        left = [line for line in terminal.display() if line]
        assert len(left) == 2 and left[1].startswith("shown run 1: succeeded in ")
        assert left[1].endswith("next: `mrcore cat shown --head 5`")
    finally:
        terminal.kill()
        watch.kill()
