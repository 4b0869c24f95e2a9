"""What one run shows of itself: why it failed, why it takes so long, what it left out. Pure, by codes and details."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mrcore.settings.config import Settings
from mrcore.state.progress import Progress, RunDetail, ServerNow, TaskRow
from mrcore.state.store import RunRow
from mrcore.text import duration, one_line, percent, rough, size

SLOW_FACTOR = 1.5  # of the usual time, from which a run counts as slow
SLOW_SERVER_FACTOR = 3.0  # slower than the others, from which a server counts as slow
SKEW_FACTOR = 4.0  # of the median partition, from which the largest counts as skewed
MORE_INPUT_FACTOR = 1.5  # of the input of the run before
SILENT_SECONDS = 30.0  # without a word of progress, from which that is told
SHOWN = 3  # keys, servers and deaths that are told
BLOCK_LINES = 12  # of a stack, a traceback, an output
# Of an error's details, what an explanation passes on.
FACTS = (
    "function", "code_line", "file", "offset", "line", "key", "server", "node", "task", "signal", "in_hand",
    "memory_bytes", "oom",
)  # fmt: skip


class Failure(NamedTuple):
    """Why a run failed. `lines`: the message, then where and with what; `cause`: one of the codes of operations.md."""

    cause: str
    lines: list[str]
    next_step: str
    facts: dict[str, Any]


class Pace(NamedTuple):
    """How a run under way goes; `cause`: of its being slow, the likeliest."""

    is_slow: bool
    headline: str
    next_step: str
    cause: str | None
    lines: list[str]
    facts: dict[str, Any]


class LeftOut(NamedTuple):
    """Something that a successful run did not read, or not as it is."""

    cause: str
    text: str
    next_step: str


# --- Failed ----------------------------------------------------------------------------------------------------------


def failure(run: RunRow, spec: dict[str, Any], detail: RunDetail | None, settings: Settings) -> Failure:
    """Return why a run failed, or was handed back; `detail`: of that run."""
    error = run.exception or {}
    details: dict[str, Any] = error.get("details") or {}
    tries = detail.deaths if detail else []
    if detail and "server" not in details:
        tries = [row for row in detail.slowest if row.outcome == "running"] + tries
    if tries and "server" not in details:  # it ended from outside: what ran longest then is where to look
        first = tries[0]
        kind = "map" if first.phase == "MAP" else "reduce"
        details |= {"server": first.server, "node": first.node, "task": f"{kind}-{first.task}-{first.try_}"}
    cause = _cause(run, error, details)
    lines = [error.get("message") or "nothing is known of its end"]
    source = _source(details, spec, settings)
    lines += _place(details, source) + _death(details)
    lines += [_try(row) for row in tries[:SHOWN]]
    facts = {key: details[key] for key in FACTS if details.get(key) is not None}
    facts |= {"class": error.get("class"), "code_file": source, "job_name": run.job_name, "run": run.run}
    return Failure(cause, lines, _mend(cause, run, spec, details, settings), facts)


def _try(row: TaskRow) -> str:
    kind, how = "map" if row.phase == "MAP" else "reduce", "ran for" if row.outcome == "running" else "died after"
    why = f": {one_line(row.why, 120)}" if row.why else ""
    return f"{kind} task {row.task}, try {row.try_}, on {row.server} {how} {duration(row.seconds)}{why}"


def _cause(run: RunRow, error: dict[str, Any], details: dict[str, Any]) -> str:
    kind, code = error.get("class"), details.get("code")
    if kind == "InternalError":
        return "bug"
    if kind in ("ClusterFault", "Unreachable", "Refused", "Malformed"):
        return "cluster"
    if details.get("oom"):
        return "out_of_memory"
    if code in STEPS:
        return str(code)
    if "function" in details:
        return "function" if "traceback" in details else "bad_item"
    for key, cause in (("key", "large_group"), ("file", "input_file")):
        if key in details:
            return cause
    return {"script": "script", "file_transfer": "transfer"}.get(run.job_type, "other")


def _source(details: dict[str, Any], spec: dict[str, Any], settings: Settings) -> str | None:
    """Return the user's file where it failed: in the project, where it is edited, not in the copy that a node has."""
    if not details.get("code_file"):
        return None
    file = Path(details["code_file"])
    for folder in {node.layout.projects_dir for node in settings.nodes}:
        if file.is_relative_to(folder) and len(inside := file.relative_to(folder).parts) > 1:
            return str(settings.projects_of(spec).joinpath(spec.get("project_name") or "", *inside[1:]))
    return str(file)


