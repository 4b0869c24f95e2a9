"""Spill runs, their index and damage; merging by blocks; the sorter's budget: against plain sorted and groupby."""

from __future__ import annotations

import itertools
import json
import os
import random
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import bag, grouped, one_form, rank
from strategies import keys
from task_parts import StubWatch

from mrcore.engine import disk_sort, spills
from mrcore.engine.disk_list import DiskGroup
from mrcore.engine.disk_sort import DiskSort, merge
from mrcore.engine.memory import MIN_SPILL_BYTES, MemoryWatch
from mrcore.engine.records import BadItem, canonical_key, loads, sort_keys
from mrcore.engine.shuffler import Shuffle
from mrcore.engine.spills import DamagedFrame, Segment, SpillWriter, encode_frame, select
from mrcore.errors import JobFault
from mrcore.messages.tasks import read_key

Item = tuple[Any, Any]
# All examples of one test write over the same folder.
shared_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
few_keys = st.one_of(
    keys.map(one_form), st.integers(0, 5), st.sampled_from(["a", "b", ("a", 1), ("a", None), None, 1.5])
)
items_of_any_kind = st.lists(st.tuples(few_keys, st.integers(0, 9) | st.sampled_from(["v", 1.5, None, [1], {"a": 1}])))


def write(folder: Path, name: str, items: Sequence[Item], frame_bytes: int = 1 << 16) -> Segment:
    """Write items as one run of one partition."""
    groups = dict(grouped(items))
    writer = SpillWriter(folder, name, frame_bytes, keep_first_keys=True)
    writer.write(0, sort_keys(groups), groups, True)
    told = writer.close()
    assert msgspec.json.encode(told)
    assert told.bytes == (folder / f"{name}.data").stat().st_size
    return Segment(folder / f"{name}.data", 0, told.bytes, told.max_decoded)


def merged(segments: Sequence[Segment], low: Any = None, high: Any = None) -> list[tuple[Any, list[Any]]]:
    got = [(key, list(itertools.chain(*lists))) for key, lists in merge(segments, low, high)]
    assert [key for key, _ in got] == sorted((key for key, _ in got), key=rank)
    assert len({repr(key) for key, _ in got}) == len(got)
    return got


def as_items(groups: Sequence[tuple[Any, list[Any]]]) -> list[Item]:
    return [(key, value) for key, values in groups for value in values]


@pytest.fixture
def small_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spills, "MAX_FRAME_GROUPS", 3)
    monkeypatch.setattr(spills, "MAX_FRAME_VALUES", 4)


@pytest.fixture
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("runs")


# --- Runs ------------------------------------------------------------------------------------------------------------


@given(items=items_of_any_kind, frame_bytes=st.integers(20, 400))
@shared_folder
def test_a_run_round_trips(small_frames: None, folders: Path, items: list[Item], frame_bytes: int) -> None:
    segment = write(folders, "run", items, frame_bytes)
    frames = list(segment.blocks())
    assert all(len(held) == len(lists) for held, lists in frames)
    assert as_items([pair for held, lists in frames for pair in zip(held, lists, strict=True)]) == as_items(
        grouped(items)
    )
    assert max((sum(map(len, lists)) for _, lists in frames), default=0) <= 4


@given(items=items_of_any_kind, borders=st.lists(few_keys, max_size=4), frame_bytes=st.integers(20, 200))
@shared_folder
def test_ranges_of_keys_hold_every_key_once(
    small_frames: None, folders: Path, items: list[Item], borders: list[Any], frame_bytes: int
) -> None:
    whole = write(folders, "run", items, frame_bytes)
    ends = [None, *([key] for key in sort_keys(dict.fromkeys(borders))), None]
    got: list[Item] = []
    for low, high in itertools.pairwise(ends):
        selector = json.loads(json.dumps({"low": low, "high": high}))  # as it comes over the wire: lists for tuples
        ranges = select(folders, "run", selector)
        segments = [Segment(whole.path, offset, length, whole.max_decoded) for offset, length in ranges]
        sorter = DiskSort(folders, StubWatch(1), low=selector["low"], high=selector["high"])  # type: ignore[arg-type]
        for segment in segments:
            sorter.add_spill(segment)
        part = as_items(list(sorter.groups()))  # type: ignore[arg-type]
        wanted = [item for item in as_items(grouped(items)) if (low is None or rank(item[0]) >= rank(low[0]))]
        assert part == [item for item in wanted if high is None or rank(item[0]) < rank(high[0])]
        got += part
    assert got == as_items(grouped(items))


