"""Whatever user code raises, and wherever: the task ends at once and says function, place, line and causes, bounded."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from conditions import wait_until
from run_task import PROJECT, Task, source

from mrcore.engine.inputs import plan_bundles

MANY = 20_000
# What the function does, and what the error must say.
RAISED = {
    "raise KeyboardInterrupt": "KeyboardInterrupt (",
    "raise GeneratorExit('closed')": "GeneratorExit: closed",
    "import asyncio; raise asyncio.CancelledError": "CancelledError (",
    "raise SystemExit(3)": "SystemExit: 3",
    "raise StopIteration('over')": "StopIteration: over",
    "raise type('Stop', (BaseException,), {})('halt')": "Stop: halt",
    "raise ValueError('x' * 30_000_000)": "ValueError: xxx",
    "raise ValueError('\\ud83d \\x1b[31m\\n\\u202e')": r"ValueError: \ud83d \x1b[31m\n\u202e (",
    "raise OSError(5, 'no\\ud83d', 'file')": "OSError: ",
    "raise BadStr": "BadStr: <BadStr whose __str__ raises",
    "raise BadAll": "BadAll: ",
    "raise Nasty('told')": "Nasty: <Nasty whose __str__ raises RuntimeError>",
    "raise Unpicklable(lambda: 1)": "Unpicklable: <function",
    "f = lambda: f()\n    f()": "RecursionError: maximum recursion depth",
    "raise MemoryError": "MemoryError (",
    "raise SyntaxError('of our own')": "SyntaxError: of our own",
    "raise BadItem('mine')": "BadItem: mine",
    "raise ClusterFault('not mine')": "ClusterFault: not mine",
    "raise TaskDied('not mine')": "TaskDied: not mine",
    "raise BaseExceptionGroup('both', [ValueError('one'), KeyboardInterrupt('two')])": "both (2 sub-exceptions)",
    "raise ExceptionGroup('g', [ValueError(n) for n in range(MANY)])": "ExceptionGroup: g (20000 sub-exceptions)",
}
PREAMBLE = f"""
from mrcore.errors import ClusterFault, TaskDied
from mrcore.engine.records import BadItem
MANY = {MANY}
class BadStr(Exception):
    def __str__(self): raise KeyboardInterrupt
class BadAll(BaseException):
    def __str__(self): return 5
    __repr__ = __str__
class Meta(type):
    @property
    def __name__(cls): raise SystemExit
