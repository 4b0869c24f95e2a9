"""Keys, values, items and frames: what is allowed, equality, order, partition, encoding."""

from __future__ import annotations

import contextlib
import decimal
import itertools
import json
import math
import os
import subprocess
import sys
from collections import Counter, OrderedDict, UserDict, defaultdict, deque, namedtuple
from enum import Enum, IntEnum, IntFlag, StrEnum
from http import HTTPStatus
from typing import Any, NamedTuple
from zlib import crc32

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import one_form, rank, tuples
from strategies import keys, values

from mrcore.engine.output import encode_items
from mrcore.engine.records import (
    MAX_DEPTH,
    BadItem,
    Snapshot,
    canonical_key,
    check_item,
    describe,
    key_hash,
    order_key,
    partition_keys,
    sort_keys,
    sort_values,
)
from mrcore.engine.spills import FRAME_HEADER, DamagedFrame, decode_payload, encode_frame


class Text(str):
    pass


class Number(int):
    def __repr__(self) -> str:
        return "a number"


class Real(float):
    pass


class Color(StrEnum):
    RED = "red"


class Shape(str, Enum):  # noqa: UP042  as code older than StrEnum has it
    ROUND = "round"


class Size(IntEnum):
    LARGE = 3


class Mode(IntFlag):
    READ = 4


class Pair(NamedTuple):
    x: Any
    y: Any


class Items(list[Any]):
    pass


class Shouted(dict[str, Any]):
    """What json writes of a dict of a subclass is what its `items` gives."""

    def items(self) -> Any:
        return [(name.upper(), value) for name, value in super().items()]


class Jsonable:
    def __json__(self) -> str:
        return '"forged"'


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no")


Point = namedtuple("Point", "x y")
DEEP: Any = ()
for _ in range(MAX_DEPTH + 1):
    DEEP = (DEEP,)
NOT_ALLOWED = [
    b"bytes",
    {1},
    object(),
    decimal.Decimal(1),
    UserDict(a=1),
    deque([1]),
    Enum("Plain", "ONE")(1),
    Jsonable(),
    Unprintable(),
    1j,
    range(3),
    "half \ud800 character",
    10**4300,
    -(10**4300),
    DEEP,
]


@given(keys)
def test_a_key_has_one_form(key: Any) -> None:
    form = canonical_key(key)
    assert form == one_form(key)
    assert repr(form) == repr(one_form(key))
    assert canonical_key(form) == form
    assert repr(canonical_key(tuples(key))) == repr(form)


@given(st.lists(keys, min_size=2, max_size=6))
def test_equal_keys_are_one_group_in_one_partition(several: list[Any]) -> None:
    for one in several:
        for other in several:
            equal = tuples(one) == tuples(other)
            assert (canonical_key(one) == canonical_key(other)) == equal
            if equal:
                assert repr(canonical_key(one)) == repr(canonical_key(other))
                assert key_hash(canonical_key(one)) == key_hash(canonical_key(other))


@pytest.mark.parametrize(
    "equal",
    [(True, 1, 1.0), (False, 0, 0.0, -0.0), (2**1000, float(2**1000)), (1e300, int(1e300)), ((1, True), [1.0, 1])],
)
def test_equal_numbers_of_different_types(equal: tuple[Any, ...]) -> None:
    assert len({repr(canonical_key(key)) for key in equal}) == 1
    assert len({key_hash(canonical_key(key)) for key in equal}) == 1


@given(st.lists(keys.map(one_form), max_size=8))
def test_order_is_total_and_native_where_python_has_one(several: list[Any]) -> None:
    ordered = sort_keys(several)
    assert ordered == sorted(several, key=rank)
    assert ordered == sorted(several, key=order_key)
    with contextlib.suppress(TypeError):  # keys of several kinds: ours alone
        assert ordered == sorted(several)


