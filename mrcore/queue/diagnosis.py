"""What one run shows of itself: why it failed, why it takes so long, what it left out. Pure, by codes and details."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any, NamedTuple

from mrcore.settings.config import Settings
from mrcore.state.progress import Progress, RunDetail, ServerNow
from mrcore.state.store import RunRow
from mrcore.text import one_line

SLOW_FACTOR = 1.5  # of the usual time, from which a run counts as slow
SKEW_FACTOR = 4.0  # of the median partition, from which the largest counts as skewed
MORE_INPUT_FACTOR = 1.5  # of the input of the run before
SILENT_SECONDS = 30.0  # without a word of progress, from which that is told
SHOWN = 3  # keys, servers and deaths that are told
STACK_LINES = 12  # of the stack of a task that died, and of a traceback


class Failure(NamedTuple):
    """Why a run failed. `lines`: the message, then where and with what; `cause`: one of the codes of operations.md."""

    cause: str
    lines: list[str]
    next_step: str
    facts: dict[str, Any]


class Pace(NamedTuple):
    """How a run under way goes; `causes`: of its being slow, the likeliest first."""

    is_slow: bool
    headline: str
    next_step: str
    causes: list[str]
    lines: list[str]
    facts: dict[str, Any]


class LeftOut(NamedTuple):
    """Something that a successful run did not read, or not as it is."""

    cause: str
    text: str
    next_step: str


def clock(seconds: float) -> str:
    """Return a length of time as hours, minutes and seconds."""
    whole = int(seconds)
    hours = f"{whole // 3600}:{whole // 60 % 60:02}" if whole >= 3600 else f"{whole // 60}"
    return f"{seconds:.0f} s" if seconds < 60 else f"{hours}:{whole % 60:02}"


def share(fraction: float) -> str:
    """Return a fraction in per cent."""
    return f"{100 * fraction:.0f} %"


def size(count: float) -> str:
    """Return bytes in a unit that keeps the number short."""
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count:.0f} bytes"


# --- Failed ----------------------------------------------------------------------------------------------------------


def failure(run: RunRow, spec: dict[str, Any], settings: Settings) -> Failure:
    """Return why a run failed, or was handed back."""
    error = run.exception or {}
    details: dict[str, Any] = error.get("details") or {}
    cause = _cause(error, details)
    lines = [error.get("message") or "nothing is known of its end"]
    lines += _place(details)
    lines += _death(details)
    kept = (
        "function",
        "file",
        "offset",
        "line",
        "key",
        "signal",
        "in_hand",
        "memory_bytes",
        "oom",
        "server",
        "node",
        "task",
    )
    facts = {key: details[key] for key in kept if details.get(key) is not None}
    return Failure(cause, lines, _mend(cause, run, spec, details, settings), facts | {"class": error.get("class")})


def _cause(error: dict[str, Any], details: dict[str, Any]) -> str:
    kind, code = error.get("class"), details.get("code")
    if code in _STEPS:
        return str(code)
    if kind == "InternalError":
        return "bug"
    if kind in ("ClusterFault", "Unreachable", "Refused", "Malformed"):
        return "cluster"
    if details.get("oom"):
        return "out_of_memory"
    if "signal" in details or "in_hand" in details:
        return "task_died"
    if "function" in details:
        return "function" if "traceback" in details else "bad_item"
    for key, cause in (("key", "large_group"), ("file", "input_file"), ("log", "script"), ("faults", "inputs")):
        if key in details:
            return cause
    return "other"


def _place(details: dict[str, Any]) -> list[str]:
    """Return where in the user's code, and with what of the data."""
    lines = []
    if details.get("code_file"):
        of = f", in {details['function']}" if details.get("function") else ""
        lines.append(f"your code: {details['code_file']}, line {details.get('code_line')}{of}")
    if details.get("file"):
        at = f", byte {details['offset']:,}" if isinstance(details.get("offset"), int) else ""
        node = f" on {details['node']}" if details.get("node") else ""
        lines.append(f"the input: {details['file']}{at}{node}")
    if details.get("line"):
        lines.append(f"the line: {one_line(details['line'], 120)}")
    if details.get("key"):
        lines.append(f"the key: {details['key']}")
    if isinstance(details.get("traceback"), str):
        lines += [f"  {line}" for line in details["traceback"].splitlines()[-STACK_LINES:]]
    return lines


