"""Functions of a script as a project: what they use arrives with them, errors name where they were written."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from checkout import SUPPORT
from hypothesis import given
from hypothesis import strategies as st

from mrcore.errors import UsageError
from mrcore.face import modules, packing, sources

SCRIPT = '''\
import json as js
import os.path
import re
import xml.etree.ElementTree
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from math import floor as down

import own_helper
from own_package import shout
from mrcore import task

WORD = re.compile(r"[a-zé]+", re.IGNORECASE)
STOP = {"the", "a"}
NESTED = {"weights": [1, 2.5, None, (True,)], b"raw": frozenset({1})}
unused = open(__file__)


@dataclass
class Word:
    text: str
    """Two lines of text,
    that are indented."""

    def size(self) -> int:
        return len(self.text)


class Longer(Word):
    def size(self) -> int:
        return super().size() + NESTED["weights"][0]


@lru_cache
def normal(text: str) -> str:
    return text.lower()


def even(n):
    return n == 0 or odd(n - 1)


def odd(n):
    return n != 0 and even(n - 1)


def words(line, auxiliary_data, longer=Longer):
    task.count("lines")
    root = xml.etree.ElementTree.fromstring(js.loads('"<a/>"')).tag
    for text in WORD.findall(line):
        if normal(text) not in STOP:
            word = longer(text)
            yield shout(normal(text)), [word.size(), even(word.size()), down(2.5), root, own_helper.twice(1)]


def add(group, auxiliary_data):
    return [(group[0][0], Counter(str(value) for _, value in group))]


def failing(line, auxiliary_data):
    def inner():
        return [int(word) for word in line.split()]
    return inner()


pick = lambda line, auxiliary_data: [(len(line), os.path.basename(line.strip()))]


def outer():
    def inside(line, auxiliary_data):
        text = """one
            two"""
        return [(text, 1 // (len(line) - 1))]
    return inside


def closing(n):
    def closed(line, auxiliary_data):
        return [(n, 1 // len(line.strip()))]
    return closed
'''
HELPERS = {
    "own_helper.py": "import own_other\n\n\ndef twice(n):\n    return own_other.FACTOR * n\n",
    "own_other.py": "FACTOR = 2\n",
    "own_package/__init__.py": "from own_package.inner import shout as shout\n",
    "own_package/inner.py": "def shout(text):\n    return text + '!'\n",
    "own_package/data.txt": "goes along\n",
    "own_package/.hidden": "does not\n",
}
TEXT = "The cat saw a dog\nCAT and Bär\n"


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """SCRIPT as Python runs a file: a module that nobody can import, with modules of its own beside it."""
    for name, text in (HELPERS | {"script.py": SCRIPT}).items():
        path = tmp_path / "work" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path / "work")
    for name in ("own_helper", "own_other", "own_package", "own_package.inner"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    spec = importlib.util.spec_from_file_location("script", tmp_path / "work/script.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "script", module)  # dataclasses look there
    spec.loader.exec_module(module)
    monkeypatch.delitem(sys.modules, "script")
    module.unused.close()
    return module


def packed(folder: Path, may_pickle: bool = True, **functions: Any) -> tuple[Path, dict[str, str]]:
    """Write a project of these functions: map=…, reduce=…; return its folder, and the names of the functions."""
    made = packing.pack({f"{key}_function_name": function for key, function in functions.items()}, may_pickle)
    packing.write(made, folder, set())
    return folder / made.name, made.functions


def tried(project: Path, names: dict[str, str], text: str, tmp_path: Path) -> tuple[int, str, str]:
    """Run a project as a task does, in a process that knows nothing of the script."""
    (tmp_path / "input.txt").write_text(text)
    request = {"project_dir": str(project), "map_name": names["map_function_name"], "inputs": ["input.txt"]}
    request |= {"reduce_name": names.get("reduce_function_name"), "combine": None, "auxiliary_file": None}
    command = [sys.executable, "-P", "-m", "mrcore.engine.trial", json.dumps(request | {"packages": None})]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout, done.stderr


def line_of(code: str) -> int:
    """The number of the line of SCRIPT that has this."""
    (number,) = [number for number, line in enumerate(SCRIPT.splitlines(), 1) if code in line]
    return number


def called(function: Callable[..., Any], text: str) -> list[Any]:
    """What a map function gives when it is simply called."""
    items = [item for line in text.splitlines(keepends=True) for item in function(line, None)]
    return json.loads(json.dumps(items))  # type: ignore[no-any-return]


def test_what_a_function_uses_arrives_with_it(script: ModuleType, tmp_path: Path) -> None:
    project, names = packed(tmp_path / "projects", False, map=script.words)
    (tmp_path / "work").rename(tmp_path / "away")
    status, out, err = tried(project, names, TEXT, tmp_path)
    assert status == 0, err
    assert [json.loads(line) for line in out.splitlines()] == called(script.words, TEXT)
    files = {str(path.relative_to(project)) for path in project.rglob("*.*") if "__pycache__" not in path.parts}
    assert files == {"map_functions.py", *HELPERS} - {"own_package/.hidden"}
    text = (project / "map_functions.py").read_text()
    assert "open(" not in text and f"script.py, line {line_of('def words')}\ndef words(" in text


@pytest.mark.parametrize("name", ["pick", "inside", "closed"])
def test_a_lambda_an_inner_function_and_a_closure_give_what_they_give_here(
    script: ModuleType, tmp_path: Path, name: str
) -> None:
    function = {"pick": script.pick, "inside": script.outer()}.get(name) or script.closing(7)
    project, names = packed(tmp_path / "projects", map=function)
    assert (project / "map.pickle").exists() == (name == "closed")
    status, out, err = tried(project, names, TEXT, tmp_path)
    assert status == 0, err
    assert [json.loads(line) for line in out.splitlines()] == called(function, TEXT)


def test_a_deployed_cluster_gets_no_pickle(script: ModuleType) -> None:
    with pytest.raises(UsageError, match=r"closes over n\. A deployed cluster takes functions as source only"):
        packing.pack({"map_function_name": script.closing(7)}, may_pickle=False)


@pytest.mark.parametrize(
    ("name", "code"),
    [("failing", "return [int("), ("inside", "return [(text, 1 //"), ("closed", "return [(n, 1 //")],
)
def test_an_error_names_the_line_where_the_function_was_written(
    script: ModuleType, tmp_path: Path, name: str, code: str
) -> None:
    function = {"failing": script.failing, "inside": script.outer()}.get(name) or script.closing(7)
    project, names = packed(tmp_path / "projects", map=function, reduce=script.add)
    status, _, err = tried(project, names, "one\n" if name == "failing" else "\n", tmp_path)
    assert status == 1 and f"(script.py, line {line_of(code)})" in err, err


def test_functions_of_a_module_are_imported_from_it(script: ModuleType, tmp_path: Path) -> None:
    project, _ = packed(tmp_path / "projects", False, map=script.words)
    assert "from own_package.inner import shout" in (project / "map_functions.py").read_text()


LITERALS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
    | st.binary() | st.frozensets(st.integers() | st.text()) | st.sets(st.text()),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner) | st.tuples(inner, inner),
)  # fmt: skip


@given(LITERALS)
def test_a_constant_is_written_as_source_of_an_equal_one(value: Any) -> None:
    text = sources._constant(value)
    assert text is not None
    again = eval(text)
    assert again == value and repr(type(again)) == repr(type(value))


ENDLESS: list[Any] = []
ENDLESS.append(ENDLESS)


@pytest.mark.parametrize(
    "value", [ENDLESS, [10**5000], float("nan"), float("inf"), object(), [object()], {"a": {float("nan")}}]
)
def test_what_is_no_constant_is_not_written(value: Any) -> None:
    assert sources._constant(value) is None


def test_the_same_functions_are_the_same_project_in_every_process(tmp_path: Path) -> None:
    (tmp_path / "again.py").write_text(
        "from mrcore.face.packing import pack\n"
        "WORDS = {'one', 'two', 'three', 'four', 'five'}\n"
        "def chosen(line, auxiliary_data):\n"
        "    return [(word, 1) for word in line.split() if word in WORDS]\n"
        "print(pack({'map_function_name': chosen}, False).name)\n"
    )
    names = set()
    for seed in ("1", "2", "3"):
        command = ["env", f"PYTHONHASHSEED={seed}", sys.executable, "again.py"]
        names.add(subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout)
    assert len(names) == 1


def test_no_more_projects_are_kept_than_there_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "MAX_PROJECTS", 2)
    made = [packing.Packed({"map_functions.py": str(n).encode()}, {}) for n in range(6)]
    for n, each in enumerate(made):
        packing.write(each, tmp_path, needed={made[0].name})
        path = tmp_path / each.name
        assert path.is_dir()
        os.utime(path, (n, n))
    (tmp_path / "not_ours").mkdir()
    packing.write(made[5], tmp_path, set())
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {made[0].name, *(each.name for each in made[3:]), "not_ours"}


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (len, "called as f(line, auxiliary_data)"),
        ("count", "is no function but of type str"),
        (lambda line: [], "its parameters are (line)"),
    ],
)
def test_what_cannot_be_called_is_refused_at_once(function: Any, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        packing.pack({"map_function_name": function}, True)
    assert words in str(caught.value)


def test_a_module_of_the_name_of_ours_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "map_functions.py").write_text("def count(line, auxiliary_data):\n    return []\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "map_functions", raising=False)
    import map_functions  # type: ignore[import-not-found]

    try:
        with pytest.raises(UsageError, match=r"your own module map_functions.py, a name that mrcore needs"):
            packing.pack({"map_function_name": map_functions.count}, True)
    finally:
        del sys.modules["map_functions"]


def test_our_own_support_counts_as_the_users(tmp_path: Path) -> None:
    """A function of a module that can be imported, which lies beside the caller's own."""
    from conditions import wait_until

    made = packing.pack({"map_function_name": wait_until}, True)
    assert made.files["conditions.py"] == (SUPPORT / "conditions.py").read_bytes()
    assert b"from conditions import wait_until" in made.files["map_functions.py"]


def test_a_module_that_is_too_large_is_not_even_read(script: ModuleType, tmp_path: Path) -> None:
    """A data file beside a package may be larger than the memory."""
    with (tmp_path / "work/own_package/huge.bin").open("wb") as stream:
        stream.truncate(1 << 40)
    with pytest.raises(UsageError, match=r"module own_package, which a function imports, .* more than 64 MiB"):
        modules.files({"own_package"})
