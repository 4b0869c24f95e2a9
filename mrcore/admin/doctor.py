"""`mrcore doctor`: what is wrong or soon will be, as the master sees it: where, what, what it means, what to do.

`gather` asks everybody, with deadlines, and gives plain facts; the `judge_…` functions look at facts only.
"""

from __future__ import annotations

import contextlib
import functools
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any, NamedTuple

import msgspec

from mrcore import VERSIONS
from mrcore.errors import MrcoreError, UsageError
from mrcore.launchers import local
from mrcore.queue.scheduler import Scheduler
from mrcore.settings.config import NodeSettings, Settings
from mrcore.state import outputs
from mrcore.state.backup import last_backup
from mrcore.text import one_line
from mrcore.transfer.session import every_file
from mrcore.wire import pki
from mrcore.wire.client import Client
from mrcore.wire.tls import master_pki

ASK_SECONDS, LIST_SECONDS = 5.0, 120.0
AT_ONCE = 32
MAX_CLOCK_SKEW_SECONDS = 60.0
MIN_FREE_BYTES = 1 << 30
RENEW_SECONDS = 30 * 86400.0  # certificates are renewed when they have less left
MAX_BACKUP_AGE_SECONDS = 2 * 86400.0  # the timer makes one each day

Json = dict[str, Any]


class Finding(NamedTuple):
    """One thing that is wrong, for people."""

    where: str
    what: str
    means: str
    do: str


def gather(settings: Settings, deep: bool = False) -> Json:
    """Ask master, agents and cluster servers, all at the same time. Gives {"master", "nodes", "servers", "queue",
    "outputs" (as `outputs.compare` says; with `deep` every part is read, too)}.

    Who does not answer has {"error": message} instead of facts. Nobody of a local cluster that is not started is asked.
    """
    scheduler = Scheduler(settings)
    with contextlib.closing(scheduler.store):
        queue = scheduler.state() | {"jobs": len(scheduler.queue())}
    started = not settings.local or any(row["pid"] for row in local.status(settings))
    answers = _ask_all(settings) if started else {}
    files = {name: settings.pki_dir / f"{name}.crt" for name in ("ca", "master")}
    return {
        "master": {
            "time": time.time(),
            **VERSIONS,
            "python": platform.python_version(),
            "local": settings.local,
            "started": started,
            "pki_dir": str(settings.pki_dir),
            "disk_free_bytes": shutil.disk_usage(settings.state_dir).free,
            "certificates_end": {
                f"{name}.crt": pki.ends(file) for name, file in files.items() if started or file.exists()
            },
            "backup": _last_backup(settings),
        },
        "nodes": {node.name: answers[f"agent of {node.name}"] for node in settings.nodes if started},
        "servers": {server.name: answers[server.name] for server in settings.servers() if started},
        "queue": queue,
        "outputs": _compare_outputs(settings, answers, queue["running"], deep) if started else [],
    }


def _ask_all(settings: Settings) -> dict[str, Json]:
    keys = master_pki(settings)
    ports = {f"agent of {node.name}": (node, node.agent_port, "health") for node in settings.nodes}
    ports |= {server.name: (server.node, server.port, "hello") for server in settings.servers()}

    def ask(who: str) -> Json:
        node, port, method = ports[who]
        with contextlib.closing(Client(node.address, port, keys, node.name, ASK_SECONDS, ASK_SECONDS)) as client:
            begun = time.time()
            try:
                answer: Json = msgspec.to_builtins(client.call(method))
            except MrcoreError as error:
                return {"error": error.message, "node": node.name}
            if "time" in answer:  # the answer was made between `begun` and now
                answer["clock_skew_seconds"] = _outside(answer["time"], begun, time.time())
            return answer | {"node": node.name, "certificate_ends": client.certificate_ends()}

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return dict(zip(ports, pool.map(ask, ports), strict=True))


def _compare_outputs(settings: Settings, answers: dict[str, Json], running: Json | None, deep: bool) -> list[Any]:
    """Compare what manifests name with what the nodes that answer hold; all of a node that is no member is missing."""
    keys, known = master_pki(settings), outputs.named(settings)

    def held(node: NodeSettings) -> dict[str, int] | str:
        with contextlib.closing(Client(node.address, node.agent_port, keys, node.name)) as client:
            try:
                call = functools.partial(client.call, "list_files", timeout_seconds=LIST_SECONDS)
                return {file[0]: file[1] for file in every_file(call, "*/reduce", True)[1]}
            except MrcoreError as error:
                return error.message

    asked = [node for node in settings.nodes if "error" not in answers[f"agent of {node.name}"]]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = dict(zip([node.name for node in asked], pool.map(held, asked), strict=True))
    lists = {node: files for node, files in found.items() if isinstance(files, dict)}
    members = {node.name for node in settings.nodes}
    everywhere = lists | {node: dict[str, int]() for node in known if node not in members}
    wrong: list[Any] = [*outputs.compare(known, everywhere, running["job_name"] if running else None)]
    if deep:
        seen = {(each["job"], each["node"], name) for each in wrong for name in each["names"]}
        unread = {
            node: {
                path: part for path, part in known.get(node, {}).items() if (part.job, node, part.part.name) not in seen
            }
            for node in lists
        }
        wrong += outputs.check_contents(settings, keys, unread)
    faults = {node: text for node, text in found.items() if isinstance(text, str)}
    return wrong + [{"kind": "unknown", "job": "", "node": node, "names": [text]} for node, text in faults.items()]


