"""Why a job waits, is slow, failed, or left something out: one plain chain from what the queue's file says.

Pure: `Known` goes in, an `Explanation` comes out, the same for the command line, the dashboard and Python. Codes and
details decide; no text is read. What a task or a script printed is added by `printed`.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Any, NamedTuple

import msgspec

from mrcore.queue import cycle, diagnosis
from mrcore.queue.diagnosis import Failure
from mrcore.settings.config import Settings
from mrcore.state.progress import Progress, RunDetail
from mrcore.state.store import JobRow, RunRow
from mrcore.text import duration, one_line, percent, rough

NAMED = 5  # jobs that a line names
LINE_CHARACTERS = 600  # of a line of a chain, which may hold text from outside


class Explanation(msgspec.Struct, kw_only=True):
    """Why a job is where it is. `lines` are for people: the first has the cause, the second "next: " and `next_step`.

    For programs: `code` and `cause` (what is behind it, or None), listed in docs/operations.md, "Why does it not run?",
    and `facts`, JSON-able. `next_step` has commands in backticks.
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
    committed: bool  # whether that run has committed
    runs: list[RunRow]  # of the job, newest first
    detail: RunDetail | None  # of the newest of them that has one
    detailed: int | None  # that run
    usual: dict[str, dict[str, float]]  # as `Scheduler.estimates`
    group: list[JobRow]  # the other jobs of its group
    culprit: RunRow | None  # the failed run for which it left, or was skipped, with its group
    cut_off_drain: str | None  # the node of a drain that was cut off
    settings: Settings
    now: float

    def until(self, moment: float | None) -> str:
        """Return how long it is to a moment."""
        return rough(max(0.0, (moment or self.now) - self.now))

    def ago(self, moment: float | None) -> str:
        """Return how long ago a moment was."""
        return f"{rough(max(0.0, self.now - (moment or self.now)))} ago"


class _Chain(NamedTuple):
    """A cause in words, what to do, and further lines; `cause` and `facts` as in Explanation."""

    text: str
    step: str
    more: tuple[str, ...] = ()
    cause: str | None = None
    facts: tuple[tuple[str, Any], ...] = ()


def explain(known: Known) -> Explanation:
    """Return why a job is where it is."""
    job, running = known.job, known.running
    if running and running.job_name == job.job_name:
        code, chain = _running(known, running)
    elif job.state == "out":
        code, chain = _out(known)
    else:
        assert known.why
        code, chain = known.why.code, _waiting(known, known.why)
    return Explanation(
        job_name=job.job_name,
        code=code,
        cause=chain.cause,
        lines=[one_line(line, LINE_CHARACTERS) for line in (chain.text, f"next: {chain.step}", *chain.more)],
        next_step=chain.step,
        facts={"state": job.state, "job_type": job.job_type} | dict(chain.facts),
    )


# --- In the queue ----------------------------------------------------------------------------------------------------


def _waiting(known: Known, why: cycle.Why) -> _Chain:
    """Return why a job of the queue does not run now, and how its last run ended if that has to do with it."""
    job, last = known.job, known.runs[0] if known.runs else None
    text, step, more, cause, facts = _WAITS[why.code](known, why)
    facts += (("until", why.until), ("behind", why.behind))
    more += tuple(f"besides, {what}: {then}" for what, then in _obstacles(known, why.code))
    text = f"{job.job_name} waits: {text}"
    failed = known.culprit if job.cause == "group failed" else last if job.cause == "failed" else None
    if failed:
        found = _failure(known, failed)
        of = "its run" if failed is last else "it was skipped in this cycle, since run"
        text += f"; {of} {failed.run}{'' if failed is last else f' of {failed.job_name}'} failed: {found.lines[0]}"
        if why.code in ("cycle", "every", "behind", "next"):
            step = f"`mrcore requeue {job.group_name or job.job_name}` runs it at once"
        return _Chain(text, f"{found.next_step}; {step}", (*found.lines[1:], *more), found.cause, facts + _facts(found))
    if last and last.state == "handed back":
        found = _failure(known, last)
        more += (f"its run {last.run} was handed back, and runs again: {found.lines[0]}",)
        return _Chain(text, step, more, cause or "handed_back", facts)
    if last and last.state == "cancelled":
        more += (f"its run {last.run} was cancelled by a user {known.ago(last.ended)}",)
    if last and last.state == "succeeded":
        chain = _ended_well(known, last)
        return _Chain(text, step, (*more, chain.text, *chain.more), cause or chain.cause, facts)
    return _Chain(text, step, more, cause, facts)


