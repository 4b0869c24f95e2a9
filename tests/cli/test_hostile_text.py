"""Random bytes as job files, errors, records, names, arguments, surroundings: one clear line, and the queue drains."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from clusters import TestCluster
from commands import MRCORE, UNFIT
from fake_cluster import FakeCluster
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from mrcore.cli import main as cli
from mrcore.errors import JobFault, MrcoreError
from mrcore.queue.job import template
from mrcore.queue.runner import Runner
from mrcore.queue.scheduler import Scheduler
from mrcore.settings.config import Settings, load_settings

ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=60)
NASTY = st.sampled_from(
    ["\ud83d", "\x1b]0;t\x07", "a\nmrcore: all is well", "\0", "[/bold]", "%s", "{0}", "\u202e", "'\"`$(x)"]
)
ANY_VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT | NASTY,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(ANY_TEXT | NASTY, inner, max_size=4),
    max_leaves=10,
)
BASE = {
    "job_name": "x",
    "project_name": "word_count",
    "map_function_name": "count_map",
    "input_dirs": ["i"],
    "run_once": True,
}
KEYS = st.sampled_from(sorted({key for kind in ("mapreduce", "script", "file_transfer") for key in template(kind)}))
QUIET = settings(deadline=None, suppress_health_check=list(HealthCheck))
BRIEF = settings(QUIET, phases=[Phase.explicit, Phase.reuse, Phase.generate])  # starts processes: no shrinking


def call(*arguments: str) -> tuple[int, str, str]:
    """`mrcore …` in this process, with streams that take UTF-8 only, as a strict terminal or file does."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", "strict") for _ in range(2))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main(list(arguments))
        except SystemExit as left:
            code = left.code
        texts = []
        for stream in (out, err):
            stream.flush()
            texts.append(stream.buffer.getvalue().decode())  # type: ignore[attr-defined]
    for text in texts:
        assert not UNFIT.search(text) and not re.search("^Traceback", text, re.MULTILINE), (arguments, texts)
        assert "mrcore: internal error" not in text
        assert "\nmrcore: all is well" not in text
    assert isinstance(code, int)
    return code, texts[0], texts[1]


def drain(found: Settings) -> None:
    """A Runner of its own; nothing may be left in the queue, whatever the jobs are."""
    Runner(found, FakeCluster(found)).run(once=True)
    assert json.loads(call("queue", "--json")[1])["jobs"] == []
    for command in (["queue"], ["history"], ["history", "--json"], ["show", "x"], ["show", "x", "--json"]):
        code, _, err = call(*command)
        assert code == 0 or (command[0] == "show" and "is not known" in err)


@pytest.fixture(scope="module")
def quiet_home() -> Iterator[Settings]:
    """One home with a project for all examples of a test."""
    before, cwd = dict(os.environ), Path.cwd()
    with tempfile.TemporaryDirectory() as name:
        os.environ["MRCORE_HOME"] = name + "/home"
        os.environ.pop("MRCORE_CONFIG", None)
        os.chdir(name)
        project = Path(name, "projects/word_count")
        project.mkdir(parents=True)
        (project / "map_functions.py").write_text("def count_map(line, aux): ...\n")
        yield load_settings().model_copy(update={"max_attempts": 1, "hold_backoff_first_seconds": 0.01})
        os.chdir(cwd)
        os.environ.clear()
        os.environ.update(before)


@settings(QUIET, max_examples=30)
@given(st.binary(max_size=200) | ANY_TEXT.map(lambda text: f"job_name: {text}\n".encode(errors="surrogatepass")))
def test_job_files_of_random_bytes(quiet_home: Settings, content: bytes) -> None:
    Path("job.yml").write_bytes(content)
    for command in ("submit", "run"):
        code, out, err = call(command, "job.yml")
        assert (code, out, err.count("\n")) == (2, "", 1), err
    assert call("plan", "job.yml")[0] in (1, 2)


