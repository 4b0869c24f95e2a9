"""What is added up of an attempt: never falling but by a death, whole at its end, bounded whatever nodes say."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mrcore.messages.tasks import (
    MAX_USER_COUNTERS,
    Bundle,
    HeavyGroup,
    Progressed,
    RunIdentity,
    Split,
    TaskIdentity,
    TaskResult,
)
from mrcore.state.board import MAX_STACKS, OTHERS, Board
from mrcore.state.progress import MAX_DEATHS, MAX_HEAVY_KEYS, MAX_SLOWEST, Progress

RUN = RunIdentity(job="wc", run=3)
SERVERS = {"S_0": "a", "S_1": "a", "S_2": "b"}


class Clock:
    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


def plain(size: int) -> Split:
    return Split("/f", 0, size, size, 0, 0)


def packed(size: int) -> Split:
    return Split("/f.gz", 0, None, size, 0, 0)


def identity(phase: Any, task: int, try_: int = 1) -> TaskIdentity:
    return TaskIdentity(job="wc", run=3, phase=phase, task=task, try_=try_)


def result(**more: Any) -> TaskResult:
    return TaskResult(peak_bytes=7, counters=more.pop("counters", {}), seconds={}, **more)


def board(*bundles: Bundle, clock: Clock | None = None) -> Board:
    return Board(RUN, SERVERS, {"a": bundles}, clock or Clock())


def done(seen: Progress) -> dict[str, tuple[int, int]]:
    return {phase.name: (phase.done, phase.total) for phase in seen.phases}


@given(st.integers(0, 1 << 32), st.integers(1, 30), st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_any_course_of_an_attempt(seed: int, count: int, partitions: int) -> None:
    rng = random.Random(seed)
    bundles = [Bundle(at, [rng.choice([plain, packed])(rng.randint(0, 10**6))]) for at in range(count)]
    clock = Clock()
    made, counted, deaths = board(*bundles, clock=clock), Counter[str](), 0
    total = sum(bundle.pieces[0].size for bundle in bundles)
    before = done(made.view())
    assert before == {"MAP": (0, total)}

    def look(died: bool) -> None:
        nonlocal before
        seen = made.view()
        after = done(seen)
        assert all(0 <= at <= of for at, of in after.values())
        assert died or all(after[name] >= before[name] for name in before), (before, after)
        before = after
        assert all(seen.counters[name] >= amount for name, amount in counted.items())

    def work(phase: Any, pieces: list[Any]) -> None:
        """Random servers take pieces (bundles, partitions), report as they like, and end or die."""
        nonlocal deaths
        hands: dict[str, tuple[Any, str, int]] = {}
        waiting, tries, number = list(pieces), Counter[Any](), 0
        while waiting or hands:
            clock.now += rng.random()
            server, died = rng.choice(list(SERVERS)), False
            if server not in hands:
                if not waiting:
                    continue
                piece = waiting.pop(0)
                name = piece.id if phase == "MAP" else piece
                tries[name] += 1
                task, number = (number, number + 1) if phase == "MAP" else (piece, number)
                partition = None if phase == "MAP" else piece
                made.start(server, identity(phase, task, tries[name]), [piece] if phase == "MAP" else [], partition)
                hands[server] = piece, "MAP" if phase == "MAP" else "SORT", 0
            else:
                piece, kind, reported = hands[server]
                what = rng.choice(["report", "report", "bundle", "sorted", "die", "done"])
                if what == "report":
                    reported += rng.randint(0, 10**6)
                    ours = {"ours": rng.randint(0, 5)}
                    made.progressed(
                        server, Progressed(phase=kind, bytes=reported, records=reported, user_counters=ours)
                    )
                    hands[server] = piece, kind, reported
                elif what == "bundle" and phase == "MAP":
                    made.bundle_done(server, piece.id)
                elif what == "sorted" and kind == "SORT":
                    made.sorted(server)
                    hands[server] = piece, "REDUCE", 0
                elif what == "die" and tries[piece.id if phase == "MAP" else piece] < 3:
                    made.died(server, "killed")
                    waiting.append(piece)
                    hands.pop(server)
                    died, deaths = True, deaths + 1
                elif what == "done":
                    amount = rng.randint(-3, 9)
                    counted["count"] += amount
                    made.done(server, result(user_counters={"count": amount}))
                    hands.pop(server)
            look(died)

    work("MAP", bundles)
    assert done(made.view())["MAP"] == (total, total)
    sizes = {number: rng.randint(0, 10**6) for number in range(partitions)}
    made.end_map(sizes)
    work("REDUCE", list(sizes))
    seen, detail, whole = made.view(), made.detail(), sum(sizes.values())
    assert {*done(seen).values()} <= {(total, total), (whole, whole)}
    assert all(phase.ended is not None for phase in seen.phases)
    assert seen.counters == detail.counters == dict(counted) and seen.deaths == deaths == len(detail.deaths)
    assert sum(share.tasks for share in detail.servers if share.phase == "REDUCE") in range(partitions + 1)
    assert sum(share.bytes for share in detail.servers if share.phase == "MAP") == total
    assert detail.largest_partition_bytes == max(sizes.values())


def test_a_packed_file_is_as_far_as_what_was_read_of_others() -> None:
    clock = Clock()
    made = board(Bundle(0, [packed(1_000)]), Bundle(1, [packed(1_000)]), clock=clock)
    made.start("S_0", identity("MAP", 0), [Bundle(0, [packed(1_000)]), Bundle(1, [packed(1_000)])], None)
    made.progressed("S_0", Progressed(phase="MAP", bytes=2_000, records=1))
    assert done(made.view())["MAP"] == (500, 2_000)  # nothing known: four to one
    made.progressed("S_0", Progressed(phase="MAP", bytes=9_000, records=1))
    assert done(made.view())["MAP"] == (950, 2_000)  # never whole before the task says so
    made.progressed("S_0", Progressed(phase="MAP", bytes=10_000, records=1))
    made.bundle_done("S_0", 0)
    made.progressed("S_0", Progressed(phase="MAP", bytes=15_000, records=1))
    assert done(made.view())["MAP"] == (1_500, 2_000)  # ten to one


def test_words_that_cross_the_change_of_phase_count_for_their_own() -> None:
    made = board()
    made.end_map({0: 100})
    made.start("S_0", identity("REDUCE", 0), [], 0)
    made.progressed("S_0", Progressed(phase="SORT", bytes=70, records=0))
    made.sorted("S_0")
    made.progressed("S_0", Progressed(phase="SORT", bytes=100, records=0))
    assert done(made.view()) == {"MAP": (0, 0), "SORT": (100, 100), "REDUCE": (0, 100)}
    made.progressed("S_0", Progressed(phase="REDUCE", bytes=30, records=3))
    assert done(made.view())["REDUCE"] == (30, 100)


def test_a_server_shows_what_it_does() -> None:
    clock = Clock()
    made = board(Bundle(0, [plain(100)]), clock=clock)
    made.up("S_0", True)
    made.start("S_0", identity("MAP", 4), [Bundle(0, [plain(100)])], None)
    status = "page 17\x1b[31m" + 500 * "x"
    made.progressed("S_0", Progressed(phase="MAP", bytes=30, records=3, spills=1, status=status))
    now, away, _ = made.view().servers
    assert (now.up, now.phase, now.task, now.since, now.bytes, now.records, now.spills) == (
        True,
        "MAP",
        4,
        1_000,
        30,
        3,
        1,
    )
    assert now.status.startswith("page 17\\x1b[31m") and len(now.status) < 300
    assert (away.up, away.phase, away.task) == (False, "", None)
    made.died("S_0", "killed")
    assert made.view().servers[0].phase == ""


def test_a_run_that_is_cut_off_keeps_what_was_under_way() -> None:
    clock = Clock()
    made = board(Bundle(0, [plain(100)]), clock=clock)
    made.start("S_0", identity("MAP", 0), [Bundle(0, [plain(100)])], None)
    made.progressed("S_0", Progressed(phase="MAP", bytes=30, records=3, user_counters={"bad": 1}))
    clock.now += 5
    detail = made.detail()
    (row,) = detail.slowest
    assert (row.outcome, row.seconds, row.bytes) == ("running", 5, 30) and detail.counters == {}


def test_everything_is_bounded() -> None:
    made = board()
    most = (1 << 62) - 1
    made.end_map(dict.fromkeys(range(65_536), 4 * most))
    for number in range(400):
        made.start("S_0", identity("REDUCE", number), [], number)
        made.progressed("S_0", Progressed(phase="SORT", bytes=most, records=most))
        if number % 2:
            made.died("S_0", "x" * 20_000)
            continue
        counters = {f"{number} {at}": most for at in range(MAX_USER_COUNTERS)}
        heavy = [HeavyGroup(key=f"{number}-{at}", values=number * 10 + at) for at in range(10)]
        profile = {f"a;b{number};c{at}": at + 1 for at in range(400)}
        made.done("S_0", result(user_counters=counters, heavy=heavy, profile=profile, counters={"values": most}))
    seen, detail = made.view(), made.detail()
    assert len(seen.counters) == MAX_USER_COUNTERS + 1 and seen.counters[OTHERS] == 1 << 62
    assert len(detail.slowest) == MAX_SLOWEST and len(detail.deaths) == MAX_DEATHS and seen.deaths == 200
    assert len(detail.heavy_keys) == MAX_HEAVY_KEYS and detail.heavy_keys[0].key == "398-9"
    assert len(made.profiles["REDUCE"]) <= MAX_STACKS and sum(made.profiles["REDUCE"].values()) == 200 * 400 * 401 // 2
    assert max(phase.records for phase in seen.phases) <= 1 << 62
    assert len(msgspec.json.encode(seen)) < 100_000 and len(msgspec.json.encode(detail)) < 300_000


@pytest.mark.parametrize("phase", ["MAP", "REDUCE"])
def test_profiles_are_by_phase(phase: Any) -> None:
    made = board()
    made.end_map({0: 5})
    made.start("S_0", identity(phase, 0), [], None if phase == "MAP" else 0)
    made.done("S_0", result(profile={"a;b": 3}))
    assert {name: dict(stacks) for name, stacks in made.profiles.items()} == {phase: {"a;b": 3}}
