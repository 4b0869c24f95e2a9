"""How long a run will yet take: from what earlier runs took for each byte, and how fast this one is; pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from mrcore.state.progress import Phase, Progress, RunDetail
from mrcore.state.store import RunRow

LIKE = 3.0  # times as much or as little input: such runs are asked first for the time of a byte
USUAL_AFTER_MAP = 0.5  # seconds of SORT and REDUCE for each of MAP, where no run has told
USUAL_SORT_SHARE = 0.4  # of the servers' seconds in SORT and REDUCE, likewise
MOST_PACE = 2.0  # times as slow or as fast as usual, as MAP shows it, are SORT and REDUCE expected to be
FIRST_SECONDS, FIRST_SHARE = 3.0, 0.01  # of a phase, before a run without earlier ones is judged by its own rate
SETTLE_SECONDS, SETTLE_SHARE = 5.0, 0.2  # or this much of what is left: so soon is a new estimate mostly believed
MOST_RISE_PER_SECOND = 0.1  # of what is left, beyond the second itself
MOST_SHOWN = 0.99  # of a run that has not ended


class Past(NamedTuple):
    """What an earlier run took: seconds before MAP, of MAP, of SORT and REDUCE together, and after them."""

    total: float
    before: float
    map: float
    reduce: float
    after: float
    input_bytes: int
    spilled_bytes: int
    sort_share: float = USUAL_SORT_SHARE


def past(row: RunRow, detail: RunDetail | None = None) -> Past | None:
    """Return what a run in the history took; None for one that can teach nothing."""
    if row.state != "succeeded" or row.ended is None:
        return None
    end, phases, counts = row.ended, row.phases, row.counts
    total = max(0.0, end - row.started)
    if row.job_type != "mapreduce":
        return Past(total, 0, 0, 0, 0, 0, 0)
    if "MAP" not in phases or not (input_bytes := int(counts.get("input_bytes", 0))):
        return None  # it had nothing to read

    def seconds(*names: str) -> float:
        each = [phases[name] for name in names if name in phases]
        return sum((max(0.0, (times["ended"] or end) - times["started"]) for times in each), 0.0)

    times = seconds("PREFLIGHT"), seconds("MAP"), seconds("SORT", "REDUCE"), seconds("COMMIT")
    spilled = int(counts.get("spilled_bytes", 0)) + int(counts.get("merged_bytes", 0))
    worked = {"SORT": 0.0, "REDUCE": 0.0}
    for share in detail.servers if detail else ():
        if share.phase in worked:
            worked[share.phase] += share.seconds
    both = sum(worked.values())
    return Past(total, *times, input_bytes, spilled, worked["SORT"] / both if both else USUAL_SORT_SHARE)


def after_map(runs: Iterable[Past]) -> float:
    """Return the usual seconds of SORT and REDUCE for each second of MAP."""
    ratios = [run.reduce / run.map for run in runs if run.map > 0 and run.reduce > 0]
    return statistics.median(ratios) if ratios else USUAL_AFTER_MAP


def seconds_left(seen: Progress, runs: Sequence[Past], usual_after_map: float) -> float | None:
    """Return the seconds that are left at `seen.updated`, None if nobody can tell. `usual_after_map` 0: MAP is all."""
    phases, now = {phase.name: phase for phase in seen.phases}, seen.updated
    moving = next((phase for phase in seen.phases if phase.total and phase.ended is None), None)
    if seen.job_type != "mapreduce" and moving:
        return _left(now - moving.started, _share(moving), None)
    if (map_ := phases.get("MAP")) is None:
        usual, spent = _median(runs, lambda run: run.total), now - seen.started
        return None if usual is None or spent >= usual else usual - spent
    like = [run for run in runs if map_.total / LIKE <= run.input_bytes <= map_.total * LIKE] or runs
    after = _median(like, lambda run: run.after) or 0.0
    if commit := phases.get("COMMIT"):
        return max(0.0, after - (now - commit.started))
    usual = _median(like, lambda run: run.map / run.input_bytes)
    usual_map = None if usual is None else usual * map_.total
    spent = max(0.0, (map_.ended or now) - map_.started)
    left = _left(spent, _share(map_), usual_map)
    if left is None:
        return None
    pace = min(MOST_PACE, max(1 / MOST_PACE, (spent + left) / usual_map)) if usual_map else 1.0
    if (sort := phases.get("SORT")) and sort.total:
        then = _median([run for run in like if run.spilled_bytes], lambda run: run.reduce / run.spilled_bytes)
        usual = spent * usual_after_map if then is None else then * sort.total * pace
        left = _left_after_map(sort, phases.get("REDUCE"), now, like, usual)
    else:
        usual = _median(like, lambda run: run.reduce / run.input_bytes)
        left += (spent + left) * usual_after_map if usual is None else usual * map_.total * pace
    return None if left is None else left + after


def _left_after_map(sort: Phase, reduce: Phase | None, now: float, like: Sequence[Past], usual: float) -> float | None:
    """Both go on at the same time, for different partitions: together they are one piece of work."""
    weight = _median(like, lambda run: run.sort_share)
    weight = USUAL_SORT_SHARE if weight is None else weight
    share = weight * _share(sort) + (1 - weight) * (_share(reduce) if reduce else 0.0)
    return _left(now - sort.started, share, usual)


def _share(phase: Phase) -> float:
    return 1.0 if phase.ended is not None else min(1.0, phase.done / max(1, phase.total))


def _left(spent: float, share: float, usual: float | None) -> float | None:
    """Return what is left of a phase: by what is usual, and from its middle on by its own rate alone."""
    spent = max(0.0, spent)
    if share >= 1:
        return 0.0
    if usual is not None:
        return (1 - share) * (max(0.0, 1 - 2 * share) * usual + min(2.0, 1 / max(share, 0.5)) * spent)
    if share <= 0 or (spent < FIRST_SECONDS and share < FIRST_SHARE):
        return None
    return spent * (1 - share) / share


def _median(runs: Iterable[Past], value: Callable[[Past], float]) -> float | None:
    values = [value(run) for run in runs]
    return statistics.median(values) if values else None


class Forecast:
    """The fraction and the seconds that are shown of a run: what `seconds_left` says, without leaps."""

    def __init__(self) -> None:
        self._at: float | None = None
        self._left = self._fraction = 0.0

    def show(
        self, left: float | None, spent: float, now: float, anew: bool = False
    ) -> tuple[float | None, float | None]:
        """Return fraction and seconds left, by what is estimated now; `spent`: since the run began; `anew`: much more
        is known than before, so that what was said then counts no longer.

        The seconds are never negative and do not rise by more than a tenth in a second; the fraction does not fall.
        """
        if left is None or not math.isfinite(left):
            return self._fraction or None, None
        left = max(0.0, left)
        if self._at is not None:
            gone = max(0.0, now - self._at)
            due = max(0.0, self._left - gone)
            settle_seconds = max(1e-3, min(SETTLE_SECONDS, SETTLE_SHARE * due))
            settled = left if anew else due + (left - due) * (1 - math.exp(-gone / settle_seconds))
            left = min(settled, self._left + gone * (1 + MOST_RISE_PER_SECOND * self._left))
        self._at, self._left = now, left
        share = spent / (spent + left) if spent + left > 0 else 0.0
        self._fraction = max(self._fraction, min(MOST_SHOWN, max(0.0, share)))
        return self._fraction, left
