"""The embedded cluster: several nodes on one machine, each a loopback address with agent, servers and its own folder.

Daemons run detached and are known by three things, all compared before a signal is sent: process id, start time, and
the value of MRCORE_SERVER they were executed with, `<cluster id>/<daemon>`, which what they leave behind carries too.
The cluster id follows from the home folder, so that leftovers are found even after their records were deleted.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mrcore
from mrcore import procfs
from mrcore.config import LOCAL_SHAPE, NodeSettings, Settings, load_settings, server_memory_bytes
from mrcore.errors import ClusterFault, UsageError
from mrcore.paths import remove_tree, write_atomic

READY_SECONDS = 60.0  # for all together: 96 servers on two cores took 4
STOP_SECONDS = 10.0
KILL_SECONDS = 15.0
LOCK_SECONDS = 90.0
LOG_TAIL_BYTES = 2000
_INHERITED = ("PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV")

Json = dict[str, Any]
_ours: list[subprocess.Popen[bytes]] = []  # children of this very process, to be reaped when they end


@dataclass(frozen=True)
class _Daemon:
    """One daemon as it should be: `module` is what runs, `name` its name in records and logs ("agent", "S_0")."""

    name: str
    module: str
    node: NodeSettings
    port: int
    owner: str

    @property
    def record(self) -> Path:
        return self.node.layout.pids_dir / f"{self.name}.json"

    @property
    def log(self) -> Path:
        return self.node.layout.logs_dir / f"{self.name}.log"

    def __str__(self) -> str:
        return f"{self.name} on {self.node.name}, {self.node.address}:{self.port}"


def cluster_id(home: Path) -> str:
    """The id that marks the processes of the local cluster of this home folder."""
    return hashlib.sha256(os.fsencode(home.resolve())).hexdigest()[:16]


def configure(home: Path, memory_bytes: int | None = None, **shape: int | str | None) -> Settings:
    """Set the shape of the local cluster: `nodes`, `servers` (per node), `address` (of the first), `agent_port`,
    `server_port`; None leaves a value as it is. Gives the settings.

    Raises UsageError for values that cannot be, and for another shape while the cluster runs.
    """
    home.mkdir(parents=True, exist_ok=True)
    file, trial = home / "cluster.json", home / "cluster.new.json"
    asked = {key: value for key, value in {**shape, "memory_bytes": memory_bytes}.items() if value is not None}
    with _locked(home):
        before = json.loads(file.read_text()) if file.exists() else {}
        after = LOCAL_SHAPE | before | asked
        write_atomic(trial, json.dumps(after | {"home": str(home)}).encode())
        try:
            settings = load_settings(trial)
        finally:
            trial.unlink()
        if after != LOCAL_SHAPE | before and any(_recorded(home)):
            changed = ", ".join(f"{key} {value!r}" for key, value in asked.items() if before.get(key) != value)
            raise UsageError(f"the local cluster runs in another shape than {changed}: `mrcore cluster stop` first")
        if after != before:
            write_atomic(file, json.dumps(after, indent=1).encode())
    return settings


def start_cluster(settings: Settings) -> list[Json]:
    """Start the daemons that do not run yet, wait until all answer, and give `status`.

    Raises UsageError for a port in use or an address that is not this machine's, ClusterFault with the end of its log
    when a daemon does not come up; in both cases what was started here is ended again.
    """
    with _locked(settings.home):
        running = {record for record, _ in _recorded(settings.home)}
        missing = [daemon for daemon in _daemons(settings) if daemon.record not in running]
        if missing:
            _kill(settings.home, {daemon.owner for daemon in missing})
            for daemon in missing:
                _check_port(daemon)
            _prepare(settings, missing)
            try:
                _await_ready(_launch(missing))
            except BaseException:
                _kill(settings.home, {daemon.owner for daemon in missing})
                for daemon in missing:
                    daemon.record.unlink(missing_ok=True)
                    daemon.record.with_suffix(".server.json").unlink(missing_ok=True)
                raise
    return status(settings)


def stop_cluster(settings: Settings) -> int:
    """End the cluster: ask each daemon to, then make certain. Gives how many daemons ran."""
    with _locked(settings.home):
        asked = list(_recorded(settings.home))
        for _, known in asked:
            procfs.send_signal(known["pid"], known["start_ticks"], signal.SIGTERM)
        _await_end([known["pid"] for _, known in asked], STOP_SECONDS)
        _kill(settings.home)
        _clean(settings.home)
    return len(asked)


def kill_cluster(settings: Settings) -> int:
    """End the cluster and all that its tasks started by SIGKILL. Gives how many daemons ran.

    Raises ClusterFault naming processes that even so do not end (stuck in the kernel).
    """
    with _locked(settings.home, patience_seconds=5, needed=False):
        count = len(list(_recorded(settings.home)))
        _kill(settings.home)
        _clean(settings.home)
    return count


def status(settings: Settings) -> list[Json]:
    """Each daemon's name, node, address, port, pid (or None) and state: "running", "stopped" (frozen), "absent"."""
    running = dict(_recorded(settings.home))
    rows = []
    for daemon in _daemons(settings):
        pids = [running[daemon.record]["pid"]] if daemon.record in running else []
        with contextlib.suppress(OSError, ValueError, KeyError):
            pids.append(json.loads(daemon.record.with_suffix(".server.json").read_text())["pid"])
        frozen = any(procfs.state(pid) == "T" for pid in pids)
        state = "absent" if daemon.record not in running else "stopped" if frozen else "running"
        pid = pids[0] if state != "absent" else None
        row = {"name": daemon.name, "node": daemon.node.name, "address": daemon.node.address, "port": daemon.port}
        rows.append(row | {"pid": pid, "state": state})
    return rows