def _death(details: dict[str, Any]) -> list[str]:
    """Return how a task process ended that could not say so itself; and the end of what a script printed."""
    lines = []
    if details.get("signal") is not None:
        lines.append(f"ended by signal {details['signal']}")
    if details.get("oom"):
        lines.append("the kernel ended it for its memory")
    if isinstance(details.get("memory_bytes"), int):
        lines.append(f"its memory then: {size(details['memory_bytes'])}")
    if details.get("in_hand"):
        lines.append(f"in hand: {details['in_hand']}")
    if details.get("stack"):
        lines += ["its stack:", *(f"  {line}" for line in str(details["stack"]).splitlines()[:STACK_LINES])]
    if details.get("output"):
        lines += ["it printed last:", *(f"  {line}" for line in str(details["output"]).splitlines()[-STACK_LINES:])]
    return lines


_STEPS = {
    "function": "mend the function; {trial} shows whether it works",
    "bad_item": "have the function give what docs/jobs.md allows (Keys, values, items); {trial} shows whether it does",
    "large_group": "`disk_based_input: true`, a combiner, or more memory_bytes; the key tells which group it is",
    "out_of_memory": "more memory_bytes for the servers, or less in one task: a combiner, `disk_based_input: true`",
    "task_died": "{logs} has its last words; {trial} with that input shows whether it dies there, too",
    "input_file": "mend or remove the file (`mrcore rm`), or `on_bad_text: replace` if its text is not UTF-8",
    "inputs": "mend input_dirs of the job file, or upload the files first; then submit it again",
    "auxiliary": "`mrcore upload-auxiliary FILE NAME`",
    "project": "put the project back where the job expects it",
    "timeout": "a larger timeout_seconds in the job file, or find out what hangs: {logs}",
    "script": "mend the script; {logs} has all that it printed",
    "no_script": "put the script back, or submit the job with another script_location",
    "bug": "a bug in mrcore: please report it, with `mrcore show {name}`; the other jobs go on",
    "cluster": "`mrcore doctor` says what is wrong; when it is mended, the job runs again by itself",
    "other": "mend what it says; {show} has the whole story",
}


def _mend(cause: str, run: RunRow, spec: dict[str, Any], details: dict[str, Any], settings: Settings) -> str:
    name = run.job_name
    server = details.get("server")
    words = {
        "name": name,
        "show": f"`mrcore show {name}`",
        "logs": f"`mrcore logs {server if server and run.job_type == 'mapreduce' else name}`",
        "trial": _trial(spec, details, settings) or f"`mrcore show {name}`",
    }
    return _STEPS[cause].format(**words)


def _trial(spec: dict[str, Any], details: dict[str, Any], settings: Settings) -> str | None:
    """Return the `mrcore try` that meets the same: over the file of the failure, or over the job's inputs."""
    if not spec.get("map_function_name"):
        return None
    base = settings.nodes[0].layout
    inputs = [details["file"]] if details.get("file") else [str(base.base_dir / each) for each in spec["input_dirs"]]
    words = ["mrcore", "try", spec["project_name"], *inputs, "--map", spec["map_function_name"]]
    for option, key in (("--reduce", "reduce_function_name"), ("--combine", "combine_function_name")):
        words += [option, spec[key]] if spec.get(key) else []
    if auxiliary := spec.get("auxiliary_data_name_mapper") or spec.get("auxiliary_data_name_reducer"):
        words += ["--aux", str(base.auxiliary_dir / f"{auxiliary}.data")]
    return f"`{shlex.join(words)}`"


