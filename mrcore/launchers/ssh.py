"""The deployed cluster: the nodes' units, started and stopped by their master over SSH.

systemd keeps the daemons: it starts them at boot and again when they die. A root-owned helper on each node acts on
exactly that node's units and is all that the master's key may do as root. Host keys must be those that were deployed;
a node that fails is named, the others go on, and one ClusterFault at the end names all that failed.
"""

from __future__ import annotations

import base64
import contextlib
import getpass
import hashlib
import logging
import shlex
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from textwrap import indent
from typing import Any, TypeVar

import paramiko
from fabric import Config, Connection
from invoke.exceptions import CommandTimedOut

from mrcore.errors import ClusterFault, MrcoreError, UsageError
from mrcore.launchers import health
from mrcore.launchers.launcher import DaemonStatus, LogFile, daemons, removable, try_nodes
from mrcore.settings.config import NodeSettings, Settings
from mrcore.system import logs
from mrcore.system.deadline import Deadline
from mrcore.system.follow import MAX_READ_BYTES, Growth, Position

HELPER = ("sudo", "-n", "/opt/mrcore/bin/units")
VERB_SECONDS = {"start": 60, "stop": 150, "kill": 60, "status": 30}
NODES_AT_ONCE = 16
CONNECT_SECONDS = 10  # each of: TCP, SSH's greeting, its keys, our key
KEEPALIVE_SECONDS = 15
COMMAND_SECONDS = 60
COPY_SECONDS = 600  # without any progress
READY_SECONDS = 60.0
LOG_LINES = 10  # of a daemon that did not come up
FAULT_CHARACTERS = 2000  # of what a command printed

T = TypeVar("T")
logging.getLogger("paramiko").setLevel(logging.CRITICAL)  # it prints a traceback for what is one sentence here


def configure(home: Path, **shape: int | str | None) -> Settings:
    """Raise UsageError: machines are not made by options."""
    raise UsageError("the shape of a deployed cluster stands in its settings: leave the options out")


def start_cluster(settings: Settings) -> list[DaemonStatus]:
    """Start what does not run, now and at boot; wait until all answer over TLS in our release; return `status`.

    Raises UsageError off the master, ClusterFault naming each node that failed and why.
    """
    _, errors = _on_nodes(settings, lambda node, shell: _helper(shell, "start"))
    wrong = health.check(settings, [node for node in settings.nodes if node.name not in errors], READY_SECONDS)
    texts = {name: "; ".join(error.text for error in of_node) for name, of_node in wrong.items() if of_node}

    def explain(node: NodeSettings, shell: Connection) -> str:
        return "; ".join(f"{error.text}{_log_end(node, shell, error.daemon)}" for error in wrong[node.name])

    explained, _ = _on_nodes(settings, explain, [node for node in settings.nodes if node.name in texts])
    _raise_errors(settings, "start", errors | texts | explained)
    return status(settings)


def stop_cluster(settings: Settings) -> int:
    """Stop all units gracefully, also for the next boot; return how many daemons ran. Raises as `start_cluster`."""
    return _end(settings, "stop")


def kill_cluster(settings: Settings) -> int:
    """End all units and whatever runs in them by SIGKILL; return how many daemons ran. Raises as `start_cluster`."""
    return _end(settings, "kill")


def status(settings: Settings) -> list[DaemonStatus]:
    """Return a row for each daemon; those of a node that does not answer are "unreachable" and have a `reason`.

    Raises UsageError off the master.
    """
    looks, errors = _on_nodes(settings, _look)
    rows = []
    for daemon in daemons(settings):
        row = daemon.status(*looks.get(daemon.node.name, {}).get(daemon.name, (None, "absent")))
        if reason := errors.get(daemon.node.name):
            row["state"], row["reason"] = "unreachable", reason
        rows.append(row)
    return rows


def log_folders(settings: Settings) -> list[Path]:
    """Return the folder of the master's logs."""
    return [settings.logs_dir]


def list_logs(settings: Settings) -> tuple[list[LogFile], dict[str, str]]:
    """Return the nodes' log files, and by node's name why those of others are not known."""

    def look(node: NodeSettings, shell: Connection) -> list[LogFile]:
        folder = shlex.quote(str(node.layout.logs_dir))
        lines = _run(shell, f"find {folder} -maxdepth 1 -type f -printf '%s %p\\n'").splitlines()
        pairs = [line.partition(" ") for line in lines]
        return sorted(LogFile(node.name, path, int(size)) for size, _, path in pairs)

    looks, errors = _on_nodes(settings, look)
    return [file for files in looks.values() for file in files], errors