class Nasty(Exception, metaclass=Meta):
    __class__ = __cause__ = __context__ = __traceback__ = __suppress_context__ = property(lambda self: 1 // 0)
    def __getattribute__(self, name): raise RuntimeError(name)
    def __str__(self): return self.anything
class Unpicklable(Exception):
    def __reduce__(self): raise TypeError('no')
"""


def failed(
    folder: Path, map_code: str, reduce_code: str = "", expected: str = "JobFault", **job: Any
) -> dict[str, Any]:
    """Have a task process run this code over one line; gives the error of its one and only end."""
    (folder / "in.txt").write_text("first\nsecond line\n")
    made = Task(folder, PREAMBLE + map_code, PREAMBLE + reduce_code if reduce_code else "", **job)
    bundles = plan_bundles(made.files([folder / "in.txt"]), 1)
    order = {"identity": {"job": "j", "run": 1, "phase": "MAP", "task": 0, "try": 1}, "job": made.job}
    order |= {"project": PROJECT, "partitions": 1, "node": "n", "memory_bytes": 256 << 20}
    end = made.obey(order | {"bundles": msgspec.to_builtins(bundles), "no_more": True, "sample_by_lines": True})
    if end["event"] == "done":
        identity = order["identity"] | {"phase": "REDUCE"}
        reducing = {"partition": 0, "sources": [source("n", end["result"]["runs"])], "identity": identity}
        end = made.obey(order | reducing)
    assert end.get("event") == "failed", made.messages
    json.dumps(end, ensure_ascii=False).encode()
    assert len(json.dumps(end)) < 200_000
    error: dict[str, Any] = end["error"]
    assert error["class"] == expected, error  # JobFault: final, no other try
    return error


@pytest.mark.parametrize("code", RAISED)
def test_what_a_map_function_raises_fails_the_job_at_once_by_name_and_place(tmp_path: Path, code: str) -> None:
    error = failed(tmp_path, f"def m(line, aux):\n    if line == 'first\\n': return []\n    {code}\n")
    assert error["message"].startswith(f"map function m failed at {tmp_path}/in.txt, byte 6: 'second line': ")
    assert RAISED[code] in error["message"]
    assert "(map_functions.py, line " in error["message"] and "\n" not in error["message"]
    details = error["details"]
    assert (details["function"], details["file"], details["offset"]) == ("m", str(tmp_path / "in.txt"), 6)
    assert details["line"] == "second line\n"
    assert "Traceback (your code, most recent call last):" in details["traceback"]
    assert "in m\n" in details["traceback"] and "/mrcore/engine/mapper.py" not in details["traceback"]


PLACES = {
    "generator": ("def m(line, aux):\n    yield line, 1\n    {}\n", "", "map function m failed at "),
    "iterator": (
        "class It:\n  def __iter__(self): return self\n  def __next__(self):\n    {}\ndef m(l, a): return It()\n",
        "",
        "map function m failed at ",
    ),
    "load": ("def f():\n    {}\nf()\ndef m(l, a): ...\n", "", "loading m from map_functions.py failed: "),
    "factory": (
        "class MapFunctions:\n  def __init__(self, name):\n    {}\n",
        "",
        "loading m from map_functions.py failed: ",
    ),
    "attribute": ("def __getattr__(name):\n    {}\n", "", "loading m from map_functions.py failed: "),
    "reduce": (
        "def m(l, a): yield 'k', 1\n",
        "def r(g, a):\n    {}\n",
        "reduce function r failed on the group of key 'k': ",
    ),
    "reduce generator": (
        "def m(l, a): yield 'k', 1\n",
        "def r(g, a):\n    yield g[0]\n    {}\n",
        "reduce function r failed on the group of key 'k': ",
    ),
    "combine": (
        "def m(l, a): yield 'k', 1\n",
        "def r(g, a): return g\ndef c(g, a):\n    {}\n",
        "combiner c failed on key 'k': ",
    ),
    "load of reduce": (
        "def m(l, a): yield 'k', 1\n",
        "def f():\n    {}\nf()\n",
        "loading r from reduce_functions.py failed: ",
    ),
    "DiskList": (
        "def m(l, a): yield 'k', 1\n",
        "def r(g, a):\n    a[0].extend(e for e in G())\n    return a[0]\n"
        "class G:\n  def __iter__(self):\n    yield 'k', 1\n    {}\n",
        "reduce function r failed on the group of key 'k': ",
    ),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("code", ["raise KeyboardInterrupt", "raise BadStr", "raise ClusterFault('not mine')"])
def test_wherever_it_is_raised(tmp_path: Path, place: str, code: str) -> None:
    map_code, reduce_code, said = PLACES[place]
    more = {"combine_function_name": "c"} if place == "combine" else {}
    more |= {"disk_based_output": True} if place == "DiskList" else {}
    error = failed(tmp_path, map_code.format(code), reduce_code.format(code), **more)
    assert error["message"].startswith(said)
    assert code.split()[1].split("(")[0] in error["message"]
    assert "_functions.py, line " in error["message"]
    assert "Traceback (your code" in error["details"]["traceback"]


def test_an_item_that_a_disk_list_refuses_names_the_line_of_user_code(tmp_path: Path) -> None:
    reduce_code = "def r(g, a):\n    a[0].append(('k', {1, 2}))\n    return a[0]\n"
    error = failed(tmp_path, "def m(l, a): yield 'k', 1\n", reduce_code, disk_based_output=True)
    assert "reduce function r failed on the group of key 'k': BadItem: the value {1, 2}" in error["message"]
    assert "(reduce_functions.py, line " in error["message"]


def test_the_chain_of_causes_and_the_members_of_a_group_are_told_in_pythons_order(tmp_path: Path) -> None:
    code = """
def m(line, aux):
    try:
        try:
            {}["field"]
        except KeyError as error:
            raise ValueError("bad record") from error
    except ValueError:
        raise ExceptionGroup("both", [OSError("left"), ExceptionGroup("inner", [TypeError("right")])])
"""
    text = failed(tmp_path, code)["details"]["traceback"]
    order = ["KeyError: 'field'", "was the direct cause of", "ValueError: bad record", "During handling of"]
    order += ["ExceptionGroup: both", "OSError: left", "ExceptionGroup: inner", "TypeError: right"]
    places = [text.index(part) for part in order]
    assert places == sorted(places), text


def test_notes_of_an_exception_are_told(tmp_path: Path) -> None:
    code = "e = ValueError('x')\n    e.add_note('of record 7 \\x1b[31m')\n    e.__notes__ += [5, BadStr()]\n    raise e"
    text = failed(tmp_path, f"{PREAMBLE}def m(line, aux):\n    {code}\n")["details"]["traceback"]
    assert "ValueError: x\nof record 7 \\x1b[31m\n5\n<BadStr whose __str__ raises KeyboardInterrupt>" in text


@pytest.mark.parametrize(
    "code",
    [
        "e = ValueError(0)\n    for n in range(20_000):\n        f, e = e, ValueError(n)\n"
        "        e.__cause__ = f\n    raise e",
        "e = ValueError(0)\n    e.__cause__ = f = KeyError(1)\n    f.__cause__ = e\n    raise e",
        "e = ValueError(0)\n    for n in range(500):\n        e = ExceptionGroup('g', [e, e, e])\n    raise e",
        "raise ValueError('x') from None",
    ],
)
def test_endless_chains_of_causes_end(tmp_path: Path, code: str) -> None:
    error = failed(tmp_path, f"def m(line, aux):\n    {code}\n")
    assert len(error["details"]["traceback"]) < 25_000


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ("map(int, ['x'])", "failed at"),
        ("map(open, ['/nowhere'])", "failed at"),
        ("5", "returned no iterable of (key, value) pairs"),
        ("[('a', 1, 2)]", "emitted a bad item"),
    ],
)
def test_what_is_returned_and_cannot_be_read_names_the_line_of_input(tmp_path: Path, returned: str, said: str) -> None:
    error = failed(tmp_path, f"def m(line, aux): return {returned}\n")
    assert error["message"].startswith(f"map function m {said}") and "byte 0" in error["message"]


def test_a_task_that_gets_sigint_says_so_and_may_be_tried_again(tmp_path: Path) -> None:
    code = "import os, signal\ndef m(line, aux):\n    os.kill(os.getpid(), signal.SIGINT)\n    while True: pass\n"
    error = failed(tmp_path, code, expected="TaskDied")
    assert "was interrupted: somebody sent it SIGINT" in error["message"]


def mrcore_try(folder: Path, code: str, *arguments: str) -> subprocess.Popen[str]:
    (folder / "map_functions.py").write_text(PREAMBLE + code)
    (folder / "in.txt").write_text("first\n")
    command = [str(Path(sys.executable).with_name("mrcore")), "try", str(folder), str(folder / "in.txt")]
    return subprocess.Popen(
        [*command, "--map", "m", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("code", ["raise KeyboardInterrupt", "raise SystemExit(0)", "raise BadStr", "raise Nasty()"])
def test_mrcore_try_tells_them_as_well(home: Path, code: str) -> None:
    process = mrcore_try(home, f"def m(line, aux):\n    {code}\n")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err.count("\n")) == (1, "", 1)
    assert err.startswith(f"mrcore: map function m failed at {home}/in.txt, byte 0: 'first': ")


def test_ctrl_c_ends_mrcore_try_as_an_interruption(home: Path) -> None:
    process = mrcore_try(
        home, f"def m(line, aux):\n    open({str(home / 'here')!r}, 'w').close()\n    while True: pass\n"
    )
    wait_until((home / "here").exists, 60, "the map function runs")
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err.strip()) == (130, "", "")