# --- Under way -------------------------------------------------------------------------------------------------------


def pace(
    run: RunRow, progress: Progress | None, detail: RunDetail | None, usual: dict[str, float] | None,
    earlier: Sequence[RunRow], now: float,
) -> Pace:  # fmt: skip
    """Return how far a run is, against what is usual, and what holds it up."""
    name, took = run.job_name, now - run.started
    phase = next(reversed(run.phases), None)
    is_slow = bool(usual and took > max(SLOW_FACTOR * usual["median_seconds"], usual["max_seconds"]))
    text = f"run {run.run} of {name} {'takes longer than usual' if is_slow else 'runs'}: {phase or 'it begins'}"
    left = None
    if progress and progress.fraction is not None:
        text += f", {share(progress.fraction)}"
    if progress and progress.eta_seconds is not None:
        left = max(0.0, progress.eta_seconds - (now - progress.updated))
        text += f", about {clock(left)} left"
    text += f"; usually {clock(usual['median_seconds'])}, now {clock(took)}" if usual else f"; {clock(took)} so far"
    found = _causes(run, progress, detail, earlier, now)
    lines = [line for _, some, _ in found for line in some]
    if not usual:
        lines.append("there are not two successful runs yet to compare it with")
    steps = [step for _, _, step in found if step]
    step = steps[0] if steps and (is_slow or found[0][0] in _ALWAYS) else f"wait; `mrcore cancel {name}` ends the run"
    facts = {"run": run.run, "phase": phase, "seconds": took, "left_seconds": left, "usual": usual}
    facts |= {"fraction": progress.fraction if progress else None}
    return Pace(is_slow, text, step, [cause for cause, _, _ in found], lines, facts)


_ALWAYS = ("servers_down", "deaths", "silent")  # what is worth acting on before a run is slow


def _causes(
    run: RunRow, progress: Progress | None, detail: RunDetail | None, earlier: Sequence[RunRow], now: float
) -> list[tuple[str, list[str], str]]:
    """Return what holds a run up: cause, lines, next step."""
    found: list[tuple[str, list[str], str]] = []
    name = run.job_name
    if progress:
        servers = progress.servers
        if down := [server.server for server in servers if not server.up]:
            text = f"{len(down)} of {len(servers)} servers do not answer: {', '.join(down[:SHOWN])}"
            found.append(
                ("servers_down", [text], "`mrcore cluster start` starts what is missing; `mrcore doctor` says more")
            )
        if progress.deaths:
            texts = [f"{progress.deaths} tasks died and are tried again", *_deaths(detail)]
            found.append(("deaths", texts, f"`mrcore logs {servers[0].server if servers else ''}`"))
        if now - progress.updated > SILENT_SECONDS:
            text = f"nothing was heard of it for {clock(now - progress.updated)}"
            found.append(("silent", [text], f"`mrcore doctor`; if it hangs, `mrcore cancel {name}`"))
        if more := _more_input(progress, earlier):
            found.append(("more_input", [more], "wait: it has more to do than before"))
        if alone := _alone(servers, now):
            longest, text = alone
            step = f"`mrcore logs {longest.server}` shows what it prints; `mrcore cancel {name}` ends the run"
            found.append(("one_task", [text], step))
    if skewed := _skew(detail):
        step = "a combine_function_name, or a key that spreads better, makes the largest partition smaller"
        found.append(("skew", skewed, step))
    if progress and progress.spills:
        found.append(("", [f"spills so far: {progress.spills}"], ""))
    if progress:
        found.append(("", _busiest(progress.servers, now), ""))
    return sorted(found, key=lambda each: not each[0])


def _deaths(detail: RunDetail | None) -> list[str]:
    rows = detail.deaths[:SHOWN] if detail else []
    return [
        f"  in an earlier run: {row.phase.lower()} task {row.task} on {row.server}: {one_line(row.why, 200)}"
        for row in rows
    ]


