"""Map and Reduce: the same items whatever the spills and partitions, what is said when user code fails, and orders
carried out by `Process` in a real child process."""

from __future__ import annotations

import errno
import gzip
import itertools
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import bag, grouped, lines_of, one_form, rank
from run_task import PROJECT, Failed, Task
from strategies import keys, texts
from task_parts import StubWatch, piece

from mrcore import task
from mrcore.engine.disk_sort import DiskSort
from mrcore.engine.functions import make_combiner
from mrcore.engine.inputs import Reader, plan_bundles
from mrcore.engine.mapper import Map
from mrcore.engine.output import DirectOutput, PartWriter
from mrcore.engine.reducer import Reduce
from mrcore.engine.shuffler import Shuffle
from mrcore.engine.spills import Segment, select
from mrcore.engine.trial import try_job
from mrcore.errors import JobFault
from mrcore.messages.tasks import Bundle, Spill

Function = Callable[..., Any]


def total(group: Any, auxiliary: Any) -> Any:
    return [(group[0][0], sum(value for _, value in group))]


def identity(group: Any, auxiliary: Any) -> Any:
    yield from group


def words(line: str, auxiliary: Any) -> Any:
    return [(word, 1) for word in line.split()]


@pytest.fixture(autouse=True)
def forgotten_surroundings() -> Iterator[None]:
    """Each test has a project of its own, and leaves no facts of a task behind."""
    before, path = dict(vars(task)), list(sys.path)
    yield
    vars(task).update(before)
    sys.path[:] = path
    for name in [name for name in sys.modules if name.startswith(("map_functions", "reduce_functions", "helper"))]:
        del sys.modules[name]


def mapped(
    folder: Path,
    content: bytes,
    function: Function,
    *,
    period: int = 10**9,
    partitions: int = 1,
    block_bytes: int = 1 << 16,
    **more: Any,
) -> tuple[Any, Map]:
    """Run Map over a file of `content`, spilling at every `period`th item, and give the runs."""
    path = folder / "input.txt"
    path.write_bytes(content)
    text = {key: more.pop(key) for key in ("on_bad_text",) if key in more}
    sink = Shuffle(folder, "map", StubWatch(period), partitions=partitions, **more)  # type: ignore[arg-type]
    reader = Reader(max_line_bytes=1 << 20, block_bytes=block_bytes)
    mapper = Map(function, "my_map", None, sink, reader, **text)
    counters = mapper.map([piece(path)])
    assert counters["lines"] == len(lines_of(content))
    return mapper.finish(), mapper


def reduced(folder: Path, told: list[Spill], function: Function, partition: int = 0, **more: Any) -> Any:
    """Run Reduce over one partition of the runs and give its items and itself."""
    watch: Any = StubWatch(3)
    sorter = DiskSort(folder, watch, ascending_values=more.pop("sort_values", False), combine=more.pop("combine", None))
    for run in told:
        for offset, length in select(folder, run.id, {"partition": partition}):
            sorter.add_spill(Segment(folder / f"{run.id}.data", offset, length, run.max_decoded))
    parts = PartWriter(folder, run=1, partition=partition, attempt_try=1, max_items=None, compress=False)
    reducer = Reduce(function, "my_reduce", None, sorter, parts, watch, folder, **more)
    reducer.sort()
    written = [folder / part.name for part in reducer.reduce()]
    items = [json.loads(line) for path in written for line in path.read_text().split("\n")[:-1]]
    for path in written:
        path.unlink()
    return [(one_form(key), value) for key, value in items], reducer


# --- The same items --------------------------------------------------------------------------------------------------


@given(
    items=st.lists(st.tuples(keys | st.integers(0, 3) | st.sampled_from("ab"), st.integers(-9, 9)), max_size=40),
    period=st.integers(1, 12),
    partitions=st.integers(1, 7),
    combining=st.booleans(),
    as_list=st.booleans(),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=60)