@settings(QUIET, max_examples=20)
@given(st.dictionaries(KEYS, ANY_VALUE, max_size=3), st.booleans(), st.dictionaries(ANY_TEXT, ANY_VALUE, max_size=1))
def test_jobs_of_random_values(quiet_home: Settings, values: dict[str, Any], known: bool, more: dict[str, Any]) -> None:
    job = BASE | values | ({} if known else more) | {"run_once": True}
    Path("job.json").write_text(json.dumps(job))
    assert call("plan", "job.json")[0] in (0, 1, 2) and call("plan", "job.json", "--json")[0] in (0, 1, 2)
    for submit in (lambda: Scheduler(quiet_home).submit_job(dict(job)), lambda: call("submit", "job.json")):
        Path("job.json").write_text(json.dumps(job))
        with contextlib.suppress(MrcoreError):
            answer = submit()
            if isinstance(answer, tuple):
                assert answer[0] in (0, 2) and answer[2].count("\n") == 1, answer
        for row in Scheduler(quiet_home).queue():
            if row["not_before"] or row["job_type"] != "mapreduce":
                Scheduler(quiet_home).delete_job(row["job_name"])
        drain(quiet_home)


@settings(QUIET, max_examples=20)
@given(ANY_TEXT | NASTY, ANY_VALUE, st.sampled_from([JobFault, MrcoreError, ValueError, KeyboardInterrupt, OSError]))
def test_errors_of_random_text(quiet_home: Settings, text: str, value: Any, kind: type[BaseException]) -> None:
    class Cluster(FakeCluster):
        def run(self, job: dict[str, Any], **facts: Any) -> dict[str, Any]:
            if job["job_name"] == "good":
                return super().run(job, **facts)
            raise kind(text, **{"line": text, text: value}) if issubclass(kind, MrcoreError) else kind(text, value)

    scheduler = Scheduler(quiet_home)
    scheduler.submit_jobs([dict(BASE), BASE | {"job_name": "good", "job_priority": -1}])
    assert Runner(quiet_home, Cluster(quiet_home)).run(once=True) == {"failed": 1, "succeeded": 1}
    drain(quiet_home)


def clean_run(
    *arguments: str | bytes, cwd: Path, environment: dict[bytes, bytes] | None = None
) -> tuple[int, bytes, str]:
    """The real command; gives status, what it printed, and its complaint, which must be sound."""
    given = os.environb.copy() | (environment or {})
    done = subprocess.run([MRCORE, *arguments], cwd=cwd, env=given, capture_output=True, timeout=120, check=False)
    err = done.stderr.decode()
    assert not UNFIT.search(err) and "Traceback" not in err and "internal error" not in err, (arguments, err)
    assert b"\nTraceback" not in done.stdout and b"\nmrcore: all is well" not in done.stdout + done.stderr
    return done.returncode, done.stdout, err


ARGUMENT = st.binary(max_size=30).map(lambda text: text.replace(b"\0", b"")) | NASTY.filter(
    lambda text: text != "\0"
).map(lambda text: text.encode(errors="surrogatepass"))


@settings(BRIEF, max_examples=10)
@given(st.sampled_from(sorted(cli.cli.commands)), st.lists(ARGUMENT, max_size=3))
def test_arguments_of_random_bytes(quiet_home: Settings, command: str, arguments: list[bytes]) -> None:
    starts = ("cluster", "run", "try", "attach", "demo", "test", "dashboard")
    if command in (*starts, "pause"):  # which would start something, run code, stop the queue
        command = "show"
    status, _, err = clean_run(command, "--", *arguments, cwd=Path.cwd())
    assert status in (0, 1, 2) and (err.count("\n") <= 2 or err.startswith("Usage: ")), err


VARIABLES = [
    b"MRCORE_HOME",
    b"MRCORE_CONFIG",
    b"LANG",
    b"LC_ALL",
    b"TERM",
    b"COLUMNS",
    b"HOME",
    b"USER",
    b"TZ",
    b"NO_COLOR",
]


@settings(BRIEF, max_examples=10)
@given(
    st.dictionaries(st.sampled_from(VARIABLES), ARGUMENT, min_size=1, max_size=4),
    st.sampled_from(["queue", "settings", "run"]),
)
def test_surroundings_of_random_bytes(quiet_home: Settings, environment: dict[bytes, bytes], command: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        given = {b"HOME": os.fsencode(folder), b"MRCORE_HOME": os.fsencode(folder) + b"/h"} | environment
        arguments = [command, "--once"] if command == "run" else [command]
        status, _, err = clean_run(*arguments, cwd=Path(folder), environment=given)
        assert status in (0, 1, 2) and err.count("\n") <= 1, err


# --- on a real cluster ------------------------------------------------------------------------------------------

CODE = """
def count(line, aux): yield line.rstrip("\\n"), 1
def fail(line, aux): raise ValueError(line)
def half(line): return line.encode().decode("ascii", "surrogateescape")
def stray(line, aux): raise BaseExceptionGroup(line, [OSError(half(line)), KeyError(line)])
def emit(line, aux): yield half(line), {line: [line]}
"""
NAMES = st.binary(min_size=1, max_size=40).map(lambda name: name.translate(None, b"\0/") or b"_")
ODD_NAMES = st.sampled_from(
    [b"new\nline", b"\x1b[31m", b"[bold]", b"caf\xe9", b"\xed\xa0\xbd", b"%s{0}", b"*", b" ", b"-x", b"\\n"]
)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestCluster]:
    folder = tmp_path_factory.mktemp("hostile")
    with TestCluster(folder, 1, 1) as made:
        project = folder / "projects/hostile"
        project.mkdir()
        (project / "map_functions.py").write_text(CODE)
        (project / "reduce_functions.py").write_text("def add(group, aux): return [(group[0][0], len(group))]\n")
        yield made