def _more_input(progress: Progress, earlier: Sequence[RunRow]) -> str | None:
    last = next((run for run in earlier if run.state == "succeeded" and run.counts.get("input_bytes")), None)
    total = next((phase.total for phase in progress.phases if phase.name == "MAP" and phase.unit == "bytes"), 0)
    before = last.counts["input_bytes"] if last else 0
    if not before or total < MORE_INPUT_FACTOR * before:
        return None
    return f"it reads {size(total)}, {total / before:.1f} times as much as run {last.run}" if last else None


def _alone(servers: Sequence[ServerNow], now: float) -> tuple[ServerNow, str] | None:
    """Return the server for which all others wait, and that in words."""
    busy = [server for server in servers if server.task is not None]
    if len(busy) != 1 or len(servers) < 2 or busy[0].since is None:
        return None
    only = busy[0]
    text = f"all others wait for {only.server} on {only.node}: {_doing(only, now)}"
    return only, text


def _doing(server: ServerNow, now: float) -> str:
    since = f" since {clock(now - server.since)}" if server.since is not None else ""
    status = f", says: {one_line(server.status, 120)}" if server.status else ""
    return f"{server.phase} task {server.task}{since}, {size(server.bytes)}, {server.records:,} records{status}"


def _busiest(servers: Sequence[ServerNow], now: float) -> list[str]:
    busy = sorted((s for s in servers if s.task is not None and s.since is not None), key=lambda s: s.since or 0)
    return [f"{server.server} on {server.node}: {_doing(server, now)}" for server in busy[:SHOWN]]


def _skew(detail: RunDetail | None) -> list[str]:
    """Return how unequal the partitions of an earlier run were, and its heaviest keys."""
    if not detail or not detail.median_partition_bytes:
        return []
    times = detail.largest_partition_bytes / detail.median_partition_bytes
    if times < SKEW_FACTOR:
        return []
    largest = size(detail.largest_partition_bytes)
    text = f"in the last run the largest partition was {times:.0f} times the median ({largest})"
    return [text, *(f"  key {key.key}: {key.values:,} values" for key in detail.heavy_keys[:SHOWN])]


# --- Succeeded -------------------------------------------------------------------------------------------------------


def nothing_new(run: RunRow) -> bool:
    """Return whether a run of an increment found nothing to read: it then has no output of its own."""
    return run.state == "succeeded" and "files_read_before" in run.counts and "output_items" not in run.counts


def left_out(run: RunRow, spec: dict[str, Any]) -> list[LeftOut]:
    """Return what a successful run did not read, or not as it is; the files that it skipped first."""
    counts, found = run.counts, list[LeftOut]()
    show = f"`mrcore show {run.job_name}`"
    skipped = counts.get("skipped")
    if isinstance(skipped, dict) and skipped:
        reasons = ", ".join(f"{number} {reason}" for reason, number in skipped.items())
        text = f"{sum(skipped.values())} files of its inputs were not read: {one_line(reasons, 200)}"
        found.append(
            LeftOut(
                "skipped", text, f"if they matter: docs/jobs.md, Input, says what is not read; {show} has all counts"
            )
        )
    if unfinished := counts.get("unfinished_characters"):
        text = f"{unfinished} files end inside of a character, and were read up to that"
        found.append(
            LeftOut("unfinished", text, "if nobody writes to them any more, they are cut off: upload them again")
        )
    if replaced := counts.get("replaced_characters"):
        text = f"{replaced:,} bytes that are not UTF-8 were replaced (on_bad_text: replace)"
        found.append(LeftOut("bad_text", text, "mend the files, if these characters matter"))
    if spec.get("downsample", 1.0) < 1.0:
        text = f"it is a sample: of the lines {share(spec['downsample'])} were read (downsample)"
        found.append(LeftOut("sample", text, "`--set downsample=1.0` reads everything"))
    return found
