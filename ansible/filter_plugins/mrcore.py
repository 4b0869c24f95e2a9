"""What preflight decides: is this inventory a cluster, and are these machines fit for it? No I/O, all faults at once.

Every fault is one sentence that names the thing, the cause and what to mend. `VARIABLES` is the one table of what an
inventory may say, with its defaults; inventory/sample explains it and tests compare the two.
"""

from __future__ import annotations

import difflib
import hashlib
import hmac
import importlib.util
import ipaddress
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

Json = dict[str, Any]

MAX_NODES = 50
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]{0,62}")
CLUSTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
ACCOUNT = re.compile(r"[a-z_][a-z0-9_-]{0,31}")
TARGET = re.compile(r"([A-Za-z0-9.-]+|\[[0-9a-fA-F:]+\]):[0-9]{1,5}")


class Variable(NamedTuple):
    """One variable of inventories: its default, what it must be (a sentence), and how that is decided."""

    default: Any
    must_be: str
    accepts: Callable[[Any], bool]
    one_for_all: bool = True


def _integer(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _text(value: Any) -> bool:
    return isinstance(value, str) and value != "" and "\n" not in value


def _folder(value: Any) -> bool:
    return (
        _text(value) and value.startswith("/") and ".." not in value.split("/") and not re.search(r"[\s%'\"\\]", value)
    )


def _maybe(accepts: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or accepts(value)


_PORT = "a port from 1024 to 65535"
_FOLDER = "an absolute path without blanks, quotes, percent signs or `..`"
VARIABLES: dict[str, Variable] = {
    "cluster_name": Variable("mrcore", "1 to 63 letters, digits, `.`, `_` or `-`", lambda v: bool(
        isinstance(v, str) and CLUSTER_NAME.fullmatch(v))),
    "cluster_ip": Variable(None, "an IP address", lambda v: _address(v) is not None, one_for_all=False),
    "servers": Variable(2, "a number from 1 to 64", _integer(1, 64), one_for_all=False),
    "agent_port": Variable(45678, _PORT, _integer(1024, 65535), one_for_all=False),
    "server_port": Variable(23456, _PORT, _integer(1024, 65535), one_for_all=False),
    "ssh_port": Variable(None, "a port from 1 to 65535", _integer(1, 65535), one_for_all=False),
    "compute_dir": Variable("/var/lib/mrcore/compute", _FOLDER, _folder, one_for_all=False),
    "memory_bytes": Variable(None, "at least 67108864 for each server", _maybe(_integer(64 << 20, 1 << 60)),
                             one_for_all=False),
    "python": Variable("/usr/bin/python3", _FOLDER, _folder, one_for_all=False),
    "min_free_bytes": Variable(1 << 30, "a number of bytes", _integer(0, 1 << 60), one_for_all=False),
    "projects_dir": Variable("/srv/mrcore/projects", _FOLDER, _folder),
    "pki_dir": Variable(None, "an absolute path of the controller", lambda v: _text(v) and v.startswith("/")),
    "users": Variable([], "a list of account names", lambda v: isinstance(v, list) and all(
        isinstance(each, str) and ACCOUNT.fullmatch(each) for each in v)),
    "settings": Variable({}, "a mapping of settings to values", lambda v: isinstance(v, Mapping)),
    "certificate_days": Variable(365, "a number from 2 to 3650", _integer(2, 3650)),
    "certificate_renew_days": Variable(30, "a number from 1 to 3650", _integer(1, 3650)),
    "max_clock_skew_seconds": Variable(60, "a number from 1 to 3600", _integer(1, 3600)),
    "upgrade_wait_seconds": Variable(300, "a number from 0 to 86400", _integer(0, 86400)),
    "dashboard": Variable(False, "true or false", lambda v: isinstance(v, bool)),
    "dashboard_port": Variable(8643, _PORT, _integer(1024, 65535)),
    "dashboard_control": Variable(False, "true or false", lambda v: isinstance(v, bool)),
    "backup_calendar": Variable("daily", "a time as systemd writes it (daily, *-*-* 03:00)", _text),
    "backup_keep": Variable(14, "a number from 1 to 1000", _integer(1, 1000)),
    "backup_copy_to": Variable(None, "the name of a node", lambda v: v is None or isinstance(v, str)),
    "monitoring": Variable(False, "true or false", lambda v: isinstance(v, bool)),
    "monitoring_install": Variable(False, "true or false", lambda v: isinstance(v, bool)),
    "monitoring_target": Variable(None, "an address and a port (10.0.0.11:8643)", lambda v: bool(
        isinstance(v, str) and TARGET.fullmatch(v))),
    "monitoring_alertmanagers": Variable([], "a list of addresses with ports", lambda v: isinstance(v, list) and all(
        isinstance(each, str) and TARGET.fullmatch(each) for each in v)),
}  # fmt: skip
# Given on the command line by the verbs that need them: NODE=, DATA=, PURGE=, CONFIRM=, PROJECT=, CA= of make, or -e.
OF_THE_COMMAND_LINE = ("node", "data", "purge", "confirm", "project", "ca", "json", "output_dir")
OF_MRCORE = {
    "cluster_name", "user", "home", "state_dir", "pki_dir", "logs_dir", "projects_dir", "nodes", "local",
    "memory_bytes",
}  # fmt: skip


def _address(value: Any) -> str | None:
    try:
        return str(ipaddress.ip_address(value)) if isinstance(value, str) else None
    except ValueError:
        return None


# ---- the inventory


def mrcore_cluster(hostvars: Mapping[str, Mapping[str, Any]], groups: Mapping[str, Iterable[str]]) -> Json:
    """Read an inventory: {"faults": sentences, "master", "nodes": names, "hosts": {name: variables without mrcore_},
    "watchers": hosts that get the role monitoring}.

    With any fault the rest is incomplete; nobody may go on then.
    """
    masters, nodes = list(groups.get("master", ())), list(groups.get("nodes", ()))
    everyone = list(dict.fromkeys([*masters, *nodes]))
    faults = _group_faults(masters, nodes, list(groups.get("all", ())), groups)
    hosts: Json = {}
    for name in everyone:
        hosts[name], found = _host(name, hostvars[name])
        faults += found
    faults += _common_faults(hosts, nodes)
    master = masters[0] if len(masters) == 1 else None
    common = {key: hosts[master][key] for key, each in VARIABLES.items() if each.one_for_all} if master else {}
    if master and not faults and common["backup_copy_to"] is None:
        common["backup_copy_to"] = next((name for name in nodes if name != master), nodes[0])
    if master and (target := common["backup_copy_to"]) is not None and target not in nodes:
        faults.append(f"mrcore_backup_copy_to names {target!r}, which is no host of the group nodes: name one of it.")
    if master and common["monitoring_target"] is None:
        common["monitoring_target"] = f"127.0.0.1:{common['dashboard_port']}"
    watchers = list(groups.get("monitoring", ())) or ([master] if common.get("monitoring") else [])
    faults += _watcher_faults(watchers, master, common)
    whole = {"faults": list(dict.fromkeys(faults)), "master": master, "nodes": nodes, "hosts": hosts}
    return whole | common | {"watchers": watchers}


def _watcher_faults(watchers: list[str], master: str | None, common: Json) -> list[str]:
    if not watchers or not master:
        return []
    faults, away = [], [name for name in watchers if name != master]
    if not common["dashboard"]:
        faults.append("Prometheus has nothing to scrape: set mrcore_dashboard to true, or mrcore_monitoring to false.")
    if away and str(common["monitoring_target"]).startswith(("127.", "localhost:", "[::1]")):
        faults.append(
            f"mrcore_monitoring_target is {common['monitoring_target']}, the master's own, which {away[0]} of the "
            "group monitoring cannot reach: say what leads there."
        )
    return faults


def _group_faults(masters: list[str], nodes: list[str], everyone: list[str], groups: Mapping[str, Any]) -> list[str]:
    faults = []
    if not masters:
        faults.append("The inventory has no master: put exactly one host into the group master.")
    if len(masters) > 1:
        faults.append(
            f"The inventory has {len(masters)} masters ({', '.join(masters)}): leave one in the group master."
        )
    if not nodes:
        faults.append(f"The inventory has no nodes: put 1 to {MAX_NODES} hosts into the group nodes.")
    if len(nodes) > MAX_NODES:
        faults.append(f"The inventory has {len(nodes)} nodes: leave at most {MAX_NODES} in the group nodes.")
    for name in everyone:
        if name not in masters and name not in nodes and name not in groups.get("monitoring", ()):
            own = [each for each, members in groups.items() if name in members and each not in ("all", "ungrouped")]
            where = f"only in {', '.join(own)}" if own else "in no group"
            faults.append(f"Host {name} is {where}: put it into the group master or nodes, or take it out.")
    return faults


def _host(name: str, given: Mapping[str, Any]) -> tuple[Json, list[str]]:
    """The variables of one host with their defaults, and what is wrong with them."""
    faults: list[str] = []
    values: Json = {}
    if not NAME.fullmatch(name) or name in ("master", "localhost"):
        what = "1 to 63 letters, digits, dots and hyphens, and neither master nor localhost"
        faults.append(f"Host name {name!r} cannot be a node's name: rename it in the inventory ({what}).")
    for key in sorted(key for key in given if key.startswith("mrcore_")):
        if (short := key.removeprefix("mrcore_")) not in VARIABLES and short not in OF_THE_COMMAND_LINE:
            faults.append(f"Unknown variable {key}: {_nearest(short)}.")
    for key, variable in VARIABLES.items():
        value = given.get(f"mrcore_{key}")
        value = variable.default if value is None else value  # `mrcore_users:` with nothing behind it
        value = _derived(key, given) if value is None else value
        if isinstance(value, str) and value.isdecimal() and not variable.accepts(value):
            value = int(value)  # -e gives numbers as text
        values[key] = None
        if key == "cluster_ip" and value is None:
            faults.append(
                f"Host {name} has no address: set mrcore_cluster_ip (or an ansible_host that is an IP address) for it."
            )
        elif value is None or variable.accepts(value):
            values[key] = _address(value) if key == "cluster_ip" else value
        else:
            faults.append(f"mrcore_{key} of {name} is {value!r}: it must be {variable.must_be}.")
    first, count, agent = (values[key] for key in ("server_port", "servers", "agent_port"))
    if first and count and agent and (first + count > 65536 or first <= agent < first + count):
        last = first + count - 1
        faults.append(
            f"Ports of {name} collide: choose mrcore_agent_port {agent} outside {first} to {last}, at most 65535."
        )
    if (memory := values["memory_bytes"]) and count and memory < count * (64 << 20):
        faults.append(f"mrcore_memory_bytes of {name} is {memory} for {count} servers: they need {count * (64 << 20)}.")
    return values, faults


def _derived(key: str, given: Mapping[str, Any]) -> Any:
    if key == "cluster_ip":
        return _address(given.get("ansible_host"))
    if key == "pki_dir":
        return f"{given.get('inventory_dir')}/pki"
    if key == "ssh_port":
        return int(given.get("ansible_port") or 22)
    return None


def _nearest(short: str) -> str:
    known = [*VARIABLES, *OF_THE_COMMAND_LINE]
    near = difflib.get_close_matches(short, known, n=1, cutoff=0.5)
    return f"did you mean mrcore_{near[0]}" if near else "see inventory/sample for those that there are"


def _common_faults(hosts: Json, nodes: list[str]) -> list[str]:
    """What is wrong between hosts: values that must be one for all, addresses of two, servers beyond bounds."""
    faults, owners = [], {}  # type: ignore[var-annotated]
    for name, values in hosts.items():
        if address := values.get("cluster_ip"):
            owners.setdefault(address, []).append(name)
    for address, names in owners.items():
        if len(names) > 1:
            faults.append(f"Address {address} is that of {' and '.join(names)}: give each its own mrcore_cluster_ip.")
    for key, variable in VARIABLES.items():
        texts = {repr(values[key]) for values in hosts.values()}
        if variable.one_for_all and len(texts) > 1:
            faults.append(f"mrcore_{key} differs between hosts ({', '.join(sorted(texts))}): set it once, for all.")
    some = next(iter(hosts.values()), None)
    if some and (taken := sorted(OF_MRCORE & set(some["settings"] or ()))):
        faults.append(f"mrcore_settings holds {', '.join(taken)}: leave it out, the inventory's own variables give it.")
    if some and (some["certificate_renew_days"] or 0) >= (some["certificate_days"] or 9999):
        faults.append("mrcore_certificate_renew_days is not below mrcore_certificate_days: every deploy would renew.")
    return faults


# ---- numbers of servers


def mrcore_numbering(present: Json | None, cluster: Json) -> dict[str, int]:
    """The number of each node's first server: {node: first}.

    `present`: the master's cluster.yml as it is, None before the first deploy; `cluster`: what the inventory wants. A
    node keeps its numbers while it has no more servers than they reach for; others get the next free ones.
    """
    taken: dict[str, tuple[int, int]] = {}
    counter = 0
    for node in (present or {}).get("nodes") or ():
        first = node.get("first_server")
        first = counter if first is None else first
        counter = first + node["servers"]
        taken[node["name"]] = first, counter
    wanted = {name: cluster["hosts"][name]["servers"] for name in cluster["nodes"]}
    numbers = {}
    for name, count in wanted.items():
        if name in taken:
            first, _ = taken[name]
            others = [each for other, each in taken.items() if other != name and other in wanted]
            if not any(low < first + count and first < high for low, high in others):
                numbers[name] = first
                taken[name] = first, first + count
    following = max([high for name, (_, high) in taken.items() if name in wanted], default=0)
    for name, count in wanted.items():
        if name not in numbers:
            numbers[name] = following
            following += count
    return numbers


# ---- small things


def mrcore_known_hosts(nodes: list[Json], keys: list[str]) -> str:
    """known_hosts of the master for these nodes, whose public host keys come in the same order."""
    lines = []
    for node, texts in zip(nodes, keys, strict=True):
        port = node["ssh_port"]
        names = [f"[{each}]:{port}" if port != 22 else each for each in (node["address"], node["name"])]
        lines += [
            f"{','.join(names)} {' '.join(key.split()[:2])}\n" for key in sorted(texts.splitlines()) if key.strip()
        ]
    return "".join(lines)


def mrcore_nodes(cluster: Json, numbers: dict[str, int]) -> list[Json]:
    """The key `nodes` of the master's cluster.yml."""
    copied = ("servers", "agent_port", "server_port", "ssh_port", "compute_dir")
    rows = []
    for name in cluster["nodes"]:
        host = cluster["hosts"][name]
        row = {"name": name, "address": host["cluster_ip"], "first_server": numbers[name]}
        rows.append(row | {key: host[key] for key in copied})
    return rows


def mrcore_places(cluster: Json) -> list[list[Any]]:
    """Where each node's agent answers: [[name, address, port]…]."""
    hosts = [(name, cluster["hosts"][name]) for name in cluster["nodes"]]
    return [[name, host["cluster_ip"], host["agent_port"]] for name, host in hosts]


def mrcore_metrics_token(token: str) -> str:
    """What lets one read the dashboard's metrics and nothing else, of the dashboard's token (`mrcore.web.access`)."""
    return hmac.digest(token.strip().encode(), b"metrics", "sha256").hex()


def mrcore_files(folder: str) -> list[str]:
    """What a project consists of, without caches and hidden files, as sha256sum prints it in its folder."""
    root, found = Path(folder), []
    for path in sorted(root.rglob("*")):
        parts = path.relative_to(root).parts
        if path.is_file() and not any(part.startswith(".") or part == "__pycache__" for part in parts):
            found.append(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  ./{'/'.join(parts)}")
    return found


def mrcore_release(root: str) -> str:
    """The release that this checkout is; see scripts/wheelhouse.py."""
    file = Path(root) / "scripts/wheelhouse.py"
    spec = importlib.util.spec_from_file_location("mrcore_wheelhouse", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return str(module.release_of(Path(root)))


class FilterModule:
    """What Ansible looks for."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """The filters by name."""
        ours = (mrcore_cluster, mrcore_numbering, mrcore_known_hosts, mrcore_release)
        ours += (mrcore_nodes, mrcore_places, mrcore_files, mrcore_metrics_token)
        return {function.__name__: function for function in ours}
