"""A task that dies without a word, as by a fault in C: the error names what it had in hand, the log has its stack."""

from __future__ import annotations

import json
import mmap
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from clusters import TestCluster
from conditions import wait_until

from mrcore import task
from mrcore.engine.memory import MemoryWatch
from mrcore.errors import JobFault
from mrcore.queue import job as jobs
from mrcore.queue.runner import Runner
from mrcore.queue.scheduler import Scheduler

HEAD = "import ctypes, os, signal, sys\n"
MAP = "def count(line, auxiliary_data):\n    return [(word, 1) for word in line.split()]\n"
REDUCE = (
    "def add(group, auxiliary_data):\n    return [(group[0][0], sum(value for _, value in group))]\n"
    "def lossy(group, auxiliary_data):\n    return [(group[0][0], len(group))]\n"
)
LINES = "".join(f"word{n:04} of many\n" for n in range(2000)) + "the worst line\n" + "another line\n" * 300
STACK = "Fatal Python error: "


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestCluster]:
    """One node with one server."""
    with TestCluster(tmp_path_factory.mktemp("deaths"), 1, 1) as made:
        made.write_inputs({"lines.txt": LINES})
        yield made


def crash(line: str, how: str, function: str) -> str:
    """The text of a function whose work on `line` (or on the group of that key) ends by `how`."""
    return f"def {function}(this, auxiliary_data):\n    if {line}:\n        {how}\n"


seen: dict[str, Any] = {}  # the details of the last fault


def run(cluster: TestCluster, map_code: str, reduce_code: str, **keys: Any) -> tuple[str, Callable[[], str]]:
    """Run a job that fails; gives the fault's message, and what tells what was written to the server's log since."""
    project = cluster.settings.projects_dir / "deadly"
    project.mkdir(exist_ok=True)
    (project / "map_functions.py").write_text(HEAD + map_code)
    (project / "reduce_functions.py").write_text(HEAD + reduce_code)
    wanted = {
        "job_name": "deadly",
        "project_name": "deadly",
        "input_dirs": ["inputs/text"],
        "map_function_name": "count",
        "reduce_function_name": "add",
        "max_attempts": 2,
        "number_of_partitions": 2,
    }
    job = jobs.validate(jobs.template("mapreduce") | wanted | keys, cluster.settings.projects_dir)
    seen.clear()
    log = cluster.settings.nodes[0].layout.logs_dir / "S_0.log"
    before = log.stat().st_size
    with pytest.raises(JobFault) as caught:
        cluster.run(job)
    cluster.assert_clean()
    assert f"was tried {job['max_attempts']} times (max_attempts)" in caught.value.message
    assert caught.value.message.endswith("the log of S_0: mrcore logs S_0")
    seen.update(caught.value.details)
    return caught.value.message, lambda: log.read_bytes()[before:].decode()


def has_stack(log: Callable[[], str], last: str) -> bool:
    """Wait until the log has the stack of a crash whose last line is `last`."""
    return bool(wait_until(lambda: STACK in (text := log()) and re.search(last, text), 30, f"{last} in the log"))


KILL = "os.kill(os.getpid(), signal.SIGSEGV)"
POINTER = "ctypes.string_at(0)"


