"""Runs one order of a task process in an interpreter of its own, and samples its memory from outside.

`python run_task.py FD` is the child: it reads an order from the socket FD and obeys it with `Process`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from mrcore.messages.nodes import InputFile
from mrcore.messages.tasks import Bundle
from mrcore.queue.job import template
from mrcore.system.paths import Layout

SAMPLE_SECONDS = 0.002
PROJECT = "a" * 32  # the hash that names its snapshot
Json = dict[str, Any]


def source(node: str, runs: Sequence[Json] = (), folder: str = "") -> Json:
    """A source as orders name them; its address is the folder from which the child reads."""
    shares = [{"most_bytes": run["bytes"]} | run for run in runs]
    return {"node": node, "address": folder, "port": 0, "runs": shares}


class Task:
    """A node's folder with one project, and the orders of one attempt carried out there one after another."""

    def __init__(self, folder: Path, map_code: str, reduce_code: str = "", **job: Any) -> None:
        self.layout = Layout(folder / "node")
        self.layout.make()
        project = self.layout.projects_dir / PROJECT
        project.mkdir(exist_ok=True)
        (project / "map_functions.py").write_text(map_code)
        (project / "reduce_functions.py").write_text(reduce_code)
        reducing = {"reduce_function_name": "r"} if reduce_code else {}
        self.job = template("mapreduce") | {"job_name": "j", "map_function_name": "m"} | reducing | job
        self.partitions = self.job["number_of_partitions"] or 1
        self.memory_bytes = 256 << 20
        self.peaks: dict[str, int] = {}
        self.messages: list[Json] = []
        self.runs: list[Json] = []
        self.tasks = 0

    def files(self, paths: Sequence[Path]) -> list[InputFile]:
        """Return the listed files of the paths."""
        states = [(str(path), path.stat()) for path in paths]
        return [InputFile(name, state.st_size, state.st_mtime_ns, state.st_ino) for name, state in states]

    def map(self, bundles: Sequence[Bundle], **more: Any) -> Json:
        """Carry out one MAP order over the bundles and give its result."""
        result = self._order("MAP", bundles=list(bundles), no_more=True, sample_by_lines=True, **more)
        self.runs += result.get("runs", ())
        return result

    def reduce(self, partition: int = 0, low: Any = None, high: Any = None, **more: Any) -> Json:
        """Carry out one REDUCE order over all spills so far, for the keys from `low` up to `high` ([key] or None).

        `sources` may name the `folder` that holds the spills of another node.
        """
        given = [source(**each) for each in more.pop("sources", [{"node": "n", "runs": self.runs}])]
        ends = {"low": low and json.dumps(low[0]), "high": high and json.dumps(high[0])}
        return self._order("REDUCE", partition=partition, sources=given, **ends, **more)

    def items(self, result: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
        """The items of a result's parts."""
        from oracle import read_part

        for part in result["parts"]:
            yield from read_part(self.layout.parts_dir("j", 1) / part["name"])

    def _order(self, phase: str, **more: Any) -> Json:
        identity = {"job": "j", "run": 1, "phase": phase, "task": self.tasks, "try": 1}
        self.tasks += 1
        order = {
            "identity": identity,
            "job": self.job,
            "project": PROJECT,
            "partitions": self.partitions,
            "node": "n",
            "memory_bytes": self.memory_bytes,
        }
        end = self.obey(order | more)
        if end["event"] == "failed":
            raise Failed(end["error"])
        return {"parts": [], "runs": [], "keys_kept": True, "fetched": {}} | end["result"]  # what JSON leaves out

    def obey(self, order: Json) -> Json:
        """Carry out any order in a child and give its last message."""
        ours, theirs = socket.socketpair()
        command = [sys.executable, __file__, str(theirs.fileno()), str(self.layout.compute_dir)]
        environment = os.environ | {"MALLOC_ARENA_MAX": "1"}
        with ours, subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment) as child:
            theirs.close()
            peak = Peak(child.pid)
            try:
                ours.sendall(json.dumps(msgspec.to_builtins(order)).encode() + b"\n")
                with ours.makefile("rb") as lines:
                    self.messages += map(json.loads, lines)
                child.wait(60)
            finally:
                child.kill()  # a test that is interrupted leaves nothing behind
                phase = order["identity"]["phase"]
                self.peaks[phase] = max(self.peaks.get(phase, 0), peak.close())
        return self.messages[-1] if self.messages else {}


class Failed(Exception):
    """A task reported "failed"."""

    def __init__(self, error: Json) -> None:
        super().__init__(error["message"])
        self.error = error


class Peak:
    """Samples a process's anonymous memory every two milliseconds until it ends."""

    def __init__(self, pid: int) -> None:
        self.bytes = 0
        self._status = Path(f"/proc/{pid}/status")
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        while not self._end.wait(SAMPLE_SECONDS):
            with contextlib.suppress(OSError, IndexError):
                self.bytes = max(self.bytes, 1024 * int(self._status.read_text().split("RssAnon:")[1].split()[0]))

    def close(self) -> int:
        """Stop and give the highest sample, in bytes."""
        self._end.set()
        self._thread.join()
        return self.bytes


def main(descriptor: int, compute_dir: str) -> None:
    """The child's life."""
    from mrcore.engine.process import Process
    from mrcore.errors import interrupt
    from mrcore.messages.kinds import decode
    from mrcore.messages.tasks import Order, Source

    signal.signal(signal.SIGINT, interrupt)  # as the supervisor does
    connection = socket.socket(fileno=descriptor)
    order = decode(Order, _line(connection))

    def fetch(source: Source, requests: list[Json], sink: Any) -> None:
        from mrcore.engine.spills import select

        folder = Path(source.address)
        for number, request in enumerate(requests):
            wanted = request["run"]
            for offset, length in select(folder, wanted["id"], wanted):
                content = (folder / f"{wanted['id']}.data").read_bytes()[offset : offset + length]
                for start in range(0, length, 1000):
                    sink(number, memoryview(content[start : start + 1000]))

    Process(order, connection, Layout(Path(compute_dir)), fetch, "S_0").process()


def _line(connection: socket.socket) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        line += connection.recv(1 << 20)
    return line


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
