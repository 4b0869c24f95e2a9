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
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from textwrap import indent
from typing import NamedTuple

import msgspec

import mrcore
from mrcore.errors import ClusterFault, UsageError
from mrcore.launchers.launcher import Daemon, DaemonStatus, LogFile, daemons, removable
from mrcore.messages.nodes import Spec
from mrcore.settings.config import LOCAL_SHAPE, NodeSettings, Settings, load_settings, server_memory_bytes
from mrcore.system import follow, logs, procfs
from mrcore.system.deadline import Deadline
from mrcore.system.follow import Growth, Position
from mrcore.system.paths import close_home, make_private, remove_tree, write_atomic
from mrcore.wire.members import members_content, read_membership

READY_SECONDS = 60.0  # for all together: 96 servers on two cores took 4
STOP_SECONDS, KILL_SECONDS = 10.0, 30.0
END_SECONDS = 5.0  # at least, for what was sent SIGKILL, however late it is
LOCK_SECONDS = 90.0
HUNT_SECONDS = 0.05  # without a trace of what forks on and on
LOG_TAIL_BYTES = 2000
_INHERITED = ("PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONPATH")

_started: list[subprocess.Popen[bytes]] = []  # children of this very process, to be reaped when they end


class _Process(NamedTuple):
    """A daemon that runs; both together are its identity."""

    pid: int
    start_ticks: int


def cluster_id(home: Path) -> str:
    """Return the id that marks the processes of the local cluster of this home folder."""
    return hashlib.sha256(os.fsencode(home.resolve())).hexdigest()[:16]


def configure(home: Path, **shape: int | str | None) -> Settings:
    """Set the local cluster's `nodes`, `servers` (per node), `address` (of the first node), `agent_port`,
    `server_port`, `memory_bytes` (of all servers together); None or left out: as it is. Return the settings.

    Raises UsageError for values that cannot be, and for another shape while the cluster runs.
    """
    with _locked(home):
        file, trial = home / "cluster.json", home / "cluster.new.json"
        before = LOCAL_SHAPE | (json.loads(file.read_text()) if file.exists() else {})
        asked = {key: value for key, value in shape.items() if value is not None and value != before.get(key)}
        write_atomic(trial, json.dumps(before | asked | {"home": str(home)}).encode())
        try:
            settings = load_settings(trial)
        finally:
            trial.unlink()
        if asked and _running(home):
            changed = ", ".join(f"{key} {value}" for key, value in asked.items())
            raise UsageError(f"the local cluster runs in another shape than {changed}: `mrcore cluster stop` first")
        write_atomic(file, json.dumps(before | asked, indent=1).encode())
    return settings


def start_cluster(settings: Settings) -> list[DaemonStatus]:
    """Start the daemons that do not run yet, wait until all answer, and return `status`.

    Raises UsageError for a port in use or an address that is not this machine's, ClusterFault with the end of its log
    when a daemon does not come up; in both cases what was started here is ended again.
    """
    with _locked(settings.home):
        running = _running(settings.home)
        missing = [daemon for daemon in daemons(settings) if _record(daemon) not in running]
        owners = {_owner(settings, daemon) for daemon in missing}
        _kill(settings.home, owners)  # what a killed supervisor could not end
        for daemon in missing:
            _check_port(daemon)
        try:
            if missing:
                _write_members(settings, _make_certificates(settings))
                _await_ready({_launch(settings, daemon): daemon for daemon in missing})
        except BaseException:
            _kill(settings.home, owners)
            for daemon in missing:
                for record in daemon.node.layout.pids_dir.glob(f"{daemon.name}.*"):  # half-written ones, too
                    record.unlink(missing_ok=True)
            raise
    return status(settings)


def stop_cluster(settings: Settings) -> int:
    """End the cluster: ask each daemon to, then make certain. Return how many daemons ran."""
    with _locked(settings.home):
        running = list(_running(settings.home).values())
        for process in running:
            for number in (signal.SIGTERM, signal.SIGCONT):  # one that is stopped could not obey
                procfs.send_signal(*process, number)
        _await_end([process.pid for process in running], STOP_SECONDS)
        _kill(settings.home)
        _clean(settings)
    return len(running)


def kill_cluster(settings: Settings) -> int:
    """End the cluster and all that its tasks started by SIGKILL. Return how many daemons ran.

    Raises ClusterFault naming processes that even so do not end (stuck in the kernel).
    """
    with _locked(settings.home, patience_seconds=5, needed=False):
        running = _running(settings.home)
        _kill(settings.home)
        _clean(settings)
    return len(running)