def test_spills_partitions_and_combiner_do_not_change_the_items(
    tmp_path: Path, items: list[Any], period: int, partitions: int, combining: bool, as_list: bool
) -> None:
    def emit(line: str, auxiliary: Any) -> Any:
        key, value = items[int(line)]
        yield [key, value] if as_list else (key, value)

    content = "".join(f"{n}\n" for n in range(len(items))).encode()
    combine = make_combiner(total, "total", None) if combining else None
    told, _ = mapped(tmp_path, content, emit, period=period, partitions=partitions, combine=combine)
    got: list[Any] = []
    for partition in range(partitions):
        part, reducer = reduced(tmp_path, told, total, partition, combine=combine)
        assert [key for key, _ in part] == sorted((key for key, _ in part), key=rank)
        assert reducer.keys_kept
        got += part
    assert bag(got) == bag((key, sum(values)) for key, values in grouped(items))


def test_hundreds_of_spills(tmp_path: Path) -> None:
    text = " ".join(f"w{n * n % 97}" for n in range(5000)).replace("w1 ", "w1\n")
    told, _ = mapped(tmp_path, text.encode(), words, period=10**9, max_items=10)
    assert len(told) == 500
    got, reducer = reduced(tmp_path, told, total)
    assert got == sorted(Counter(text.split()).items())
    assert reducer.groups == len(got) and reducer.values == 5000


@given(st.lists(texts, max_size=12), st.integers(1, 40))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_offsets_are_those_of_bytes(tmp_path: Path, several: list[str], block_bytes: int) -> None:
    content = "\n".join(several).encode()
    got: list[Any] = []

    def ask(line: str, auxiliary: Any) -> Any:
        got.append((task.offset, line.encode()))
        return ()

    mapped(tmp_path, content, ask, block_bytes=block_bytes)
    offsets = itertools.accumulate(map(len, lines_of(content)), initial=0)
    assert got == list(zip(offsets, lines_of(content), strict=False))
    assert task.offset is None and task.input_file == str(tmp_path / "input.txt")


def test_bad_text_is_replaced_without_moving_the_offsets(tmp_path: Path) -> None:
    content = "é fine\n".encode() + b"bad \xff\xfe\xe2\x82\n" + "é later\n".encode()
    seen: list[Any] = []

    def ask(line: str, auxiliary: Any) -> Any:
        seen.append((task.offset, line))
        return ()

    mapped(tmp_path, content, ask, on_bad_text="replace")
    assert seen == [(0, "é fine\n"), (8, "bad \ufffd\ufffd\ufffd\n"), (17, "é later\n")]
    with pytest.raises(JobFault, match=r"input\.txt is not UTF-8 at byte 12 .*on_bad_text: replace") as caught:
        mapped(tmp_path, content, ask)
    assert caught.value.details["offset"] == 12


# --- What bad code and bad items get ---------------------------------------------------------------------------------

NAN = float("nan")


def emitting(*bad: Any) -> Function:
    return lambda line, auxiliary: list(bad) if "BAD" in line else [("fine", 1), ("ü", "x")]


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (emitting((NAN, 1)), "the key is nan"),
        (emitting((("a", NAN), 1)), "the key is nan"),
        (emitting(("k", "\ud800")), "the value .*lone surrogate"),
        (emitting(("\ud800", 1)), "the key .*lone surrogate"),
        (emitting(("k", 10**4300)), "the value is an integer of more than 4,300 digits"),
        (emitting((10**4300, 1)), "the key is an integer of more than 4,300 digits"),
        (emitting(("k", b"x")), "the value b'x' is of type bytes"),
        (emitting(({}, 1)), "the key {} is of type dict"),
        (emitting(("k", {(1,): 1})), r"the dict key \(1,\) is of type tuple"),
        (emitting(("k",)), r"\('k',\) is no \(key, value\) pair"),
        (emitting(("k", 1, 2)), r"\('k', 1, 2\) is no \(key, value\) pair"),
        (emitting("kv"), r"'kv' is no \(key, value\) pair"),
        (emitting(None), r"None is no \(key, value\) pair"),
        (lambda line, auxiliary: None if "BAD" in line else [("k", 1)], "no iterable of .*pairs"),
        (lambda line, auxiliary: 5 if "BAD" in line else [("k", 1)], "no iterable of .*pairs"),
    ],
)
@pytest.mark.parametrize("combining", [False, True])
@pytest.mark.parametrize("partitions", [1, 5])
def test_a_bad_item_is_named_with_its_line(
    tmp_path: Path, function: Function, says: str, partitions: int, combining: bool
) -> None:
    before = "ü a line like others\n".encode() * 40
    content = before + b"the BAD one\n" + "behind ü\n".encode() * 40
    combine = make_combiner(lambda group, auxiliary: [group[0]], "first", None) if combining else None
    for period in (7, 10**9):  # found at a later spill, or at the end
        with pytest.raises(JobFault, match=says) as caught:
            mapped(tmp_path, content, function, period=period, partitions=partitions, combine=combine, block_bytes=100)
        assert caught.value.details["offset"] == len(before)
        assert caught.value.details["line"] == "the BAD one\n"
        assert "my_map" in str(caught.value) and "input.txt, byte 880: 'the BAD one'" in str(caught.value)