@given(st.lists(keys.map(one_form), min_size=1, max_size=40), st.integers(1, 7))
def test_partitions_hold_every_key_once_by_its_hash(several: list[Any], partitions: int) -> None:
    distinct = list(dict.fromkeys(several))
    dealt = partition_keys(distinct, partitions)
    assert sorted(map(repr, itertools.chain(*dealt))) == sorted(map(repr, distinct))
    for number, part in enumerate(dealt):
        assert all(key_hash(key) % partitions == number for key in part)


def test_many_mixed_keys_and_values_sort_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mrcore.engine.records.SLICE", 7)
    mixed: list[Any] = [(n if n % 5 else None, str(n) if n % 3 else -n) for n in range(200)]
    assert sort_keys(mixed) == sorted(mixed, key=rank)
    held: list[Any] = [n if n % 4 else [n] for n in range(100)]
    sort_values(held)
    assert held == sorted(held, key=lambda value: (isinstance(value, list), value))


def test_hash_is_the_same_in_every_process() -> None:
    code = (
        "from mrcore.engine.records import key_hash\n"
        "print([key_hash(k) for k in (None, 0, 7, 1.5, 2**1000, 'a', 'é', '', ('a', (None, 1)), ())])"
    )
    told = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        for seed in ("0", "1", "random")
    }
    assert len(told) == 1


def test_hash_spreads_multiples_and_texts() -> None:
    for several in ([n * 64 for n in range(64_000)], [f"w{n}" for n in range(64_000)]):
        counts = [len(part) for part in partition_keys(several, 64)]
        assert max(counts) < 1.15 * 1000 and min(counts) > 0.85 * 1000


@pytest.mark.parametrize("wrong", NOT_ALLOWED, ids=lambda wrong: type(wrong).__name__)
def test_what_is_not_allowed_is_refused_by_name(wrong: Any) -> None:
    with pytest.raises(BadItem, match="key"):
        canonical_key(wrong)
    with pytest.raises(BadItem, match="key"):
        canonical_key(("fine", [wrong]))
    if wrong is not DEEP:
        with pytest.raises(BadItem, match="value"):
            Snapshot().take(wrong)
        with pytest.raises(BadItem, match="value"):
            Snapshot().take({"fine": [wrong]})


@pytest.mark.parametrize("name", [(1,), b"b", Pair(1, 2), Enum("Plain", "ONE")(1)], ids=describe)
def test_dict_keys_that_json_refuses_are_refused(name: Any) -> None:
    with pytest.raises(TypeError):
        json.dumps({name: 1})
    with pytest.raises(BadItem, match="dict key"):
        Snapshot().take({name: 1})


@pytest.mark.parametrize("name", ["\ud800", Text("\ud800"), 10**4300, Number(10**4300)], ids=type)
def test_dict_keys_that_could_not_be_read_back_are_refused(name: Any) -> None:
    with pytest.raises(BadItem, match="dict key"):
        Snapshot().take({name: 1})


# --- Objects of subclasses -------------------------------------------------------------------------------------------

SUBCLASSED: list[Any] = [
    Counter("abracadabra"),
    Counter({1: 2, False: 3, 2.5: 4, None: 5}),
    defaultdict(list, {"a": [1]}),
    OrderedDict([("z", 1), ("a", 2)]),
    Shouted(a=1, b=Shouted(c=2)),
    Point(1, 2),
    Pair(Pair(1, "x"), [Pair(None, 1.5)]),
    Items([1, Items()]),
    Text("text"),
    Text(""),
    Color.RED,
    Shape.ROUND,
    Size.LARGE,
    Mode.READ | Mode(1),
    HTTPStatus.NOT_FOUND,
    Number(7),
    Number(-(2**70)),
    Real(1.5),
    Real("nan"),
    Real("-inf"),
    {Color.RED: 1, Size.LARGE: 2, Text("t"): 3, Number(9): 4, Real(0.1): 5, Real("inf"): 6, Mode.READ: 7},
    {1: "a", "1": "b"},
]


def exact_types(value: Any) -> set[type]:
    """The types of a value and of all that it holds."""
    inner = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list | tuple) else []
    return {type(value)}.union(*map(exact_types, inner))


