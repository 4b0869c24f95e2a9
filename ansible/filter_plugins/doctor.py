"""Judges what `mrcore_inspect` saw on each machine: findings of where, what, what it means and what to type."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Iterator
from typing import Any

GIB = 1 << 30
DAY = 86_400
OLD_BACKUP_HOURS = 48  # backups are daily unless the inventory says otherwise: one may fail
INODES_SHARE = 0.02  # less than this share of free inodes is as bad as a full disk
Finding = dict[str, str]
Judge = Callable[[dict[str, Any], dict[str, Any]], Iterator[tuple[str, str, str]]]


def verb(wanted: dict[str, Any], name: str) -> str:
    """The make command of a verb for this inventory."""
    return f"make {name} INVENTORY={wanted['inventory']}"


def release(facts: dict[str, Any], wanted: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Every machine runs the same release, and it works."""
    here, master = facts["release"], wanted["release"]
    if here["current"] is None:
        means = "mrcore is not installed here, or its link was removed"
        yield "no release: /opt/mrcore/current points nowhere", means, verb(wanted, "deploy")
    elif here["current"] not in here["there"]:
        means = "the release that should run is gone from the disk"
        yield f"/opt/mrcore/current points at {here['current']}, which is not there", means, verb(wanted, "deploy")
    elif not here["works"]:
        means = "its files are damaged: daemons run until they are restarted, then no more"
        again = f"rm -r /opt/mrcore/releases/{here['current']} on that machine, then {verb(wanted, 'deploy')}"
        yield f"release {here['current']} cannot be imported", means, again
    elif master and here["current"] != master:
        means = "an upgrade stopped half-way; jobs are refused while versions differ"
        yield f"release {here['current']}, the master has {master}", means, verb(wanted, "upgrade")