def test_a_bad_item_of_an_earlier_line_does_not_blame_a_later_one(tmp_path: Path) -> None:
    def function(line: str, auxiliary: Any) -> Any:
        return {"nan": [(NAN, 1)], "none": None}[line.strip()]

    with pytest.raises(JobFault, match="no iterable") as caught:
        mapped(tmp_path, b"nan\nnone\n", function)
    assert caught.value.details["offset"] == 4


def test_a_full_disk_is_not_the_fault_of_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*anything: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    told, _ = mapped(tmp_path, b"a b c\n", words)
    monkeypatch.setattr("mrcore.engine.spills.SpillWriter.write", full)
    monkeypatch.setattr("mrcore.engine.output.PartWriter.write", full)
    with pytest.raises(OSError, match="No space"):
        mapped(tmp_path, b"a b c\n", words, max_items=1)
    with pytest.raises(OSError, match="No space"):
        reduced(tmp_path, told, lambda group, auxiliary: group * 2000)
    parts = PartWriter(tmp_path, run=1, partition=0, attempt_try=1, max_items=None, compress=False)
    sink = DirectOutput(parts, StubWatch(10))  # type: ignore[arg-type]
    mapper = Map(lambda line, aux: [(1, 1)] * 2000, "f", None, sink, Reader(max_line_bytes=99, block_bytes=99))
    with pytest.raises(OSError, match="No space"):
        mapper.map([piece(tmp_path / "input.txt")])


def test_a_map_only_task_gives_back_memory_and_batches_by_size(tmp_path: Path) -> None:
    watch = StubWatch(1)
    parts = PartWriter(tmp_path, run=1, partition=0, attempt_try=1, max_items=None, compress=False)
    sink = DirectOutput(parts, watch)  # type: ignore[arg-type]
    for _ in range(10):
        sink.add(("k" * 20_000, ["x"] * 20_000))
        assert sum(len(key) + len(value) for key, value in sink._batch) < 1 << 16
    assert watch.released >= 9
    assert sink.close()[0].records == 10


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (lambda group, auxiliary: [(NAN, 1)], "bad item on the group of key 'b'.*nan"),
        (lambda group, auxiliary: [(group[0][0], "\ud800")], "bad item on the group of key 'b'.*surrogate"),
        (lambda group, auxiliary: [("k", {1})], "bad item on the group of key 'b'.*type set"),
        (lambda group, auxiliary: None, "no iterable of pairs on the group of key 'b'"),
        (lambda group, auxiliary: 1 / 0, "failed on the group of key 'b': ZeroDivisionError"),
    ],
)
def test_a_failing_reduce_function_is_named_with_its_key(tmp_path: Path, function: Function, says: str) -> None:
    told, _ = mapped(tmp_path, b"b b c\n", words)
    with pytest.raises(JobFault, match=says) as caught:
        reduced(tmp_path, told, function)
    assert "my_reduce" in str(caught.value)


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (
            lambda group, auxiliary: [("other", 1)],
            "combiner c turned key 'b' into 'other': a combiner must keep its key",
        ),
        (lambda group, auxiliary: [("b",)], "combiner c on key 'b': .*no .*pair"),
        (lambda group, auxiliary: 1 / 0, "combiner c failed on key 'b': ZeroDivisionError"),
    ],
)
def test_a_wrong_combiner_is_refused(tmp_path: Path, function: Function, says: str) -> None:
    with pytest.raises(JobFault, match=says):
        mapped(tmp_path, b"b b c\n", words, combine=make_combiner(function, "c", None))


