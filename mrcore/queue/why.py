"""Why a job waits, is slow, failed, or left something out: one plain chain from what the queue's file says.

Pure: `Known` goes in, an `Explanation` comes out, the same for the command line, the dashboard and Python. Codes and
details decide; no text is read. What the daemons printed comes from `printed`, and may be missing.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any, NamedTuple

import msgspec

from mrcore.queue import cycle, diagnosis
from mrcore.queue.diagnosis import clock, share
from mrcore.settings.config import Settings
from mrcore.state.progress import Progress, RunDetail
from mrcore.state.store import JobRow, RunRow
from mrcore.text import one_line

NAMED = 5  # jobs that a line names
LINE_CHARACTERS = 400  # of a text from outside, in a line of a chain
_RUNS_AGAIN = "its Runner ended before the run was committed, so it runs again"


class Explanation(msgspec.Struct, kw_only=True):
    """Why a job is where it is. `lines` are for people: the cause and "next: " with `next_step` in the first three.

    For programs: `code` (docs/operations.md lists them all), `cause` (what is behind it, None if that is all), and
    `facts`, JSON-able. `next_step` has commands in backticks.
    """

    job_name: str
    code: str
    cause: str | None = None
    lines: list[str]
    next_step: str
    facts: dict[str, Any] = {}


class Known(NamedTuple):
    """What is known of a job and of what is around it."""

    job: JobRow
    why: cycle.Why | None  # why it does not start now; None: it is out of the queue
    state: cycle.State
    ahead: list[JobRow]  # what runs before it, in that order, without the run under way
    running: RunRow | None  # the run under way, of whichever job
    progress: Progress | None  # of that run
    runs: list[RunRow]  # of the job, newest first
    detail: RunDetail | None  # of the newest of them that has one
    usual: dict[str, dict[str, float]]  # as `Scheduler.estimates`
    group: list[JobRow]  # the other jobs of its group
    culprit: RunRow | None  # the failed run for which it left, or was skipped, with its group
    culprit_spec: dict[str, Any] | None
    cut_off_drain: str | None  # the node of a drain that was cut off
    committed: bool  # whether the run under way has committed
    settings: Settings
    now: float


class _Chain(msgspec.Struct):
    """A cause in a few words, what to do, and further lines; `cause` and `facts` as in Explanation."""

    text: str
    next_step: str
    more: list[str] = []
    cause: str | None = None
    facts: dict[str, Any] = {}


def explain(known: Known) -> Explanation:
    """Return why a job is where it is."""
    job, running = known.job, known.running
    if running and running.job_name == job.job_name:
        return _running(known, running)
    if job.state != "out":
        return _waiting(known)
    return _out(known)


def _made(known: Known, code: str, headline: str, chain: _Chain) -> Explanation:
    lines = [headline, f"next: {chain.next_step}", *chain.more]
    return Explanation(
        job_name=known.job.job_name,
        code=code,
        cause=chain.cause,
        lines=[one_line(line, LINE_CHARACTERS) for line in lines],
        next_step=chain.next_step,
        facts={"state": known.job.state} | chain.facts,
    )


# --- In the queue ----------------------------------------------------------------------------------------------------


def start_of_a_runner(settings: Settings) -> str:
    """Return how a Runner of these settings is started."""
    if settings.local:
        return "`mrcore run` runs the queue, in a terminal that stays open (`mrcore run --once`: one cycle)"
    return (
        "`systemctl start mrcore-runner` on the master, or `make start INVENTORY=…` on the controller; "
        "`journalctl -u mrcore-runner` tells why it ended"
    )


def _waiting(known: Known) -> Explanation:
    assert known.why
    code, name = known.why.code, known.job.job_name
    chain = _WAITS[code](known)
    more, cause, facts = list(chain.more), chain.cause, dict(chain.facts)
    if code in ("retry", "not_before", "every", "group", "cycle", "behind"):
        more += [f"besides, {text}: {step}" for text, step in _obstacles(known)]
    last = known.runs[0] if known.runs else None
    if known.job.cause == "group failed" and known.culprit:
        found = diagnosis.failure(known.culprit, known.culprit_spec or {}, known.settings)
        more += [f"it was skipped in this cycle, since run {known.culprit.run} of {known.culprit.job_name} failed:"]
        more += [f"  {line}" for line in found.lines]
        cause = cause or "group_failed"
    elif last and last.state in ("failed", "handed back"):
        found = diagnosis.failure(last, known.job.spec, known.settings)
        more += [f"its run {last.run} {'failed' if last.state == 'failed' else 'was handed back'}:"]
        more += [f"  {line}" for line in found.lines]
        more += [f"  then: {found.next_step}"] if last.state == "failed" else []
        cause = cause or (found.cause if last.state == "failed" else "handed_back")
        facts |= {"run": last.run, "failure": found.facts}
    elif last and last.state == "succeeded":
        more += _ended_well(known, last)
    facts |= {"until": known.why.until, "behind": known.why.behind}
    return _made(known, code, f"{name} waits: {chain.text}", _Chain(chain.text, chain.next_step, more, cause, facts))


def _obstacles(known: Known) -> Iterable[tuple[str, str]]:
    """Yield what holds the whole queue, and what ends it, beside a job's own reason to wait."""
    state = known.state
    if not state.runner:
        yield "no Runner runs the queue", start_of_a_runner(known.settings)
    if state.paused:
        yield "the queue is paused", "`mrcore resume`"
    if state.drain:
        yield state.drain, _drain(known).next_step
    if state.hold:
        yield f"the queue holds: {state.hold.reason}", "`mrcore resume` has it try again at once"


