"""One validated, frozen settings object, read once at the edge and handed down.

Where settings come from, first found wins: `--config`, `MRCORE_CONFIG`, `/etc/mrcore/cluster.yml`, else the embedded
local cluster under `MRCORE_HOME` (default `~/.mrcore`). A file without `nodes` describes the local cluster too.
The local cluster's shape is `MRCORE_HOME/cluster.json`: `{"nodes": 3, "servers": 2, "address": "127.0.0.1",
"agent_port": 45678, "server_port": 23456}`, each key optional; any other setting may stand there as well.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mrcore.errors import UsageError
from mrcore.settings.validation import explain, parse_yaml
from mrcore.system.logs import LOG_BYTES, MIN_LOG_BYTES
from mrcore.system.paths import Layout
from mrcore.system.procfs import budget_bytes, too_little_memory
from mrcore.system.reload import Watched
from mrcore.text import unfit

SYSTEM_CONFIG = Path("/etc/mrcore/cluster.yml")
_PORTS = {"agent_port": 45678, "server_port": 23456}
LOCAL_SHAPE: dict[str, Any] = {"nodes": 1, "servers": 2, "address": "127.0.0.1"} | _PORTS
MAX_PORT = 65_535

Port = Annotated[int, Field(ge=1, le=MAX_PORT)]
Folder = Annotated[Path, Field(strict=False)]


class NodeSettings(BaseModel):
    """One machine (or loopback address) that holds data and runs `servers` cluster servers."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9.-]{0,62}$")
    address: str = Field(min_length=1)
    servers: int = Field(ge=1, le=256)
    agent_port: Port = _PORTS["agent_port"]
    server_port: Port = _PORTS["server_port"]
    first_server: int | None = Field(None, ge=0, lt=100_000, description="number of its first cluster server")
    ssh_port: Port = 22
    compute_dir: Folder

    @property
    def layout(self) -> Layout:
        """Return the node's folders, `auxiliary_dir` and `base_dir` among them."""
        return Layout(self.compute_dir)


class ServerSettings(NamedTuple):
    """One cluster server: its name in the cluster, its node, and the port of its own."""

    name: str
    node: NodeSettings
    port: int


class Settings(BaseModel):
    """Everything that can be set, with units in the names; see the module for where it comes from."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    cluster_name: str = Field("local", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$")
    local: bool = False
    user: str | None = Field(None, pattern=r"^[a-z_][a-z0-9_-]{0,31}$", description="who the program runs as")
    home: Folder
    state_dir: Folder
    pki_dir: Folder
    logs_dir: Folder
    projects_dir: Folder
    nodes: tuple[NodeSettings, ...] = Field(min_length=1, max_length=250, strict=False)
    memory_bytes: int | None = Field(None, ge=32 << 20, description="for all servers of one machine")
    node_timeout_seconds: float = Field(15, gt=0)
    cycle_interval_seconds: float = Field(60, ge=0)
    max_attempts: int = Field(3, ge=1, le=100)
    hold_backoff_first_seconds: float = Field(2, gt=0)
    hold_backoff_max_seconds: float = Field(300, gt=0)
    log_bytes: int = Field(LOG_BYTES, ge=MIN_LOG_BYTES, description="for each log")
    history_keep_runs: int = Field(10_000, ge=1)
    on_success: list[str] | None = Field(None, min_length=1, description="a command and its arguments")
    on_failure: list[str] | None = Field(None, min_length=1, description="a command and its arguments")
    on_hold: list[str] | None = Field(None, min_length=1, description="a command and its arguments")
    on_findings: list[str] | None = Field(None, min_length=1, description="a command and its arguments")

    @property
    def members_file(self) -> Path:
        """Return the allow list of the cluster's certificates (`wire.members`), by which the master knows its nodes."""
        return self.pki_dir.parent / "members.json"

    def projects_of(self, job: Mapping[str, Any]) -> Path:
        """Return where a job's project is: in a local cluster where `projects` lay when it was submitted.

        A deployed cluster has one folder: whatever a job says, no submitter has another's code run from elsewhere.
        """
        settled = job.get("projects_dir") if self.local else None
        return Path(settled) if settled else self.projects_dir

    def node(self, name: str) -> NodeSettings:
        """Return the node of this name. Raises UsageError."""
        for node in self.nodes:
            if node.name == name:
                return node
        raise UsageError(f"there is no node {name!r}; there are {', '.join(node.name for node in self.nodes)}")

    def servers(self) -> list[ServerSettings]:
        """Return all cluster servers in order of their numbers: S_0, S_1, …"""
        return [server for _, server in sorted(self.numbered_servers(), key=lambda pair: pair[0])]

    def numbered_servers(self) -> list[tuple[int, ServerSettings]]:
        """Return number and server for all cluster servers, by nodes.

        A node's numbers begin with its `first_server`, so that names stay when nodes come and go; without it they
        follow those of the node before.
        """
        servers: list[tuple[int, ServerSettings]] = []
        number = 0
        for node in self.nodes:
            number = number if node.first_server is None else node.first_server
            for port in range(node.server_port, node.server_port + node.servers):
                servers.append((number, ServerSettings(f"S_{number}", node, port)))
                number += 1
        return servers