def test_a_giant_group_is_combined_in_slices() -> None:
    sizes: list[int] = []

    def count(group: Any, auxiliary: Any) -> Any:
        sizes.append(len(group))
        return total(group, auxiliary)

    combine = make_combiner(count, "count", None)
    assert combine("k", [1] * 100_000) == [100_000] and max(sizes) <= 4096
    keep = make_combiner(lambda group, auxiliary: group, "keep", None)
    assert keep("k", list(range(10_000))) == list(range(10_000))  # one that combines nothing does no harm


def test_disk_based_output_and_input(tmp_path: Path) -> None:
    told, _ = mapped(tmp_path, b"b a\n" * 3000, words)

    def function(group: Any, auxiliary: Any) -> Any:
        held, inner = auxiliary
        assert len(held) == 0 and inner is None
        for item in group:
            held.append(item)
        held.append((group[0][0], {"again": len(group)}))
        return held

    got, reducer = reduced(tmp_path, told, function, disk_based_input=True, disk_based_output=True)
    assert got == [(key, value) for key in "ab" for value in [*[1] * 3000, {"again": 3000}]]
    assert reducer.keys_kept
    _, reducer = reduced(tmp_path, told, lambda group, auxiliary: [("other", 1)])
    assert not reducer.keys_kept


# --- mrcore try ------------------------------------------------------------------------------------------------------


def project(folder: Path, map_code: str, reduce_code: str | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "map_functions.py").write_text(map_code)
    if reduce_code is not None:
        (folder / "reduce_functions.py").write_text(reduce_code)
    return folder


REDUCE = "def r(group, auxiliary):\n    return [(group[0][0], sum(v for _, v in group))]\n"
MAP = "def m(line, auxiliary):\n    return [(word, 1) for word in line.split()]\n"


def trial(
    folder: Path, map_code: str, reduce_code: str | None = REDUCE, content: bytes = b"b a\nb\n", **more: Any
) -> Any:
    (folder / "in.txt").write_bytes(content)
    made = project(folder / "p", map_code, reduce_code)
    return list(try_job(made, "m", "r" if reduce_code else None, [str(folder / "in.txt")], **more))


def test_try_maps_and_reduces(tmp_path: Path) -> None:
    assert trial(tmp_path, MAP) == [("a", 1), ("b", 2)]


def test_try_without_reduce_keeps_the_order(tmp_path: Path) -> None:
    assert trial(tmp_path, MAP, None) == [("b", 1), ("a", 1), ("b", 1)]


def test_try_with_combiner_sorted_values_and_auxiliary_data(tmp_path: Path) -> None:
    code = "def m(line, auxiliary):\n    return [('k', auxiliary[0]), ('k', None), ('k', 'x'), ('k', [1])]\n"
    keep = "def r(group, auxiliary):\n    return group\n"
    got = trial(tmp_path, code, keep, b"1\n2\n", sort_values=True, auxiliary=[7])
    assert [value for _, value in got] == [None, None, 7, 7, "x", "x", [1], [1]]


@pytest.mark.parametrize(
    ("map_code", "reduce_code", "says"),
    [
        ("def other():\n    pass\n", REDUCE, "map_functions.py of project p has no function 'm'"),
        ("def map_it(:\n", REDUCE, "map_functions.py, line 1: syntax error"),
        ("import nowhere_to_be_found\n", REDUCE, "loading m from map_functions.py failed: ModuleNotFoundError.*line 1"),
        ("raise SystemExit('bye')\n", REDUCE, "loading m from map_functions.py failed: SystemExit: bye"),
        (
            "class MapFunctions:\n    def __init__(s, n): s.f = {}[n]\n",
            REDUCE,
            "loading m from .* KeyError: 'm'.*line 2",
        ),
        (
            "def m(line): return []\n",
            REDUCE,
            r"map function m of map_functions.py cannot be called as f\(line, auxiliary_data\): .*\(line\).*too many",
        ),
        ("def m(line, auxiliary, third): return []\n", REDUCE, r"cannot be called as f\(line, .*'third'"),
        ("def m(*, line, auxiliary): return []\n", REDUCE, r"cannot be called as f\(line, "),
        (
            "class MapFunctions:\n    def __init__(s, n): pass\n    def get_map_function(s): return s.m\n"
            "    def m(line, auxiliary): return []\n",
            REDUCE,
            r"cannot be called as f\(line, auxiliary_data\): its parameters are \(auxiliary\)",
        ),
        (MAP, "def r(group): return group\n", r"reduce function r of .* cannot be called as f\(group, auxiliary\)"),
        (MAP, "class r:\n    def __init__(self, group): pass\n", r"cannot be called as f\(group, auxiliary\)"),
        (MAP, "x = 1\n", "reduce_functions.py of project p has no function 'r'"),
        (MAP, "def r(:\n", "reduce_functions.py, line 1: syntax error"),
    ],
)
def test_try_names_what_is_wrong_with_the_project(tmp_path: Path, map_code: str, reduce_code: str, says: str) -> None:
    with pytest.raises(JobFault, match=says):
        trial(tmp_path, map_code, reduce_code)