@pytest.mark.slow
@settings(BRIEF, max_examples=10)
@given(
    st.dictionaries(NAMES | ODD_NAMES, st.binary(max_size=60), min_size=1, max_size=3),
    st.sampled_from(["count", "fail", "stray", "emit"]),
    st.sampled_from(["fail", "replace"]),
)
def test_names_and_records_of_random_bytes_on_a_cluster(
    cluster: TestCluster, files: dict[bytes, bytes], function: str, on_bad_text: str
) -> None:
    base = cluster.settings.nodes[0].layout.base_dir
    environment = {b"MRCORE_HOME": os.fsencode(cluster.settings.home)}
    with tempfile.TemporaryDirectory(dir=base) as odd, tempfile.TemporaryDirectory(dir=base) as plain:
        for name, content in files.items():
            Path(os.fsdecode(os.path.join(os.fsencode(odd), name))).write_bytes(content)
        Path(plain, "a.txt").write_text("one\ntwo\none\n")
        shared = {"project_name": "hostile", "reduce_function_name": "add", "run_once": True}
        hostile = {"job_name": "odd", "map_function_name": function, "input_dirs": [odd], "on_bad_text": on_bad_text}
        innocent = {"job_name": "good", "map_function_name": "count", "input_dirs": [plain], "job_priority": -1}
        Path(cluster.folder, "jobs.json").write_text(json.dumps([shared | hostile, shared | innocent]))
        assert clean_run("submit", "jobs.json", cwd=cluster.folder, environment=environment)[0] == 0
        status, out, err = clean_run("run", "--once", cwd=cluster.folder, environment=environment)
        assert b"good run " in out and b": succeeded\n" in out, (out, err)
        assert sorted(cluster.items("good")) == [["one", 2], ["two", 1]]
        queue = json.loads(clean_run("queue", "--json", cwd=cluster.folder, environment=environment)[1])
        assert queue["jobs"] == [] and queue["hold"] is None
        last = str(Scheduler(cluster.settings).history("odd")[0]["run"])
        shown = (["show", "odd"], ["history"], ["show", "odd", "--json"], ["show", "odd", "--run", last], ["watch"])
        for command in (*shown, ["logs", "odd"]):
            status_of_it, text, _ = clean_run(*command, cwd=cluster.folder, environment=environment)
            assert status_of_it == 0 and not UNFIT.search(text.decode())
        assert clean_run("plan", "jobs.json", cwd=cluster.folder, environment=environment)[0] in (0, 1)
        (run, *_) = Scheduler(cluster.settings).history("odd")
        expected = _expected(files, function, on_bad_text)
        if isinstance(expected, Counter):
            assert (status, run["state"]) == (0, "succeeded"), run
            assert Counter(dict(cluster.items("odd"))) == expected
        else:
            assert (status, run["state"]) == (1, "failed")
            assert expected in run["exception"]["message"]
            assert err.count("\n") == 2  # the run, and the sum