def _obstacles(known: Known, code: str) -> Iterator[tuple[str, str]]:
    """Yield what else holds the whole queue, and what ends it, beside the reason with this code."""
    state = known.state
    holds = {"no_runner": not state.runner, "paused": state.paused, "drain": state.drain, "hold": state.hold}
    for name in (name for name, true in holds.items() if true and name != code):
        yield _WAITS[name](known, cycle.Why(name, ""))[:2]


def _retry(known: Known, why: cycle.Why) -> _Chain:
    job = known.job
    step = f"it is tried again by itself, `mrcore requeue {job.job_name}` tries at once"
    facts = (("tries", job.tries), ("retries", job.retries))
    return _Chain(f"retry {job.tries} of {job.retries} comes in {known.until(job.retry_at)}", step, facts=facts)


def _not_before(known: Known, why: cycle.Why) -> _Chain:
    text = f"its not_before, {datetime.fromtimestamp(why.until or 0):%Y-%m-%d %H:%M}, comes in {known.until(why.until)}"
    return _Chain(text, "wait, or submit it again with another not_before")


def _every(known: Known, why: cycle.Why) -> _Chain:
    job = known.job
    text = f"it runs every {rough(job.every or 0)} at most, began {known.ago(job.last_start)}"
    return _Chain(f"{text}, and may begin again in {known.until(why.until)}", _OR_FORCE)


def _group(known: Known, why: cycle.Why) -> _Chain:
    text = f"behind the retry of {why.behind}, of its group {known.job.group_name}, in {known.until(why.until)}"
    step = f"`mrcore why {why.behind}` says what failed; `mrcore requeue {why.behind}` tries at once"
    return _Chain(text, step)


def _no_runner(known: Known, why: cycle.Why) -> _Chain:
    step = "`mrcore run`, in a terminal that stays open, runs the queue (`mrcore run --once`: one cycle)"
    if not known.settings.local:
        step = "`systemctl start mrcore-runner` on the master, or `make start INVENTORY=…` on the controller; "
        step += "`journalctl -u mrcore-runner` says why it ended"
    return _Chain("no Runner runs the queue", step)


def _paused(known: Known, why: cycle.Why) -> _Chain:
    return _Chain("the queue is paused", "`mrcore resume` goes on")


def _drain(known: Known, why: cycle.Why) -> _Chain:
    if node := known.cut_off_drain:
        step = f"`mrcore drain {node}` completes it"
        return _Chain(f"a drain of node {node} was cut off", step, cause="cut_off", facts=(("node", node),))
    return _Chain(known.state.drain or "", "wait for the end of the drain; then it goes on by itself")


def _hold(known: Known, why: cycle.Why) -> _Chain:
    hold = known.state.hold
    assert hold
    again = f"again in {known.until(hold.until)}" if hold.until > known.now else "again now"
    meanwhile = (
        "script jobs go on, but not before the jobs of their group"
        if hold.nodes
        else "no job starts: the cluster is at fault, not a job"
    )
    more = (f"it holds for {rough(known.now - hold.since)}, tried {hold.tries} times, and tries {again}; {meanwhile}",)
    step = "`mrcore doctor` says what to mend; then it goes on by itself, `mrcore resume` tries at once"
    if hold.nodes:
        step = "`mrcore cluster start` starts what does not run, and goes on; `mrcore doctor` says more"
    facts = (("since", hold.since), ("tries", hold.tries), ("next_try", hold.until))
    return _Chain(f"the queue holds: {hold.reason}", step, more, "nodes" if hold.nodes else "cluster", facts)