def read_log(settings: Settings, node_name: str, name: str, lines: int) -> bytes | None:
    """Return the last lines of a daemon's log on a node. Raises ClusterFault, UsageError (no node)."""
    file = shlex.quote(str(settings.node(node_name).layout.logs_dir / f"{name}.log"))
    both = f"{{ cat -- {file}.1 2>/dev/null; cat -- {file}; }}"
    ends = f"tail -n {lines:d} | tail -c {lines * logs.LINE_BYTES:d}"
    text = run_on_node(settings, node_name, f"test -r {file} || exec cat -- {file}; {both} | {ends}")
    return text.encode(errors="surrogateescape")


def find_in_logs(settings: Settings, node_name: str, words: str, lines: int) -> list[bytes]:
    """Return the last lines of the logs of a node's cluster servers that hold `words`. May raise ClusterFault."""
    folder = settings.node(node_name).layout.logs_dir
    names = [server.name for server in settings.servers() if server.node.name == node_name]
    files = " ".join(shlex.quote(str(folder / f"{name}.log{end}")) for name in names for end in (".1", ""))
    ends = f"tail -n {lines:d} | tail -c {lines * logs.LINE_BYTES:d}"
    text = run_on_node(settings, node_name, f"grep -ahsF -- {shlex.quote(words)} {files} | {ends}")
    return text.encode(errors="surrogateescape").splitlines(keepends=True)


# What a log has grown by, in a line: name, inode, where that begins, base64 of the rest of the one before, and of it.
_MORE = """more() {
    inode=$(stat -c %i -- "$2" 2>/dev/null) && size=$(stat -c %s -- "$2") || return 0
    rest= start=$4
    if [ "$3" = 0 ]; then start=$(( size > $5 ? size - $5 : 0 ))
    elif [ "$3" != "$inode" ]; then
        [ "$(stat -c %i -- "$2.1" 2>/dev/null)" = "$3" ] &&
            rest=$(tail -c +$(( $4 + 1 )) -- "$2.1" | head -c LIMIT | base64 -w0)
        start=0
    elif [ "$start" -gt "$size" ]; then start=$size
    fi
    echo "$1 $inode $start =$rest =$(tail -c +$(( start + 1 )) -- "$2" | head -c LIMIT | base64 -w0)"
}
""".replace("LIMIT", str(MAX_READ_BYTES))


def read_on(
    settings: Settings, node_name: str, since: Mapping[str, Position | None], back_bytes: int
) -> dict[str, Growth]:
    """Return what daemons' logs on a node have grown by. Raises ClusterFault, UsageError."""
    command = reading_on(settings.node(node_name).layout.logs_dir, since, back_bytes)
    return grown(run_on_node(settings, node_name, command))


def reading_on(folder: Path, since: Mapping[str, Position | None], back_bytes: int) -> str:
    """Return the shell command that does what `system.follow.read_on` does, for logs in a folder."""
    calls = []
    for name, at in since.items():
        inode, offset = at or (0, 0)
        file = shlex.quote(str(folder / f"{name}.log"))
        calls.append(f"more {shlex.quote(name)} {file} {inode:d} {offset:d} {back_bytes:d}")
    return _MORE + "\n".join(calls)


def grown(text: str) -> dict[str, Growth]:
    """Return what that command printed. Raises ClusterFault for anything else."""
    found = {}
    for line in text.splitlines():
        try:
            name, inode, start, rest, data = line.split(" ")
            new = base64.b64decode(data[1:], validate=True)
            at = Position(int(inode), int(start) + len(new))
            found[name] = Growth(base64.b64decode(rest[1:], validate=True) + new, at)
        except ValueError:
            raise ClusterFault(f"its answer about the growth of logs cannot be used: {_shortened(line)}") from None
    return found


def run_on_node(settings: Settings, node_name: str, command: str, seconds: float = COMMAND_SECONDS) -> str:
    """Run a shell command on a node as the cluster's user; return its output. Raises ClusterFault, UsageError."""
    return _on_node(settings, node_name, command.split()[0], lambda node, shell: _run(shell, command, seconds))


