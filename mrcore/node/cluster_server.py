"""A cluster server: takes one order at a time from the master, has it carried out by a task process, passes on events.

`python -m mrcore.node.cluster_server SPEC.json` runs the supervisor, which forks what `serve` describes.
`messages.nodes.Spec` says what stands in the file.

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

import msgspec

from mrcore import VERSIONS
from mrcore.errors import ClusterFault, Refused
from mrcore.messages import tasks
from mrcore.messages.kinds import Count, JobName, Positive, Seconds, Word, convert, decode
from mrcore.messages.methods import LARGE_BYTES
from mrcore.messages.nodes import Spec
from mrcore.node.spec import pki_of, read_spec
from mrcore.node.supervisor import Json, Supervisor
from mrcore.system import logs, procfs
from mrcore.system.paths import Layout, write_atomic
from mrcore.system.terminal import log_to
from mrcore.text import size
from mrcore.wire.data import DataClient
from mrcore.wire.members import watch_membership
from mrcore.wire.service import REQUEST_BYTES, Method, Server
from mrcore.wire.tls import LIMITS, Identity

MAX_EVENTS = 10_000  # held for a silent master; then tasks wait
MAX_POLL_EVENTS, MAX_POLL_BYTES = 1_000, 4 << 20  # a poll gives at least one event, whatever its size
MAX_LINE_BYTES = 24 << 20  # one message of a task; must fit a frame of the wire
MAX_POLL_SECONDS = 30.0
TASK_DEADLINE_SECONDS = 8.0  # to start or to end one: beyond the supervisor's own, below the callers'
SEND_SECONDS = 5
MAX_CONTROL_BYTES = 64 << 10  # one message of the supervisor, with what a task had in hand and its stack

log = logging.getLogger(__name__)


@dataclass
class _Task:
    serial: int
    identity: tasks.TaskIdentity
    connection: socket.socket
    pid: int = 0
    end: Json | None = None  # the supervisor's last message
    finished: bool = False  # it has reported done or failed
    silenced: bool = False  # cancelled or replaced: nobody wants its events
    progress: _Event | None = None  # its last

    def is_of(self, job: str, run: int) -> bool:
        return (self.identity.job, self.identity.run) == (job, run)


@dataclass(eq=False)
class _Event:
    number: int
    task: _Task
    content: object  # a tasks.TaskEvent
    size: int


class ClusterServer:
    """What a cluster server knows and answers; each public method is an RPC method for the master."""

    def __init__(self, spec: Spec, control: socket.socket) -> None:
        self._spec, self._name, self._control = spec, spec.name, control
        self._incarnation = secrets.token_hex(8)
        self._changed = threading.Condition()
        self._serials, self._numbers = itertools.count(1), itertools.count(1)
        self._events: deque[_Event] = deque()
        self._task: _Task | None = None  # the newest, also after its end
        self._open: dict[int, _Task] = {}  # those whose end the supervisor has not reported yet

    def methods(self) -> dict[str, Method]:
        """Return the RPC methods, all for the master only."""
        sizes = dict.fromkeys(("hello", "poll", "cancel"), REQUEST_BYTES) | dict.fromkeys(
            ("order", "give"), LARGE_BYTES
        )
        return {name: Method(getattr(self, name), "master", size) for name, size in sizes.items()}

    def hello(self, caller: Identity) -> tasks.Hello:
        """Return who this is, and what memory server and supervisor take."""
        facts = {"incarnation": self._incarnation, "pid": os.getpid(), "anonymous_bytes": self._own_bytes()}
        return convert(tasks.Hello, facts | VERSIONS | {"name": self._name, "python": platform.python_version()})

    def order(self, caller: Identity, order: tasks.Order) -> tasks.Accepted:
        """Start a task; replaces a task of an older run or try. Repeating the last order changes nothing.

        Raises Refused for an order older than the last and while another task of the run is under way.
        """
        ours, theirs = socket.socketpair()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", SEND_SECONDS, 0))
        task = _Task(next(self._serials), order.identity, ours)
        with self._changed, theirs:
            if self._is_repeated(task.identity):
                return tasks.Accepted(accepted=True)
            if self._task:
                self._task.silenced |= not self._task.finished
            self._task = self._open[task.serial] = task
            left = max(procfs.MIN_TASK_BYTES, (self._spec.memory_bytes or 0) - self._own_bytes())
            data = msgspec.json.encode(msgspec.structs.replace(order, memory_bytes=left))
            spawn = {"spawn": task.serial, "whose": _whose(task.identity)}
            socket.send_fds(self._control, [json.dumps(spawn).encode()], [theirs.fileno()])
            theirs.close()
            threading.Thread(target=self._listen, args=(task,), name=f"task {task.serial}", daemon=True).start()
            try:
                ours.sendall(len(data).to_bytes(4, "big") + data)
            except OSError:  # it ended already, or does not read: how it ends is reported as usual
                self._kill(task)
            self._changed.wait_for(lambda: task.pid or task.end, TASK_DEADLINE_SECONDS)
            if not task.pid:
                task.silenced = True
                why = task.end["message"] if task.end else "its supervisor does not answer"
                raise ClusterFault(f"{self._name} cannot start a task process: {why}")
        return tasks.Accepted(accepted=True)

    def give(
        self,
        caller: Identity,
        identity: tasks.TaskIdentity,
        bundles: list[tasks.Bundle] | None = None,
        no_more: bool = False,
    ) -> tasks.Given:
        """Hand bundles of splits, or the news that there are no more, on to the running task of this identity."""
        with self._changed:
            task = self._task
            if task is None or task.identity != identity or task.end or task.finished:
                raise Refused(f"{self._name} does not run this task (any more)")
            try:
                task.connection.sendall(msgspec.json.encode(tasks.More(bundles or [], no_more)) + b"\n")
            except OSError as error:
                self._kill(task)  # a message may have been cut
                raise Refused(f"the task on {self._name} does not listen: {error}") from None
        return tasks.Given(given=len(bundles or ()))

    def poll(self, caller: Identity, incarnation: Word, after: Count, wait_seconds: Seconds) -> Json:
        """Wait for events numbered above `after`, which acknowledges the others. Return what decodes as `tasks.Polled`.

        To another incarnation than ours the answer is ours, at once, and has no events.
        """
        events: list[tuple[int, object]] = []
        with self._changed:
            if incarnation == self._incarnation:
                while self._events and self._events[0].number <= after:
                    self._events.popleft()
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._events, min(wait_seconds, MAX_POLL_SECONDS))
                room = MAX_POLL_BYTES
                for event in itertools.islice(self._events, MAX_POLL_EVENTS):
                    room -= event.size
                    if events and room < 0:
                        break
                    events.append((event.number, event.content))
        return {"incarnation": self._incarnation, "events": events}

    def cancel(self, caller: Identity, job: JobName, run: Positive) -> tasks.Cancelled:
        """End the task of this run with all it started, if there is one, and forget its events; returns when gone."""
        with self._changed:
            task = self._task if self._task and self._task.is_of(job, run) else None
            running = task is not None and not task.end
            if task is not None:
                task.silenced = True
                self._kill(task)
                if not self._changed.wait_for(lambda: task.end, TASK_DEADLINE_SECONDS):
                    raise ClusterFault(f"{self._name}: the task process of {job} does not end", pid=task.pid)
            self._events = deque(event for event in self._events if not event.task.is_of(job, run))
        return tasks.Cancelled(cancelled=running)

    def _kill(self, task: _Task) -> None:
        self._control.send(json.dumps({"kill": task.serial}).encode())

    def _own_bytes(self) -> int:
        return procfs.anonymous_bytes() + procfs.anonymous_bytes(os.getppid())

    def _is_repeated(self, new: tasks.TaskIdentity) -> bool:
        """Return whether the last order is repeated; raise Refused for a stale one, and while we are busy."""
        task = self._task
        if task is None or task.identity.job != new.job or task.identity.run < new.run:
            return False
        last = task.identity
        if last == new and not task.silenced:
            return True
        if last.run > new.run:
            raise Refused(f"{self._name}: the order is older than {last}")
        next_try = (last.phase, last.task) == (new.phase, new.task) and last.try_ < new.try_
        if task.end or task.finished or next_try:
            return False
        raise Refused(f"{self._name} is busy with {last}")

    # ---- messages of task and supervisor

    def _read(self, task: _Task, line: bytes) -> tuple[object, bool]:
        """Return an event, with the identity of its task, and whether it is the last. Raises ValueError."""
        event: tasks.TaskEvent = decode(tasks.TaskEvent, line)  # type: ignore[arg-type]  # a union is no class
        return msgspec.structs.replace(event, identity=task.identity), isinstance(event, tasks.Done | tasks.Failed)

    def _add(self, task: _Task, content: object, size: int, is_last: bool) -> None:
        with self._changed:
            self._changed.wait_for(lambda: len(self._events) < MAX_EVENTS or task.silenced)
            if not task.silenced:
                task.finished |= is_last
                event = _Event(next(self._numbers), task, content, size)
                if isinstance(content, tasks.Progressed):
                    if task.progress and task.progress in self._events:  # not acknowledged: only the newest counts
                        self._events.remove(task.progress)
                    task.progress = event
                self._events.append(event)
                self._changed.notify_all()

    def _listen(self, task: _Task) -> None:
        """Pass on a task's events until its connection ends, and how it ended if it did not report that itself."""
        with contextlib.suppress(OSError), task.connection.makefile("rb") as stream:
            while line := stream.readline(MAX_LINE_BYTES):
                try:
                    content, is_last = self._read(task, line)
                except ValueError:
                    log.error("%s sent what is no event: %.200r", task.identity, line)
                    break
                self._add(task, content, len(line), is_last)
        with self._changed:
            if not task.finished and not self._changed.wait_for(lambda: task.end, 1.0):
                self._kill(task)  # it hung up without a result: nothing more can come of it
            self._changed.wait_for(lambda: task.end)
        if not task.finished and task.end:
            died = _died(task.identity, task.end, self._name)
            self._add(task, died, len(died.message) + len(died.stack), is_last=True)
        task.connection.close()

    def receive_events(self) -> None:
        """Take the supervisor's messages until it closes the control socket."""
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