def status(settings: Settings) -> list[DaemonStatus]:
    """Return a row for each daemon; its state is "running", "stopped" (frozen) or "absent"."""
    running, rows = _running(settings.home), []
    for daemon in daemons(settings):
        process = running.get(_record(daemon))
        pid = process.pid if process else None
        frozen = pid and "T" in map(procfs.state, (pid, *procfs.children(pid)))
        rows.append(daemon.status(pid, "stopped" if frozen else "running" if pid else "absent"))
    return rows


def is_started(settings: Settings) -> bool:
    """Return whether any daemon runs, be it frozen."""
    return any(row["pid"] for row in status(settings))


def log_folders(settings: Settings) -> list[Path]:
    """Return the folders of the nodes' logs and of the master's."""
    return [*(node.layout.logs_dir for node in settings.nodes), settings.logs_dir]


def list_logs(settings: Settings) -> tuple[list[LogFile], dict[str, str]]:
    """Return none: all logs are on this machine."""
    return [], {}


def read_log(settings: Settings, node_name: str, name: str, lines: int) -> bytes | None:
    """Return the last lines of a daemon's log; None when there is none yet."""
    file = settings.node(node_name).layout.logs_dir / f"{name}.log"
    return logs.last_lines(file, lines) if file.is_file() else None


def find_in_logs(settings: Settings, node_name: str, words: str, lines: int) -> list[bytes]:
    """Return the last lines of the logs of a node's cluster servers that hold `words`."""
    found: deque[bytes] = deque(maxlen=lines)
    for server in settings.servers():
        file = settings.node(node_name).layout.logs_dir / f"{server.name}.log"
        for log in (Path(f"{file}.1"), file) if server.node.name == node_name else ():
            with contextlib.suppress(FileNotFoundError), log.open("rb") as stream:
                found.extend(line for line in stream if words.encode() in line)
    return list(found)


def read_on(
    settings: Settings, node_name: str, since: Mapping[str, Position | None], back_bytes: int
) -> dict[str, Growth]:
    """Return what daemons' logs on a node have grown by."""
    folder = settings.node(node_name).layout.logs_dir
    grown = {name: follow.read_on(folder / f"{name}.log", at, back_bytes) for name, at in since.items()}
    return {name: growth for name, growth in grown.items() if growth is not None}


def attach_command(settings: Settings, server_name: str) -> list[str]:
    """Raise UsageError: there is nothing to attach to."""
    raise UsageError(
        f"the daemons of a local cluster have no windows: `mrcore logs {server_name}` shows what they print, "
        "`mrcore try` debugs a function"
    )