def _place(details: dict[str, Any], source: str | None) -> list[str]:
    """Return where in the user's code, and with what of the data."""
    lines = []
    if source:
        lines.append(f"your code: {source}, line {details.get('code_line')}")
    if details.get("file"):
        at = f", byte {details['offset']:,}" if isinstance(details.get("offset"), int) else ""
        lines.append(f"the input: {details['file']}{at}")
    if details.get("line"):
        lines.append(f"the line: {one_line(details['line'], 120)}")
    if details.get("key"):
        lines.append(f"the key: {details['key']}")
    if details.get("server"):
        lines.append(f"task {details.get('task')} on {details['server']} of node {details.get('node')}")
    if isinstance(details.get("traceback"), str):
        lines += _block(details["traceback"])
    return lines


def _death(details: dict[str, Any]) -> list[str]:
    """Return how a task process ended that could not say so itself, and the end of what a script printed."""
    lines = []
    if details.get("oom"):
        lines.append("the kernel probably ended it for want of memory")
    if isinstance(details.get("memory_bytes"), int):
        of = f" of {size(details['budget_bytes'])}" if isinstance(details.get("budget_bytes"), int) else ""
        lines.append(f"it held {size(details['memory_bytes'])} at most{of}")
    if details.get("in_hand"):
        lines.append(f"in hand: {details['in_hand']}")
    if details.get("stack"):  # most recent call first
        lines += ["its stack:", *(f"  {line}" for line in str(details["stack"]).splitlines()[:BLOCK_LINES])]
    if details.get("output"):
        lines += ["it printed last:", *_block(details["output"])]
    return lines


def _block(text: object) -> list[str]:
    """Return the last lines of a longer text, indented."""
    return [f"  {line}" for line in str(text).splitlines()[-BLOCK_LINES:]]


# What to do, by cause; {trial} is the `mrcore try` that meets the same.
STEPS = {
    "function": "mend the function; {trial} shows whether it works",
    "import": "mend the module; {trial} shows whether it can be loaded",
    "bad_item": "mend what the function gives (docs/jobs.md, Keys, values, items); {trial} shows whether it works",
    "no_function": "put the function into the project, or its name into the job; {trial} shows whether it is found",
    "large_group": "`disk_based_input: true`, a combine_function_name, or more memory_bytes",
    "out_of_memory": "more memory_bytes, or less at a time: a combine_function_name, `disk_based_input: true`",
    "task_died": "{logs} has its last words; {trial} shows whether it dies there, too",
    "input_file": "mend the file, or remove it (`mrcore rm`); `on_bad_text: replace` takes text that is not UTF-8",
    "inputs": "mend input_dirs in the job's file, or bring the files (`mrcore upload`)",
    "changed_input": "on_changed_input: reprocess_all or ignore; `mrcore ledger forget {name}` has it read everything",
    "ledger": "`mrcore ledger forget {name}`: the next run reads everything and replaces the output",
    "sample": "a larger downsample",
    "auxiliary": "`mrcore upload-auxiliary FILE NAME` brings it to every node",
    "project": "mend the project's folder",
    "packages": "`make wheels PROJECT=…` or `pip download` fetches the wheels: docs/jobs.md, Packages",
    "timeout": "a larger timeout_seconds, or find what hangs: {logs}",
    "script": "mend the script; {logs} has all that it printed",
    "no_script": "put the script back, or submit the job with another script_location",
    "transfer": "mend what it says",
    "bug": "report it, with what `mrcore show {name}` says: it is a bug in mrcore",
    "cluster": "`mrcore doctor` says what is wrong; when that is mended, it runs again by itself",
    "other": "mend what it says; `mrcore show {name}` has the whole story",
}


