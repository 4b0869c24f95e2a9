"""`mrcore doctor`: what is wrong or soon will be, as the master sees it: where, what, what it means, what to do.

`gather` asks all daemons, with deadlines, and returns plain facts; the `judge_…` functions look at facts only.
"""

from __future__ import annotations

import contextlib
import functools
import platform
import shutil
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, NamedTuple, TypedDict

import msgspec

from mrcore import VERSIONS
from mrcore.errors import MrcoreError, UsageError
from mrcore.launchers import local
from mrcore.launchers.launcher import Daemon, daemons
from mrcore.messages.methods import LIST_FILES
from mrcore.queue.scheduler import Scheduler
from mrcore.settings.config import NodeSettings, Settings
from mrcore.state import outputs
from mrcore.state.backup import last_backup
from mrcore.system.parallel import on_nodes
from mrcore.text import one_line
from mrcore.transfer.session import every_file
from mrcore.wire import pki
from mrcore.wire.client import Client
from mrcore.wire.tls import Pki, master_pki

ASK_SECONDS, LIST_SECONDS = 5.0, 120.0
AT_ONCE = 32
MAX_CLOCK_SKEW_SECONDS = 60.0
MIN_FREE_BYTES = 1 << 30
RENEW_SECONDS = 30 * 86400.0  # certificates are renewed when they have less left
MAX_BACKUP_AGE_SECONDS = 2 * 86400.0  # the timer makes one each day

Json = dict[str, Any]


class Facts(TypedDict):
    """What the doctor looks at, as `mrcore doctor --json` prints it. A daemon that does not answer has {"error" (a
    message), "code" ("certificate", or None)} instead of facts; of a local cluster that is not started none is asked.
    """

    master: Json
    nodes: dict[str, Json]  # by name: what its agent's `health` answers, clock_skew_seconds, certificate_ends
    servers: dict[str, Json]  # by name: what `hello` answers, certificate_ends
    queue: Json  # as `Scheduler.state`, and the number of jobs
    outputs: list[Json]  # as `outputs.compare`


class Finding(NamedTuple):
    """One thing that is wrong, for people; for programs its code."""

    where: str
    code: str
    what: str
    means: str
    do: str


def gather(settings: Settings, deep: bool = False) -> Facts:
    """Ask master, agents and cluster servers, all at the same time; with `deep` every part of all output is read."""
    scheduler = Scheduler(settings)
    with contextlib.closing(scheduler.store):
        queue = scheduler.state() | {"jobs": len(scheduler.queue())}
    started = not settings.local or local.is_started(settings)
    keys, asked = (master_pki(settings), daemons(settings)) if started else (None, [])
    answers = list(zip(asked, on_nodes(asked, lambda daemon: _ask(keys, daemon), AT_ONCE), strict=True)) if keys else []
    nodes = {daemon.node.name: answer for daemon, answer in answers if daemon.is_agent}
    servers = {daemon.name: answer for daemon, answer in answers if not daemon.is_agent}
    files = {name: settings.pki_dir / f"{name}.crt" for name in ("ca", "master")}
    ends = {f"{name}.crt": pki.ends(file) for name, file in files.items() if started or file.exists()}
    master = {
        "time": time.time(),
        **VERSIONS,
        "python": platform.python_version(),
        "local": settings.local,
        "started": started,
        "pki_dir": str(settings.pki_dir),
        "disk_free_bytes": shutil.disk_usage(settings.state_dir).free,
        "certificates_end": ends,
        "backup": _last_backup(settings),
    }
    busy = queue["running"]["job_name"] if queue["running"] else None
    answering = [node for node in settings.nodes if started and "error" not in nodes[node.name]]
    wrong = _compare_outputs(settings, keys, answering, busy, deep) if keys else []
    return {"master": master, "nodes": nodes, "servers": servers, "queue": queue, "outputs": wrong}


