"""A cluster server: takes one order at a time from the master, has it carried out by a task process, tells its events.

`python -m mrcore.node.cluster_server SPEC.json` runs the supervisor, which forks what `serve` describes. The spec has
name, node, address, port, cluster (id or name), compute_dir, pki_dir, members_file (`wire.members`), log_bytes
(`logs`), and memory_bytes: the budget of task, supervisor and server together, counted as anonymous memory; null: this
server's share of the machine that it runs on, of which it is one of `servers`.

Events are numbered per incarnation, one life of the server child; a master that sees the incarnation change knows
that task and events are gone. They are kept until a poll with `after` at or past their number acknowledges them.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import logging
import os
import platform
import secrets
import signal
import socket
import struct
import sys
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mrcore import VERSIONS
from mrcore.errors import ClusterFault, Refused
from mrcore.messages.methods import LARGE_BYTES
from mrcore.node.supervisor import Json, Supervisor
from mrcore.system import logs, procfs
from mrcore.system.paths import Layout, write_atomic
from mrcore.system.terminal import log_to
from mrcore.wire.data import DataClient
from mrcore.wire.members import watch_membership
from mrcore.wire.service import Method, Server
from mrcore.wire.tls import LIMITS, Pki

MAX_EVENTS = 10_000  # held for a silent master; then tasks wait
MAX_POLL_EVENTS, MAX_POLL_BYTES = 1_000, 4 << 20  # a poll gives at least one event, whatever its size
MAX_LINE_BYTES = 24 << 20  # one message of a task; must fit a frame of the wire
MAX_POLL_SECONDS = 30.0
TASK_DEADLINE_SECONDS = 8.0  # to start or to end one: beyond the supervisor's own, below the callers'
SEND_SECONDS = 5
MAX_CONTROL_BYTES = 16 << 10  # one message of the supervisor, with what a task had in hand
STACK_SIGNALS = {signal.SIGSEGV, signal.SIGFPE, signal.SIGABRT, signal.SIGBUS, signal.SIGILL}  # of faulthandler

log = logging.getLogger(__name__)


@dataclass
class _Task:
    serial: int
    identity: Json
    connection: socket.socket
    pid: int = 0
    end: Json | None = None  # the supervisor's last word
    finished: bool = False  # it has reported done or failed
    silenced: bool = False  # cancelled or replaced: nobody wants to hear of it

    def key(self, *names: str) -> tuple[Any, ...]:
        return tuple(self.identity[name] for name in names)


class ClusterServer:
    """What a cluster server knows and answers; each public method is an RPC method for the master."""

    def __init__(self, spec: Json, control: socket.socket) -> None:
        self._spec, self._name, self._control = spec, spec["name"], control
        self._incarnation = secrets.token_hex(8)
        self._changed = threading.Condition()
        self._serials, self._sequence = itertools.count(1), itertools.count(1)
        self._events: deque[tuple[int, Json, int]] = deque()  # number, event, bytes
        self._task: _Task | None = None  # the newest, also after its end
        self._open: dict[int, _Task] = {}  # those whose end the supervisor has not told yet

    def methods(self) -> dict[str, Method]:
        """The RPC methods, all for the master only."""
        small, large = (self.hello, self.poll, self.cancel, self.status), (self.order, self.give)
        methods = {each.__name__: Method(each, "master") for each in small}
        return methods | {each.__name__: Method(each, "master", LARGE_BYTES) for each in large}

    def hello(self, caller: Any) -> Json:
        """Who this is: name, incarnation, versions, pid, anonymous_bytes (of server and supervisor)."""
        who = {"name": self._name, "incarnation": self._incarnation, "pid": os.getpid()}
        versions = VERSIONS | {"python": platform.python_version()}
        return who | versions | {"anonymous_bytes": self._own_bytes()}

    def order(self, caller: Any, order: Json) -> Json:
        """Start a task; replaces a task of an older attempt or try. Repeating the last order changes nothing.

        Raises Refused for an order older than the last and while another task of the attempt runs.
        """
        ours, theirs = socket.socketpair()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", SEND_SECONDS, 0))
        task = _Task(next(self._serials), order["identity"], ours)
        with self._changed, theirs:
            if self._is_repeated(task):
                return {"accepted": True}
            if self._task:
                self._task.silenced |= not self._task.finished
            self._task = self._open[task.serial] = task
            left = max(procfs.MIN_TASK_BYTES, self._spec["memory_bytes"] - self._own_bytes())
            data = json.dumps(order | {"memory_bytes": left}).encode()
            socket.send_fds(self._control, [json.dumps({"spawn": task.serial}).encode()], [theirs.fileno()])
            theirs.close()
            threading.Thread(target=self._listen, args=(task,), name=f"task {task.serial}", daemon=True).start()
            try:
                ours.sendall(len(data).to_bytes(4, "big") + data)
            except OSError:  # it ended already, or does not read: how it ends is told as usual
                self._kill(task)
            self._changed.wait_for(lambda: task.pid or task.end, TASK_DEADLINE_SECONDS)
            if not task.pid:
                task.silenced = True
                told = task.end["message"] if task.end else "its supervisor does not answer"
                raise ClusterFault(f"{self._name} cannot start a task process: {told}")
        return {"accepted": True}

    def give(self, caller: Any, identity: Json, bundles: list[Json] | None = None, no_more: bool = False) -> Json:
        """Hand bundles of splits, or the news that there are no more, on to the running task of this identity."""
        messages = ([{"bundles": bundles}] if bundles else []) + ([{"no_more": True}] if no_more else [])
        with self._changed:
            task = self._task
            if task is None or task.identity != identity or task.end or task.finished:
                raise Refused(f"{self._name} does not run this task (any more)", identity=identity)
            try:
                task.connection.sendall(b"".join(json.dumps(message).encode() + b"\n" for message in messages))
            except OSError as error:
                self._kill(task)  # a message may have been cut
                raise Refused(f"the task on {self._name} does not listen: {error}", identity=identity) from None
        return {"given": len(bundles or ())}

    def poll(self, caller: Any, incarnation: str, after: int, wait_seconds: float) -> Json:
        """Wait for events numbered above `after`, which acknowledges the others; `[[number, event], …]`.

        Another incarnation than ours is told ours at once, and gets no events.
        """
        given: list[list[Any]] = []
        with self._changed:
            if incarnation == self._incarnation:
                while self._events and self._events[0][0] <= after:
                    self._events.popleft()
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._events, min(wait_seconds, MAX_POLL_SECONDS))
                room = MAX_POLL_BYTES
                for number, event, size in itertools.islice(self._events, MAX_POLL_EVENTS):
                    room -= size
                    if given and room < 0:
                        break
                    given.append([number, event])
        return {"incarnation": self._incarnation, "events": given}

    def cancel(self, caller: Any, job: str, run: int) -> Json:
        """End the task of this run with all it started, if there is one, and forget its events; returns when gone."""
        with self._changed:
            task = self._task if self._task and self._task.key("job", "run") == (job, run) else None
            running = task is not None and not task.end
            if task is not None:
                task.silenced = True
                self._kill(task)
                if not self._changed.wait_for(lambda: task.end, TASK_DEADLINE_SECONDS):
                    raise ClusterFault(f"{self._name}: the task process of {job} does not end", pid=task.pid)
            about = [(entry[1]["identity"], entry) for entry in self._events]
            self._events = deque(entry for who, entry in about if (who["job"], who["run"]) != (job, run))
        return {"cancelled": running}

    def status(self, caller: Any) -> Json:
        """What runs: the identity and pid of the task, or None, and the number of events not yet acknowledged."""
        with self._changed:
            task = self._task if self._task and not self._task.end else None
            what = {"identity": task.identity if task else None, "pid": task.pid if task else None}
            return what | {"incarnation": self._incarnation, "events": len(self._events)}

    def _kill(self, task: _Task) -> None:
        self._control.send(json.dumps({"kill": task.serial}).encode())

    def _own_bytes(self) -> int:
        return procfs.anonymous_bytes() + procfs.anonymous_bytes(os.getppid())

    def _is_repeated(self, new: _Task) -> bool:
        """Whether the last order is repeated; raises Refused for one that is stale or comes while we are busy."""
        last = self._task
        if last is None or last.key("job") != new.key("job") or last.key("run", "attempt") < new.key("run", "attempt"):
            return False
        if last.identity == new.identity and not last.silenced:
            return True
        if last.key("run", "attempt") > new.key("run", "attempt"):
            raise Refused(f"{self._name}: the order is older than {last.identity}", identity=new.identity)
        same_task = last.key("phase", "task") == new.key("phase", "task")
        if last.end or last.finished or (same_task and last.key("try") < new.key("try")):
            return False
        raise Refused(f"{self._name} is busy with {last.identity}", identity=new.identity)

    # ---- what task and supervisor say

    def _add(self, task: _Task, event: Json, size: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: len(self._events) < MAX_EVENTS or task.silenced)
            if task.silenced:
                return
            task.finished |= event["event"] in ("done", "failed", "died")
            if event["event"] == "progress" and self._events and self._events[-1][1]["event"] == "progress":
                self._events.pop()  # the newer says it all
            self._events.append((next(self._sequence), event | {"identity": task.identity}, size))
            self._changed.notify_all()

    def _listen(self, task: _Task) -> None:
        """Pass on what a task says until its connection ends, and how it ended if it did not say so itself."""
        with contextlib.suppress(OSError), task.connection.makefile("rb") as stream:
            while line := stream.readline(MAX_LINE_BYTES):
                try:
                    self._add(task, json.loads(line), len(line))
                except (ValueError, TypeError, KeyError):
                    log.error("task %s sent what is no event: %.200r", task.identity, line)
                    break
        with self._changed:
            if not task.finished and not self._changed.wait_for(lambda: task.end, 1.0):
                self._kill(task)  # it hung up without a result: nothing more can come of it
            self._changed.wait_for(lambda: task.end)
        if not task.finished and task.end:
            note, stack = task.end.pop("in_hand", ""), task.end.get("signal") in STACK_SIGNALS
            text = (
                f"the task process {task.end['message']} without a result"
                + (f"; it had in hand: {note}" if note else "")
                + f"; {'the Python stack at its end is in' if stack else 'see'} the log of {self._name}: "
                f"mrcore logs {self._name}"
            )
            told = {"event": "died", "signal": None, "status": None} | task.end | {"message": text}
            self._add(task, told, len(text))
        task.connection.close()

    def hear_supervisor(self) -> None:
        """Take the supervisor's reports until it closes the control socket."""
        while data := self._control.recv(MAX_CONTROL_BYTES):
            message = json.loads(data)
            with self._changed:
                if "spawned" in message:
                    self._open[message["spawned"]].pid = message["pid"]
                else:
                    task = self._open.pop(message.pop("ended"))
                    task.end = message
                    with contextlib.suppress(OSError):  # what it wrote is still read, then comes the end
                        task.connection.shutdown(socket.SHUT_RD)
                self._changed.notify_all()


