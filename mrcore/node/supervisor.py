"""The single-threaded guard of one cluster server: forks the server, forks a fresh process per task, ends what is left.

    supervisor (this file; subreaper, no threads, no user code)
      ├── server   `cluster_server.serve`: threads and RPC; started again when it dies
      └── task     one order's user code: own process group, and whatever it forked

Why three processes: a parent-death signal fires when the forking *thread* ends, so tasks cannot be forked from RPC
handlers; and orphans of a task (setsid, daemons) are only sure to be found by a parent that is their subreaper.

Messages on the control socket (SOCK_SEQPACKET, one JSON object each; `serial` tells tasks of one server apart):
  server → supervisor  {"ready": port} · {"kill": serial}
                       {"spawn": serial, "whose": "JOB/RUN map-0-1"} with the task's end of its connection
  supervisor → server  {"spawned": serial, "pid"} · {"ended": serial, "status"|"signal", "message", …} (see `traces`)
A task gets its order as the first thing on its connection: 4 bytes of length (big-endian), then JSON.

What server and tasks print comes by pipes, one for each, and the supervisor writes it into its own log, which so stays
bounded; lines of a task are tagged with whose they are.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import logging
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

from mrcore.errors import interrupt
from mrcore.node.traces import Traces
from mrcore.system import logs, procfs
from mrcore.system.subreaper import SWEEP_SECONDS, describe, reap, sweep

MAX_RESTARTS, RESTART_WINDOW_SECONDS = 5, 30.0
GRACE_SECONDS = 3.0
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

Json = dict[str, Any]
Serve = Callable[[socket.socket], None]
RunTask = Callable[[bytes, socket.socket], None]
log = logging.getLogger(__name__)


class Supervisor:
    """Keeps one server child and its tasks. `serve` and `run_task` are called in the forked children.

    `record` is the file with the server child's pid and start ticks; MRCORE_READY_FD is written to once it answers.
    """

    def __init__(
        self, name: str, serve: Serve, run_task: RunTask, record: Path, log_bytes: int = logs.LOG_BYTES
    ) -> None:
        self._name, self._serve, self._run_task, self._record = name, serve, run_task, record
        self._ready = self._stopping = False
        self._server = self._task = self._serial = 0
        self._starts: list[float] = []
        self._terminal = os.isatty(0)
        self._log = logs.take_over(log_bytes)
        self._printed, self._print_to = logs.open_pipe()
        self._traces: Traces | None = None  # of the task that runs
        self._wake, wake_in = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        procfs.become_subreaper()
        for number in (*_STOP_SIGNALS, signal.SIGCHLD):
            signal.signal(number, self._on_signal)
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # else taking the terminal back would stop us
        signal.set_wakeup_fd(wake_in, warn_on_full_buffer=False)

    def _on_signal(self, number: int, frame: object) -> None:
        self._stopping = self._stopping or number != signal.SIGCHLD

    def run(self) -> int:
        """Serve until a stop signal (return 0), or until the server child cannot be kept alive (return 1)."""
        gc.collect()
        gc.freeze()  # the collector would otherwise touch, and so copy, every page that the children share
        self._start_server()
        while self._server and not self._stopping:
            ours = [self._wake, self._control.fileno(), self._printed]
            if self._traces and self._traces.is_open:
                ours.append(self._traces.printed)
            waits = self._log.held or (self._terminal and self._traces and self._traces.begun)
            readable, _, _ = select.select(ours, [], [], logs.WINDOW_SECONDS if waits else None)
            if self._printed in readable:
                self._log.write(os.read(self._printed, logs.READ_BYTES))
            if self._traces and self._traces.is_open and self._traces.printed in readable:
                self._traces.read()
            elif self._traces and self._terminal and not readable:
                self._traces.finish_line()  # somebody is asked something there
            if not readable:
                self._log.settle()
            if self._wake in readable:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._wake, 4096)
                self._reap()
            elif ours[1] in readable:
                self._obey()
        self._end_task("the cluster server is stopped")
        for number, seconds in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, SWEEP_SECONDS)):
            if self._server:
                os.kill(self._server, number)
                self._server = self._server if reap(self._server, seconds) is None else 0
        logs.drain(self._printed, self._log)
        self._record.unlink(missing_ok=True)
        return int(not self._stopping)

    # ---- the server child

    def _start_server(self) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._starts.append(time.monotonic())
        self._server = self._fork({theirs.fileno()}, self._print_to, lambda: self._serve(theirs))
        theirs.close()
        partial = self._record.with_suffix(".partial")
        partial.write_text(json.dumps({"pid": self._server, "start_ticks": procfs.start_ticks(self._server)}))
        partial.replace(self._record)

    def _restart_server(self, status: int) -> None:
        self._server = 0
        self._end_task("its server ended")
        self._starts = [start for start in self._starts if start > time.monotonic() - RESTART_WINDOW_SECONDS]
        again = self._ready and len(self._starts) <= MAX_RESTARTS
        what_next = "starting it again" if again else "giving up"
        log.error("the server child of %s %s; %s", self._name, describe(status)["message"], what_next)
        if again:
            self._start_server()

    def _obey(self) -> None:
        """Receive and carry out one message of the server child; nothing, when it died meanwhile."""
        try:
            data, handles, _, _ = socket.recv_fds(self._control, 4096, 1)
        except OSError:
            return
        message = json.loads(data or b"{}")
        if "spawn" in message:
            self._end_task("replaced by a newer order")
            self._spawn(message["spawn"], message["whose"], socket.socket(fileno=handles[0]))
        elif message.get("kill") == self._serial:
            self._end_task("cancelled")
        elif "ready" in message:
            self._ready = True
            procfs.announce_ready()

    def _send(self, **message: Any) -> None:
        with contextlib.suppress(OSError):  # a dead server needs no news; its end is noticed by SIGCHLD
            self._control.send(json.dumps(message).encode(), socket.MSG_DONTWAIT)

    # ---- the task

    def _fork(self, kept: set[int], print_to: int, life: Callable[[], None]) -> int:
        """Fork a child that dies with us, prints there, holds no other descriptors but `kept`, lives and ends."""
        parent = os.getpid()
        sys.stdout.flush()
        if pid := os.fork():
            return pid
        code: Any = 1
        try:
            procfs.die_with_parent(parent)
            signal.set_wakeup_fd(-1)
            for number in (*_STOP_SIGNALS, signal.SIGCHLD, signal.SIGTTOU):
                signal.signal(number, signal.SIG_DFL)
            for standard in (1, 2):
                os.dup2(print_to, standard)
            for low, high in pairwise(sorted({2, 1 << 20} | kept)):  # the kernel's usual ceiling for any process
                os.closerange(low + 1, high)
            life()
            code = 0
        except SystemExit as error:
            code = error.code or 0
            if not isinstance(code, int):
                print(code, file=sys.stderr)
                code = 1
        except BaseException:  # noqa: BLE001  the last frame of this process
            traceback.print_exc()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(code & 0xFF)  # at once: the exit handlers are the parent's

    def _spawn(self, serial: int, whose: str, connection: socket.socket) -> None:
        self._serial = serial
        try:
            self._traces = traces = Traces(whose, self._log)
            kept = {connection.fileno(), traces.dump}
            self._task = pid = self._fork(kept, traces.print_to, lambda: self._be_task(connection, traces))
        except OSError as error:
            if self._traces:
                self._traces.close()
                self._traces = None
            self._send(ended=serial, message=f"cannot fork a task process: {error}")
        else:
            traces.close(traces.print_to)
            with contextlib.suppress(OSError):  # here and in the child, so that neither has to wait for the other
                os.setpgid(pid, pid)
            self._give_terminal(pid)
            self._send(spawned=serial, pid=pid)
        connection.close()

    def _be_task(self, connection: socket.socket, traces: Traces) -> None:
        """The life of a task process."""
        os.setpgid(0, 0)
        if self._terminal:
            signal.signal(signal.SIGTSTP, signal.SIG_IGN)  # nobody would continue it
            signal.signal(signal.SIGTTOU, signal.SIG_IGN)
            self._give_terminal(os.getpid())
            signal.signal(signal.SIGTTOU, signal.SIG_DFL)
            sys.breakpointhook = _break_on_terminal
        else:
            os.dup2(nothing := os.open(os.devnull, os.O_RDONLY), 0)
            os.close(nothing)
            sys.breakpointhook = self._no_breakpoint
        signal.signal(signal.SIGINT, interrupt)
        faulthandler.enable(traces.dump)
        traces.share()
        with contextlib.suppress(OSError):  # short of memory, the kernel is to choose user code, not its guard
            Path("/proc/self/oom_score_adj").write_text("500")
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(line_buffering=True)
        size = int.from_bytes(connection.recv(4, socket.MSG_WAITALL), "big")
        data = connection.recv(size, socket.MSG_WAITALL)
        if not size or len(data) < size:
            sys.exit("the order was cut off")
        self._run_task(data, connection)

    def _no_breakpoint(self, *_: Any, **__: Any) -> NoReturn:
        raise RuntimeError(
            f"breakpoint() needs a terminal and {self._name} has none: debug with `mrcore try`, or in a screen window"
        )

    def _give_terminal(self, group: int) -> None:
        if self._terminal:
            with contextlib.suppress(OSError):  # a terminal on stdin need not be our controlling one
                os.tcsetpgrp(0, group)

    def _end_task(self, reason: str = "") -> None:
        """End the task and all it left, then report how it ended (`reason`: why we end it, if it did not by itself)."""
        pid, self._task = self._task, 0
        status = None
        if pid:
            for kill in (os.killpg, os.kill):  # before reaping, while neither id can be used again
                with contextlib.suppress(OSError):
                    kill(pid, signal.SIGKILL)
            status = reap(pid, SWEEP_SECONDS)
        sweep({self._server})
        logs.drain(self._printed, self._log)
        if pid and self._traces:
            self._give_terminal(os.getpgrp())
            ending = {"message": "does not end: stuck in the kernel"} if status is None else describe(status)
            left = self._traces.end(ending.get("signal"))
            left["oom"] = left["oom"] and not reason  # else it was us who killed it
            self._send(ended=self._serial, **{**ending, **left, "message": reason or ending["message"]})
        self._traces = None

    def _reap(self) -> None:
        """Handle every child that has ended, orphans of tasks too."""
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
                if ended.si_pid == self._task:
                    self._end_task()
                    continue
                _, status = os.waitpid(ended.si_pid, 0)
                if ended.si_pid == self._server:
                    self._restart_server(status)


def _break_on_terminal(*_: Any, **__: Any) -> None:
    """Debug in the window: from here on this task prints there alone, so that lines can be edited."""
    import pdb

    for number in (1, 2):
        os.dup2(0, number)
    pdb.Pdb().set_trace(sys._getframe(1))