def _ask(keys: Pki, daemon: Daemon) -> Json:
    node = daemon.node
    with contextlib.closing(Client(node.address, daemon.port, keys, node.name, ASK_SECONDS, ASK_SECONDS)) as client:
        begun = time.time()
        try:
            answer: Json = msgspec.to_builtins(client.call(daemon.method))
        except MrcoreError as error:
            return {"error": error.message, "code": error.details.get("code"), "node": node.name}
        if "time" in answer:  # the answer was made between `begun` and now
            answer["clock_skew_seconds"] = _outside(answer["time"], begun, time.time())
        return answer | {"node": node.name, "certificate_ends": client.certificate_ends()}


def _compare_outputs(
    settings: Settings, keys: Pki, answering: list[NodeSettings], busy: str | None, deep: bool
) -> list[Any]:
    """Compare what manifests name with what the nodes that answer hold; all of a node that is no member is missing."""
    known = outputs.named(settings)

    def list_parts(node: NodeSettings) -> dict[str, int] | str:
        with contextlib.closing(Client(node.address, node.agent_port, keys, node.name)) as client:
            call = functools.partial(client.call, LIST_FILES, timeout_seconds=LIST_SECONDS)
            try:
                return {file.name: file.size for file in every_file(call, "*/reduce", True)[1]}
            except MrcoreError as error:
                return error.message

    lists = dict(zip([node.name for node in answering], on_nodes(answering, list_parts, AT_ONCE), strict=True))
    held = {node: files for node, files in lists.items() if isinstance(files, dict)}
    removed: dict[str, dict[str, int]] = {node: {} for node in known.keys() - {node.name for node in settings.nodes}}
    wrong: list[Any] = [*outputs.compare(known, held | removed, busy)]
    if deep:
        seen = {(item["node"], f"{item['job']}/reduce/{name}") for item in wrong for name in item["names"]}
        unread = {
            node: {path: part for path, part in known.get(node, {}).items() if (node, path) not in seen}
            for node in held
        }
        wrong += outputs.check_contents(settings, keys, unread)
    return wrong + [
        {"kind": "unknown", "job": "", "node": node, "names": [text]}
        for node, text in lists.items()
        if isinstance(text, str)
    ]


def _outside(value: float, low: float, high: float) -> float:
    """Return how far a value lies below (negative) or above a span."""
    return min(0.0, value - low) + max(0.0, value - high)


def judge(facts: Facts) -> list[Finding]:
    """Return everything that is wrong, in the order in which to see to it."""
    if facts["master"]["started"]:
        machines = (judge_answers, judge_versions, judge_clocks, judge_disks, judge_certificates)
        return [finding for rule in (*machines, judge_queue, judge_backup, judge_outputs) for finding in rule(facts)]
    means = "its jobs wait" if facts["queue"]["jobs"] else "no job can run, and no output be read"
    first = Finding("local cluster", "not started", "it is not started", means, "`mrcore cluster start`")
    hold = facts["queue"]["hold"]
    waits_for_it = bool(hold and hold.get("nodes"))
    queue = [finding for finding in judge_queue(facts) if finding.code != "hold" or not waits_for_it]
    return [first, *judge_disks(facts), *queue]


def judge_answers(facts: Facts) -> Iterator[Finding]:
    """Look for daemons that do not answer. A node that is silent altogether is one finding, and so is a cluster."""
    local, starts = facts["master"]["local"], "`mrcore cluster start` starts what is missing"
    renew = "`make deploy` on the controller renews what has ended; a node that was removed stays refused"
    renew = _new_certificates(facts) if local else renew
    again = starts if local else f"see whether `ping` reaches the machine; then {starts}"
    answering = {answer["node"] for answer in facts["servers"].values() if "error" not in answer}
    silent = {node: answer for node, answer in facts["nodes"].items() if "error" in answer}
    gone = silent.keys() - answering
    if gone == facts["nodes"].keys() and not any(answer["code"] for answer in silent.values()):
        what = (
            f"it is not started, or out of reach: nothing answers on any node: {next(iter(silent.values()))['error']}"
        )
        do = "`mrcore cluster start`" if local else "`mrcore cluster start`; if that fails, `ping` a node from here"
        yield Finding("cluster", "not started", what, "no job can run, and no output be read", do)
        return
    for node, answer in facts["nodes"].items():
        if "error" in answer:
            yield Finding(
                f"node {node}",
                "node silent" if node in gone else "agent silent",
                f"{'nothing on it answers' if node in gone else 'its agent does not answer'}: {answer['error']}",
                "no job can run: the queue holds until the node is back",
                renew if answer["code"] == "certificate" else again,
            )
    for name, answer in facts["servers"].items():
        if "error" in answer and answer["node"] not in gone:
            yield Finding(
                f"server {name}",
                "server silent",
                f"does not answer: {answer['error']}",
                "its node's other servers do its work; a node without any servers holds the queue",
                renew if answer["code"] == "certificate" else f"{starts}; `mrcore logs {name}` has its last words",
            )