@pytest.mark.parametrize(
    ("how", "name"),
    [
        (KILL, "SIGSEGV"),
        (POINTER, "SIGSEGV"),
        ("os.abort()", "SIGABRT"),
        ("os.kill(os.getpid(), signal.SIGFPE)", "SIGFPE"),
        ("os.kill(os.getpid(), signal.SIGBUS)", "SIGBUS"),
    ],
)
def test_a_crash_in_a_map_function_names_the_file_the_place_and_the_log(
    cluster: TestCluster, how: str, name: str
) -> None:
    told, log = run(cluster, crash("this.startswith('the worst')", how, "count") + "    return []\n", REDUCE)
    assert f"was killed by {name} without a result" in told
    (found,) = re.findall(
        r"map function count, the lines from byte (\d+) of (\S+) on; the Python stack at its end", told
    )
    assert found[1].endswith("inputs/text/lines.txt")
    worst = LINES.index("the worst")
    assert int(found[0]) <= worst
    assert LINES[int(found[0]) : worst].count("\n") <= 600, "hundreds of lines, not the whole file"
    assert has_stack(log, r'\| .*map_functions.py", line 4 in count')
    assert seen["signal"] == signal.Signals[name] and seen["in_hand"] in told
    assert seen["stack"].startswith(STACK) and 'map_functions.py", line 4 in count' in seen["stack"]
    assert "threading.py" not in seen["stack"], "of the thread that crashed only"
    assert 0 < seen["memory_bytes"] < seen["budget_bytes"] and "oom" not in seen


def test_what_a_slow_function_had_in_hand_is_told_to_the_line(cluster: TestCluster) -> None:
    """Some hundred lines of it would be minutes."""
    slow = "    import time\n    time.sleep(0.02 if 'word001' in this else 0)\n"
    code = crash("this.startswith('word0019')", "time.sleep(0.5); " + KILL, "count").replace(
        "    if", f"{slow}    if", 1
    )
    told, _ = run(cluster, code + "    return []\n", REDUCE, max_attempts=1)
    (offset,) = re.findall(r"the lines from byte (\d+) of \S+lines.txt on", told)
    assert int(offset) == LINES.index("word0019")


def test_what_a_slow_reduce_function_had_in_hand_is_told_to_the_key(cluster: TestCluster) -> None:
    code = "import time\n" + crash("this[0][0] == 'word1500'", "time.sleep(0.5); " + KILL, "add") + "    return []\n"
    told, _ = run(cluster, MAP, code, max_attempts=1)
    assert "reduce function add, the groups from key 'word1500' on of partition" in told


@pytest.mark.parametrize(
    "keys", [{}, {"reduce_function_name": None}, {"max_number_dumped_items_shuffler": 100}], ids=str
)
def test_whatever_the_map_task_does_with_its_items_the_place_is_told(cluster: TestCluster, keys: Any) -> None:
    code = crash("this.startswith('the worst')", KILL, "count") + "    return [(this, 1)]\n"
    told, _ = run(cluster, code, REDUCE, **keys)
    (offset,) = re.findall(r"map function count, the lines from byte (\d+) of \S+lines.txt on", told)
    assert LINES[int(offset) : LINES.index("the worst")].count("\n") <= 600


@pytest.mark.parametrize("how", [KILL, POINTER])
@pytest.mark.parametrize("keys", [{}, {"disk_based_input": True}, {"partitioner": "range"}], ids=str)
def test_a_crash_in_a_reduce_function_names_the_partition_and_the_keys(
    cluster: TestCluster, how: str, keys: Any
) -> None:
    told, log = run(cluster, MAP, crash("this[0][0] == 'word1500'", how, "add") + "    return []\n", **keys)
    assert "was killed by SIGSEGV" in told
    (key, partition) = re.findall(r"reduce function add, the groups from key '(\w+)' on of partition (\d);", told)[0]
    assert key <= "word1500" and partition in "01"
    assert has_stack(log, r'reduce_functions.py", line 4 in add')


def test_a_crash_in_a_combiner_names_it(cluster: TestCluster) -> None:
    code = REDUCE + crash("this[0][0] == 'of'", KILL, "squeeze") + "    return this[:1]\n"
    told, _ = run(cluster, MAP, code, combine_function_name="squeeze")
    assert re.search(r"it had in hand: combiner squeeze, \d+ groups, the first of key 'word0000'", told), told


def test_a_crash_while_the_project_is_imported_says_so(cluster: TestCluster) -> None:
    told, log = run(cluster, KILL + "\n" + MAP, REDUCE)
    assert "it had in hand: the import of project deadly;" in told
    assert has_stack(log, 'map_functions.py", line 2 in <module>')


