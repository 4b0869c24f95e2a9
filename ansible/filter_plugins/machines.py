"""What preflight decides of machines: are they fit for the cluster? No I/O, all faults of all machines at once.

Every fault is one sentence that names the machine, the cause and what to mend, also when the machine's answer is none:
what a machine says is decoded here, by the table ANSWER, and judged afterwards.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Json = dict[str, Any]

OLDEST_PYTHON = (3, 11)
SYSTEMS = {("debian", "12"): "Debian 12", ("debian", "13"): "Debian 13", ("ubuntu", "24.04"): "Ubuntu 24.04"}
MAX_ANSWER_CHARACTERS = 1 << 20
UNFIT = re.compile("[^\\x20-\\x7e\\xa1-\\u024f]+")  # control characters, line ends, what reorders text


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _word(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9 ._+~-]{0,80}", value) is not None


def _list_of(accepts: Callable[[Any], bool], least: int = 0) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and least <= len(value) <= 1000 and all(map(accepts, value))


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


ANSWER: dict[str, Callable[[Any], bool]] = {
    "skew_seconds": _number,
    "python": _list_of(_whole, least=2),
    "os_id": _word,
    "os_version": _word,
    "systemd": _flag,
    "machine": lambda value: isinstance(value, str) and re.fullmatch(r"\w{1,40}", value, re.ASCII) is not None,
    "glibc": lambda value: isinstance(value, str) and re.fullmatch(r"\d{1,6}(\.\d{1,6})*", value, re.ASCII) is not None,
    "disk_free_bytes": _whole,
    "address_is_here": _flag,
    "ports_taken": _list_of(_whole),
    "unknown_users": _list_of(_word),
    "release": lambda value: value is None or _word(value),
    "configured": _flag,
    "authority": lambda value: isinstance(value, str),
}
"""What probe.py says of a machine: each key and what its value must be. Machine and glibc become names of files."""


def mrcore_machines(
    results: Mapping[str, Json], cluster: Json, authority: str, release: str | None, removed: Sequence[str] = ()
) -> Json:
    """Judge what probe.py said on each host: {"faults": sentences, "targets": what wheels must be made for}.

    `results`: what the probe's task gave, by host. `authority`: the controller's bundle of CA certificates, "" before
    there is one. `release`: the one that a host may run; None for any. A first deploy that ended before it came to the
    master leaves nothing that runs: it may go on with another release. `removed`: nodes that were removed; what is on
    them is of no account.
    """
    faults, minors, targets = [], {}, {}  # type: ignore[var-annotated]
    answers = {name: _said(name, result, cluster["hosts"][name]["python"]) for name, result in results.items()}
    master, _ = answers.get(cluster["master"], ({}, None))  # not there with --limit
    if master and not any(found.get("configured") for found, _ in answers.values()):
        release = None
    for name, (found, trouble) in answers.items():
        host = cluster["hosts"][name]
        if trouble:
            faults.append(trouble)
            continue
        faults += _machine_faults(name, found, cluster, host)
        state = _state_faults(name, found, cluster, authority, release)
        if state and name in removed:
            state = [
                f"Host {name} was removed, and what is on it does not fit any more: `make remove-node NODE={name} "
                "DATA=abandon` takes that off it, then `make add-node` takes it back."
            ]
        faults += state
        minor = ".".join(map(str, found["python"][:2]))
        minors.setdefault(minor, []).append(name)
        before = targets.setdefault((minor, found["machine"]), found["glibc"])
        targets[minor, found["machine"]] = min(before, found["glibc"], key=_version)
    if len(minors) > 1:
        told = ", ".join(f"{minor} on {' '.join(names)}" for minor, names in sorted(minors.items()))
        faults.append(f"Python differs in its minor version ({told}): give all hosts one, mrcore_python may name it.")
    wanted = [{"python": minor, "machine": cpu, "glibc": glibc} for (minor, cpu), glibc in sorted(targets.items())]
    return {"faults": faults, "targets": wanted}


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def _said(name: str, result: Any, python: str) -> tuple[Json, str | None]:
    """The answer of one host, or the sentence about why there is none."""
    if not isinstance(result, Mapping):
        return {}, f"Host {name} was not asked: see what Ansible said of it above."
    reason = _shown(result.get("msg") or result.get("stderr") or "").removeprefix("Task failed: ")
    if result.get("unreachable"):
        return {}, f"Host {name} cannot be reached ({reason}): mend its SSH access, or take it out of the inventory."
    output = str(result.get("stdout") or "")[-MAX_ANSWER_CHARACTERS:]
    lines = [line for line in output.splitlines() if line.startswith("{")]
    if not lines and result.get("rc") == 127:
        return {}, f"Host {name} has no {python}: install python3 there, or set mrcore_python."
    if not lines and "Traceback (most recent call last)" in (told := f"{output}\n{result.get('stderr') or ''}"):
        return {}, f"Host {name} could not be looked at ({_shown(told.strip().splitlines()[-1])}): mend that there."
    if not lines:
        said = reason or _shown(output)
        return {}, f"Host {name} let nothing be run as root ({said}): give the user that Ansible logs in as sudo there."
    try:
        found = json.loads(lines[-1])
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        return {}, f"Host {name} gave an answer that is none ({_shown(lines[-1])}): see what {python} is there."
    for key, accepts in ANSWER.items():
        if key not in found:
            return {}, f"Host {name} gave an answer without {key}: see what {python} is there."
        if not accepts(found[key]):
            told = _shown(json.dumps(found[key]))
            return {}, f"Host {name} gave an answer that cannot be ({key}: {told}): see what {python} is there."
    return {key: found[key] for key in ANSWER}, None


def _shown(text: Any) -> str:
    """What a machine said, as a part of a sentence."""
    return UNFIT.sub("?", " ".join(str(text)[:3000].split()))[:300]


def _machine_faults(name: str, found: Json, cluster: Json, host: Json) -> list[str]:
    faults = []
    if (found["os_id"], found["os_version"]) not in SYSTEMS:
        told = f"{found['os_id']} {found['os_version']}".strip()
        faults.append(
            f"Host {name} runs {told}: mrcore needs {', '.join(SYSTEMS.values())}; reinstall it or leave it out."
        )
    if not found["systemd"]:
        faults.append(f"Host {name} was not started by systemd, which keeps mrcore's daemons: boot it with systemd.")
    if tuple(found["python"][:2]) < OLDEST_PYTHON:
        told, oldest = (".".join(map(str, each)) for each in (found["python"], OLDEST_PYTHON))
        faults.append(
            f"Host {name} has Python {told} as {host['python']}: mrcore needs {oldest} or later; "
            "upgrade the system, or set mrcore_python."
        )
    if abs(found["skew_seconds"]) > (limit := cluster["max_clock_skew_seconds"]):
        word = "ahead of" if found["skew_seconds"] > 0 else "behind"
        faults.append(
            f"The clock of {name} is {abs(found['skew_seconds']):.0f} s {word} the controller's (at most {limit} s): "
            "set it, and let a time service such as chrony keep it."
        )
    if name in cluster["nodes"] and found["disk_free_bytes"] < host["min_free_bytes"]:
        free, least = (
            f"{number / (1 << 20):,.0f} MiB" for number in (found["disk_free_bytes"], host["min_free_bytes"])
        )
        faults.append(
            f"Host {name} has {free} free for {host['compute_dir']} (at least {least}): make room there, "
            "set mrcore_compute_dir to a larger disk, or lower mrcore_min_free_bytes."
        )
    if not found["address_is_here"]:
        faults.append(f"Host {name} has no interface with {host['cluster_ip']}: correct its mrcore_cluster_ip.")
    for port in found["ports_taken"]:
        faults.append(f"Port {port} of {name} is in use by another program: end that, or choose another port.")
    for user in found["unknown_users"]:
        faults.append(
            f"mrcore_users names {user}, who has no account on {name}: create it (adduser {user}) or leave it out."
        )
    return faults


def _state_faults(name: str, found: Json, cluster: Json, authority: str, release: str | None) -> list[str]:
    """What an earlier deploy left that this one must not change by the way."""
    faults = []
    if found["configured"] and name != cluster["master"]:
        faults.append(
            f"Host {name} is the master already, with the queue: leave it in the group master. To move the queue to "
            f"another machine, `make reset` first and bring a backup along (docs/runbooks/backup-and-restore.md)."
        )
    if release and found["release"] not in (None, release):
        faults.append(
            f"Host {name} runs release {found['release']}, this checkout is {release}: `make upgrade` changes it."
        )
    trusted = set(certificates(found["authority"]))
    if trusted and not trusted & set(certificates(authority)):
        faults.append(
            f"Host {name} trusts another authority than {cluster['pki_dir']} holds: bring that folder back from its "
            "backup; docs/runbooks says what to do when it is lost."
        )
    return faults


def certificates(text: str) -> list[str]:
    """The PEM blocks of a bundle, each as one normalised text."""
    blocks = re.findall(r"-----BEGIN CERTIFICATE-----(.*?)-----END CERTIFICATE-----", text or "", re.DOTALL)
    return ["".join(block.split()) for block in blocks]


class FilterModule:
    """What Ansible looks for."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """The filters by name."""
        return {"mrcore_machines": mrcore_machines}