def judge_versions(facts: Facts) -> Iterator[Finding]:
    """Look for daemons of another mrcore or Python than the master's."""
    ours = _versions(facts["master"])
    for where, answer in _answered(facts):
        if (theirs := _versions(answer)) != ours:
            yield Finding(
                where,
                "version",
                f"runs {theirs}, the master {ours}",
                "no job can run: the queue holds until all are of one version",
                "`mrcore cluster stop`, then `mrcore cluster start`"
                if facts["master"]["local"]
                else "`make upgrade` on the controller brings all to one version",
            )


def judge_clocks(facts: Facts) -> Iterator[Finding]:
    """Look for clocks that are off."""
    for node, answer in facts["nodes"].items():
        if abs(skew := answer.get("clock_skew_seconds", 0)) > MAX_CLOCK_SKEW_SECONDS:
            yield Finding(
                f"node {node}",
                "clock",
                f"its clock is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} the master's",
                "certificates may be refused, times in logs and of files mislead, increments may miss changes",
                "`timedatectl` on both tells whether they follow a time server: `systemctl restart systemd-timesyncd`",
            )


def judge_disks(facts: Facts) -> Iterator[Finding]:
    """Look for disks that are nearly full."""
    known = [("master", facts["master"])] + [(f"node {name}", answer) for name, answer in facts["nodes"].items()]
    for where, answer in known:
        if (free := answer.get("disk_free_bytes", MIN_FREE_BYTES)) < MIN_FREE_BYTES:
            yield Finding(
                where,
                "disk",
                f"{free >> 20} MiB of disk are free, less than {MIN_FREE_BYTES >> 20}",
                "below 256 MiB the queue holds; a run that fills the disk is handed back",
                "`df -h` and `du -xh --max-depth=2` there tell what is large; `mrcore rm` removes inputs and output",
            )


def judge_certificates(facts: Facts) -> Iterator[Finding]:
    """Look for certificates that end soon, or have ended."""
    now = facts["master"]["time"]
    known = [(f"master, {name}", end) for name, end in facts["master"]["certificates_end"].items()]
    known += [(where, answer.get("certificate_ends")) for where, answer in _answered(facts)]
    for where, end in known:
        if end is not None and end - now < RENEW_SECONDS:
            day = datetime.fromtimestamp(end, UTC).strftime("%Y-%m-%d %H:%M UTC")
            yield Finding(
                where,
                "certificate",
                f"its certificate {'ended' if end <= now else 'ends'} on {day}",
                "from then on every connection with it is refused",
                _new_certificates(facts) if facts["master"]["local"] else "`make deploy` on the controller renews it",
            )


def judge_queue(facts: Facts) -> Iterator[Finding]:
    """Look for what keeps jobs from running."""
    queue = facts["queue"]
    if queue["hold"]:
        yield Finding(
            "queue",
            "hold",
            f"it holds: {queue['hold']['reason']}",
            "no job starts until the cause is fixed; then it goes on by itself",
            "fix the cause; `mrcore resume` has it try at once",
        )
    if queue["drain"]:
        yield Finding(
            "queue",
            "drain",
            f"it waits: {queue['drain']}",
            "no job starts until then",
            "wait for the drain's end, or, if it was cut off, repeat it",
        )
    if queue["paused"]:
        yield Finding("queue", "paused", "it is paused", "no further job starts", "`mrcore resume` ends the pause")
    run = queue["running"]
    if not queue["runner"] and (queue["jobs"] or run or not facts["master"]["local"]):
        left = f"; run {run['run']} of {run['job_name']} was under way when the last one ended" if run else ""
        yield Finding(
            "master",
            "runner",
            f"no Runner drains the queue{left}",
            f"{queue['jobs']} jobs wait, and those to come will",
            "`mrcore run` does"
            if facts["master"]["local"]
            else "`systemctl status mrcore-runner` tells why, `systemctl start mrcore-runner` starts it",
        )