def load_settings(path: str | os.PathLike[str] | None = None) -> Settings:
    """Read the settings (see the module for the order). Raises UsageError naming every error at once."""
    chosen = path or os.environ.get("MRCORE_CONFIG")
    file = Path(chosen) if chosen else SYSTEM_CONFIG
    values = _read(file) if chosen or file.exists() else {}
    home = _folder("home", values.get("home") or os.environ.get("MRCORE_HOME") or "~/.mrcore")
    source = str(file)
    if "nodes" not in values or isinstance(values["nodes"], int):
        shape_file = home / "cluster.json"
        if shape_file.exists():
            values = _read(shape_file) | values
            source = str(shape_file)
        values = _local_values(home, values, source)
    folders = {"state_dir": home / "state", "pki_dir": home / "pki", "logs_dir": home / "logs"}
    values = {"projects_dir": "projects"} | folders | values | {"home": home}
    for key in ("projects_dir", *folders):
        if isinstance(values[key], str | Path):
            values[key] = _folder(key, values[key])
    try:
        settings = Settings.model_validate(values)
    except ValidationError as error:
        raise _refused(source, explain(error, Settings, NodeSettings)) from None
    if errors := _errors_between_nodes(settings):
        raise _refused(source, errors)
    return settings


def _refused(source: str, errors: list[str]) -> UsageError:
    return UsageError(f"settings of {source} refused: {'; '.join(errors)}", faults=errors)


def _folder(key: str, name: Any) -> Path:
    """Return a folder that the settings name, absolute. Raises UsageError for what can be no name."""
    if why := unfit(str(name)):
        raise UsageError(f"the folder {str(name)!r} ({key} of the settings, or MRCORE_HOME) {why}: choose another one")
    try:
        return Path(name).expanduser().absolute()
    except (RuntimeError, TypeError) as error:  # "~name" of nobody; no text
        raise UsageError(f"settings refused: {key}: {str(name)!r} is no folder: {error}") from None


def watch_settings(path: str | os.PathLike[str] | None = None) -> Watched[Settings]:
    """Return what loads the settings again when their file changes; one with errors changes nothing."""
    chosen = path or os.environ.get("MRCORE_CONFIG")
    files = [Path(chosen) if chosen else SYSTEM_CONFIG, load_settings(path).home / "cluster.json"]
    return Watched(files, lambda: load_settings(path))


def _errors_between_nodes(settings: Settings) -> list[str]:
    """Return what the settings of one node alone do not show: names, ports and numbers of servers that clash."""
    errors: list[str] = []
    names, places = set[str](), dict[tuple[str, int], str]()
    for node in settings.nodes:
        if node.name.lower() in names:
            errors.append(f"two nodes have one name ({node.name})")
            continue
        names.add(node.name.lower())
        if node.server_port + node.servers - 1 > MAX_PORT:
            errors.append(f"{node.name}: {node.servers} servers from port {node.server_port} on end beyond {MAX_PORT}")
        for port in (node.agent_port, *range(node.server_port, node.server_port + node.servers)):
            if (holder := places.get((node.address, port))) is not None:
                both = f"{holder} and {node.name}" if holder != node.name else f"agent and a server of {node.name}"
                errors.append(f"{both} have one address and port ({node.address}:{port})")
                break
            places[node.address, port] = node.name
    holders, clashes = dict[int, str](), dict[str, str]()  # the first of each node
    for number, server in settings.numbered_servers():
        name = server.node.name
        if (holder := holders.setdefault(number, name)) != name:
            text = f"{holder} and {name} would both have a server S_{number}: fix their first_server"
            clashes.setdefault(name, text)
    return [*errors, *clashes.values()]


def _read(file: Path) -> dict[str, Any]:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read the settings {file}: {error.strerror}") from None
    values = parse_yaml(content, f"the settings file {file}")
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UsageError(f"the settings {file} must be one mapping of names to values")
    return values


def _local_values(home: Path, values: dict[str, Any], source: str) -> dict[str, Any]:
    """Return the values of a local cluster, whose shape becomes its nodes."""
    shape = {key: values.get(key, usual) for key, usual in LOCAL_SHAPE.items()}
    count, ports = shape["nodes"], {key: shape[key] for key in ("servers", "agent_port", "server_port")}
    try:
        first = ipaddress.IPv4Address(shape["address"])
        addresses = [first + index for index in range(count)] if 1 <= count <= 250 else []
    except ValueError:
        raise _refused(source, [f"address: no IPv4 address, got {shape['address']!r}"]) from None
    if not addresses:
        raise _refused(source, [f"nodes: a local cluster has 1 to 250, got {count}"])
    if outside := [address for address in addresses if not address.is_loopback]:
        loopback = "is no loopback address (127.0.0.0/8), and a local cluster listens on no other"
        raise _refused(source, [f"address: {outside[0]} {loopback}"])
    nodes = [
        {"name": f"node-{index}", "address": str(address), "compute_dir": home / "nodes" / str(address), **ports}
        for index, address in enumerate(addresses)
    ]
    return {key: value for key, value in values.items() if key not in LOCAL_SHAPE} | {"local": True, "nodes": nodes}


def server_memory_bytes(settings: Settings, node: NodeSettings | None = None) -> int:
    """Return the budget of one server in bytes: the machine's share over all servers that this machine runs.

    Nodes of a local cluster share one machine; of a deployed one each has its own, here `node`. Raises UsageError when
    that is too little to work with.
    """
    together = sum(other.servers for other in settings.nodes) if settings.local or node is None else node.servers
    if error := too_little_memory(settings.memory_bytes, together):
        raise UsageError(error)
    return budget_bytes(settings.memory_bytes, together)
