"""Decisions of the day-two playbooks: what a removal writes down, how far a rotation is, which releases stay."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

KEEP_RELEASES = 2  # the one that runs and the one to go back to


def without(cluster: dict[str, Any], node: str) -> dict[str, Any]:
    """An inventory (of the filter mrcore_cluster) as it is when this node is deleted from it."""
    nodes = [each for each in cluster["nodes"] if each != node]
    hosts = {name: host for name, host in cluster["hosts"].items() if name != node or name == cluster["master"]}
    copy_to = cluster["backup_copy_to"]
    if copy_to == node:
        copy_to = next((name for name in nodes if name != cluster["master"]), nodes[0] if nodes else None)
    return {**cluster, "nodes": nodes, "hosts": hosts, "backup_copy_to": copy_to}


def superfluous(releases: list[dict[str, Any]], current: str, previous: str | None) -> list[str]:
    """The releases to remove, of rows with `path` and `mtime`: all but the newest few, never these two."""
    names = [each["path"].rstrip("/").rsplit("/", 1)[1] for each in sorted(releases, key=lambda row: -row["mtime"])]
    keep = [name for name in (current, previous) if name in names]
    keep += [name for name in names if name not in keep][: max(0, KEEP_RELEASES - len(keep))]
    return [name for name in names if name not in keep]


def holdings(told: dict[str, Any]) -> str:
    """What `mrcore drain NODE --list --json` says a node holds, for a sentence; empty: nothing."""
    parts = [
        f"{kind['files']} files of {name} ({kind['bytes']} bytes)"
        for name, kind in told.get("kinds", {}).items()
        if kind["files"]
    ]
    if told.get("jobs"):
        parts.append(f"output of the jobs {', '.join(job['job_name'] for job in told['jobs'])}")
    parts += [f"what cannot be moved: {why}" for why in told.get("cannot_move", ())]
    parts += [f"{each['input_dir']}, which job {each['job_name']} reads" for each in told.get("elsewhere", ())]
    return "; ".join(parts)


def said(result: dict[str, Any]) -> str:
    """One line of what a failed task said: its program's last line, else Ansible's message."""
    for text in (result.get("stderr"), result.get("stdout"), result.get("msg")):
        if text and (lines := str(text).strip().splitlines()):
            return " ".join(lines[-1].split())[:400]
    return "no reason given"


def why_nothing_came(host: Mapping[str, Any]) -> str:
    """Why a host (its variables) sent no archive of its logs; empty: it did not answer, or it sent one."""
    gathered, fetched = host.get("__collect_archive") or {}, host.get("__collect_fetched") or {}
    if gathered.get("unreachable") or fetched.get("unreachable") or "checksum" in fetched:
        return ""
    return said(gathered if gathered.get("rc") or fetched.get("skipped") else fetched)


class FilterModule:
    """What playbooks may call."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Names and functions."""
        return {
            "mrcore_without": without,
            "mrcore_superfluous": superfluous,
            "mrcore_holdings": holdings,
            "mrcore_said": said,
            "mrcore_why_nothing_came": why_nothing_came,
        }
