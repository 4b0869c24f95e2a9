"""The command line's commands of the queue, called as a user calls them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_cluster import FakeCluster

from mrcore import cli
from mrcore.config import load_settings
from mrcore.runner import Runner

JOB = """\
project_name: word_count
job_name: wc
input_dirs: [inputs]
map_function_name: count_map
reduce_function_name: count_reduce
run_once: true
"""
Mrcore = Callable[..., tuple[int, str, str]]


@pytest.fixture
def mrcore(home: Path, projects_dir: Path, capfd: pytest.CaptureFixture[str]) -> Mrcore:
    """Call `mrcore …` in this process; gives status, stdout, stderr."""

    def call(*arguments: str) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main(list(arguments))
        out, err = capfd.readouterr()
        assert isinstance(left.value.code, int)
        return left.value.code, out, err

    return call


@pytest.fixture
def file(mrcore: Mrcore) -> Path:
    path = Path("job.yml")
    path.write_text(JOB)
    return path


def drain() -> None:
    settings = load_settings()
    Runner(settings, FakeCluster(settings)).run(once=True)


def test_submit_queue_run_history_show(mrcore: Mrcore, file: Path) -> None:
    code, out, err = mrcore("submit", str(file), "--set", "job_priority=3", "--set", "group_name=nightly")
    assert (code, out) == (0, "wc: queued; it runs once\n")
    assert "no Runner drains this queue" in err
    listed = json.loads(mrcore("queue", "--json")[1])
    assert (listed["jobs"][0]["job_name"], listed["jobs"][0]["job_priority"], listed["runner"]) == ("wc", 3, False)
    assert "nightly" in mrcore("queue")[1]
    drain()
    assert json.loads(mrcore("queue", "--json")[1])["jobs"] == []
    assert json.loads(mrcore("history", "--json")[1])[0]["counts"] == {"items": 7}
    assert "succeeded" in mrcore("history", "wc")[1]
    story = mrcore("show", "wc")[1]
    assert "wc: out (succeeded)" in story and "items: 7" in story and "MAP: 0.0" in story


def test_show_prints_the_users_traceback_and_line(mrcore: Mrcore, file: Path) -> None:
    module = Path("projects/word_count/map_functions.py")
    module.write_text("def fail(line, aux): ...\n")
    mrcore("submit", str(file), "--set", "map_function_name=fail")
    drain()
    story = mrcore("show", "wc")[1]
    assert "JobFault: map failed" in story
    assert "    File x.py, line 3" in story
    assert "line: the line" in story
    assert mrcore("requeue", "wc")[1] == "queued again: wc\n"


def test_replace_delete_pause_resume_cancel(mrcore: Mrcore, file: Path) -> None:
    mrcore("submit", str(file))
    assert "replaces the one in the queue" in mrcore("submit", str(file), "--set", "run_once=false")[1]
    code, _, err = mrcore("cancel", "wc")
    assert (code, err) == (2, "mrcore: job 'wc' is not running; `mrcore delete wc` takes it from the queue\n")
    mrcore("pause")
    assert "the queue is paused" in mrcore("queue")[1]
    mrcore("resume")
    assert "paused" not in mrcore("queue")[1]
    assert mrcore("delete", "wc")[0] == 0
    code, _, err = mrcore("delete", "wc")
    assert (code, err) == (2, "mrcore: job 'wc' is not in the queue\n")
    code, _, err = mrcore("show", "wcc")
    assert (code, err) == (2, "mrcore: job 'wcc' is not known (did you mean 'wc'?)\n")


def test_a_list_is_queued_whole_or_not_at_all(mrcore: Mrcore, file: Path) -> None:
    entry = JOB.replace("\n", "\n  ")
    file.write_text(f"- {entry}\n- {entry.replace('job_name: wc', 'job_name: w2').replace('count_map', 'cout_map')}\n")
    code, out, err = mrcore("submit", str(file))
    assert (code, out) == (2, "")
    assert err.startswith("mrcore: job 'w2' refused: no function 'cout_map' in ")
    assert err.count("\n") == 1
    assert json.loads(mrcore("queue", "--json")[1])["jobs"] == []
    file.write_text(json.dumps([{"job_name": "x", "job_type": "script", "script_location": __file__}]))
    assert mrcore("submit", str(file))[1] == "x: queued; it recurs each cycle (run_once: true runs it once)\n"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a: [1", "is neither YAML nor JSON"),
        (b"\xff\x00\x01", "holds NUL bytes"),
        (JOB.encode("utf-16"), "holds NUL bytes, as UTF-16"),
        (JOB.encode() + b"group_name: caf\xe9\n", "is not UTF-8: byte 0xe9 in line 7"),
        (JOB.encode() + b"job_name: other\n", "has the key 'job_name' twice, in lines 2 and 7"),
        (b'{"job_name": "a", "project_name": "p", "job_name": "b"}', "has the key 'job_name' twice in one mapping"),
        (JOB.encode() + b"every: 10:00\n", "every: should be seconds, or a number with s, m, h, d or w"),
        (JOB.encode() + b"group_name: 0777\n", "group_name: input should be a valid string, got 777"),
        (JOB.encode() + b"compress: yes\n", "compress: input should be a valid boolean, got 'yes'"),
        (b'{"job_name": "a", "downsample": NaN}', "downsample: nan is no number"),
        (b'{"job_name": "a", "every": -Infinity}', "every: -inf is no number"),
        (b'{"job_name": "a", "input_dirs": ["x", "b\\ud83d"]}', "input_dirs[1] holds \\ud83d, half of a character"),
        (b'{"job_name": ' + b"9" * 5000 + b"}", "cannot be read: Exceeds the limit"),
        (b"[" * 200_000, "nested more than"),
        (b"just words", "holds no job"),
        (b"", "holds no job"),
        (b"[]", "holds no job"),
        (b"x" * (11 << 20), "more than 10 MiB"),
        (JOB.encode().replace(b"job_name: wc", b"job_name: a/b"), "job 'a/b' refused: job_name"),
        (JOB.encode() + b"job_priority: high\n", "job_priority: input should be a valid number"),
        (JOB.encode() + b"job_type: file_transfer\n", "'transfer_type' is missing"),
        (JOB.encode() + b"every: &a [*a]\n", "every"),
    ],
)
def test_bad_job_files_queue_nothing(mrcore: Mrcore, file: Path, content: bytes, said: str) -> None:
    file.write_bytes(content)
    code, out, err = mrcore("submit", str(file))
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1 and len(err) < 1500
    assert json.loads(mrcore("queue", "--json")[1])["jobs"] == []


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("job_type: script\nscript_location: nowhere.py\n", "script_location: there is no file"),
        ("job_type: script\n", "'script_location' is missing"),
        ("job_type: script\nscript_location: job.yml\nscript_arguments: [{a: 1}]\n", "script_arguments"),
        ("job_type: skript\n", "job_type 'skript' is not one of mapreduce, script, file_transfer (did you mean"),
        ("job_type: file_transfer\ntransfer_type: uplaod\n", "transfer_type: input should be 'upload'"),
        ("job_type: file_transfer\ntransfer_type: upload\n", "upload needs 'input_dir'"),
    ],
)
def test_bad_scripts_and_transfers_queue_nothing(mrcore: Mrcore, file: Path, content: str, said: str) -> None:
    file.write_text(f"job_name: x\n{content}")
    code, out, err = mrcore("submit", str(file))
    assert (code, out) == (2, "")
    assert said in err and err.count("\n") == 1
    assert json.loads(mrcore("queue", "--json")[1])["jobs"] == []


def test_run_once_does_not_wait_for_a_paused_queue(mrcore: Mrcore, file: Path) -> None:
    mrcore("submit", str(file))
    mrcore("pause")
    code, out, err = mrcore("run", "--once")
    assert (code, out) == (1, "")
    assert err.splitlines()[-1] == "mrcore: the queue is paused: `mrcore resume` goes on"
    assert len(json.loads(mrcore("queue", "--json")[1])["jobs"]) == 1


def test_missing_file_and_wrong_usage(mrcore: Mrcore) -> None:
    assert mrcore("submit", "nowhere.yml")[::2] == (1, "mrcore: nowhere.yml: No such file or directory\n")
    assert mrcore("submit")[0] == 2
    assert mrcore("frobnicate")[0] == 2
    assert mrcore("--config", "/nowhere.yml", "queue")[::2] == (
        2,
        "mrcore: cannot read the settings /nowhere.yml: No such file or directory\n",
    )


def test_run_once_tells_what_ended_and_fails_with_a_failed_run(
    mrcore: Mrcore, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: Any = Runner._manage_cluster
    monkeypatch.setattr(Runner, "_manage_cluster", lambda self: FakeCluster(self.settings))
    assert made is not Runner._manage_cluster
    assert mrcore("run", "--once") == (0, "", "nothing to run: `mrcore submit FILE` queues a job\n")
    mrcore("submit", str(file))
    assert mrcore("run", "--once") == (0, "wc run 1: succeeded\n", "")
    Path("projects/word_count/map_functions.py").write_text("def fail(line, aux): ...\n")
    mrcore("submit", str(file), "--set", "map_function_name=fail")
    code, out, err = mrcore("run", "--once")
    assert (code, out) == (1, "")
    assert err == "wc run 2: failed: map failed\nmrcore: 1 of 1 runs failed: see `mrcore history`\n"


def test_template_of_each_kind(mrcore: Mrcore) -> None:
    for kind in ("mapreduce", "script", "file_transfer"):
        assert mrcore("template", kind)[1].startswith(f"# A {kind} job.")
    assert mrcore("template", "mapreduc")[0] == 2


def test_logs_are_listed_and_shown(mrcore: Mrcore) -> None:
    folder = load_settings().nodes[0].layout.logs_dir
    folder.mkdir(parents=True)
    (folder / "S_0.log").write_text("".join(f"line {n}\n" for n in range(200)))
    assert "S_0.log" in mrcore("logs")[1]
    assert mrcore("logs", "S_0", "--lines", "2")[1] == "line 198\nline 199\n"
    code, _, err = mrcore("logs", "S_9")
    assert (code, err) == (2, "mrcore: there is no log of 'S_9'; known: S_0\n")


def test_reader_that_stops_early_hears_no_complaint(home: Path) -> None:
    code = (
        "import sys, types\n"
        "fake = types.ModuleType('mrcore.manage_cluster')\n"
        "class ManageCluster:\n"
        "    def __init__(self, settings): pass\n"
        "    def cat(self, job, out, head=None):\n"
        "        for n in range(10**6): out.write(b'[1, 2]\\n')\n"
        "fake.ManageCluster = ManageCluster\n"
        "sys.modules['mrcore.manage_cluster'] = fake\n"
        "from mrcore.cli import main; main(['cat', 'wc'])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout and process.stderr
    assert process.stdout.readline() == b"[1, 2]\n"
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(10) == 1
    process.stderr.close()


def test_help_loads_nothing_heavy() -> None:
    heavy = ("pydantic", "yaml", "rich", "rpyc", "sqlite3")
    code = f"import sys, mrcore.cli; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"[]\n"