def run_on_node(settings: Settings, node_name: str, command: str) -> str:
    """Run a shell command here; return what it prints. Raises ClusterFault when it fails, UsageError (no node)."""
    settings.node(node_name)
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, errors="surrogateescape")
    if done.returncode:
        raise ClusterFault(f"`{command[:200]}` ended with status {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def copy_file(settings: Settings, node_name: str, source: Path, folder: Path) -> Path:
    """Copy a file into a folder of a node; return its path there. Raises OSError, UsageError (no node)."""
    settings.node(node_name)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_atomic(folder / source.name, source.read_bytes(), 0o600)
    return folder / source.name


# ---- what should run, what does


def _owner(settings: Settings, daemon: Daemon) -> str:
    """Return the value of MRCORE_SERVER that marks a daemon's processes."""
    name = f"agent@{daemon.node.address}" if daemon.is_agent else daemon.name
    return f"{cluster_id(settings.home)}/{name}"


def _record(daemon: Daemon) -> Path:
    return daemon.node.layout.pids_dir / f"{daemon.name}.json"


def _running(home: Path) -> dict[Path, _Process]:
    """Return by record file what runs, of whatever shape the cluster had when it was started."""
    result = {}
    for record in sorted(home.glob("nodes/*/pids/*.json")):
        with contextlib.suppress(OSError, ValueError, KeyError):
            known = json.loads(record.read_text())
            process, server_child = _Process(known["pid"], known["start_ticks"]), record.name.endswith(".server.json")
            if server_child or not _marked([process.pid], cluster_id(home)) or not procfs.state(process.pid):
                continue
            if procfs.start_ticks(process.pid) == process.start_ticks:
                result[record] = process
    return result


def _marked(pids: Iterable[int], mark: str, owners: set[str] | None = None) -> set[int]:
    """Return which processes carry the mark of these owners; None: of any of the cluster with the id `mark`."""
    owner_of = {pid: procfs.environment_value(pid, "MRCORE_SERVER") for pid in pids if pid != os.getpid()}
    return {
        pid for pid, owner in owner_of.items() if (owner.startswith(f"{mark}/") if owners is None else owner in owners)
    }


@contextlib.contextmanager
def _locked(home: Path, patience_seconds: float = LOCK_SECONDS, needed: bool = True) -> Iterator[None]:
    close_home(home)
    with (home / "cluster.lock").open("w") as lock:
        for _ in Deadline(patience_seconds).tries(0.05):
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
        else:
            if needed:
                raise UsageError(f"another command is starting or stopping the cluster of {home}")
        yield


# ---- start


def _check_port(daemon: Daemon) -> None:
    option = "--agent-port" if daemon.is_agent else "--server-port"
    try:
        socket.create_server((daemon.node.address, daemon.port)).close()
    except OSError as error:
        hint = f"end what uses it, or choose another {option}"
        hint = hint if error.errno == errno.EADDRINUSE else f"choose another --address or {option}"
        raise UsageError(f"cannot start {daemon}: {os.strerror(error.errno or 0).lower()}; {hint}") from None


def _make_certificates(settings: Settings) -> dict[tuple[str, str], list[str]]:
    """Make the CA once; a certificate when it is new, when its holder changed name or address, or the CA did.

    O is this cluster's alone, also when another one has a copy of the CA. Return the serials by (role, name).
    """
    from mrcore.wire import pki  # only here: cryptography takes longer to load than a server to start

    authority, cluster = settings.pki_dir / "ca.crt", cluster_id(settings.home)
    serials = dict[tuple[str, str], list[str]]()
    if not authority.exists():
        pki.make_authority(settings.pki_dir, settings.cluster_name)
    holders = [("master", "master", settings.pki_dir, "master", list[str]())]
    holders += [("node", node.name, node.layout.pki_dir, "node", [node.address]) for node in settings.nodes]
    for role, name, folder, stem, addresses in holders:
        holder = folder / "holder.json"
        wanted = json.dumps([name, *addresses, cluster, authority.read_text()]).encode()
        if not holder.exists() or holder.read_bytes() != wanted:
            pki.issue(settings.pki_dir, folder, stem, name, role, addresses, cluster)  # type: ignore[arg-type]
            write_atomic(holder, wanted)
        serials[role, name] = [pki.serial(folder / f"{stem}.crt")]
    return serials


def _write_members(settings: Settings, serials: dict[tuple[str, str], list[str]]) -> None:
    """Write the allow list, for the master and for each node. What was denied by hand stays denied."""
    for file in (settings.members_file, *map(_members_file, settings.nodes)):
        denied = read_membership(file).denied if file.exists() else ()
        content = members_content(cluster_id(settings.home), serials, denied)
        if not file.exists() or file.read_bytes() != content:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(file, content)


def _members_file(node: NodeSettings) -> Path:
    return node.compute_dir / "members.json"


def _launch(settings: Settings, daemon: Daemon, module: str = "") -> int:
    """Write the daemon's spec into its own node's folder, start and record it; return where it will say "ready"."""
    node, layout = daemon.node, daemon.node.layout
    make_private(node.compute_dir.parent)
    layout.make()
    layout.pids_dir.mkdir(exist_ok=True)
    file, spec = node.compute_dir / f"{daemon.name}.json", Spec(
        name=daemon.name, node=node.name, address=node.address, port=daemon.port, servers=node.servers,
        cluster=cluster_id(settings.home), members_file=str(_members_file(node)), log_bytes=settings.log_bytes,
        compute_dir=str(node.compute_dir), pki_dir=str(layout.pki_dir),
        sibling_dirs=str(node.compute_dir.parent), memory_bytes=server_memory_bytes(settings, node),
    )  # fmt: skip
    write_atomic(file, msgspec.json.format(msgspec.json.encode(spec), indent=1))
    ready, theirs = os.pipe()
    environment = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    package = Path(mrcore.__file__).parents[1]
    if not package.name.endswith("-packages"):
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(package), environment.get("PYTHONPATH")]))
    environment["MALLOC_ARENA_MAX"] = "1"  # an arena per thread would cost each server megabytes of its budget
    environment |= {"MRCORE_SERVER": _owner(settings, daemon), "MRCORE_READY_FD": str(theirs)}
    module = module or ("mrcore.node.node_agent" if daemon.is_agent else "mrcore.node.cluster_server")
    with (layout.logs_dir / f"{daemon.name}.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, str(file)], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            cwd=node.compute_dir, env=environment, pass_fds=[theirs], umask=0o077, start_new_session=True,
        )  # fmt: skip
    os.close(theirs)
    _started.append(process)
    known = {"pid": process.pid, "start_ticks": procfs.start_ticks(process.pid)}
    write_atomic(_record(daemon), json.dumps(known).encode())
    return ready