def copy_file(settings: Settings, node_name: str, source: Path, folder: Path) -> Path:
    """Copy a file into a folder of a node, made if need be (mode 0700); it appears there whole, or not at all.

    Return its path there. Raises ClusterFault, UsageError.
    """
    target = folder / source.name
    partial = target.with_name(target.name + ".partial")

    def copy(node: NodeSettings, shell: Connection) -> Path:
        _run(shell, f"umask 077 && mkdir -p {shlex.quote(str(folder))}")
        with contextlib.closing(shell.client.open_sftp()) as files:
            files.get_channel().settimeout(COPY_SECONDS)
            with source.open("rb") as content, files.open(str(partial), "wb") as there:
                there.set_pipelined(True)
                files.chmod(str(partial), 0o600)
                shutil.copyfileobj(content, there, 1 << 20)
            if files.stat(str(partial)).st_size != source.stat().st_size:
                raise ClusterFault(f"{source} changed while it was copied: copy it again")
        _run(shell, f"sync {shlex.quote(str(partial))} && mv -f {shlex.quote(str(partial))} {shlex.quote(str(target))}")
        return target

    return _on_node(settings, node_name, f"copy {source} to", copy)


def attach_command(settings: Settings, server_name: str) -> list[str]:
    """Return the command that shows a cluster server's screen window. Raises UsageError for an unknown server."""
    servers = {server.name: server for server in settings.servers()}
    if server_name not in servers:
        raise UsageError(f"there is no cluster server {server_name!r}; there are {', '.join(servers)}")
    server = servers[server_name]
    key, known_hosts = _credentials(settings)
    options = {
        "IdentityFile": key, "IdentitiesOnly": "yes", "IdentityAgent": "none", "UserKnownHostsFile": known_hosts,
        "GlobalKnownHostsFile": "/dev/null", "StrictHostKeyChecking": "yes", "BatchMode": "yes",
        "ConnectTimeout": CONNECT_SECONDS, "ServerAliveInterval": KEEPALIVE_SECONDS, "Port": server.node.ssh_port,
    }  # fmt: skip
    written = [part for name, value in options.items() for part in ("-o", f"{name}={value}")]
    window = f"SCREENDIR=/run/mrcore-{server.name} exec screen -U -x {server.name}"
    return ["ssh", "-F", "none", "-t", *written, f"{_user(settings)}@{server.node.address}", window]


# ---- what the verbs do on a node


def _end(settings: Settings, verb: str) -> int:
    def end(node: NodeSettings, shell: Connection) -> int:
        ran = sum(pid is not None for pid, _ in _look(node, shell).values())
        _helper(shell, verb)
        _clean(settings, node, shell)
        return ran

    counts, errors = _on_nodes(settings, end)
    _raise_errors(settings, verb, errors)
    return sum(counts.values())


def _clean(settings: Settings, node: NodeSettings, shell: Connection) -> None:
    """Remove the working files of all runs but those whose commit is not carried out yet."""
    folder = node.layout.working_dir
    listed = _run(
        shell, f"cd {shlex.quote(str(folder))} 2>/dev/null && find . -mindepth 1 -maxdepth 2 -printf '%P\\n'", ok=(0, 1)
    )
    if gone := removable(settings.state_dir, listed.splitlines()):
        paths = (shlex.quote(str(folder / path)) for path in gone)
        _run(shell, f"rm -rf -- {' '.join(paths)}", VERB_SECONDS["kill"])


def _look(node: NodeSettings, shell: Connection) -> dict[str, tuple[int, str]]:
    """Return what runs on a node by name of the daemon: (pid, state)."""
    blocks = _helper(shell, "status").split("\n\n")
    units = [dict(line.partition("=")[::2] for line in block.splitlines()) for block in blocks]
    records = shlex.quote(str(node.layout.pids_dir))
    output = _run(shell, f"cat {records}/S_*[0-9].json 2>/dev/null; echo; cat /proc/[0-9]*/stat 2>/dev/null; true")
    recorded, _, lines = output.partition("\n")
    states, parents = _processes(lines)
    supervisors = {pid for pid in states if f'"pid": {pid},' in recorded}
    result: dict[str, tuple[int, str]] = {}
    for unit in units:
        name = unit.get("Id", "").removesuffix(".service").removeprefix("mrcore-").removeprefix("server@")
        main = int(unit.get("MainPID") or 0)
        if unit.get("ActiveState") not in ("active", "deactivating") or not main:
            continue
        family = {main}
        while more := {pid for pid, parent in parents.items() if parent in family} - family:
            family |= more
        is_frozen = any(states.get(pid) == "T" for pid in family)
        result[name] = next(iter(supervisors & family), main), "stopped" if is_frozen else "running"
    return result