def clock(facts: dict[str, Any], wanted: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """The clock agrees with the controller's."""
    skew = facts["skew"]
    if abs(skew) > wanted["skew_seconds"]:
        means = "certificates may be refused, times in logs and of inputs mislead"
        what = f"the clock is {abs(skew):.0f} seconds {'ahead of' if skew > 0 else 'behind'} the controller's"
        yield what, means, "timedatectl set-ntp true on that machine (package systemd-timesyncd or chrony)"


def disks(facts: dict[str, Any], wanted: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """File systems have room and inodes."""
    for folder, found in facts["disks"].items():
        if found is None:
            yield f"{folder} is not there", "daemons cannot write their data or logs", verb(wanted, "deploy")
        elif found["free_bytes"] < wanted["min_free_bytes"]:
            what = f"{found['free_bytes'] / GIB:.1f} GiB free at {folder}, wanted {wanted['min_free_bytes'] / GIB:.1f}"
            yield what, "the queue holds when a run finds no room", f"see docs/runbooks/disk-full.md; df -h {folder}"
        elif found["inodes"] and found["free_inodes"] < found["inodes"] * INODES_SHARE:
            what = f"{found['free_inodes']} inodes free at {folder} of {found['inodes']}"
            yield what, "no further files can be made, as on a full disk", f"df -i {folder}"


def units(facts: dict[str, Any], wanted: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Our units run and come back after a boot; no other unit has failed."""
    for name, state in facts["units"].items():
        if state.get("LoadState") != "loaded":
            yield f"unit {name} is missing", "its part of the cluster cannot run", verb(wanted, "deploy")
        elif state.get("ActiveState") != "active":
            means = "its part of the cluster does not run: it crashed, or somebody stopped it"
            what = f"unit {name} is {state.get('ActiveState')} ({state.get('Result')})"
            yield what, means, f"journalctl -u {name} -n 50 on that machine; {verb(wanted, 'start')}"
        elif state.get("UnitFileState") not in ("enabled", "static"):
            means = "it runs now, but not after a reboot"
            yield f"unit {name} is not enabled", means, verb(wanted, "start")
    for name in facts["failed_units"]:
        if name not in facts["units"]:
            means = "not ours, but worth a look"
            yield f"unit {name} has failed", means, f"systemctl status {name} on that machine, then reset-failed"


def ports(facts: dict[str, Any], wanted: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Daemons listen where they should, and the table that keeps strangers out is loaded."""
    if facts["is_node"] and len(facts["servers"]) != wanted["servers"]:
        what = f"{len(facts['servers'])} servers are set up here, the inventory has {wanted['servers']}"
        yield what, "the inventory was changed after the last deploy", verb(wanted, "deploy")
    if facts["listening"] is not None:
        there = {int(each.rsplit(":", 1)[1]) for each in facts["listening"]}
        agent = {"the agent": wanted["agent_port"]} if facts["is_node"] else {}
        for what, port in {**agent, **facts["servers"]}.items():
            if port not in there:
                means = "its daemon does not run or cannot take the port"
                yield f"nobody listens on port {port} ({what})", means, verb(wanted, "start")
    if facts["is_node"] and not facts["table"]:
        means = "only certificates protect the ports here: strangers reach them"
        yield "the firewall's table is not loaded", means, "systemctl restart mrcore-firewall on that machine"


def certificates(facts: dict[str, Any], wanted: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Certificates are valid for long enough, belong to their keys, and the keys are for nobody else."""
    for found in facts["certificates"]:
        if "expires" not in found:
            yield f"{found['path']}: {found['fault']}", "this machine cannot talk to the others", verb(wanted, "deploy")
            continue
        left = (found["expires"] - facts["time"]) / DAY
        day = datetime.datetime.fromtimestamp(found["expires"], datetime.UTC).date().isoformat()
        if left < 0:
            means = "the others refuse this machine"
            yield f"{found['path']} expired on {day}", means, verb(wanted, "deploy")
        elif left < wanted["renew_days"]:
            means = "once it has expired, the others refuse this machine"
            yield f"{found['path']} expires on {day}, in {left:.0f} days", means, verb(wanted, "deploy")
        if found["fault"] and left >= 0:
            means = "its key or its authority is another one: the others refuse this machine"
            yield f"{found['path']}: {found['fault']}", means, verb(wanted, "deploy")
        if (found["mode"], found["owner"]) != ("0600", "mrcore"):
            means = "somebody else could read the key: think of it as stolen if that may have happened"
            what = f"{found['key']} has mode {found['mode']}, owner {found['owner']}: wanted 0600, mrcore"
            yield what, means, f"{verb(wanted, 'deploy')}; stolen: {verb(wanted, 'rotate-certs CA=yes')}"


def windows(facts: dict[str, Any], wanted: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Each server that runs has its screen window."""
    for name, there in facts["windows"].items():
        state = facts["units"].get(f"mrcore-server@{name}.service", {})
        if not there and state.get("ActiveState") == "active":
            means = f"`mrcore attach {name}` finds nothing, and its debugger no terminal"
            yield f"server {name} has no screen window", means, f"systemctl restart mrcore-server@{name}"


def housekeeping(facts: dict[str, Any], wanted: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Backups are made."""
    if not facts["is_master"]:
        return
    newest = facts["newest_backup"]
    do = "systemctl start mrcore-backup on the master; journalctl -u mrcore-backup"
    if newest is None:
        yield "there is no backup yet", "a lost master would lose queue and history", do
    elif facts["time"] - newest > OLD_BACKUP_HOURS * 3600:
        hours = (facts["time"] - newest) / 3600
        yield f"the newest backup is {hours:.0f} hours old", "a lost master would lose what came since", do


def master_to_nodes(facts: dict[str, Any], wanted: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """The master reaches the units of all nodes over SSH with strict host keys."""
    for found in facts["ssh"]:
        if found["status"] == 0 or found["name"] in wanted["silent"]:
            continue  # a silent node is told of by itself
        what = f"SSH from here to {found['name']} ({found['address']}) fails: {last_line(found['errors'])}"
        if "REMOTE HOST IDENTIFICATION" in found["errors"] or "key verification failed" in found["errors"].lower():
            means = "the node has another host key than at the last deploy: reinstalled, or somebody is in between"
            yield what, means, f"find out which (docs/runbooks/suspected-intrusion.md); then {verb(wanted, 'deploy')}"
        else:
            yield what, "start, stop, attach and logs do not reach that node", verb(wanted, "deploy")


JUDGES: tuple[Judge, ...] = (
    release, clock, disks, units, ports, certificates, windows, housekeeping, master_to_nodes
)  # fmt: skip


def last_line(text: str) -> str:
    """The line of an error that says most: its last."""
    return (text.strip().splitlines() or ["no reason given"])[-1]


def findings(cluster: dict[str, Any], results: dict[str, dict[str, Any]], inventory: str) -> list[Finding]:
    """All findings, machine by machine.

    `cluster`: the inventory as the filter mrcore_cluster gives it. `results`: what the task of mrcore_inspect left,
    by machine; without `facts`, the machine did not answer. `inventory`: its name, for the commands.
    """
    master = results.get(cluster["master"], {}).get("facts")
    running = master.get("release") if isinstance(master, dict) else None
    wanted = {
        "inventory": inventory,
        "release": running.get("current") if isinstance(running, dict) else None,
        "renew_days": cluster["certificate_renew_days"],
        "skew_seconds": cluster["max_clock_skew_seconds"],
        "silent": [name for name, result in results.items() if "facts" not in result],
    }
    found = []
    for name, result in results.items():
        facts = result.get("facts")
        if facts is None:
            means = "it is down, or its network or SSH is; the work of its servers goes elsewhere or waits"
            what = f"does not answer: {last_line(str(result.get('msg') or ''))}"
            do = "see docs/runbooks/node-does-not-answer.md"
            found.append({"where": name, "what": what, "means": means, "do": do})
            continue
        for judge in JUDGES:
            told = judged(judge, facts, wanted | cluster["hosts"][name])
            found += [{"where": name, "what": what, "means": means, "do": do} for what, means, do in told]
    return found


def judged(judge: Judge, facts: Any, wanted: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What one judge finds; an answer that it cannot judge is a finding, and the other judges and machines go on."""
    try:
        return list(judge(facts, wanted))
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, OSError) as error:
        what = (
            f"gave no answer about {judge.__name__} that can be judged ({type(error).__name__}: {str(error)[:100]!r})"
        )
        means = "the machine is damaged, or somebody answers in its place"
        return [(what, means, "look at the machine itself; docs/runbooks/suspected-intrusion.md")]


def ssh_hosts(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    """The nodes as mrcore_inspect on the master wants them."""
    rows = [(name, cluster["hosts"][name]) for name in cluster["nodes"]]
    return [{"name": name, "address": host["cluster_ip"], "ssh_port": host["ssh_port"]} for name, host in rows]


def masters_view(result: dict[str, Any], master: str) -> list[Finding]:
    """The findings of `mrcore doctor --json`, of the result of that command; one of our own if it could not tell.

    Nothing if the master did not answer, which is a finding already.
    """
    if result.get("unreachable"):
        return []
    try:
        answer = json.loads(result["stdout"])
        rows = answer["findings"] if isinstance(answer, dict) else answer
        return [{key: str(row.get(key, "")) for key in ("where", "what", "means", "do")} for row in rows]
    except (ValueError, KeyError, AttributeError, TypeError):
        said = last_line(f"{result.get('stdout', '')}\n{result.get('stderr') or result.get('msg') or ''}")
        means = "the program itself does not work on the master"
        what = f"`mrcore doctor` gave no list (status {result.get('rc')}): {said[:300]}"
        return [
            {"where": master, "what": what, "means": means, "do": "mend what it says; make deploy if it is damaged"}
        ]


def merged(local: list[Finding], view: list[Finding], master: str) -> list[Finding]:
    """Both lists, without what the master says of a matter of a machine that the machine itself told already."""
    told = {(each["where"], topic(each["what"])) for each in local}
    rows = []
    for each in view:
        where = each["where"].removeprefix("node ")
        where = master if where.startswith("master") else where
        if topic(each["what"]) is None or (where, topic(each["what"])) not in told:
            rows.append({**each, "where": where})
    return local + rows


def topic(what: str) -> str | None:
    """The matter of a finding that both sides look at."""
    words = {"clock": "clock", "free at": "disk", "disk are free": "disk", ".crt": "certificate", "backup": "backup"}
    return next((matter for word, matter in {**words, "certificate": "certificate"}.items() if word in what), None)


def report(found: list[Finding]) -> str:
    """The list that a person reads; equal sentences about one machine only once."""
    lines, said = [], set()
    for each in found:
        if (each["where"], each["what"]) not in said:
            said.add((each["where"], each["what"]))
            lines.append(f"{each['where']}: {each['what']}\n  means: {each['means']}\n  do:    {each['do']}")
    return "\n".join(lines)


class FilterModule:
    """What playbooks may call."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Names and functions."""
        return {
            "mrcore_ssh_hosts": ssh_hosts,
            "mrcore_findings": findings,
            "mrcore_masters_view": masters_view,
            "mrcore_merged": merged,
            "mrcore_report": report,
        }