def _cycle(known: Known, why: cycle.Why) -> _Chain:
    if why.until is None:
        more = (_line_of_jobs(known, "before that run"),) if known.ahead or known.running else ()
        return _Chain("it had its turn, and the next cycle begins after the jobs of this one", _OR_FORCE, more)
    return _Chain(f"it had its turn, and its next cycle begins in {known.until(why.until)}", _OR_FORCE)


def _behind(known: Known, why: cycle.Why) -> _Chain:
    names = [row.job_name for row in known.ahead]
    if known.running:
        names.insert(0, known.running.job_name)
    left = _left(known, known.running) if known.running else 0.0
    some = [left, *(known.usual.get(row.job_name, {}).get("median_seconds") for row in known.ahead)]
    whole = sum(seconds for seconds in some if seconds is not None) if None not in some else None
    text = f"behind {names[0]}" + (", which runs" if known.running else "")
    text += f", and {len(names) - 1} more" if len(names) > 1 else ""
    more: tuple[str, ...] = (_line_of_jobs(known, "ahead of it"),)
    if forced := [row.job_name for row in known.ahead if row.force_run]:
        more += (f"before all others by their force_run: {', '.join(forced[:NAMED])}",)
    step = f"wait{f', about {rough(whole)}' if whole is not None else ''}; {_FORCE}"
    return _Chain(text, step, more, facts=(("ahead", names), ("wait_seconds", whole)))


def _next(known: Known, why: cycle.Why) -> _Chain:
    return _Chain("it is next", "nothing: it starts within seconds")


_FORCE = "submitted again with `--set force_run=true` it is the next to run"
_OR_FORCE = f"wait; {_FORCE}"
_WAITS = {
    "retry": _retry, "not_before": _not_before, "every": _every, "group": _group, "no_runner": _no_runner,
    "paused": _paused, "drain": _drain, "hold": _hold, "cycle": _cycle, "behind": _behind, "next": _next,
}  # fmt: skip


def _left(known: Known, running: RunRow) -> float | None:
    """Return the seconds that the run under way may still take."""
    if known.progress and (left := known.progress.left_seconds(known.now)) is not None:
        return left
    usual = known.usual.get(running.job_name)
    return max(0.0, usual["median_seconds"] - (known.now - running.started)) if usual else None


def _line_of_jobs(known: Known, title: str) -> str:
    """Return the run under way and what comes next, with their times."""
    told = []
    if running := known.running:
        left, fraction = _left(known, running), known.progress.fraction if known.progress else None
        told.append(f"{running.job_name} (runs" + (f", {percent(fraction)}" if fraction is not None else ""))
        told[0] += f", about {rough(left)} left)" if left is not None else ")"
    for row in known.ahead:
        usual = known.usual.get(row.job_name)
        told.append(f"{row.job_name} ({'usually ' + duration(usual['median_seconds']) if usual else 'time not known'})")
    return f"{title}: {', '.join(told[:NAMED])}" + (f" and {len(told) - NAMED} more" if len(told) > NAMED else "")


# --- Under way -------------------------------------------------------------------------------------------------------


def _running(known: Known, run: RunRow) -> tuple[str, _Chain]:
    job, hold, whose = known.job, known.state.hold, f"run {run.run} of {known.job.job_name}"
    if known.committed and hold and not hold.nodes:
        held = _hold(known, cycle.Why("", ""))
        text = f"{whose} is committed, and waits for its output to be in place: {hold.reason}"
        return "output_pending", _Chain(text, held.step, held.more, None, held.facts)
    if not known.state.runner:
        then = "completed" if known.committed else "handed back, and runs again"
        text = f"{whose} was under way when its Runner ended: no Runner runs the queue"
        return "runner_died", _Chain(
            text, _no_runner(known, cycle.Why("", "")).step, (f"once one starts, it is {then}",)
        )
    if run.cancel:
        step = "nothing: its tasks end within seconds; `mrcore cluster kill` ends what does not"
        return "cancelling", _Chain(f"{whose} was cancelled by a user, and ends", step)
    pace = diagnosis.pace(run, known.progress, known.detail, known.usual.get(job.job_name), known.runs, known.now)
    more = tuple(pace.lines)
    if job.state == "out":
        more += ("the job was deleted meanwhile: this run goes on to its end, and is the last",)
    elif job.number != run.number:
        more += ("the job was replaced meanwhile: this run is of the earlier one, the next will be of the new",)
    facts = tuple(pace.facts.items())
    chain = _Chain(pace.headline, pace.next_step, more, pace.cause, facts)
    return ("slow" if pace.is_slow else "running"), chain