def _await_ready(waiting: dict[int, Daemon]) -> None:
    deadline = Deadline(READY_SECONDS)
    try:
        while waiting:
            readable, _, _ = select.select(list(waiting), [], [], deadline.left_seconds)
            for ready in readable or list(waiting)[:1]:
                daemon = waiting[ready]
                if not readable or not os.read(ready, 16):
                    log = daemon.node.layout.logs_dir / f"{daemon.name}.log"
                    tail = log.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace").strip()
                    what = "ended at once" if readable else f"is not ready after {READY_SECONDS:.0f} s"
                    raise ClusterFault(f"{daemon} {what}; the end of {log}:\n{indent(tail, '  ', lambda line: True)}")
                os.close(ready)
                del waiting[ready]
    finally:
        for ready in waiting:
            os.close(ready)


# ---- end


def _kill(home: Path, owners: set[str] | None = None) -> None:
    """SIGKILL what carries the mark of these owners (None: any of this home's) and all that descends from it.

    The topmost are stopped first and killed last: supervisors then start nothing again, and until their end they
    adopt, as subreapers, every orphan below them, however it may have detached itself and wiped its environment. Ends
    with a look that finds nothing.
    """
    deadline, mark = Deadline(KILL_SECONDS), cluster_id(home)
    while True:
        by_parent = procfs.family()
        marked = _marked(set().union(*by_parent.values()), mark, owners)
        below = {child for parent in marked for child in by_parent.get(parent, ())}
        tops = {pid: ticks for pid in marked - below if (ticks := procfs.start_ticks(pid))}
        for pid, ticks in tops.items():
            procfs.send_signal(pid, ticks, signal.SIGSTOP)
        _kill_below(tops, deadline)
        for pid, ticks in tops.items():
            procfs.send_signal(pid, ticks, signal.SIGKILL)
        if left := _await_end(tops, max(END_SECONDS, deadline.left_seconds)):
            raise ClusterFault(f"processes do not end even by SIGKILL (stuck in the kernel?): {left}", pids=left)
        killed = _hunt(mark, owners, deadline)
        if not (tops or killed) or deadline.is_over:  # what was not there when we looked cannot be born any more
            return


def _hunt(mark: str, owners: set[str] | None, deadline: Deadline) -> int:
    """SIGKILL marked processes that no supervisor adopts (it was killed) and that fork faster than /proc can be walked.

    Looks at the process ids that were given out since its last look only, which takes less time than to fork, until
    none of them was marked for HUNT_SECONDS. Return how many it killed.
    """
    seen, killed, quiet = procfs.newest_pid(), 0, Deadline(HUNT_SECONDS)
    while not quiet.is_over and not deadline.is_over:
        newest = procfs.newest_pid()
        for pid in _marked(range(seen, newest + 1), mark, owners):  # none when the ids began again from 1
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
                killed, quiet = killed + (procfs.state(pid) is not None), Deadline(HUNT_SECONDS)
        seen = newest
    return killed


def _kill_below(tops: Iterable[int], deadline: Deadline) -> None:
    """SIGKILL the children of stopped supervisors, and those that they adopt by it, until only zombies are left.

    That is certain when all were zombies and a later look shows the same ones: each orphan is adopted before its
    parent is seen as a zombie. A walk over /proc alone would run after daemons that fork faster than it looks.
    """
    zombies: set[int] = set()
    for _ in deadline.tries(0.0005):
        below = set().union(*map(procfs.children, tops))
        alive = [pid for pid in below if procfs.state(pid)]
        for pid in alive:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        if not alive and below == zombies:
            return
        zombies = set() if alive else below


def _await_end(pids: Iterable[int], seconds: float) -> list[int]:
    """Wait until none of the processes lives; return those that still do at the deadline."""
    for _ in Deadline(seconds).tries(0.005):
        _started[:] = [process for process in _started if process.poll() is None]
        if not (pids := [pid for pid in pids if procfs.state(pid)]):
            break
    return list(pids)


def _clean(settings: Settings) -> None:
    """Remove the records and working files of all nodes."""
    gone = list(settings.home.glob("nodes/*/pids/*"))
    for folder in settings.home.glob("nodes/*/working"):
        entries = (str(path.relative_to(folder)) for path in [*folder.glob("*"), *folder.glob("*/*")])
        gone += (folder / entry for entry in removable(settings.state_dir, entries))
    for path in gone:
        remove_tree(path) if path.is_dir() else path.unlink(missing_ok=True)
