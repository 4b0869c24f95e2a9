"""A cluster server whose tasks do what the tests ask for: `python standin_server.py SPEC.json`. `act` chooses."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from mrcore.errors import interrupt
from mrcore.messages.nodes import Spec
from mrcore.node import cluster_server

STUBBORN = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.setsid()
print(os.getpid(), file=open(sys.argv[1], "a"), flush=True)
time.sleep(600)
"""


def leave_daemon(pids: str) -> None:
    """Start a grandchild in a session of its own that ignores SIGTERM and forgets the environment it came from."""
    start = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {STUBBORN!r}, {pids!r}], env={{}})"
    subprocess.run([sys.executable, "-c", start], check=True)


def act(spec: Spec, content: bytes, connection: socket.socket) -> None:
    order, lines = json.loads(content), connection.makefile("rb")

    def say(event: str, **more: Any) -> None:
        connection.sendall(json.dumps({"event": event, "act": True} | more).encode() + b"\n")

    what = order["job"]
    say(
        "started",
        pid=os.getpid(),
        group=os.getpgrp(),
        memory_bytes=order["memory_bytes"],
        length=len(content),
    )
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if "leave" in what:
        Path(what["leave"]).touch()
        leave_daemon(what["leave"])
        if os.fork() == 0:  # a child in our own group that keeps the connection open
            with Path(what["leave"]).open("a") as stream:
                print(os.getpid(), file=stream)
            time.sleep(600)
        while Path(what["leave"]).read_text().count("\n") < 2:
            time.sleep(0.005)
        say("left")
    match what["act"]:
        case "done":
            say("done", result={"n": 1})
        case "echo":
            say("want")
            for line in lines:
                message = json.loads(line)
                say("got", message=message)
                if message.get("no_more"):
                    say("done", result={})
                    return
        case "hang":
            while True:
                time.sleep(600)
        case "fork for ever":
            end = time.monotonic() + 60  # not for ever after all: should the test be killed, nobody else ends it
            for _ in range(what["chains"]):
                if os.fork() == 0:
                    while time.monotonic() < end:
                        os.setsid()  # a daemon that is never the same process for long
                        if os.fork():
                            os._exit(0)
                    os._exit(0)
            say("forking")
            time.sleep(600)
        case "spin":
            while True:
                pass
        case "os._exit":
            os._exit(7)
        case "sys.exit":
            sys.exit("leaving")
        case "raise":
            raise ValueError("a fault of the process itself")
        case "signal":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "hang up":
            connection.shutdown(socket.SHUT_RDWR)
            time.sleep(600)
        case "garbage" | "no event":
            connection.sendall(b"no json\n" if what["act"] == "garbage" else b'{"event": "done", "result": 5}\n')
            time.sleep(600)
        case "breakpoint":
            try:
                breakpoint()
            except RuntimeError as error:
                say("failed", error={"class": "JobFault", "message": str(error), "details": {}})
        case "ask":
            print("your name? ", end="", flush=True)
            say("done", result={"answer": sys.stdin.readline()})
        case "look":
            said = os.read(0, 10).decode()
            descriptors = sorted(int(fd) for fd in os.listdir("/proc/self/fd"))
            print("printed by the task")
            blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
            handlers = [signal.getsignal(number) == signal.SIG_DFL for number in (signal.SIGCHLD, signal.SIGTTOU)]
            usual = handlers == [True, True] and signal.getsignal(signal.SIGINT) is interrupt
            say(
                "done",
                result={
                    "stdin": said,
                    "descriptors": descriptors,
                    "usual": usual and not blocked,
                    "kept": connection.fileno(),
                },
            )
        case "print":
            print("the first line")
            for _ in range(what["mebibytes"]):
                os.write(1, (b"x" * 1023 + b"\n") * 1024)
            print("the last line", file=sys.stderr)
            if what.get("crash"):
                os.kill(os.getpid(), signal.SIGSEGV)
            say("done", result={})
        case "progress":
            for done in range(1, what["count"] + 1):  # events of the real kind
                told = {"event": "progress", "phase": "MAP", "bytes": 10 * done, "records": done}
                connection.sendall(json.dumps(told).encode() + b"\n")
            say("told")
            say("done", result={})
        case "flood":
            for number in range(what["count"]):
                say("count", number=number)
            say("done", result={})


class StandinServer(cluster_server.ClusterServer):
    """Passes on the events of `act` too; writes how many thousand events it holds into `held` of its node's folder."""

    def _read(self, task: Any, line: bytes) -> tuple[object, bool]:
        event = json.loads(line)
        if "act" not in event:
            return super()._read(task, line)
        return event | {"identity": msgspec.to_builtins(task.identity)}, event["event"] in ("done", "failed")

    def _add(self, *event: Any, **more: Any) -> None:
        super()._add(*event, **more)
        if len(self._events) % 1_000 == 0:
            Path(self._spec.compute_dir, "held").write_text(str(len(self._events)))


if __name__ == "__main__":
    cluster_server.ClusterServer = StandinServer  # type: ignore[misc]
    sys.exit(cluster_server.main(sys.argv[1], act))
