"""What a launcher does: `local` for daemons on this machine, `ssh` for units of others.

Both are modules, and mypy checks them against `Launcher` (`launcher_of` in `mrcore.launchers`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, Protocol, TypedDict, TypeVar

from mrcore.errors import MrcoreError
from mrcore.messages.methods import HEALTH, HELLO, Method
from mrcore.settings.config import NodeSettings, Settings
from mrcore.state import manifest
from mrcore.system.follow import Growth, Position
from mrcore.system.parallel import on_nodes
from mrcore.system.tags import of_run

T = TypeVar("T")
NODES_AT_ONCE = 64  # they only wait


class DaemonStatus(TypedDict):
    """One row of `mrcore cluster status`; `state`: running, stopped (frozen), absent, unreachable (with a reason)."""

    name: str
    node: str
    address: str
    port: int
    pid: int | None
    state: str
    reason: NotRequired[str]


class LogFile(NamedTuple):
    """A log on another machine, as `mrcore logs` lists it."""

    node: str
    path: str
    size_bytes: int


class Daemon(NamedTuple):
    """One daemon as it should be; `name` ("agent", "S_0") is that of its spec, record and log."""

    name: str
    node: NodeSettings
    port: int

    def __str__(self) -> str:
        return f"{self.name} on {self.node.name}, {self.node.address}:{self.port}"

    @property
    def is_agent(self) -> bool:
        """Return whether it is a node agent, not a cluster server."""
        return self.name == "agent"

    @property
    def method(self) -> Method[Any]:
        """Return what it is asked to see whether it answers."""
        return HEALTH if self.is_agent else HELLO

    def status(self, pid: int | None, state: str) -> DaemonStatus:
        """Return its row of `status`."""
        node = self.node
        return {
            "name": self.name, "node": node.name, "address": node.address, "port": self.port, "pid": pid, "state": state
        }  # fmt: skip


class Launcher(Protocol):
    """All of it raises ClusterFault for what fails, UsageError for what cannot be asked (here, or of this cluster)."""

    def configure(self, home: Path, **shape: int | str | None) -> Settings:
        """Set the shape of a local cluster and return its settings."""

    def start_cluster(self, settings: Settings) -> list[DaemonStatus]:
        """Start the daemons that do not run yet, wait until all answer, and return `status`."""

    def stop_cluster(self, settings: Settings) -> int:
        """Ask every daemon to end, then make certain; return how many ran."""

    def kill_cluster(self, settings: Settings) -> int:
        """End everything by SIGKILL, and all that tasks started; return how many daemons ran."""

    def status(self, settings: Settings) -> list[DaemonStatus]:
        """Return a row for each daemon, agents first."""

    def log_folders(self, settings: Settings) -> list[Path]:
        """Return the folders of this machine that have logs of the cluster."""

    def list_logs(self, settings: Settings) -> tuple[list[LogFile], dict[str, str]]:
        """Return the log files on other machines, and by node's name why those of some are not known."""

    def read_log(self, settings: Settings, node_name: str, name: str, lines: int) -> bytes | None:
        """Return the last lines of a daemon's log as `system.logs.last_lines`; None: this machine has no such file."""

    def find_in_logs(self, settings: Settings, node_name: str, words: str, lines: int) -> list[bytes]:
        """Return the last lines of the logs of a node's cluster servers that hold `words`, as they are."""

    def read_on(
        self, settings: Settings, node_name: str, since: Mapping[str, Position | None], back_bytes: int
    ) -> dict[str, Growth]:
        """Return what daemons' logs on a node have grown by, each as `system.follow.read_on`; those that are there."""

    def attach_command(self, settings: Settings, server_name: str) -> list[str]:
        """Return the command that shows the window of a cluster server."""

    def run_on_node(self, settings: Settings, node_name: str, command: str) -> str:
        """Run a shell command on a node as the cluster's user; return what it prints."""

    def copy_file(self, settings: Settings, node_name: str, source: Path, folder: Path) -> Path:
        """Copy a file into a folder of a node, made if need be (mode 0700), whole or not at all; return its path."""


def daemons(settings: Settings) -> list[Daemon]:
    """Return every daemon that should run: the agents, then the cluster servers in order of their numbers."""
    agents = [Daemon("agent", node, node.agent_port) for node in settings.nodes]
    return agents + [Daemon(server.name, server.node, server.port) for server in settings.servers()]


def try_nodes(
    nodes: Iterable[NodeSettings], work: Callable[[NodeSettings], T], at_once: int
) -> tuple[dict[str, T], dict[str, MrcoreError]]:
    """Call `work` for each node, several at once; return the results and, of those that failed, the errors by name."""

    def one(node: NodeSettings) -> T | MrcoreError:
        try:
            return work(node)
        except MrcoreError as error:
            return error

    nodes = list(nodes)
    answers = dict(zip((node.name for node in nodes), on_nodes(nodes, one, at_once), strict=True))
    errors = {name: answer for name, answer in answers.items() if isinstance(answer, MrcoreError)}
    return {name: answer for name, answer in answers.items() if not isinstance(answer, MrcoreError)}, errors


def lines_of_run(
    launcher: Launcher, settings: Settings, job: str, run: int, lines: int
) -> tuple[list[bytes], dict[str, MrcoreError]]:
    """Return the last lines that a run's tasks printed, on all nodes, in order of their times; and by node's name why
    those of some are not known.
    """
    words = f" {job}/{run} "
    found, errors = try_nodes(
        settings.nodes, lambda node: launcher.find_in_logs(settings, node.name, words, lines), NODES_AT_ONCE
    )
    return of_run((line for some in found.values() for line in some), job, run)[-lines:], errors


def removable(state_dir: Path, entries: Iterable[str]) -> list[str]:
    """Return which entries (`JOB`, `JOB/RUN`) of a working folder may be removed when the cluster ends.

    A run that has committed may have parts there that have not got their places yet: the next Runner sees to that.
    """
    entries = list(entries)

    def is_committed(entry: str) -> bool:
        job, _, run = entry.partition("/")
        return run.isdecimal() and manifest.path_of(state_dir, job, int(run)).exists()

    kept = {entry for entry in entries if is_committed(entry)}
    parents = {entry.partition("/")[0] for entry in kept}
    return [entry for entry in entries if entry not in kept | parents]