@pytest.mark.parametrize(("how", "says"), [("os._exit(3)", "exit status 3"), (KILL.replace("SEGV", "KILL"), "SIGKILL")])
def test_any_death_without_a_word_says_what_was_in_hand(cluster: TestCluster, how: str, says: str) -> None:
    told, log = run(cluster, crash("this.startswith('the worst')", how, "count") + "    return []\n", REDUCE)
    assert says in told and re.search(r"the lines from byte \d+ of \S+lines.txt on; see the log of S_0", told)
    assert STACK not in log() and "stack" not in seen and "oom" not in seen
    assert bool(re.search(r"was killed by SIGKILL .*; it held up to [\d.]+ MB, with a budget of [\d.]+ MB;", told)) == (
        "KILL" in says
    )


def test_a_file_with_a_hostile_name_is_told_clean_and_short(cluster: TestCluster) -> None:
    name = "\x1b[31m" + "é\u202e" * 40 + ".txt"
    cluster.write_inputs({name: "line\n"}, entry="inputs/hostile")
    told, _ = run(cluster, crash("True", KILL, "count"), REDUCE, input_dirs=["inputs/hostile"])
    assert "\\x1b[31mé\\u202e" in told and "\x1b" not in told and "\u202e" not in told
    assert told.isprintable() and len(told) < 2000


def test_what_a_function_writes_over_the_note_does_no_harm(cluster: TestCluster) -> None:
    code = "from mrcore import task\ndef count(this, auxiliary_data):\n    task._note[:] = b'\\xff' * 4096\n    " + KILL
    told, _ = run(cluster, code + "\n", REDUCE)
    assert "was killed by SIGSEGV" in told and len(told) < 10_000
    told.encode()


@pytest.mark.slow
def test_the_history_of_a_job_has_signal_place_memory_and_stack(tmp_path: Path) -> None:
    with TestCluster(tmp_path, 1, 1) as made:
        made.write_inputs({"one.txt": "a line\n"})
        code = HEAD + crash("True", POINTER, "count")
        (tmp_path / "projects/gated/map_functions.py").write_text(code)
        settings = made.settings
        keys = {"map_function_name": "count", "reduce_function_name": None, "combine_function_name": None}
        Scheduler(settings).submit_job(made.job(**keys))
        assert Runner(settings).run(once=True) == {"failed": 1}
        (entry,) = Scheduler(settings).history()
    details = json.loads(json.dumps(entry["exception"]["details"]))
    assert details["signal"] == signal.SIGSEGV and "one.txt" in details["in_hand"]
    assert 'map_functions.py", line 4 in count' in details["stack"] and details["memory_bytes"] > 0


def test_a_crash_in_try_leaves_the_stack_on_the_terminal(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "p/map_functions.py").write_text(HEAD + crash("True", POINTER, "count"))
    (tmp_path / "in.txt").write_text("line\n")
    command = [str(Path(sys.executable).with_name("mrcore")), "try", str(tmp_path / "p"), "--map", "count"]
    done = subprocess.run([*command, str(tmp_path / "in.txt")], capture_output=True, text=True, timeout=60)
    assert done.returncode == -11
    assert STACK in done.stderr and 'map_functions.py", line 4 in count' in done.stderr


def test_noting_what_is_in_hand_takes_little_whatever_it_costs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys of megabytes took milliseconds to describe, every two milliseconds."""
    asked: list[float] = []

    def refine() -> str:
        end = time.thread_time() + 0.01
        while time.thread_time() < end:
            pass
        asked.append(end)
        return "a large key"

    monkeypatch.setattr(task, "_note", mmap.mmap(-1, task.NOTE_BYTES))
    task.in_hand("something", refine)
    try:
        with MemoryWatch(1 << 30):
            wait_until(lambda: asked, 10, "the first look")
            end = time.monotonic() + 0.5
            while time.monotonic() < end:
                pass
    finally:
        task.in_hand("")
    assert len(asked) <= 2, "a hundredth of the time, so once a second"