@pytest.mark.parametrize("value", SUBCLASSED, ids=describe)
def test_what_json_takes_of_subclasses_is_taken_as_json_takes_it(value: Any) -> None:
    for whole in (value, [value], {"a": {"b": value}}, (value, 1)):
        taken = Snapshot().take(whole)
        assert repr(taken) == repr(json.loads(json.dumps(whole)))
        assert exact_types(taken) <= {str, int, float, bool, type(None), list, dict}


PLAIN_KEYS = [
    (Text("text"), "text"),
    (Color.RED, "red"),
    (Shape.ROUND, "round"),
    (Size.LARGE, 3),
    (Mode.READ, 4),
    (HTTPStatus.OK, 200),
    (Number(7), 7),
    (Real(1.5), 1.5),
    (Real(2.0), 2),
    (Point(1, 2), (1, 2)),
    (Pair(Color.RED, [Size.LARGE, Pair(1, 2)]), ("red", (3, (1, 2)))),
    (Items([1, "a"]), (1, "a")),
    (("a", Size.LARGE), ("a", 3)),
    (math.inf, math.inf),
    ((-math.inf, "a"), (-math.inf, "a")),
]


@pytest.mark.parametrize(("key", "plain"), PLAIN_KEYS, ids=describe)
def test_a_key_of_a_subclass_is_the_plain_key(key: Any, plain: Any) -> None:
    form = canonical_key(key)
    assert repr(form) == repr(plain)
    assert exact_types(form) == exact_types(plain)
    assert key_hash(form) == key_hash(canonical_key(plain))


@pytest.mark.parametrize("key", [math.nan, Real("nan"), ("a", math.nan), [Pair(1, math.nan)]], ids=describe)
def test_nan_is_no_key(key: Any) -> None:
    with pytest.raises(BadItem, match="the key is nan"):
        canonical_key(key)


@pytest.mark.parametrize("key", [Counter("a"), defaultdict(int), OrderedDict()], ids=describe)
def test_a_dict_is_no_key_whatever_its_class(key: Any) -> None:
    with pytest.raises(BadItem, match=f"is of type {type(key).__name__}"):
        canonical_key(key)


@pytest.mark.parametrize("item", [Point("k", 1), Pair("k", 1), Items(["k", 1])], ids=describe)
def test_a_pair_may_be_of_a_subclass(item: Any) -> None:
    assert check_item(item, Snapshot()) == ("k", 1)


@given(st.lists(st.floats() | st.integers() | st.booleans(), max_size=12), st.randoms())
def test_nan_has_its_place_among_values(several: list[Any], random: Any) -> None:
    ordered = list(several)
    sort_values(ordered)
    finite = sum(value == value for value in several)
    assert ordered[:finite] == sorted(value for value in several if value == value)
    assert all(value != value for value in ordered[finite:])
    nested = [[value] for value in several]
    random.shuffle(nested)
    sort_values(nested)
    assert all(value == value for (value,) in nested[:finite])


def test_deep_and_cyclic_values_are_refused() -> None:
    cycle: list[Any] = []
    cycle.append(cycle)
    deep: Any = 1
    for _ in range(5000):
        deep = [deep]
    for wrong in (cycle, deep):
        with pytest.raises(BadItem, match="nested more than"):
            Snapshot().take(wrong)


@pytest.mark.parametrize(
    "wrong", [None, 1, "ab", ("a",), ("a", 1, 2), {"a": 1, "b": 2}, Pair("a", 1)[:1]], ids=describe
)
def test_an_item_is_a_pair(wrong: Any) -> None:
    with pytest.raises(BadItem, match="no \\(key, value\\) pair"):
        check_item(wrong, Snapshot())


@given(values)
def test_a_value_means_its_json_round_trip(value: Any) -> None:
    taken = Snapshot().take(value)
    assert repr(taken) == repr(json.loads(json.dumps(value)))
    assert repr(json.loads(json.dumps(taken))) == repr(taken)