def _mend(cause: str, run: RunRow, spec: dict[str, Any], details: dict[str, Any], settings: Settings) -> str:
    name, server = run.job_name, details.get("server")
    logs = name if run.job_type == "script" else server or settings.servers()[0].name
    return STEPS[cause].format(name=name, logs=f"`mrcore logs {logs}`", trial=_trial(run, spec, details, settings))


def _trial(run: RunRow, spec: dict[str, Any], details: dict[str, Any], settings: Settings) -> str:
    """Return the `mrcore try` that meets the same: over the file of the failure, else over the job's inputs."""
    if not spec.get("map_function_name"):
        return f"`mrcore show {run.job_name}`"
    nodes = [node for node in settings.nodes if node.name == details.get("node")] or settings.nodes
    layout = nodes[0].layout
    inputs = [details["file"]] if details.get("file") else [str(layout.base_dir / each) for each in spec["input_dirs"]]
    words = ["mrcore", "try", spec["project_name"], *inputs, "--map", spec["map_function_name"]]
    for option, key in (("--reduce", "reduce_function_name"), ("--combine", "combine_function_name")):
        words += [option, spec[key]] if spec.get(key) else []
    if auxiliary := spec.get("auxiliary_data_name_mapper") or spec.get("auxiliary_data_name_reducer"):
        words += ["--aux", str(layout.auxiliary_dir / f"{auxiliary}.data")]
    return f"`{shlex.join(words)}`" + ("" if settings.local else f" on {nodes[0].name}, which has the input,")


# --- Under way -------------------------------------------------------------------------------------------------------


def pace(
    run: RunRow, progress: Progress | None, detail: RunDetail | None, usual: dict[str, float] | None,
    earlier: Sequence[RunRow], now: float,
) -> Pace:  # fmt: skip
    """Return how far a run is, against what is usual, and what holds it up."""
    name, took, phase = run.job_name, now - run.started, next(reversed(run.phases), None)
    is_slow = bool(usual and took > max(SLOW_FACTOR * usual["median_seconds"], usual["max_seconds"]))
    fraction, left = (progress.fraction, progress.left_seconds(now)) if progress else (None, None)
    text = f"run {run.run} of {name} {'takes longer than usual' if is_slow else 'runs'}: {phase or 'it begins'}"
    text += f", {percent(fraction)}" if fraction is not None else ""
    text += f", about {rough(left)} left" if left is not None else ""
    text += (
        f"; usually {duration(usual['median_seconds'])}, now {duration(took)}"
        if usual
        else f"; {duration(took)} so far"
    )
    found = list(_held_up(run, progress, detail, earlier, now))
    causes = [each for each in found if is_slow or each[0] in _ALWAYS]
    step = causes[0][2] if causes else f"wait; `mrcore watch {name}` shows it, `mrcore cancel {name}` ends the run"
    lines = [line for _, some, _ in found for line in some]
    lines += _of_phases(run, phase, earlier, now) if phase else []
    facts: dict[str, Any] = {
        "run": run.run,
        "phase": phase,
        "seconds": took,
        "left_seconds": left,
        "fraction": fraction,
    }
    facts |= {"usual": usual, "causes": [cause for cause, _, _ in found]}
    if progress:
        busy = _longest(progress.servers)
        lines += [f"{server.server} on {server.node}: {_doing(server, now)}" for server in busy[:SHOWN]]
        lines += [f"spills so far: {progress.spills}"] if progress.spills else []
        for server in busy[: int(is_slow)]:
            facts |= {"server": server.server, "node": server.node, "job_name": name}
    if detail and is_slow and (rows := detail.slowest[:SHOWN]):
        told = (f"{row.phase} task {row.task} on {row.server}, {duration(row.seconds)}" for row in rows)
        lines.append(f"slowest in the last run: {'; '.join(told)}")
    lines += [] if usual else ["there are no two successful runs yet to compare it with"]
    return Pace(is_slow, text, step, causes[0][0] if causes else None, lines, facts)


def _of_phases(run: RunRow, phase: str, earlier: Sequence[RunRow], now: float) -> list[str]:
    """Return how long the phase under way has taken, against earlier runs."""
    times = [each.phases[phase] for each in earlier if each.state == "succeeded" and phase in each.phases]
    if not times:
        return []
    usual = statistics.median(each["ended"] - each["started"] for each in times)
    return [f"{phase} usually takes {duration(usual)}, now {duration(now - run.phases[phase]['started'])} so far"]