def _processes(text: str) -> tuple[dict[int, str], dict[int, int]]:
    """Return states and parents by pid, from the lines of /proc/PID/stat; a name in parentheses may hold anything."""
    states, parents = {}, {}
    for line in text.splitlines():
        pid, fields = line.partition(" ")[0], line.rpartition(")")[2].split()
        if pid.isdigit() and len(fields) > 1:
            states[int(pid)], parents[int(pid)] = fields[0], int(fields[1])
    return states, parents


def _log_end(node: NodeSettings, shell: Connection, daemon: str) -> str:
    file = node.layout.logs_dir / f"{daemon}.log"
    with contextlib.suppress(MrcoreError):
        if tail := _run(shell, f"tail -n {LOG_LINES} -- {shlex.quote(str(file))}").strip():
            return f"; the end of {file}:\n{indent(tail, '  ', lambda line: True)}"
    return ""


# ---- SSH


def _on_nodes(
    settings: Settings, work: Callable[[NodeSettings, Connection], T], nodes: Iterable[NodeSettings] | None = None
) -> tuple[dict[str, T], dict[str, str]]:
    """Do something on nodes, each over a connection of its own; return results and texts of errors by node's name."""
    _credentials(settings)

    def one(node: NodeSettings) -> T:
        try:
            with _connect(settings, node) as shell:
                return work(node, shell)
        except MrcoreError:
            raise
        except Exception as error:  # paramiko raises what it likes; the other nodes go on
            raise ClusterFault(_explain(settings, node, error)) from error

    results, errors = try_nodes(settings.nodes if nodes is None else nodes, one, NODES_AT_ONCE)
    return results, {name: error.message for name, error in errors.items()}


def _on_node(settings: Settings, name: str, verb: str, work: Callable[[NodeSettings, Connection], T]) -> T:
    results, errors = _on_nodes(settings, work, [settings.node(name)])
    _raise_errors(settings, verb, errors)
    return results[name]


def _raise_errors(settings: Settings, verb: str, errors: dict[str, str]) -> None:
    if errors:
        lines = [f"{node.name}: {errors[node.name]}" for node in settings.nodes if node.name in errors]
        head = f"{verb} failed on {len(lines)} of {len(settings.nodes)} nodes: "
        raise ClusterFault(head + (lines[0] if len(lines) == 1 else "\n  " + "\n  ".join(lines)), nodes=errors)


class _KnownHostsOnly(paramiko.RejectPolicy):  # type: ignore[misc]
    """Refuses a host without a known key, as its base does, but in words of ours."""

    def missing_host_key(self, client: Any, hostname: str, key: Any) -> None:
        raise ClusterFault(
            f"its SSH host key ({_fingerprint(key)}) is not among the known ones of the master, so nothing was sent to "
            "it; `make deploy` makes the keys of all nodes known"
        )


@contextlib.contextmanager
def _connect(settings: Settings, node: NodeSettings) -> Iterator[Connection]:
    key, known_hosts = _credentials(settings)
    connection = Connection(
        node.address,
        user=_user(settings),
        port=node.ssh_port,
        config=Config(lazy=True, ssh_config=paramiko.SSHConfig()),  # nobody's own files count
        connect_timeout=CONNECT_SECONDS,
        connect_kwargs={
            "key_filename": str(key), "allow_agent": False, "look_for_keys": False, "banner_timeout": CONNECT_SECONDS,
            "auth_timeout": CONNECT_SECONDS, "channel_timeout": CONNECT_SECONDS,
        },
    )  # fmt: skip
    connection.client.set_missing_host_key_policy(_KnownHostsOnly())  # Fabric's own takes any key
    connection.client.load_system_host_keys(str(known_hosts))
    try:
        connection.open()
        connection.transport.set_keepalive(KEEPALIVE_SECONDS)
        yield connection
    finally:
        connection.client.close()