def _retry(known: Known) -> _Chain:
    job = known.job
    assert known.why
    text = (
        f"its last run failed, and it is tried again in {_in(known, job.retry_at)}: retry {job.tries} of {job.retries}"
    )
    step = f"`mrcore requeue {job.job_name}` tries at once; it goes on by itself"
    return _Chain(text, step, facts={"tries": job.tries, "retries": job.retries})


def _not_before(known: Known) -> _Chain:
    at = datetime.fromtimestamp(known.why.until or 0) if known.why else datetime.now()
    text = f"not_before {at:%Y-%m-%d %H:%M} has not come, which is in {_in(known, known.why and known.why.until)}"
    return _Chain(text, f"wait, or submit it again with another not_before, or `--set force_run=true`{_again(known)}")


def _every(known: Known) -> _Chain:
    job, until = known.job, known.why and known.why.until
    text = f"it runs every {cycle.duration(job.every or 0)} at most, and began {_ago(known, job.last_start)}"
    return _Chain(f"{text}; again in {_in(known, until)}", f"wait, or submit it again{_again(known)}")


def _group(known: Known) -> _Chain:
    mate = known.why.behind if known.why else None
    text = f"behind the retry of {mate}, of its group {known.job.group_name}"
    until = known.why and known.why.until
    return _Chain(
        f"{text}, in {_in(known, until)}",
        f"`mrcore why {mate}` tells what failed; `mrcore requeue {mate}` tries at once",
    )


def _no_runner(known: Known) -> _Chain:
    return _Chain("no Runner runs the queue", start_of_a_runner(known.settings))


def _paused(known: Known) -> _Chain:
    return _Chain("the queue is paused", "`mrcore resume` goes on")


def _drain(known: Known) -> _Chain:
    if known.cut_off_drain:
        step = f"`mrcore drain {known.cut_off_drain}` completes it"
        return _Chain(known.state.drain or "", step, cause="cut_off", facts={"node": known.cut_off_drain})
    return _Chain(known.state.drain or "", "wait for the drain's end; then it goes on by itself")


def _hold(known: Known) -> _Chain:
    hold = known.state.hold
    assert hold
    wait = hold.until - known.now
    again = f"the next try is in {clock(wait)}" if wait > 0 else "it is tried again now"
    more = [
        f"it holds since {clock(known.now - hold.since)}, {hold.tries} tries so far; {again}",
        "script jobs go on meanwhile"
        if hold.nodes
        else "no job starts meanwhile: the cluster is at fault, not the job",
    ]
    step = "`mrcore doctor` says what is wrong with which node; when that is mended, `mrcore resume` tries at once"
    facts = {"reason": hold.reason, "since": hold.since, "tries": hold.tries, "next_try": hold.until}
    if hold.nodes:
        step = "`mrcore cluster start` starts what does not run, and has the queue try again; `mrcore doctor` says more"
    return _Chain(f"the queue holds: {hold.reason}", step, more, "nodes" if hold.nodes else "cluster", facts)


def _cycle(known: Known) -> _Chain:
    soon = known.state.next_cycle
    step = f"wait, or submit it again{_again(known)}"
    if soon is None:
        more = [_ahead_line(known)] if known.ahead or known.running else []
        return _Chain("it had its turn in this cycle; the next begins after the jobs that are left in it", step, more)
    interval = f"{known.settings.cycle_interval_seconds:g} s after this one (cycle_interval_seconds)"
    return _Chain(f"it had its turn; its next cycle begins in {_in(known, soon)}, {interval}", step)