def test_first_keys_reach_the_master_whatever_they_are(tmp_path: Path) -> None:
    infinite = float("inf")
    held: list[Any] = [-infinite, 7, infinite, (infinite, ["x"]), ("a", (-infinite,)), 10**4299, -(10**400)]
    held = sort_keys(map(canonical_key, held))
    writer = SpillWriter(tmp_path, "run", 1, keep_first_keys=True)
    writer.write(0, held, {key: [1] for key in held}, True)
    plain = json.dumps({"event": "done", "runs": [msgspec.to_builtins(writer.close())]})
    sent = msgspec.json.decode(plain)["runs"][0]["samples"]
    cuts = [read_key(key) for key, _ in sent]
    assert cuts == held
    got: list[Any] = []
    for low, high in itertools.pairwise([None, *([cut] for cut in cuts), None]):
        sorter = DiskSort(tmp_path, StubWatch(1), low=low, high=high)  # type: ignore[arg-type]
        for offset, length in select(tmp_path, "run", {"low": low, "high": high}):
            sorter.add_spill(Segment(tmp_path / "run.data", offset, length, 1))
        got += [key for key, _ in sorter.groups()]
    assert got == held, "each key is in one range, in the order of all"


def test_partitions_of_a_run(tmp_path: Path) -> None:
    writer = SpillWriter(tmp_path, "run", 1 << 16)
    for partition in (0, 2, 3):
        writer.write(partition, [f"k{partition}"], {f"k{partition}": list(range(9000))}, False)
    told = writer.close()
    assert set(told.partitions) == {"0", "2", "3"} and told.groups >= 3 and told.values == 27_000
    position = 0
    for partition in range(4):
        ranges = select(tmp_path, "run", {"partition": partition})
        assert sum(length for _, length in ranges) == told.partitions.get(str(partition), 0)
        for offset, length in ranges:
            assert offset == position
            position += length
            for held, lists in Segment(tmp_path / "run.data", offset, length, 1).blocks():
                assert held == [f"k{partition}"] and len(lists[0]) <= spills.MAX_FRAME_VALUES
    with pytest.raises(FileNotFoundError):
        select(tmp_path, "other", {"partition": 0})
    assert sorted(os.listdir(tmp_path)) == ["run.data", "run.index"]


def test_every_flipped_byte_of_a_run_is_found(tmp_path: Path) -> None:
    segment = write(tmp_path, "run", [("a", 1), (("b", 2), [1, {"x": "é"}]), ("c", 2)], 30)
    whole = segment.path.read_bytes()
    assert len(list(segment.blocks())) > 1
    for place in range(len(whole)):
        for flip in (1, 128):
            wrong = bytearray(whole)
            wrong[place] ^= flip
            segment.path.write_bytes(wrong)
            with pytest.raises(DamagedFrame, match=r"run\.data"):
                list(segment.blocks())
    for kept in range(len(whole)):
        segment.path.write_bytes(whole[:kept])
        with pytest.raises(DamagedFrame, match=r"run\.data"):
            list(segment.blocks())