def _helper(shell: Connection, verb: str) -> str:
    """Have the node's helper act on its units; return what it prints."""
    command = " ".join([*HELPER, verb])
    status, out, error = _try(shell, command, VERB_SECONDS[verb])
    if status == 0:
        return out
    if "command not found" in error or "No such file" in error:
        raise ClusterFault(f"it has no {HELPER[-1]}: `make deploy` installs it")
    if "password is required" in error or "is not allowed" in error or "may not run" in error:
        raise ClusterFault(f"sudo refuses `{command}` to the cluster's user: `make deploy` writes its rule")
    raise ClusterFault(f"`{command}` ended with status {status}: {_shortened(error or out)}")


def _run(shell: Connection, command: str, seconds: float = COMMAND_SECONDS, ok: tuple[int, ...] = (0,)) -> str:
    status, out, error = _try(shell, command, seconds)
    if status not in ok:
        raise ClusterFault(f"`{command[:200]}` ended with status {status}: {_shortened(error or out)}")
    return out


def _try(shell: Connection, command: str, seconds: float) -> tuple[int, str, str]:
    limit = int(seconds)
    deadline = Deadline(limit)
    try:
        result = shell.run(command, hide=True, warn=True, in_stream=False, timeout=limit)
        # On a busy machine the timer's thread has closed the channel and still runs: invoke takes that for no timeout.
        late = result.exited < 0 and deadline.is_over
    except CommandTimedOut:
        late = True
    if late:
        raise ClusterFault(f"`{command[:200]}` did not end within {seconds:g} s: look at the node itself")
    if result.exited < 0:
        raise ClusterFault(f"the connection broke during `{command[:200]}`: whether it was carried out is not known")
    return result.exited, result.stdout, result.stderr


# paramiko's texts for a peer that accepts the connection and then sends nothing.
_SILENT = ("Error reading SSH protocol banner", "No existing session")


def _explain(settings: Settings, node: NodeSettings, error: Exception) -> str:
    place, key = f"{node.address}:{node.ssh_port}", _credentials(settings)[0]
    if isinstance(error, paramiko.BadHostKeyException):
        return (
            f"its SSH host key has changed: it shows {_fingerprint(error.key)}, known is "
            f"{_fingerprint(error.expected_key)}. Nothing was sent. If the machine was installed again, `make deploy` "
            "takes up its key; if not, something answers in its place: find out what"
        )
    if isinstance(error, paramiko.AuthenticationException):
        return f"it does not accept the master's key {key} for user {_user(settings)}: `make deploy` authorises it"
    if isinstance(error, paramiko.ssh_exception.NoValidConnectionsError):
        causes = {str(cause.strerror or cause).lower() for cause in error.errors.values()}
        return f"SSH at {place}: {', '.join(sorted(causes))}: is the machine up, and does its sshd listen there?"
    if isinstance(error, TimeoutError) or str(error) in _SILENT:
        return f"SSH at {place} gave no answer within {CONNECT_SECONDS} s: is the machine up and reachable from here?"
    if isinstance(error, socket.gaierror):
        return f"the address {node.address} is not known: {error.strerror}; fix it in the inventory"
    return f"SSH at {place}: {error or type(error).__name__}"


def _credentials(settings: Settings) -> tuple[Path, Path]:
    """Return the master's key and the hosts that it knows. Raises UsageError where they cannot be read."""
    files = settings.home / ".ssh/id_ed25519", settings.home / ".ssh/known_hosts"
    for file in files:
        try:
            file.open("rb").close()
        except OSError as error:
            raise UsageError(
                f"cannot read {file}: {error.strerror}. A deployed cluster is operated on its master, as user "
                f"{_user(settings)}; `make deploy` sets both up"
            ) from None
    return files


def _user(settings: Settings) -> str:
    return settings.user or getpass.getuser()


def _fingerprint(key: Any) -> str:
    digest = base64.b64encode(hashlib.sha256(key.asbytes()).digest()).decode().rstrip("=")
    return f"{key.get_name()} SHA256:{digest}"


def _shortened(text: str) -> str:
    return text.strip()[-FAULT_CHARACTERS:] or "it said nothing"
