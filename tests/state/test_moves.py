"""The mark of a drain: who drains, what is in its middle, also as an earlier release wrote it down."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from mrcore.errors import UsageError
from mrcore.state import moves
from mrcore.state.moves import Mark, Move
from mrcore.state.store import Store

MOVE = Move("in/a", 3, 1, 0o644, 7, "n2", "in/a.n1", 2, 8)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with contextlib.closing(Store(tmp_path)) as made:
        yield made


def test_what_an_earlier_release_wrote_down_is_understood(store: Store) -> None:
    assert moves.read(store) == Mark()
    store.put("drain", {"source": "n1", "moves": None})
    assert moves.read(store) == Mark(source="n1")
    row = ["in/a", 3, 1, 0o644, 7, "n2", "in/a.n1", 2, 8]
    places = {"n1": ["", "/one"], "n2": ["", "/two"]}
    store.put(
        "drain", {"source": "n1", "pid": 1, "start_ticks": 5, "stage": "publish", "moves": [row], "places": places}
    )
    mark = moves.read(store)
    assert (mark.source, mark.stage, mark.moves, mark.places["n2"]) == ("n1", "publish", [MOVE], ("", "/two"))
    moves.write(store, stage="remove")
    assert store.get("drain")["moves"] == [row] and store.get("drain")["stage"] == "remove"
    assert "mrcore drain n1" in (store.held_by_drain() or "")


def test_one_process_drains_and_a_step_in_its_middle_outlives_it(store: Store) -> None:
    with moves.alone(store, "n1"):
        assert f"n1 is being drained by process {os.getpid()}" in (store.held_by_drain() or "")
        with pytest.raises(UsageError, match=f"process {os.getpid()} is draining node n1"), moves.alone(store, "n2"):
            pass
    assert store.get("drain") is None
    with pytest.raises(ZeroDivisionError), moves.alone(store, "n1"):
        moves.write(store, moves=[MOVE], stage="publish")
        raise ZeroDivisionError
    assert moves.read(store).pid is None and moves.read(store).moves == [MOVE] and store.held_by_drain()
    with moves.alone(store, "n3"):
        assert moves.read(store).source == "n1"  # whose step is to be completed first
        moves.write(store, moves=None)
    assert store.get("drain") is None and store.held_by_drain() is None