def _outside(value: float, low: float, high: float) -> float:
    """How far a value lies below (negative) or above a span."""
    return min(0.0, value - low) + max(0.0, value - high)


def judge(facts: Json) -> list[Finding]:
    """Everything that is wrong, in the order in which to see to it."""
    if not facts["master"]["started"]:
        means = "its jobs wait" if facts["queue"]["jobs"] else "no job can run, and no output be read"
        return [Finding("local cluster", "it is not started", means, "`mrcore cluster start`")] + [
            finding for rule in (judge_disks, judge_queue) for finding in rule(facts)
        ]
    rules: list[Callable[[Json], Iterator[Finding]]] = [
        judge_answers,
        judge_versions,
        judge_clocks,
        judge_disks,
        judge_certificates,
        judge_queue,
        judge_backup,
        judge_outputs,
    ]
    return [finding for rule in rules for finding in rule(facts)]


def judge_answers(facts: Json) -> Iterator[Finding]:
    """Who does not answer. A node that is silent altogether is one finding."""
    local, starts = facts["master"]["local"], "`mrcore cluster start` starts what is missing"
    renew = "`make deploy` on the controller renews what has ended; a node that was removed stays refused"
    renew = _new_certificates(facts) if local else renew
    again = starts if local else f"see whether `ping` reaches the machine; then {starts}"
    of_node: dict[str, list[Json]] = {}
    for answer in facts["servers"].values():
        of_node.setdefault(answer["node"], []).append(answer)
    gone = {node for node, answer in facts["nodes"].items() if "error" in answer}
    gone = {node for node in gone if all("error" in answer for answer in of_node.get(node, []))}
    for node, answer in facts["nodes"].items():
        if "error" in answer:
            yield Finding(
                f"node {node}",
                f"{'nothing on it answers' if node in gone else 'its agent does not answer'}: {answer['error']}",
                "no job can run: the queue holds until the node is back",
                renew if "certificate" in answer["error"] else again,
            )
    for name, answer in facts["servers"].items():
        if "error" in answer and answer["node"] not in gone:
            yield Finding(
                f"server {name}",
                f"does not answer: {answer['error']}",
                "its node's other servers do its work; a node without any servers holds the queue",
                renew if "certificate" in answer["error"] else f"{starts}; `mrcore logs {name}` has its last words",
            )


def judge_versions(facts: Json) -> Iterator[Finding]:
    """Who runs another mrcore or Python than the master."""
    ours = _versions(facts["master"])
    for where, answer in _answered(facts):
        if (theirs := _versions(answer)) != ours:
            yield Finding(
                where,
                f"runs {theirs}, the master {ours}",
                "no job can run: the queue holds until all are of one version",
                "`mrcore cluster stop`, then `mrcore cluster start`"
                if facts["master"]["local"]
                else "`make upgrade` on the controller brings all to one version",
            )


def judge_clocks(facts: Json) -> Iterator[Finding]:
    """Whose clock is off."""
    for node, answer in facts["nodes"].items():
        if abs(skew := answer.get("clock_skew_seconds", 0)) > MAX_CLOCK_SKEW_SECONDS:
            yield Finding(
                f"node {node}",
                f"its clock is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} the master's",
                "certificates may be refused, times in logs and of files mislead, increments may miss changes",
                "`timedatectl` on both tells whether they follow a time server: `systemctl restart systemd-timesyncd`",
            )


def judge_disks(facts: Json) -> Iterator[Finding]:
    """Whose disk is nearly full."""
    known = [("master", facts["master"])] + [(f"node {name}", answer) for name, answer in facts["nodes"].items()]
    for where, answer in known:
        if (free := answer.get("disk_free_bytes", MIN_FREE_BYTES)) < MIN_FREE_BYTES:
            yield Finding(
                where,
                f"{free >> 20} MiB of disk are free, less than {MIN_FREE_BYTES >> 20}",
                "below 256 MiB the queue holds; a run that fills the disk is handed back",
                "`df -h` and `du -xh --max-depth=2` there tell what is large; `mrcore rm` removes inputs and output",
            )