def _behind(known: Known) -> _Chain:
    seconds, jobs = _ahead(known)
    first = jobs[0] if jobs else known.why.behind if known.why else ""
    runs = known.running is not None and known.running.job_name == first
    text = f"behind {first}{', which runs' + _how_far(known) if runs else ''}"
    if len(jobs) > 1:
        text += f", and {len(jobs) - 1} more"
    why_first = [row for row in known.ahead if row.force_run]
    more = [_ahead_line(known)]
    if why_first:
        more.append(f"first by force_run: {', '.join(row.job_name for row in why_first[:NAMED])}")
    when = "it starts by itself" + (f", in about {clock(seconds)}" if seconds is not None else "")
    step = f"{when}; submitted again with `--set force_run=true` it is the next to run"
    return _Chain(text, step, more, facts={"ahead": jobs, "wait_seconds": seconds})


def _next(known: Known) -> _Chain:
    return _Chain("it is next", "nothing to do: it starts within seconds")


_WAITS = {
    "retry": _retry, "not_before": _not_before, "every": _every, "group": _group, "no_runner": _no_runner,
    "paused": _paused, "drain": _drain, "hold": _hold, "cycle": _cycle, "behind": _behind, "next": _next,
}  # fmt: skip


def _ahead(known: Known) -> tuple[float | None, list[str]]:
    """Return how long what is ahead will take (None: not known of all of it), and the names, in order."""
    seconds: list[float | None] = []
    names = [row.job_name for row in known.ahead]
    if known.running:
        names.insert(0, known.running.job_name)
        seconds.append(_left(known, known.running))
    seconds += [known.usual.get(row.job_name, {}).get("median_seconds") for row in known.ahead]
    known_ones = [each for each in seconds if each is not None]
    return (sum(known_ones) if len(known_ones) == len(seconds) else None), names


def _left(known: Known, running: RunRow) -> float | None:
    """Return the seconds that the run under way may still take."""
    if known.progress and known.progress.eta_seconds is not None:
        return max(0.0, known.progress.eta_seconds - (known.now - known.progress.updated))
    usual = known.usual.get(running.job_name)
    return max(0.0, usual["median_seconds"] - (known.now - running.started)) if usual else None


def _ahead_line(known: Known) -> str:
    _, names = _ahead(known)
    parts = []
    for name in names[:NAMED]:
        if known.running and name == known.running.job_name:
            left = _left(known, known.running)
            parts.append(f"{name} (runs{'' if left is None else f', about {clock(left)} left'})")
        else:
            usual = known.usual.get(name)
            parts.append(f"{name} ({'usually ' + clock(usual['median_seconds']) if usual else 'time not known'})")
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"ahead of it: {', '.join(parts)}{more}"


def _how_far(known: Known) -> str:
    if not known.progress or known.progress.fraction is None:
        return ""
    return f" ({share(known.progress.fraction)})"


def _in(known: Known, moment: float | None) -> str:
    return clock(max(0.0, (moment or known.now) - known.now))


def _ago(known: Known, moment: float | None) -> str:
    return f"{clock(max(0.0, known.now - (moment or known.now)))} ago"


def _again(known: Known) -> str:
    return f" (`mrcore delete {known.job.job_name}` takes it from the queue)"


# --- Under way -------------------------------------------------------------------------------------------------------


def _running(known: Known, run: RunRow) -> Explanation:
    name, hold = known.job.job_name, known.state.hold
    if known.committed and hold and not hold.nodes:
        chain = _hold(known)
        text = f"run {run.run} of {name} is committed, and its output waits to be put in place: {hold.reason}"
        return _made(known, "output_pending", text, _Chain("", chain.next_step, chain.more, None, chain.facts))
    if not known.state.runner:
        text = f"run {run.run} of {name} was under way when its Runner ended"
        ends = "it is completed, since it has committed" if known.committed else _RUNS_AGAIN
        chain = _Chain("", start_of_a_runner(known.settings), [f"when a Runner starts: {ends}"])
        return _made(known, "runner_died", text, chain)
    if run.cancel:
        step = "nothing to do: tasks end within seconds; `mrcore cluster kill` ends what does not"
        text = f"run {run.run} of {name} is being cancelled by the user"
        return _made(known, "cancelling", text, _Chain("", step))
    pace = diagnosis.pace(run, known.progress, known.detail, known.usual.get(name), known.runs, known.now)
    more = list(pace.lines)
    if known.job.number != run.number:
        more.append("the job was replaced since: the run under way is of the earlier one, the next is of this one")
    if known.job.state == "out":
        more.append("the job was deleted meanwhile: the run goes on to its end, and there is no further one")
    chain = _Chain("", pace.next_step, more, pace.causes[0] if pace.causes else None, pace.facts)
    return _made(known, "slow" if pace.is_slow else "running", pace.headline, chain)