@pytest.mark.parametrize(
    "map_code",
    [
        "def m(line, *others): return [('k', 1)]\n",
        "def m(line, auxiliary=None, more=7): return [('k', 1)]\n",
        "class m(list):\n    def __init__(self, line, auxiliary): super().__init__([('k', 1)])\n",
        "import functools\ndef three(a, line, auxiliary): return [('k', a)]\nm = functools.partial(three, 1)\n",
        "import functools\ndef one_more(f):\n    @functools.wraps(f)\n    def call(line, auxiliary):\n"
        "        return f(1, line, auxiliary)\n    return call\n"
        "@one_more\ndef m(a, line, auxiliary): return [('k', a)]\n",
        "class Maker:\n    def __call__(self, line, auxiliary): return [('k', 1)]\nm = Maker()\n",
    ],
)
def test_whatever_can_be_called_with_two_arguments_is_a_function(tmp_path: Path, map_code: str) -> None:
    assert trial(tmp_path, map_code, content=b"x\n") == [("k", 1)]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("return undefined(group)", r"NameError: .*undefined.* \(reduce_functions.py, line 4\)"),
        ("return two(1)", r"TypeError: two\(\) missing 1 required .* \(reduce_functions.py, line 4\)"),
        ("return [(two(1), 1)]", r"TypeError: two\(\) missing .* \(reduce_functions.py, line 4\)"),
        ("return len(5)", r"TypeError: object of type 'int' has no len\(\) \(reduce_functions.py, line 4\)"),
        ("return (two(each) for each in group)", r"TypeError: two\(\) missing .* \(reduce_functions.py, line 4\)"),
        ("disk.append(b'x'); return disk", r"BadItem: b'x' is no \(key, value\) pair \(reduce_functions.py, line 4\)"),
        (
            "disk.append(('k', {1})); return disk",
            r"BadItem: the value \{1\} .* set; .* \(reduce_functions.py, line 4\)",
        ),
        ("disk.append(); return disk", r"TypeError: DiskList.append\(\) missing .* \(reduce_functions.py, line 4\)"),
        ("disk.extend(two(n) for n in group)", r"TypeError: two\(\) missing .* \(reduce_functions.py, line 4\)"),
        ("disk.extend(5); return disk", r"TypeError: 'int' object is not iterable \(reduce_functions.py, line 4\)"),
        ("return [disk[7]]", r"IndexError: list index out of range \(reduce_functions.py, line 4\)"),
        ("return group['a']", r"TypeError: .* \(reduce_functions.py, line 4\)"),
        ("group.append((1, NotImplemented))", r"BadItem: the value NotImplemented .* \(reduce_functions.py, line 4\)"),
        ("raise BadItem('of mine')", r"BadItem: of mine \(reduce_functions.py, line 4\)"),
        ("return [('b', Odd(a=1))]", r"ZeroDivisionError: division by zero \(reduce_functions.py, line 6\)"),
        ("import json; return json.loads('{')", r"JSONDecodeError: .* \(reduce_functions.py, line 4\)"),
        (
            "import shutil; return shutil.copy('/nowhere', '/x')",
            r"FileNotFoundError: .* \(reduce_functions.py, line 4\)",
        ),
        ("raise OSError(5, 'of mine')", r"OSError: \[Errno 5\] of mine \(reduce_functions.py, line 4\)"),
    ],
)
def test_errors_in_a_reduce_function_with_disk_lists_name_its_line(tmp_path: Path, body: str, says: str) -> None:
    code = (
        "from mrcore.engine.records import BadItem\n"
        "def r(group, auxiliary):\n"
        "    disk, auxiliary = auxiliary\n"
        f"    {body}\n"
        "class Odd(dict):\n"
        "    def items(self): 1 / 0\n"
        "def two(a, b): pass\n"
    )
    with pytest.raises(JobFault, match=f"^reduce function r failed on the group of key 'a': {says}") as caught:
        trial(tmp_path, MAP, code, disk_based_input=True, disk_based_output=True)
    assert caught.value.details["function"] == "r" and caught.value.details["key"] == "'a'"
    assert "reduce_functions.py" in caught.value.details["traceback"]
    assert "disk_list.py" not in caught.value.details["traceback"]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("return two(1)", r"two\(\) missing 1 required .* \(map_functions.py, line 2\)"),
        ("yield 'k', two(1)", r"two\(\) missing 1 required .* \(map_functions.py, line 2\)"),
        ("return 1 + 'a'", r"unsupported operand .* \(map_functions.py, line 2\)"),
        ("return map(two, line)", r"two\(\) missing 1 required"),
        ("return zip(line, map(two, line))", r"two\(\) missing 1 required"),
    ],
)
@pytest.mark.parametrize("reduce_code", [REDUCE, None])
def test_a_type_error_in_a_map_function_is_its_own(tmp_path: Path, body: str, says: str, reduce_code: Any) -> None:
    code = f"def m(line, auxiliary):\n    {body}\ndef two(a, b): pass\n"
    with pytest.raises(JobFault, match=f"^map function m failed at .*in.txt, byte 0: 'b a': TypeError: {says}"):
        trial(tmp_path, code, reduce_code)