def judge_certificates(facts: Json) -> Iterator[Finding]:
    """Whose certificate ends soon, or has ended."""
    now = facts["master"]["time"]
    known = [(f"master, {name}", end) for name, end in facts["master"]["certificates_end"].items()]
    known += [(where, answer.get("certificate_ends")) for where, answer in _answered(facts)]
    for where, end in known:
        if end is not None and end - now < RENEW_SECONDS:
            day = datetime.fromtimestamp(end, UTC).strftime("%Y-%m-%d %H:%M UTC")
            yield Finding(
                where,
                f"its certificate {'ended' if end <= now else 'ends'} on {day}",
                "from then on every connection with it is refused",
                _new_certificates(facts) if facts["master"]["local"] else "`make deploy` on the controller renews it",
            )


def judge_queue(facts: Json) -> Iterator[Finding]:
    """Why jobs do not run."""
    queue = facts["queue"]
    if queue["hold"]:
        yield Finding(
            "queue",
            f"it holds: {queue['hold']['reason']}",
            "no job starts until the cause is mended; then it goes on by itself",
            "mend the cause; `mrcore resume` has it try at once",
        )
    if queue["drain"]:
        yield Finding(
            "queue",
            f"it waits: {queue['drain']}",
            "no job starts until then",
            "wait for the drain's end, or, if it was cut off, repeat it",
        )
    if queue["paused"]:
        yield Finding("queue", "it is paused", "no further job starts", "`mrcore resume` ends the pause")
    if not queue["runner"] and (queue["jobs"] or not facts["master"]["local"]):
        yield Finding(
            "master",
            "no Runner drains the queue",
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


def judge_backup(facts: Json) -> Iterator[Finding]:
    """Whether queue and history could be brought back; who keeps a local cluster may do without."""
    backup, now = facts["master"]["backup"], facts["master"]["time"]
    if backup and "error" in backup:
        yield Finding("master", backup["error"], "nobody knows how old the last backup is", "`mrcore backup FILE`")
        return
    age = None if backup is None else now - backup["time"]
    if not facts["master"]["local"] and (age is None or age > MAX_BACKUP_AGE_SECONDS):
        yield Finding(
            "master",
            "there was no backup yet" if age is None else f"the last backup is {age / 86400:.1f} days old",
            "what happened since would be lost with the master's disk",
            "`systemctl status mrcore-backup.timer mrcore-backup.service` tells why; `mrcore backup FILE` makes one",
        )

    if backup and backup.get("copied") is False:
        yield Finding(
            f"node {backup['copy_to']}",
            "it did not get its copy of the last backup",
            "should the master's disk be lost now, the newest backup is lost with it",
            f"`mrcore backup FILE --copy-to {backup['copy_to']}` tries again and tells why it fails",
        )


def judge_outputs(facts: Json) -> Iterator[Finding]:
    """Whose output is not what manifests say, and what lies beside it."""
    for each in facts["outputs"]:
        job, names = each["job"], each["names"]
        some = ", ".join(one_line(name, 200) for name in names[: outputs.NAMED])
        some += f" and {len(names) - outputs.NAMED} more" if len(names) > outputs.NAMED else ""
        where = f"node {each['node']}"
        if each["kind"] == "unknown":
            yield Finding(where, f"what output it holds cannot be told: {some}", "parts may be missing", "mend that")
        elif each["kind"] == "foreign":
            yield Finding(
                where,
                f"{len(names)} files in {job}/reduce are no part of the output of {job}: {some}",
                "`mrcore cat` leaves them out, but a job that reads this folder reads them, too",
                f"see what they are; `mrcore rm {job}/reduce/NAME` removes one",
            )
        else:
            also = f" (of that name on {', '.join(each['elsewhere'])})" if each["elsewhere"] else ""
            yield Finding(
                where,
                f"of the output of {job} {len(names)} parts are {each['kind']}: {some}{also}",
                f"`mrcore cat {job}` fails, and whatever reads this output does, or reads too little",
                f"run {job} again (one with hold_state after `mrcore ledger forget {job}`), or, if it is not wanted "
                f"any more, `mrcore rm {job}/reduce`",
            )


def _new_certificates(facts: Json) -> str:
    folder = facts["master"]["pki_dir"]
    return f"`mrcore cluster stop`, `rm {folder}/ca.* {folder}/master.*`, `mrcore cluster start` make new ones"


def _answered(facts: Json) -> list[tuple[str, Json]]:
    known = [(f"node {name}", answer) for name, answer in facts["nodes"].items()]
    known += [(f"server {name}", answer) for name, answer in facts["servers"].items()]
    return [(where, answer) for where, answer in known if "error" not in answer]


def _versions(answer: Json) -> str:
    minor = ".".join(answer["python"].split(".")[:2])
    return f"mrcore {answer['release']} (wire {answer['wire_version']}) on Python {minor}"