# --- Out of the queue ------------------------------------------------------------------------------------------------


def _out(known: Known) -> tuple[str, _Chain]:
    job, name = known.job, known.job.job_name
    back = f"`mrcore requeue {job.group_name or name}` brings it back"
    left = f"{name} left the queue {known.ago(job.left_at)}"
    if job.cause == "deleted":
        step = "submit it again; its output stays where it is"
        return "deleted", _Chain(f"{left}: it was deleted", step)
    if job.cause == "cancelled":
        return "cancelled", _Chain(f"{left}: its run was cancelled by a user", f"{back}, or submit it again")
    if job.cause == "succeeded":
        last = next((run for run in known.runs if run.state == "succeeded"), None)
        if last:
            chain = _ended_well(known, last)
            return "partial" if chain.cause and chain.cause != "nothing_new" else "succeeded", chain
        return "succeeded", _Chain(f"{name} succeeded {known.ago(job.left_at)}", "submit it to have it run again")
    group = job.cause == "group failed"
    code = "group_failed" if group else "failed"
    failed = known.culprit if group else next((run for run in known.runs if run.state == "failed"), None)
    if failed is None:  # the history has forgotten it
        return code, _Chain(f"{left}: {job.reason}", back, cause="forgotten")
    found = _failure(known, failed)
    text = f"run {failed.run} of {failed.job_name} failed {known.ago(failed.ended)}: {found.lines[0]}"
    more, step = tuple(found.lines[1:]), f"{found.next_step}; then {back}"
    if group:
        text = f"{left} with its group {job.group_name}: {text}"
    elif gone := [mate.job_name for mate in known.group if mate.cause == "group failed"]:
        others = f" and {len(gone) - NAMED} more" if len(gone) > NAMED else ""
        more = (f"with it left, of its group {job.group_name}: {', '.join(gone[:NAMED])}{others}", *more)
    return code, _Chain(text, step, more, found.cause, _facts(found))


def _failure(known: Known, run: RunRow) -> Failure:
    mine = run.job_name == known.job.job_name
    spec = next((row.spec for row in (known.job, *known.group) if row.job_name == run.job_name), {})
    detail = known.detail if mine and run.run == known.detailed else None
    return diagnosis.failure(run, known.job.spec if mine else spec, detail, known.settings)


def _facts(found: Failure) -> tuple[tuple[str, Any], ...]:
    return (("failure", found.facts),)


def _ended_well(known: Known, run: RunRow) -> _Chain:
    """Return what a run that succeeded did, what it left out, and where its output is."""
    name, kind = known.job.job_name, known.job.job_type
    text = f"run {run.run} of {name} succeeded {known.ago(run.ended)}"
    facts = (("run", run.run), ("counts", run.counts))
    cat, logs = f"`mrcore cat {name}` prints its output", f"`mrcore logs {name}` shows what it printed"
    step = {"mapreduce": cat, "script": logs}.get(kind, f"`mrcore show {name}` has what was moved")
    if diagnosis.nothing_new(run):
        return _Chain(f"{text}: there was nothing new to read", f"nothing; {cat}", (), "nothing_new", facts)
    text += f", in {duration((run.ended or known.now) - run.started)}"
    left_out = diagnosis.left_out(run, known.job.spec)
    more = tuple(each.text for each in left_out)
    if kind == "mapreduce":
        more += (f"its output is in {name}/reduce of each node's base_dir",)
    if left_out:
        text, more, step = f"{text}, but {left_out[0].text}", more[1:], left_out[0].next_step
    return _Chain(text, step, more, left_out[0].cause if left_out else None, facts)