def test_a_function_in_c_that_refuses_its_arguments_has_failed(tmp_path: Path) -> None:
    with pytest.raises(JobFault, match=r"^map function m failed at .*byte 0: 'b a': TypeError"):
        trial(tmp_path, "m = vars\n")  # no signature, one argument


def test_a_combiner_that_raises_is_named_with_its_line(tmp_path: Path) -> None:
    code = "def r(group, auxiliary):\n    return sum(group)\n"
    with pytest.raises(JobFault, match=r"^combiner r failed on key 'b': TypeError: .* \(reduce_functions.py, line 2\)"):
        trial(tmp_path, MAP, code, combine="r")


def test_a_combiner_that_cannot_be_called_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(JobFault, match=r"^reduce function c of .* cannot be called as f\(group, auxiliary\)"):
        trial(tmp_path, MAP, REDUCE + "def c(group): return group\n", combine="c")


def test_trouble_with_the_file_of_a_disk_list_is_not_the_users(tmp_path: Path) -> None:
    code = (
        "import os\ndef r(group, auxiliary):\n    disk = auxiliary[0]\n    disk._chunks._folder /= 'gone'\n"
        "    for n in range(5000): disk.append((1, n))\n    return disk\n"
    )
    with pytest.raises(FileNotFoundError):
        trial(tmp_path, MAP, code, disk_based_output=True)


def test_a_traceback_holds_only_frames_of_the_user(tmp_path: Path) -> None:
    code = "import helper_x\ndef m(line, auxiliary):\n    yield ('k', 1)\n    helper_x.fail(line)\n"
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "helper_x.py").write_text("import json\ndef fail(line):\n    json.loads(line)\n")
    with pytest.raises(
        JobFault, match=r"map function m failed at .*in.txt, byte 3: 'é no json': JSONDecodeError"
    ) as caught:
        trial(tmp_path, code, content="10\né no json\n".encode())
    text = caught.value.details["traceback"]
    assert "map_functions.py" in text and "helper_x.py" in text and "/mrcore/engine/mapper.py" not in text
    assert caught.value.details["file"].endswith("in.txt") and caught.value.details["line"] == "é no json\n"