@pytest.mark.parametrize(
    "values",
    [
        list(range(1000, 5000)),
        [n + 0.5 for n in range(4000)],
        [f"text {n}" for n in range(3000)],
        ["emoji 😀" * 3 + str(n) for n in range(2000)],
        [{"a": n, "b": [n]} for n in range(1000)],
        [[n, [], {}] for n in range(1000)],
        [True, None] * 2000,
    ],
    ids=["int", "float", "str", "wide", "dict", "list", "constant"],
)
@pytest.mark.parametrize("by_key", [False, True])
def test_the_decoded_size_of_a_frame_is_not_underestimated(values: list[Any], by_key: bool) -> None:
    held = [f"key {n}" for n in range(len(values))] if by_key else ["key"]
    lists = [[value] for value in values] if by_key else [values]
    frame, estimate = encode_frame(held, lists)
    decoded = loads(frame[12:])
    seen: set[int] = set()

    def size(value: Any) -> int:
        if id(value) in seen or value is None or isinstance(value, bool):
            return 0
        seen.add(id(value))
        inner = value if isinstance(value, list) else [*value, *value.values()] if isinstance(value, dict) else ()
        return sys.getsizeof(value) + sum(map(size, inner))

    real = size(decoded)
    assert 0.8 * real < estimate < 9 * real


# --- Merging ---------------------------------------------------------------------------------------------------------


@given(several=st.lists(items_of_any_kind, max_size=6), frame_bytes=st.integers(20, 300))
@shared_folder
def test_a_merge_equals_sorted_and_groupby(
    small_frames: None, folders: Path, several: list[list[Item]], frame_bytes: int
) -> None:
    segments = [write(folders, f"run-{n}", items, frame_bytes) for n, items in enumerate(several) if items]
    everything = list(itertools.chain(*several))
    assert bag(as_items(merged(segments))) == bag(as_items(grouped(everything)))
    assert [key for key, _ in merged(segments)] == [key for key, _ in grouped(everything)]


@pytest.mark.parametrize("combining", [False, True])
@pytest.mark.parametrize("fan_in", [2, 3, 256])
def test_many_merge_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_frames: None, fan_in: int, combining: bool
) -> None:
    monkeypatch.setattr(disk_sort, "MAX_FAN_IN", fan_in)
    draw = random.Random(3)
    kinds: list[Any] = [None, 1, 2.5, "a", ("a",), ("a", None), ("a", 3)]
    several = [[(draw.choice(kinds), draw.randrange(9)) for _ in range(draw.randrange(60))] for _ in range(25)]
    combine = (lambda key, values: [sum(values)]) if combining else None
    sorter = DiskSort(tmp_path, StubWatch(1), combine=combine)  # type: ignore[arg-type]
    for number, items in enumerate(several):
        sorter.add_spill(write(tmp_path, f"run-{number}", items, 60))
    got = [(key, sum(values)) for key, values in sorter.groups()]  # type: ignore[arg-type]
    assert got == [(key, sum(values)) for key, values in grouped(itertools.chain(*several))]
    assert bool(sorter.merge_passes) == (fan_in < 25)


def test_a_giant_group_over_many_runs(tmp_path: Path) -> None:
    segments = [write(tmp_path, f"r{n}", [("k", v) for v in range(10_000)] + [("a", n), ("z", n)]) for n in range(5)]
    got = dict(merged(segments))
    assert Counter(got["k"]) == Counter(list(range(10_000)) * 5)
    assert sorted(got["a"]) == sorted(got["z"]) == list(range(5))


# --- Spilling --------------------------------------------------------------------------------------------------------


