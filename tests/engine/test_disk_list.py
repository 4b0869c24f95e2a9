"""Lists on disk: against a plain list."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import grouped, one_form
from strategies import keys, values

from mrcore.engine import disk_list
from mrcore.engine.disk_list import DiskGroup, DiskList
from mrcore.engine.records import BadItem, Snapshot

items_of_any_kind = st.lists(st.tuples(keys, values), max_size=30)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_list, "CHUNK_RECORDS", 3)


@given(items_of_any_kind)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_a_list_gives_back_its_items(small_chunks: None, tmp_path: Path, items: list[Any]) -> None:
    held = DiskList(tmp_path)
    held.extend(items)
    wanted = [(one_form(key), Snapshot().take(value)) for key, value in items]
    assert len(held) == len(items)
    assert repr(list(held)) == repr(wanted) == repr(list(held))
    assert repr([held[n] for n in range(len(held))]) == repr(wanted)
    assert repr([held[-n - 1] for n in range(len(held))]) == repr(wanted[::-1])
    for _ in range(2):  # after the end the cursor starts anew
        got = []
        while (item := held.next()) is not None:
            got.append(item)
        assert repr(got) == repr(wanted)
    for wrong in (len(items), -len(items) - 1):
        with pytest.raises(IndexError):
            held[wrong]
    assert not os.listdir(tmp_path)  # the file has no name


def test_next_group(small_chunks: None, tmp_path: Path) -> None:
    held = DiskList(tmp_path)
    items = [(n // 4, n) for n in range(30)]
    held.extend(items)
    for _ in range(2):
        got = []
        while (group := held.next_group()) is not None:
            got.append(group)
        assert [(group[0][0], [value for _, value in group]) for group in got] == grouped(items)
    assert DiskList(tmp_path).next_group() is None


def test_two_readers_do_not_disturb_each_other(small_chunks: None, tmp_path: Path) -> None:
    held = DiskList(tmp_path)
    held.extend((n, n) for n in range(20))
    assert [(a[0], b[0]) for a in held for b in held] == [(a, b) for a in range(20) for b in range(20)]


def test_a_list_copies_what_it_gets_and_refuses_what_is_no_item(tmp_path: Path) -> None:
    held = DiskList(tmp_path)
    value = [1]
    held.append(("k", value))
    value.append(2)
    assert list(held) == [("k", [1])]
    for wrong in (("k",), ("k", b""), (b"", 1), None):
        with pytest.raises(BadItem):
            held.append(wrong)  # type: ignore[arg-type]


def test_large_records_go_to_disk(tmp_path: Path) -> None:
    held = DiskGroup(tmp_path, "k")
    held.extend_values("x" * 200_000 for _ in range(20))
    held.append(("k", "last"))
    assert len(held._chunks._tail) < 3
    assert [len(value) for _, value in held] == [200_000] * 20 + [4]
    assert held[0][0] == "k"


def test_a_list_that_was_read_in_part_closes_its_file_at_once(small_chunks: None, tmp_path: Path) -> None:
    gc.disable()  # as in a task
    try:
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(50):
            held = DiskList(tmp_path)
            held.extend((n, n) for n in range(20))
            assert held.next() == (0, 0)
            assert held.next_group() == [(1, 1)]
        del held
        assert len(os.listdir("/proc/self/fd")) == before
    finally:
        gc.enable()