def test_try_names_inputs_that_are_not_there(tmp_path: Path) -> None:
    made = project(tmp_path / "p", MAP, REDUCE)
    with pytest.raises(JobFault, match=r"nothing-here matches no file"):
        list(try_job(made, "m", "r", [str(tmp_path / "nothing-here")]))
    with pytest.raises(JobFault, match=r"project empty has no map_functions.py: create"):
        list(try_job(_empty(tmp_path / "empty"), "m", "r", [str(made)]))


def _empty(folder: Path) -> Path:
    folder.mkdir()
    return folder


# --- Orders, in a child process --------------------------------------------------------------------------------------

COUNT = "def r(group, auxiliary):\n    return [(group[0][0], sum(v for _, v in group))]\n"
CLASSES = (
    "class MapFunctions():\n    def __init__(self, name):\n        self.map_function = getattr(self, name)\n"
    "    def get_map_function(self):\n        return self.map_function\n"
    "    def m(self, line, auxiliary_data):\n        return [(word, 1) for word in line.split()]\n"
)


def bundles(work: Task, folder: Path, *contents: bytes) -> list[Any]:
    paths = []
    for number, content in enumerate(contents):
        paths.append(folder / f"in-{number}.txt")
        paths[-1].write_bytes(content)
    return [Bundle(n, bundle.pieces) for n, path in enumerate(paths) for bundle in plan_bundles(work.files([path]), 1)]


def test_process_counts_words_in_partitions_with_spills(tmp_path: Path) -> None:
    work = Task(
        tmp_path, CLASSES, COUNT, number_of_partitions=3, max_number_dumped_items_shuffler=20, combine_function_name="r"
    )
    texts = [" ".join(f"w{n * n % 53}" for n in range(start, start + 400)).encode() + b"\n" for start in (0, 9)]
    work.map(bundles(work, tmp_path, *texts))
    assert len(work.runs) == 40
    work.map(bundles(work, tmp_path, b"w1 w2\n"))
    results = [work.reduce(partition) for partition in range(3)]
    got = [list(work.items(result)) for result in results]
    assert all(part == sorted(part) and part for part in got)
    assert sorted(itertools.chain(*got)) == sorted(Counter(b" ".join([*texts, b"w1 w2"]).decode().split()).items())
    assert [message["event"] for message in work.messages] == [
        "bundle_done", "bundle_done", "done", "bundle_done", "done", *["phase", "done"] * 3
    ]  # fmt: skip
    assert results[0]["fetched"]["n"] == sum(run["partitions"].get("0", 0) for run in work.runs)
    assert results[0]["keys_kept"] and results[0]["peak_bytes"] > 1 << 20
    left = sorted(path.name for path in work.layout.run_dir("j", 1).iterdir())
    assert left == ["parts", "runs"]  # a task's own folder goes with the task


def test_process_by_range_gives_the_total_order_of_mixed_keys(tmp_path: Path) -> None:
    code = (
        "def m(line, auxiliary):\n    n = int(line)\n"
        "    return [([n, (n % 7, str(n)), str(n), None, (n, None)][n % 5], n)]\n"
    )
    work = Task(
        tmp_path, code, "def r(g, a):\n    return g\n", partitioner="range", max_number_dumped_items_shuffler=90
    )
    numbers = [n * 7919 % 1009 for n in range(1000)]
    work.map(bundles(work, tmp_path, "".join(f"{n}\n" for n in numbers).encode()))
    kinds = [lambda n: n, lambda n: (n % 7, str(n)), str, lambda n: None, lambda n: (n, None)]
    wanted = [(key, v) for key, values in grouped((kinds[n % 5](n), n) for n in numbers) for v in values]
    cuts = [None, [500], ["3"], [[3, "3"]], None]  # as JSON brings them
    got: list[Any] = []
    remote = [{"node": "other", "folder": str(work.layout.runs_dir("j", 1)), "runs": work.runs}]
    for number, (low, high) in enumerate(itertools.pairwise(cuts)):
        got += work.items(work.reduce(number, low, high, sources=remote))
    assert [key for key, _ in got] == [key for key, _ in wanted]
    assert bag(got) == bag(wanted)