@given(items_of_any_kind, st.integers(1, 9), st.integers(1, 7), st.booleans())
@shared_folder
def test_any_number_of_spills_and_partitions_gives_the_same_items(
    folders: Path, items: list[Item], period: int, partitions: int, by_range: bool
) -> None:
    watch = StubWatch(period)
    sink = Shuffle(folders, "map", watch, partitions=partitions, by_range=by_range)  # type: ignore[arg-type]
    for key, value in items:
        sink.append(key, value)
    told = sink.shuffle()
    assert len(told) == -(-len(items) // period) and watch.released >= len(told)
    got: list[Item] = []
    for partition in range(1 if by_range else partitions):
        segments = [
            Segment(folders / f"{run.id}.data", offset, length, run.max_decoded)
            for run in told
            for offset, length in select(folders, run.id, {"partition": partition})
        ]
        got += as_items(merged(segments))
    assert bag(got) == bag(as_items(grouped(items)))


def test_next_group_returns_the_groups_of_all_spills(tmp_path: Path) -> None:
    draw = random.Random(1)
    items = [(draw.randrange(30), draw.randrange(1000)) for _ in range(5000)]
    sink = Shuffle(tmp_path, "s", StubWatch(50), partitions=1)  # type: ignore[arg-type]
    for key, value in items:
        sink.append(key, value)
    with pytest.raises(BadItem):
        sink.append("k", b"")
    sorter = DiskSort(tmp_path, StubWatch(50), ascending_values=True)  # type: ignore[arg-type]
    for spill in sink.shuffle():
        sorter.add_spill(Segment(tmp_path / f"{spill.id}.data", 0, spill.bytes, spill.max_decoded))
    got = []
    while (group := sorter.next_group()) is not None:
        got.append(group)
    assert got == [(key, sorted(values)) for key, values in grouped(items)]
    assert sorter.next_group() is None


def test_groups_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mrcore.engine.disk_list.MAX_PIECE_VALUES", 100)
    items = [(("k", n % 2), (n * 7919) % 20_011) for n in range(20_000)]
    for ascending in (False, True):
        sorter = DiskSort(tmp_path, StubWatch(10**9), ascending_values=ascending)  # type: ignore[arg-type]
        for start in range(0, len(items), 5000):
            sorter.add_spill(write(tmp_path, f"run-{start}", items[start : start + 5000]))
        for (key, group), (wanted_key, wanted) in zip(sorter.groups(True), grouped(items), strict=True):
            assert isinstance(group, DiskGroup) and key == wanted_key
            values = [value for _, value in group]
            assert (values if ascending else sorted(values)) == sorted(wanted)
            assert len(group) == len(wanted) and group[0][0] == key


def test_a_group_that_does_not_fit_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = StubWatch(10**9)
    sorter = DiskSort(tmp_path, watch)  # type: ignore[arg-type]
    sorter.add_spill(write(tmp_path, "run", [("small", 1), *(("the key", n) for n in range(20_000))]))
    monkeypatch.setattr(watch, "fits", lambda more, share=1.0: False)
    with pytest.raises(JobFault, match=r"group of key 'the key' does not fit.*disk_based_input: true.*memory_bytes"):
        list(sorter.groups())


@pytest.mark.parametrize(
    ("place", "bad"),
    [
        ("key", float("nan")),
        ("key", ("a", float("nan"))),
        *((place, bad) for place in ("key", "value") for bad in ("\ud800", 10**4300, b"")),
    ],
    ids=type,
)
@pytest.mark.parametrize("partitions", [1, 3])
def test_what_got_in_unchecked_is_found_at_the_spill(tmp_path: Path, bad: Any, place: str, partitions: int) -> None:
    sorter = Shuffle(tmp_path, "s", StubWatch(1), partitions=partitions)  # type: ignore[arg-type]
    sorter.groups["fine"].append(1)
    sorter.groups[bad if place == "key" else "k"].append(1 if place == "key" else bad)
    with pytest.raises(BadItem, match=f"the {place}"):
        sorter.spill()


# --- The watch -------------------------------------------------------------------------------------------------------


def test_a_watch_calls_for_a_spill_only_when_one_would_free_something() -> None:
    with MemoryWatch(1 << 40) as watch:
        watch.look()
        assert not watch.due and watch.fits(1 << 30)
    with MemoryWatch(1 << 20) as watch:  # what is held from the start is far past the budget
        watch.look()
        assert not watch.due and not watch.fits(0)
        ballast = bytearray(3 * MIN_SPILL_BYTES)
        watch.look()
        assert watch.due and watch.peak_bytes > len(ballast)
        del ballast
        watch.release()
        watch.look()
        assert not watch.due