def _whose(identity: tasks.TaskIdentity) -> str:
    return f"{identity.job}/{identity.run} {identity.phase.lower()}-{identity.task}-{identity.try_}"


def _died(identity: tasks.TaskIdentity, end: Json, server: str) -> tasks.Died:
    """Return what the supervisor says of the end of a task that reported none."""
    known = {name: end[name] for name in tasks.Died.__struct_fields__ if name in end}
    died = msgspec.structs.replace(convert(tasks.Died, known | {"event": "died"}), identity=identity)
    held = f"up to {size(died.memory_bytes)}, with a budget of {size(died.budget_bytes)}"
    text = (
        f"the task process {died.message} without a result"
        + (", probably by the kernel for want of memory" if died.oom else "")
        + (f"; it held {held}" if died.signal and died.budget_bytes else "")
        + (f"; it had in hand: {died.in_hand}" if died.in_hand else "")
        + f"; {'the Python stack at its end is in' if died.stack else 'see'} the log of {server}: mrcore logs {server}"
    )
    return msgspec.structs.replace(died, message=text)


def serve(spec: Spec, control: socket.socket) -> None:
    """The life of the server child: answer on the spec's port until SIGTERM."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a screen window is meant for the task
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    ours = ClusterServer(spec, control)
    limits = replace(LIMITS, close_seconds=0.2)  # waiting polls need not be waited for
    server = Server(
        spec.address, spec.port, pki_of(spec), watch_membership(Path(spec.members_file)), ours.methods(), limits=limits
    )
    server.start()
    control.send(json.dumps({"ready": server.port}).encode())
    try:
        ours.receive_events()
    finally:
        server.close()


def run_process(spec: Spec, order: bytes, connection: socket.socket) -> None:
    """The life of a task process: carry out one order."""
    from mrcore.engine.process import Process, Request  # loaded by `main`, before any fork

    def fetch(source: tasks.Source, requests: list[Request], sink: Callable[[int, memoryview], None]) -> None:
        with contextlib.closing(DataClient(source.address, source.port, pki_of(spec), source.node)) as client:
            client.get(requests, sink)

    Process(decode(tasks.Order, order), connection, Layout(Path(spec.compute_dir)), fetch, spec.name).process()


def main(spec_file: str, run_task: Callable[[Spec, bytes, socket.socket], None] = run_process) -> int:
    """Run the cluster server that a spec file describes, until SIGTERM; return the exit status."""
    log_to()
    spec = read_spec(spec_file)
    if run_task is run_process:
        import mrcore.engine.process  # noqa: F401  once for all tasks, which share its memory
    if spec.memory_bytes is None:
        if fault := procfs.too_little_memory(None, spec.servers):
            log.error("%s does not start: %s", spec.name, fault)
            return 1
        spec = msgspec.structs.replace(spec, memory_bytes=procfs.budget_bytes(None, spec.servers))
    layout, name = Layout(Path(spec.compute_dir)), spec.name
    layout.make()
    layout.pids_dir.mkdir(exist_ok=True)
    ours, known = layout.pids_dir / f"{name}.json", {"pid": os.getpid(), "start_ticks": procfs.start_ticks(os.getpid())}
    write_atomic(ours, json.dumps(known).encode())  # systemd leaves none for the node's agent
    parts = functools.partial(serve, spec), functools.partial(run_task, spec)
    log_bytes = spec.log_bytes or logs.LOG_BYTES
    status = Supervisor(name, *parts, layout.pids_dir / f"{name}.server.json", log_bytes).run()
    ours.unlink(missing_ok=True)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