def _last_backup(settings: Settings) -> Any:
    """Return the note of the last backup, None: there is none; a damaged one is a finding like others."""
    try:
        return last_backup(settings.state_dir)
    except UsageError as error:
        return {"error": error.message}


def judge_backup(facts: Facts) -> Iterator[Finding]:
    """Look whether queue and history could be brought back; a local cluster may do without."""
    backup, now = facts["master"]["backup"], facts["master"]["time"]
    if backup and "error" in backup:
        yield Finding(
            "master", "backup note", backup["error"], "nobody knows how old the last backup is", "`mrcore backup FILE`"
        )
        return
    age = None if backup is None else now - backup["time"]
    if not facts["master"]["local"] and (age is None or age > MAX_BACKUP_AGE_SECONDS):
        yield Finding(
            "master",
            "backup",
            "there was no backup yet" if age is None else f"the last backup is {age / 86400:.1f} days old",
            "what happened since would be lost with the master's disk",
            "`systemctl status mrcore-backup.timer mrcore-backup.service` tells why; `mrcore backup FILE` makes one",
        )

    if backup and backup.get("copied") is False:
        yield Finding(
            f"node {backup['copy_to']}",
            "backup copy",
            "it did not get its copy of the last backup",
            "should the master's disk be lost now, the newest backup is lost with it",
            f"`mrcore backup FILE --copy-to {backup['copy_to']}` tries again and tells why it fails",
        )


def judge_outputs(facts: Facts) -> Iterator[Finding]:
    """Look for output that is not what manifests name, and for what lies beside it."""
    for item in facts["outputs"]:
        job, names = item["job"], item["names"]
        some = ", ".join(one_line(name, 200) for name in names[: outputs.NAMED])
        some += f" and {len(names) - outputs.NAMED} more" if len(names) > outputs.NAMED else ""
        where, code = f"node {item['node']}", f"output {item['kind']}"
        if item["kind"] == "unknown":
            what = f"what output it holds cannot be told: {some}"
            yield Finding(where, code, what, "parts may be missing", "fix that")
        elif item["kind"] == "foreign":
            yield Finding(
                where,
                code,
                f"{len(names)} files in {job}/reduce are no part of the output of {job}: {some}",
                "`mrcore cat` leaves them out, but a job that reads this folder reads them, too",
                f"see what they are; `mrcore rm {job}/reduce/NAME` removes one",
            )
        else:
            also = f" (of that name on {', '.join(item['elsewhere'])})" if item["elsewhere"] else ""
            yield Finding(
                where,
                code,
                f"of the output of {job} {len(names)} parts are {item['kind']}: {some}{also}",
                f"`mrcore cat {job}` fails, and whatever reads this output does, or reads too little",
                f"run {job} again (one with hold_state after `mrcore ledger forget {job}`), or, if it is not wanted "
                f"any more, `mrcore rm {job}/reduce`",
            )


def _new_certificates(facts: Facts) -> str:
    folder = facts["master"]["pki_dir"]
    return f"`mrcore cluster stop`, `rm {folder}/ca.* {folder}/master.*`, `mrcore cluster start` make new ones"


def _answered(facts: Facts) -> list[tuple[str, Json]]:
    known = [(f"node {name}", answer) for name, answer in facts["nodes"].items()]
    known += [(f"server {name}", answer) for name, answer in facts["servers"].items()]
    return [(where, answer) for where, answer in known if "error" not in answer]


def _versions(answer: Json) -> str:
    minor = ".".join(answer["python"].split(".")[:2])
    return f"mrcore {answer.get('release', answer['version'])} (wire {answer['wire_version']}) on Python {minor}"