_ALWAYS = ("servers_down", "deaths", "silent")  # what is worth a look before a run is slow


def _held_up(
    run: RunRow, progress: Progress | None, detail: RunDetail | None, earlier: Sequence[RunRow], now: float
) -> Iterator[tuple[str, list[str], str]]:
    """Yield what may hold a run up, the likeliest first: cause, lines, next step."""
    cancel = f"`mrcore cancel {run.job_name}` ends the run"
    servers = progress.servers if progress else []
    if down := [server.server for server in servers if not server.up]:
        text = f"{len(down)} of {len(servers)} servers do not answer: {', '.join(down[:SHOWN])}"
        yield "servers_down", [text], "`mrcore cluster start` starts what is missing; `mrcore doctor` says more"
    if progress and (silent := now - progress.updated) > SILENT_SECONDS:
        yield "silent", [f"nothing was heard of it for {duration(silent)}"], f"`mrcore doctor`; {cancel}"
    if progress and progress.deaths:
        text = f"{progress.deaths} tasks died, and were given out again"
        yield "deaths", [text], "wait: they are tried again; `mrcore logs` with a server's name says why they died"
    busy = _longest(servers)
    if len(busy) == 1 < len(servers):
        text = f"all others wait for {busy[0].server}"
        yield "one_task", [text], f"`mrcore logs {busy[0].server}` shows what it prints; {cancel}"
    if skewed := _skew(detail):
        yield "skew", skewed, "a combine_function_name, or keys that spread better, make the largest partition smaller"
    if slower := _slow_server(detail):
        yield "slow_server", [slower[1]], f"see what else runs on {slower[0]}, and how its disk is; `mrcore doctor`"
    if progress and (more := _more_input(progress, earlier)):
        yield "more_input", [more], "wait: it has more to do than before"


def _more_input(progress: Progress, earlier: Sequence[RunRow]) -> str | None:
    last = next((run for run in earlier if run.state == "succeeded" and run.counts.get("input_bytes")), None)
    total = next((phase.total for phase in progress.phases if phase.name == "MAP" and phase.unit == "bytes"), 0)
    before = last.counts["input_bytes"] if last else 0
    if not before or total < MORE_INPUT_FACTOR * before:
        return None
    return f"it reads {size(total)} of input, {total / before:.1f} times as much as the last run"


def _slow_server(detail: RunDetail | None) -> tuple[str, str] | None:
    """Return the node of a server that mapped far slower than the others in an earlier run, and that in words."""
    shares = [each for each in detail.servers if each.phase == "MAP" and each.seconds and each.bytes] if detail else []
    if len(shares) < 2:
        return None
    slowest = min(shares, key=lambda each: each.bytes / each.seconds)
    rate = slowest.bytes / slowest.seconds
    usual = statistics.median(each.bytes / each.seconds for each in shares if each is not slowest)
    if rate * SLOW_SERVER_FACTOR > usual:
        return None
    text = f"in the last run {slowest.server} on {slowest.node} mapped {size(rate)} a second, the others {size(usual)}"
    return slowest.node, text


def _longest(servers: Sequence[ServerNow]) -> list[ServerNow]:
    """Return the servers that have a task, the one with the longest first."""
    return sorted((server for server in servers if server.task is not None), key=lambda server: server.since or 0.0)


def _doing(server: ServerNow, now: float) -> str:
    since = f" since {duration(now - server.since)}" if server.since is not None else ""
    status = f", says: {one_line(server.status, 120)}" if server.status else ""
    return f"{server.phase} task {server.task}{since}, {size(server.bytes)}, {server.records:,} records{status}"


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
    if replaced := counts.get("replaced_lines"):
        text = f"{replaced:,} lines that are not UTF-8 were read with replacement characters (on_bad_text)"
        found.append(LeftOut("bad_text", text, "mend the files, if these characters matter"))
    if spec.get("downsample", 1.0) < 1.0:
        text = f"it is a sample: of the lines {percent(spec['downsample'])} were read (downsample)"
        found.append(LeftOut("sample", text, "`--set downsample=1.0` reads everything"))
    return found