# --- Out of the queue ------------------------------------------------------------------------------------------------


def _out(known: Known) -> Explanation:
    job, last = known.job, known.runs[0] if known.runs else None
    name = job.job_name
    back = f"`mrcore requeue {job.group_name or name}` brings it back"
    when = _ago(known, job.left_at)
    if job.cause == "failed":
        failed = next((run for run in known.runs if run.state == "failed"), None)
        if failed is None:
            chain = _Chain("", f"{back}; its runs are no longer in the history", cause="forgotten")
            return _made(known, "failed", f"{name} left the queue {when}: {job.reason}", chain)
        found = diagnosis.failure(failed, job.spec, known.settings)
        more = [*found.lines[1:], *_for_the_group(known, failed)]
        chain = _Chain("", f"{found.next_step}; then {back}", more, found.cause, {"run": failed.run} | found.facts)
        return _made(known, "failed", f"run {failed.run} of {name} failed {when}: {found.lines[0]}", chain)
    if job.cause == "group failed":
        return _group_failed(known, when, back)
    if job.cause == "cancelled":
        step = f"{back}, or submit it again"
        return _made(known, "cancelled", f"{name} left the queue {when}: a user cancelled its run", _Chain("", step))
    if job.cause == "deleted":
        step = "submit it again (`mrcore submit FILE`); its output stays where it is"
        return _made(known, "deleted", f"{name} left the queue {when}: it was deleted", _Chain("", step))
    if last is None:
        chain = _Chain("", "submit it again to have it run again", cause="forgotten")
        return _made(known, "succeeded", f"{name} succeeded {when}; its runs are no longer in the history", chain)
    told, *more = _ended_well(known, last)
    left_out = diagnosis.left_out(last, job.spec)
    step = left_out[0].next_step if left_out else _output_of(known)
    chain = _Chain("", step, more, left_out[0].cause if left_out else None, {"run": last.run, "counts": last.counts})
    return _made(known, "partial" if left_out else "succeeded", f"{name}: {told}", chain)


def _group_failed(known: Known, when: str, back: str) -> Explanation:
    job, run = known.job, known.culprit
    if run is None:
        chain = _Chain("", back, cause="forgotten")
        return _made(known, "group_failed", f"{job.job_name} left the queue {when}: {job.reason}", chain)
    found = diagnosis.failure(run, known.culprit_spec or {}, known.settings)
    text = f"{job.job_name} left the queue {when} with its group {job.group_name}, since "
    text += f"run {run.run} of {run.job_name} failed: {found.lines[0]}"
    facts = {"failed_job": run.job_name, "failed_run": run.run} | found.facts
    chain = _Chain("", f"{found.next_step}; then {back} with its group", list(found.lines[1:]), found.cause, facts)
    return _made(known, "group_failed", text, chain)


def _for_the_group(known: Known, failed: RunRow) -> list[str]:
    gone = [mate.job_name for mate in known.group if mate.cause == "group failed"]
    if not gone:
        return []
    more = f" and {len(gone) - NAMED} more" if len(gone) > NAMED else ""
    return [f"with it left its group {known.job.group_name}: {', '.join(gone[:NAMED])}{more}"]


def _output_of(known: Known) -> str:
    if known.job.job_type == "mapreduce":
        return f"`mrcore cat {known.job.job_name}` prints its output"
    if known.job.job_type == "script":
        return f"`mrcore logs {known.job.job_name}` shows what it printed"
    return f"`mrcore show {known.job.job_name}` has what was moved"


def _ended_well(known: Known, run: RunRow) -> list[str]:
    """Return what a run that succeeded did, and what it left out."""
    took = clock((run.ended or known.now) - run.started)
    if diagnosis.nothing_new(run):
        told = f"run {run.run} succeeded {_ago(known, run.ended)}: there was nothing new to read"
    else:
        told = f"run {run.run} succeeded {_ago(known, run.ended)}, in {took}"
    lines = [told, *(each.text for each in diagnosis.left_out(run, known.job.spec))]
    if known.job.job_type == "mapreduce" and not diagnosis.nothing_new(run):
        lines.append(f"its output: {known.job.job_name}/reduce of each node's base_dir")
    return lines