# ---- what should run, what does


def _daemons(settings: Settings) -> list[_Daemon]:
    mark = cluster_id(settings.home)
    agents = [
        _Daemon("agent", "mrcore.node_agent", node, node.agent_port, f"{mark}/agent@{node.address}")
        for node in settings.nodes
    ]
    return agents + [
        _Daemon(server.name, "mrcore.cluster_server", server.node, server.port, f"{mark}/{server.name}")
        for server in settings.servers()
    ]


def _recorded(home: Path) -> Iterator[tuple[Path, Json]]:
    """The daemons that run, of whatever shape the cluster had when they were started: record file and content."""
    for record in sorted(home.glob("nodes/*/pids/*.json")):
        with contextlib.suppress(OSError, ValueError, KeyError):
            known = json.loads(record.read_text())
            alive = procfs.state(known["pid"]) and procfs.start_ticks(known["pid"]) == known["start_ticks"]
            if alive and not record.name.endswith(".server.json"):
                mark = procfs.environment_value(known["pid"], "MRCORE_SERVER") or ""
                if mark.startswith(cluster_id(home) + "/"):
                    yield record, known


@contextlib.contextmanager
def _locked(home: Path, patience_seconds: float = LOCK_SECONDS, needed: bool = True) -> Iterator[None]:
    home.mkdir(parents=True, exist_ok=True)
    with (home / "cluster.lock").open("w") as lock:
        deadline = time.monotonic() + patience_seconds
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    if needed:
                        raise UsageError(f"another command is starting or stopping the cluster of {home}") from None
                    break
                time.sleep(0.05)
        yield


# ---- start


def _check_port(daemon: _Daemon) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((daemon.node.address, daemon.port))
        except OSError as error:
            option = "--agent-port" if daemon.name == "agent" else "--server-port"
            hint = f"end what uses it, or choose another port ({option})" if error.errno == errno.EADDRINUSE else ""
            hint = hint or f"choose another --address or {option}"
            raise UsageError(f"cannot start {daemon}: {os.strerror(error.errno or 0).lower()}; {hint}") from None


def _prepare(settings: Settings, missing: Iterable[_Daemon]) -> None:
    """Make certificates and folders, and write each daemon's spec into its own node's folder."""
    members = [node.name for node in settings.nodes]
    _make_certificates(settings)
    for daemon in missing:
        node, layout = daemon.node, daemon.node.layout
        layout.make()
        layout.pids_dir.mkdir(exist_ok=True)
        spec = {
            "name": daemon.name,
            "node": node.name,
            "address": node.address,
            "port": daemon.port,
            "cluster": cluster_id(settings.home),
            "compute_dir": str(node.compute_dir),
            "sibling_dirs": str(settings.home / "nodes"),
            "pki_dir": str(layout.pki_dir),
            "members": members,
            "memory_bytes": server_memory_bytes(settings, node),
        }
        write_atomic(node.compute_dir / f"{daemon.name}.json", json.dumps(spec, indent=1).encode())


def _make_certificates(settings: Settings) -> None:
    """The CA and the master's certificate once; a node's when it is new, changed its name or address, or the CA did."""
    from mrcore import pki  # only here: cryptography takes longer to load than a server to start

    authority = settings.pki_dir / "ca.crt"
    if not authority.exists():
        pki.make_authority(settings.pki_dir, settings.cluster_name)
    if not (settings.pki_dir / "master.crt").exists():
        pki.issue(settings.pki_dir, settings.pki_dir, "master", "master", "master", [])
    for node in settings.nodes:
        holder = node.layout.pki_dir / "holder.json"
        wanted = json.dumps([node.name, node.address, authority.read_text()]).encode()
        if not holder.exists() or holder.read_bytes() != wanted:
            pki.issue(settings.pki_dir, node.layout.pki_dir, "node", node.name, "node", [node.address])
            write_atomic(holder, wanted)