def test_process_map_only_compressed_in_parts(tmp_path: Path) -> None:
    work = Task(tmp_path, MAP, compress=True, max_number_dumped_items_reducer=1500)
    result = work.map(bundles(work, tmp_path, b"b a\n" * 2000))
    assert [part["records"] for part in result["parts"]] == [1500, 1500, 1000]
    assert [part["name"] for part in result["parts"]] == [f"part-000001-00000-0000{n}.data.gz" for n in range(3)]
    assert list(work.items(result)) == [("b", 1), ("a", 1)] * 2000
    for part in result["parts"]:
        path = work.layout.parts_dir("j", 1) / part["name"]
        assert part["text_bytes"] == len(gzip.decompress(path.read_bytes())) and part["bytes"] == path.stat().st_size


def test_process_tells_surroundings_and_imports_helpers(tmp_path: Path) -> None:
    code = (
        "from mrcore import task\nimport helper_a\nfrom helper_b.inner import shout\n"
        "def m(line, auxiliary):\n"
        "    where = [task.input_file, task.offset, task.job, task.run, task.phase, task.server, task.node]\n"
        "    yield shout(line), where + [auxiliary, helper_a.X]\n"
    )
    work = Task(tmp_path, code, auxiliary_data_name_mapper="facts")
    project = work.layout.projects_dir / PROJECT
    (project / "helper_a.py").write_text("X = 5\n")
    (project / "helper_b").mkdir()
    (project / "helper_b" / "inner.py").write_text("def shout(line):\n    return line.strip().upper()\n")
    (work.layout.auxiliary_dir / "facts.data").write_text('{"a": 1}')
    work.memory_bytes = 48 << 20
    made = bundles(work, tmp_path, "é\nb\n".encode())
    got = list(work.items(work.map(made)))
    facts = [str(tmp_path / "in-0.txt"), 0, "j", 1, "MAP", "S_0", "n", {"a": 1}, 5]
    assert got == [("É", facts), ("B", [facts[0], 3, *facts[2:]])]
    work.job["auxiliary_data_name_mapper"] = "none"
    with pytest.raises(Failed, match=r"auxiliary data 'none' is not on this node: .* upload it first"):
        work.map(made)
    (work.layout.auxiliary_dir / "none.data").write_text("{")
    with pytest.raises(Failed, match=r"none.data cannot be read as JSON"):
        work.map(made)


def test_process_reports_a_damaged_run_as_retryable(tmp_path: Path) -> None:
    work = Task(tmp_path, MAP, COUNT)
    work.map(bundles(work, tmp_path, b"b a\n"))
    run = work.layout.runs_dir("j", 1) / f"{work.runs[0]['id']}.data"
    content = bytearray(run.read_bytes())
    content[-1] ^= 1
    run.write_bytes(content)
    with pytest.raises(Failed, match="checksum of a frame") as caught:
        work.reduce()
    assert caught.value.error["class"] == "TaskDied"
    run.unlink()
    with pytest.raises(Failed) as caught:
        work.reduce()
    assert caught.value.error["class"] == "TaskDied"
    run.with_suffix(".index").write_bytes(b"")
    with pytest.raises(Failed, match=r"index is damaged") as caught:
        work.reduce()
    assert caught.value.error["class"] == "TaskDied"


def test_process_does_not_take_a_mistake_of_ours_for_a_damaged_file(tmp_path: Path) -> None:
    work = Task(tmp_path, MAP, COUNT)
    work.map(bundles(work, tmp_path, b"b a\n"))
    with pytest.raises(Failed, match="ValueError: embedded null byte") as caught:
        work.reduce(sources=[{"node": "n", "runs": [work.runs[0] | {"id": "no\0name"}]}])
    assert caught.value.error["class"] == "InternalError"


def test_process_fails_by_name_for_a_group_that_does_not_fit(tmp_path: Path) -> None:
    work = Task(tmp_path, "def m(line, a):\n    return [('the key', n) for n in range(1000)]\n", COUNT)
    work.memory_bytes = 40 << 20
    work.map(bundles(work, tmp_path, b"x\n" * 1000))
    with pytest.raises(
        Failed, match=r"group of key 'the key' does not fit in memory.*disk_based_input: true"
    ) as caught:
        work.reduce()
    assert caught.value.error["class"] == "JobFault" and work.peaks["REDUCE"] < 1.2 * work.memory_bytes
    work.job["disk_based_input"] = True
    assert list(work.items(work.reduce())) == [("the key", 499_500_000)]