def test_a_value_is_a_snapshot() -> None:
    inner = {"a": [1]}
    value = [inner]
    taken = Snapshot().take(value)
    inner["a"].append(2)
    value.clear()
    assert taken == [{"a": [1]}]
    assert Snapshot().take({1: 2, None: 4}) == {"1": 2, "null": 4}
    assert Snapshot().take({True: 3, False: 4}) == {"true": 3, "false": 4}


@given(st.lists(values.map(lambda value: json.loads(json.dumps(value))), max_size=10))
def test_values_ascend_by_kind(several: list[Any]) -> None:
    def kind(value: Any) -> int:
        return {type(None): 0, str: 2, list: 3, dict: 4}.get(type(value), 1)

    held = list(several)
    sort_values(held)
    assert [kind(value) for value in held] == sorted(map(kind, several))
    # NaN, which `sorted` puts anywhere, has a test of its own.
    assert [v for v in held if kind(v) == 1 and v == v] == sorted(v for v in several if kind(v) == 1 and v == v)
    assert [v for v in held if kind(v) == 2] == sorted(v for v in several if kind(v) == 2)
    again = several[::-1]
    sort_values(again)
    assert [repr(v) for v in again if kind(v) != 1] == [repr(v) for v in held if kind(v) != 1]


groups = st.lists(
    st.tuples(keys.map(one_form), st.lists(values.map(Snapshot().take), min_size=1, max_size=4)), min_size=1, max_size=8
)


@given(groups)
def test_a_frame_round_trips(some: list[tuple[Any, list[Any]]]) -> None:
    frame, decoded = encode_frame([key for key, _ in some], [held for _, held in some])
    length, count, checksum = FRAME_HEADER.unpack(frame[: FRAME_HEADER.size])
    payload = frame[FRAME_HEADER.size :]
    assert length == len(payload) < decoded
    got = list(zip(*decode_payload(payload, count, checksum), strict=True))
    assert repr(got) == repr(some)


@settings(max_examples=25)
@given(groups, st.data())
def test_a_flipped_byte_in_a_frame_is_found(some: list[tuple[Any, list[Any]]], data: st.DataObject) -> None:
    frame, _ = encode_frame([key for key, _ in some], [held for _, held in some])
    place = data.draw(st.integers(4, len(frame) - 1))  # the length itself: see test_spills_and_sort
    wrong = bytearray(frame)
    wrong[place] ^= data.draw(st.integers(1, 255))
    _, count, checksum = FRAME_HEADER.unpack(wrong[: FRAME_HEADER.size])
    with pytest.raises(DamagedFrame):
        decode_payload(bytes(wrong[FRAME_HEADER.size :]), count, checksum)


@pytest.mark.parametrize("payload", [b"", b"[", b"[[1]]", b"7", b"[[1],[2],[3]]", b"[1,2]", b"[[1],{}]", b"\xff"])
def test_a_frame_whose_checksum_was_made_for_nonsense_is_damaged_too(payload: bytes) -> None:
    with pytest.raises(DamagedFrame):
        decode_payload(payload, 1, crc32(payload))


@given(st.lists(st.tuples(keys.map(one_form), values.map(Snapshot().take)), max_size=8))
def test_items_are_json_lines(items: list[tuple[Any, Any]]) -> None:
    lines = encode_items(items).split("\n")
    assert lines.pop() == ""
    assert repr([(tuples(key), value) for key, value in map(json.loads, lines)]) == repr(items)


@pytest.mark.parametrize("nasty", ["],[", "]],[[", "]\n[", "\u2028", "\x0b\r", '"],["', "\\", "/"])
def test_items_that_look_like_borders(nasty: str) -> None:
    items: list[Any] = [(nasty, [[nasty], [1], [2]]), ((nasty,), {nasty: nasty}), ("b", []), ("c", [[], []])]
    lines = encode_items(items).split("\n")[:-1]
    assert repr([(tuples(key), value) for key, value in map(json.loads, lines)]) == repr(items)


def test_describe_is_short_whatever_it_gets() -> None:
    assert len(describe("x" * 10_000)) < 150
    assert "Unprintable" in describe(Unprintable())
    assert "\ud800" not in describe("\ud800")