def _launch(missing: Iterable[_Daemon]) -> dict[int, _Daemon]:
    """Start and record the daemons; gives the descriptor on which each will say that it is ready."""
    waiting: dict[int, _Daemon] = {}
    package = Path(mrcore.__file__).parents[1]
    kept = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    roots = [] if package.name.endswith("-packages") else [str(package)]
    search = os.pathsep.join([*roots, *filter(None, [os.environ.get("PYTHONPATH")])])
    for daemon in missing:
        ready, theirs = os.pipe()
        environment = kept | {
            "PYTHONPATH": search,
            "MALLOC_ARENA_MAX": "1",  # an arena per thread would cost each server megabytes of its budget
            "MRCORE_SERVER": daemon.owner,
            "MRCORE_READY_FD": str(theirs),
        }
        command = [sys.executable, "-P", "-m", daemon.module, str(daemon.node.compute_dir / f"{daemon.name}.json")]
        with daemon.log.open("ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=daemon.node.compute_dir,
                env=environment,
                pass_fds=[theirs],
                start_new_session=True,
            )
        os.close(theirs)
        _ours.append(process)
        known = {"pid": process.pid, "start_ticks": procfs.start_ticks(process.pid)}
        write_atomic(daemon.record, json.dumps(known).encode())
        waiting[ready] = daemon
    return waiting


def _await_ready(waiting: dict[int, _Daemon]) -> None:
    deadline = time.monotonic() + READY_SECONDS
    try:
        while waiting:
            readable, _, _ = select.select(list(waiting), [], [], max(0.0, deadline - time.monotonic()))
            for ready in readable or list(waiting)[:1]:
                if not readable or not os.read(ready, 16):
                    daemon = waiting[ready]
                    what = "ended at once" if readable else f"is not ready after {READY_SECONDS:.0f} s"
                    tail = daemon.log.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace").strip()
                    raise ClusterFault(f"{daemon} {what}; the end of {daemon.log}:\n{tail}")
                del waiting[ready]
                os.close(ready)
    finally:
        for ready in waiting:
            os.close(ready)


# ---- end


def _kill(home: Path, owners: set[str] | None = None) -> None:
    """SIGKILL the daemons of these owners (None: all of the home) and everything that they or their tasks started.

    The daemons are stopped first, so that supervisors start nothing again, and killed last: until then they adopt, as
    subreapers, every orphan below them, however it may have renamed or detached itself.
    """
    prefix = cluster_id(home) + "/"
    deadline = time.monotonic() + KILL_SECONDS
    roots: dict[int, int] = {}
    while True:
        marks = {pid: procfs.environment_value(pid, "MRCORE_SERVER") or "" for pid in procfs.processes()}
        marked = {pid for pid, mark in marks.items() if mark.startswith(prefix) and (owners is None or mark in owners)}
        for _, known in _recorded(home):
            if known["pid"] in marked and known["pid"] not in roots:
                roots[known["pid"]] = known["start_ticks"]
                procfs.send_signal(known["pid"], known["start_ticks"], signal.SIGSTOP)
        family = (marked | procfs.descendants(*roots)) - roots.keys() - {os.getpid()}
        victims = [pid for pid in family if procfs.state(pid)]
        for pid in victims or roots:
            ticks = procfs.start_ticks(pid) if victims else roots[pid]
            if ticks is not None and (not victims or pid in family):
                procfs.send_signal(pid, ticks, signal.SIGKILL)
        left = _await_end(victims or roots, max(0.0, deadline - time.monotonic()))
        if left:
            raise ClusterFault(f"processes do not end even by SIGKILL (stuck in the kernel?): {left}", pids=left)
        if not victims:
            return


def _await_end(pids: Iterable[int], seconds: float) -> list[int]:
    """Wait until none of the processes lives; gives those that still do at the deadline."""
    deadline = time.monotonic() + seconds
    while True:
        _ours[:] = [process for process in _ours if process.poll() is None]
        pids = [pid for pid in pids if procfs.state(pid)]
        if not pids or time.monotonic() > deadline:
            return pids
        time.sleep(0.005)


def _clean(home: Path) -> None:
    """Remove records and working files of all nodes."""
    for node in home.glob("nodes/*"):
        for folder in (node / "working", node / "pids"):
            for path in folder.glob("*"):
                remove_tree(path) if path.is_dir() else path.unlink(missing_ok=True)
