"""What is said of the time that is left, against simulated runs whose end is known, and any course of events."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mrcore.queue.forecast import Forecast, Past, after_map, past, seconds_left
from mrcore.state.progress import Phase, Progress, RunDetail, ServerShare
from mrcore.state.store import RunRow

GIB = 1 << 30
SECONDS = st.floats(0, 1e7)


SHARE = {"server": "S_0", "node": "n", "tasks": 8, "bytes": 1, "records": 1}
DETAIL = RunDetail(
    servers=[ServerShare(phase="SORT", seconds=10, **SHARE), ServerShare(phase="REDUCE", seconds=20, **SHARE)]
)


def row(**changes: object) -> RunRow:
    """A succeeded mapreduce run: 2 s PREFLIGHT, 60 s MAP, 30 s SORT and REDUCE, 1 s COMMIT."""
    times = {"PREFLIGHT": (0, 2), "MAP": (2, 62), "SORT": (62, 72), "REDUCE": (72, 92), "COMMIT": (92, 93)}
    phases = {name: {"started": begun, "ended": ended} for name, (begun, ended) in times.items()}
    counts = {"input_bytes": GIB, "spilled_bytes": GIB // 4}
    base = RunRow("wc", 1, "succeeded", 1, 0, 0.0, 93.0, 1, phases, counts, None, "mapreduce", None)
    return base._replace(**changes)  # type: ignore[arg-type]


def simulated(t: float, times: dict[str, float], size: int = GIB, before: float = 1.0) -> Progress:
    """A run of even speed in each phase, at second `t`; its report is as old as real ones may be."""
    ends, begin = {}, before
    for name in ("MAP", "SORT", "REDUCE", "COMMIT"):
        begin += times[name]
        ends[name] = begin
    phases = [Phase(name="PREFLIGHT", started=0, ended=min(t, before) if t > before else None)]
    for name in ("MAP", "SORT", "REDUCE", "COMMIT"):
        begun = ends[name] - times[name]
        if t >= begun:
            total = {"MAP": size, "COMMIT": 0}.get(name, size // 4)
            share = min(1.0, (t - begun) / times[name]) if times[name] else 1.0
            ended = ends[name] if t >= ends[name] else None
            phases.append(Phase(name=name, started=begun, ended=ended, done=int(total * share), total=total))
    return Progress(job_name="wc", run=9, job_type="mapreduce", started=0, updated=t, phases=phases)


def left_at(
    share: float, times: dict[str, float], runs: list[Past], usual: float, size: int = GIB
) -> tuple[float, float]:
    """Return what is shown, and what is true, when this share of a run's time has gone."""
    whole, forecast, t, known = 1 + sum(times.values()), Forecast(), 0.0, False
    shown: float | None = None
    while t < whole * share:
        seen = simulated(t, times, size)
        _, shown = forecast.show(
            seconds_left(seen, runs, usual), t, t, anew=any(phase.total for phase in seen.phases) > known
        )
        known = any(phase.total for phase in seen.phases)
        t += 1
    assert shown is not None
    return shown, whole - t