@pytest.mark.slow
@pytest.mark.parametrize("shell", ["| head -n 1", ">&-", ">/dev/full 2>&1", "2>&1 | true", ">&- 2>&-"])
def test_whoever_reads_the_runner_each_run_is_recorded_once(cluster: TestCluster, shell: str) -> None:
    base = cluster.settings.nodes[0].layout.base_dir
    environment = {b"MRCORE_HOME": os.fsencode(cluster.settings.home)}
    scheduler = Scheduler(cluster.settings)
    before = len(scheduler.history())
    with tempfile.TemporaryDirectory(dir=base) as folder:
        Path(folder, "a.txt").write_text("one\n")
        jobs = {"one": "count", "two": "fail", "three": "count", "four": "fail"}
        shared = {"project_name": "hostile", "reduce_function_name": "add", "run_once": True, "input_dirs": [folder]}
        scheduler.submit_jobs([shared | {"job_name": name, "map_function_name": does} for name, does in jobs.items()])
        command = f"{MRCORE} run --once {shell}"
        given = os.environb.copy() | environment
        for _ in range(2):  # the second Runner finds nothing to do
            done = subprocess.run(
                ["bash", "-c", command], cwd=cluster.folder, env=given, capture_output=True, timeout=120, check=False
            )
            assert b"Traceback" not in done.stderr
        runs = scheduler.history(limit=len(scheduler.history()) - before)
    assert Counter((run["job_name"], run["state"]) for run in runs) == Counter(
        {(name, "succeeded" if does == "count" else "failed"): 1 for name, does in jobs.items()}
    )
    scheduler.store.check()


@pytest.mark.slow
def test_inputs_that_nobody_foresaw_cost_their_job_only(cluster: TestCluster) -> None:
    """A tree too deep for recursion and for the kernel's longest path, and 3,000 links to nowhere."""
    base = cluster.settings.nodes[0].layout.base_dir
    scheduler = Scheduler(cluster.settings)
    with tempfile.TemporaryDirectory(dir=base) as deep, tempfile.TemporaryDirectory(dir=base) as links:
        handle = os.open(deep, os.O_RDONLY)
        for _ in range(1200):
            os.mkdir("d", dir_fd=handle)
            below = os.open("d", os.O_RDONLY, dir_fd=handle)
            os.close(handle)
            handle = below
        os.close(handle)
        for number in range(3000):
            os.symlink("/nonexistent/place", f"{links}/link-{number}")
        Path(base, "good.txt").write_text("one\n")
        shared = {"project_name": "hostile", "map_function_name": "count", "run_once": True}
        jobs = {"deep": f"{deep}/**/*.txt", "links": links, "good": str(base / "good.txt")}
        for number, (name, entry) in enumerate(jobs.items()):
            scheduler.submit_job(shared | {"job_name": name, "input_dirs": [entry], "job_priority": -number})
        quick = cluster.settings.model_copy(update={"hold_backoff_first_seconds": 0.1})
        Runner(quick).run(once=True)
        subprocess.run(["rm", "-rf", deep], check=True)
        Path(deep).mkdir()
    assert scheduler.queue() == [] and scheduler.state()["hold"] is None
    assert scheduler.history("good")[0]["state"] == "succeeded"
    (told,) = scheduler.history("links")
    assert told["state"] == "failed" and len(json.dumps(told)) < 30_000
    assert "and 2,9" in told["exception"]["message"] and len(told["exception"]["message"]) < 5_000


def test_a_script_that_prints_random_bytes_fails_by_its_last_line(quiet_home: Settings) -> None:
    said = "caf\\xe9 \\x1b]0;title\\x07 \\xed\\xa0\\xbd"
    Path("script.py").write_text(f"import os, sys\nos.write(1, b'{said}')\nsys.exit(b'{said}' * 100_000)\n")
    scheduler = Scheduler(quiet_home)
    scheduler.submit_job({"job_type": "script", "job_name": "x", "script_location": "script.py", "run_once": True})
    ended = Runner(quiet_home).run(once=True)
    assert ended == {"failed": 1}, (scheduler.state(), scheduler.queue(), scheduler.history())
    drain(quiet_home)


def _expected(files: dict[bytes, bytes], function: str, on_bad_text: str) -> Counter[str] | str:
    """What must come of it: the lines counted by plain Python, or a part of the error."""
    if not all(map(_is_utf8, files)):
        return "is not UTF-8: rename the file"
    read = [content for name, content in files.items() if not name.startswith(b".") and not name.endswith(b".partial")]
    if not read:
        return "matches no file"
    lines = [line for content in read for line in re.findall(rb"[^\n]*\n|[^\n]+", content)]
    if on_bad_text == "fail" and any(not _is_utf8(line) for line in lines):
        return ""  # whichever comes first: the text, or what the function makes of a line before it
    texts = [line.decode(errors="replace") for line in lines]
    if function == "count" or not texts:
        return Counter(text.rstrip("\n") for text in texts)
    if function == "emit":
        return Counter(texts) if all(map(str.isascii, texts)) else "map function emit emitted a bad item: the key "
    return f"map function {function} failed at "


def _is_utf8(content: bytes) -> bool:
    try:
        return content.decode() is not None
    except UnicodeDecodeError:
        return False