def serve(spec: Json, control: socket.socket) -> None:
    """The life of the server child: answer on the spec's port until SIGTERM."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a screen window is meant for the task
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    ours, members = ClusterServer(spec, control), Path(spec["members_file"])
    pki = Pki(Path(spec["pki_dir"]), "node", members)
    limits = replace(LIMITS, close_seconds=0.2)  # waiting polls need not be waited for
    server = Server(spec["address"], spec["port"], pki, watch_membership(members), ours.methods(), limits=limits)
    server.start()
    control.send(json.dumps({"ready": server.port}).encode())
    try:
        ours.hear_supervisor()
    finally:
        server.close()


def run_process(spec: Json, order: Json, connection: socket.socket) -> None:
    """The life of a task process: carry out one order."""
    from mrcore.engine.process import Process  # loaded by `main`, before any fork

    def fetch(source: Json, requests: list[Json], sink: Callable[[int, memoryview], None]) -> None:
        pki = Pki(Path(spec["pki_dir"]), "node", Path(spec["members_file"]))
        with contextlib.closing(DataClient(source["address"], source["port"], pki, source["node"])) as client:
            client.get(requests, sink)

    Process(order, connection, Layout(Path(spec["compute_dir"])), fetch, spec["name"]).process()


def main(spec_file: str, run_task: Callable[[Json, Json, socket.socket], None] = run_process) -> int:
    """Run the cluster server that a spec file describes, until SIGTERM; gives the exit status."""
    log_to()
    spec: Json = json.loads(Path(spec_file).read_text())
    if run_task is run_process:
        import mrcore.engine.process  # noqa: F401  once for all tasks, which share its memory
    if spec["memory_bytes"] is None:
        if fault := procfs.too_little_memory(None, spec["servers"]):
            log.error("%s does not start: %s", spec["name"], fault)
            return 1
        spec["memory_bytes"] = procfs.budget_bytes(None, spec["servers"])
    layout, name = Layout(Path(spec["compute_dir"])), spec["name"]
    layout.make()
    layout.pids_dir.mkdir(exist_ok=True)
    ours, known = layout.pids_dir / f"{name}.json", {"pid": os.getpid(), "start_ticks": procfs.start_ticks(os.getpid())}
    write_atomic(ours, json.dumps(known).encode())  # systemd leaves none for the node's agent
    parts = functools.partial(serve, spec), functools.partial(run_task, spec)
    log_bytes = spec.get("log_bytes", logs.LOG_BYTES)
    status = Supervisor(name, *parts, layout.pids_dir / f"{name}.server.json", log_bytes).run()
    ours.unlink(missing_ok=True)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
