"""The command line's commands of the queue, called as a user calls them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_cluster import FakeCluster

from mrcore.cli import main as cli
from mrcore.queue.execution import Kinds
from mrcore.queue.runner import Runner
from mrcore.queue.scheduler import Scheduler
from mrcore.settings.config import load_settings

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
        (b"{" * 2_000, "nested more than"),
        (b"a: " + b"[{" * 2_000, "nested more than"),
        (b"{a: " * 2_000, "nested more than"),
        (b"- " * 2_000, "nested more than"),
        (b"&a ['[[[[', " * 2_000, "nested more than"),
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
    monkeypatch.setattr(Kinds, "cluster", lambda self: FakeCluster(self._settings))
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
        "fake = types.ModuleType('mrcore.cluster.manage_cluster')\n"
        "class ManageCluster:\n"
        "    def __init__(self, settings): pass\n"
        "    def cat(self, job, out, head=None, run=None):\n"
        "        for n in range(10**6): out.write(b'[1, 2]\\n')\n"
        "fake.ManageCluster = ManageCluster\n"
        "sys.modules['mrcore.cluster.manage_cluster'] = fake\n"
        "from mrcore.cli.main import main; main(['cat', 'wc'])\n"
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
    code = f"import sys, mrcore.cli.main; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"[]\n"


def test_queue_tells_an_empty_queue_where_it_looked_and_what_to_do(mrcore: Mrcore, home: Path) -> None:
    said = f"the queue of {home}/state is empty: `mrcore submit FILE` queues a job\n"
    assert mrcore("queue") == (0, said, "")
    assert json.loads(mrcore("queue", "--json")[1])["state_dir"] == f"{home}/state"


def test_queue_tells_what_left_by_a_failure_until_it_is_brought_back(mrcore: Mrcore, file: Path) -> None:
    Path("projects/word_count/map_functions.py").write_text("def fail(line, aux): ...\n")
    mrcore("submit", str(file), "--set", "map_function_name=fail")
    for name in ("first", "second", "third"):
        keys = ("map_function_name=fail", f"job_name={name}", "group_name=my group")
        mrcore("submit", str(file), *(word for key in keys for word in ("--set", key)))
    drain()
    code, out, err = mrcore("queue")
    lines = out.splitlines()
    assert (code, err, len(lines)) == (0, "", 3)
    assert lines[0].endswith("is empty: `mrcore submit FILE` queues a job")
    assert re.fullmatch(
        r"first left the queue at \d{4}-\d\d-\d\d \d\d:\d\d, and 2 of its group with it: failed: map failed; "
        r"`mrcore requeue 'my group'` brings back what left",
        lines[1],
    )
    assert lines[2].startswith("wc left the queue at ") and lines[2].endswith(
        "`mrcore requeue wc` brings back what left"
    )
    left = json.loads(mrcore("queue", "--json")[1])["left_by_a_failure"]
    assert {row["job_name"]: (row["cause"], row["requeue"]) for row in left} == {
        "wc": ("failed", "wc"),
        "first": ("failed", "my group"),
        "second": ("group failed", "my group"),
        "third": ("group failed", "my group"),
    }
    assert mrcore("requeue", "my group")[1] == "queued again: first, second, third\n"
    assert mrcore("delete", "wc")[0] == 0
    assert "left" not in mrcore("queue")[1]


def test_queue_lists_a_bounded_number_of_what_left_and_long_reasons_cut(mrcore: Mrcore, file: Path) -> None:
    scheduler = Scheduler(load_settings())
    for number in range(30):
        mrcore("submit", str(file), "--set", f"job_name=j{number}")
        scheduler.store.move_job(f"j{number}", "out", "failed: \x1b[31m\n" + "x" * 5000, number + 1.0, "failed")
    out = mrcore("queue")[1]
    assert len(out.splitlines()) == 12 and len(out) < 6000 and "\x1b" not in out
    assert out.splitlines()[1].startswith("j29 left the queue at ")
    assert out.splitlines()[-1] == "and 20 others left by a failure: `mrcore queue --json` has them all"
    scheduler.store.close()


def test_queue_tells_why_each_job_waits(mrcore: Mrcore, file: Path) -> None:
    mrcore("submit", str(file), "--set", "not_before=2999-01-01T06:00")
    mrcore("submit", str(file), "--set", "job_name=other", "--set", "job_priority=2")
    out = mrcore("queue")[1]
    assert [line.split()[0] for line in out.splitlines()[:3]] == ["JOB", "other", "wc"]
    assert "no Runner drains the queue" in out and "not before 2999-01-01 06:00" in out
    assert out.splitlines()[0].split() == ["JOB", "STATE", "PRIORITY", "RUNS", "WHY"]  # columns without content are out
    assert all(len(line.rstrip()) <= 80 for line in out.splitlines())
    jobs = json.loads(mrcore("queue", "--json")[1])["jobs"]
    assert [job["why"]["code"] for job in jobs] == ["no_runner", "not_before"]


def test_a_failed_run_tells_what_becomes_of_its_job(
    mrcore: Mrcore, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Kinds, "cluster", lambda self: FakeCluster(self._settings))
    Path("projects/word_count/map_functions.py").write_text("def fail(line, aux): ...\n")
    keys = ("map_function_name=fail", "run_once=false", "retries=1", "retry_delay=0.2")
    mrcore("submit", str(file), *(word for key in keys for word in ("--set", key)))
    code, out, err = mrcore("run", "--once")
    assert (code, out) == (1, "")
    assert re.sub(r"0\.[012]\d s", "N s", err).splitlines() == [
        "wc run 1: failed: map failed (retry 1 of 1 in N s)",
        "wc run 2: failed: map failed (the job stays in the queue)",
        "mrcore: 1 of 2 runs failed: see `mrcore history`",
    ]


def test_a_job_runs_where_it_was_submitted_whoever_runs_it_where(
    mrcore: Mrcore, file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    mrcore("submit", str(file))
    here = Path("projects").absolute()
    assert f'projects_dir: "{here}"' in mrcore("show", "wc")[1]
    monkeypatch.chdir(tmp_path)
    assert mrcore("submit", str(here.parent / file), "--set", f"projects_dir={here}")[0] == 2, "a job may not choose"
    assert json.loads(mrcore("show", "wc", "--json")[1])["job"]["projects_dir"] == str(here)


def test_set_takes_each_key_once(mrcore: Mrcore, file: Path) -> None:
    code, _, err = mrcore("submit", str(file), "--set", "job_priority=1", "--set", "job_priority=2")
    assert (code, err) == (2, "mrcore: --set job_priority is given twice: leave one of them out\n")