@pytest.mark.parametrize("share", [0.34, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("slower", [0.8, 1.0, 1.25])
@pytest.mark.parametrize("size", [GIB // 5, GIB, 8 * GIB])
def test_a_job_that_has_run_before(share: float, slower: float, size: int) -> None:
    learnt = past(row(), DETAIL)
    assert learnt
    scale = slower * size / GIB
    times = {"MAP": 60 * scale, "SORT": 10 * scale, "REDUCE": 20 * scale, "COMMIT": 1.0}
    shown, true = left_at(share, times, [learnt] * 3, USUAL, size)
    assert shown == pytest.approx(true, rel=0.3, abs=2)


USUAL = after_map([])


@pytest.mark.parametrize("reduce_share", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("seconds", [30, 300, 3_000])
def test_a_first_run_whose_phases_are_as_usual(reduce_share: float, seconds: float) -> None:
    after = seconds * reduce_share
    times = {"MAP": float(seconds), "SORT": after / 3, "REDUCE": after * 2 / 3, "COMMIT": 0.5}
    shown, true = left_at(1 / 3, times, [], USUAL)
    assert shown == pytest.approx(true, rel=0.3)


def test_a_first_run_without_reduce() -> None:
    times = {"MAP": 90.0, "SORT": 0.0, "REDUCE": 0.0, "COMMIT": 0.5}
    shown, true = left_at(1 / 3, times, [], 0.0)
    assert shown == pytest.approx(true, rel=0.1)


def test_what_is_usual_is_learnt_from_all_runs() -> None:
    learnt = past(row())
    assert learnt and after_map([learnt]) == pytest.approx(0.5)
    assert past(row(state="failed")) is None and past(row(counts={"input_bytes": 0})) is None
    assert past(row(job_type="script", phases={}, counts={})) == Past(93, 0, 0, 0, 0, 0, 0)


def test_a_script_has_its_median_and_then_nothing() -> None:
    seen = Progress(
        job_name="s", run=2, job_type="script", started=0, updated=40, phases=[Phase(name="SCRIPT", started=0)]
    )
    runs = [Past(seconds, 0, 0, 0, 0, 0, 0) for seconds in (90, 100, 200)]
    assert seconds_left(seen, runs, USUAL) == 60
    seen.updated = 101
    assert seconds_left(seen, runs, USUAL) is None and seconds_left(seen, [], USUAL) is None


def test_a_transfer_has_its_own_rate() -> None:
    moving = Phase(name="TRANSFER", started=10, done=25, total=100)
    seen = Progress(job_name="t", run=1, job_type="file_transfer", started=0, updated=20, phases=[moving])
    assert seconds_left(seen, [], USUAL) == pytest.approx(30)


PHASES = st.lists(
    st.builds(
        Phase, name=st.sampled_from(["PREFLIGHT", "MAP", "SORT", "REDUCE", "COMMIT", "TRANSFER"]), started=SECONDS,
        ended=st.none() | SECONDS, done=st.integers(0, 1 << 62), total=st.integers(0, 1 << 62),
    ),
    max_size=6,
)  # fmt: skip
PASTS = st.lists(
    st.builds(Past, *[SECONDS] * 5, input_bytes=st.integers(1, 1 << 62), spilled_bytes=st.integers(0, 1 << 62)),
    max_size=4,
)


@given(PHASES, PASTS, SECONDS, st.floats(0, 10), st.sampled_from(["mapreduce", "script", "file_transfer"]))
def test_whatever_is_seen_the_seconds_are_none_or_not_negative(
    phases: list[Phase], runs: list[Past], now: float, usual: float, kind: str
) -> None:
    seen = Progress(job_name="x", run=1, job_type=kind, started=0, updated=now, phases=phases)
    left = seconds_left(seen, runs, usual)
    assert left is None or (left >= 0 and math.isfinite(left))


LEFT = st.none() | st.floats(0, allow_infinity=True)


@given(st.lists(st.tuples(st.floats(0, 60), LEFT, st.booleans()), min_size=1, max_size=50))
def test_whatever_is_estimated_what_is_shown_does_not_leap(course: list[tuple[float, float | None, bool]]) -> None:
    forecast, now, shown = Forecast(), 0.0, []
    for pause, left, anew in course:
        now += pause
        shown.append((now, *forecast.show(left, now, now, anew)))
    fractions = [fraction for _, fraction, _ in shown if fraction is not None]
    assert fractions == sorted(fractions) and all(0 <= fraction < 1 for fraction in fractions)
    known = [(at, left) for at, _, left in shown if left is not None]
    assert all(left >= 0 for _, left in known)
    for (before, was), (at, left) in pairwise(known):
        assert left <= was + (at - before) * (1 + 0.1 * was) + 1e-6 * (1 + was)
