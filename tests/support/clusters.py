"""A local cluster for tests: real daemons on loopback addresses, and a project whose tasks wait at gates."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from conditions import wait_until
from daemons import own_address

from mrcore.cluster.manage_cluster import ManageCluster
from mrcore.launchers import local
from mrcore.queue import job as jobs
from mrcore.settings.config import Settings
from mrcore.system import procfs

# At a gate a task says that it is there (file `<name>-<pid>`: its server) and waits for the file `open-<name>`.
GATES = """
import os, time
from mrcore import task

FOLDER = {folder!r}

def gate(name):
    path = os.path.join(FOLDER, name + "-" + str(os.getpid()))
    if not os.path.exists(os.path.join(FOLDER, "closed-" + name)):
        return
    with open(path + ".partial", "w") as stream:
        stream.write(task.server)
    os.rename(path + ".partial", path)
    while not os.path.exists(os.path.join(FOLDER, "open-" + name)):
        time.sleep(0.01)
"""
MAP = """
from gates import gate

def count_words(line, auxiliary_data):
    if line.startswith("GATE"):
        gate("map")
    return [(word, 1) for word in line.split()]
"""
REDUCE = """
from gates import gate
from mrcore import task

gate("sort")

def add_up(group, auxiliary_data):
    if group[0][0] == "GATE" or group[0][0].startswith("GATE"):
        gate("reduce")
    return [(group[0][0], sum(value for _, value in group))]
"""


class TestCluster:
    """A running local cluster with a `gated` project and inputs; `close` (or `with`) leaves nothing."""

    __test__ = False

    def __init__(self, folder: Path, nodes: int, servers: int, **settings: Any) -> None:
        self.folder, self.gates = folder, folder / "gates"
        self.gates.mkdir()
        first = own_address()
        for _ in range(nodes - 1):
            own_address()
        projects = folder / "projects" / "gated"
        projects.mkdir(parents=True)
        (projects / "gates.py").write_text(GATES.format(folder=str(self.gates)))
        (projects / "map_functions.py").write_text(MAP)
        (projects / "reduce_functions.py").write_text(REDUCE)
        memory_bytes = settings.pop("memory_bytes", 512 << 20)
        configured = local.configure(
            folder / "home", nodes=nodes, servers=servers, address=first, memory_bytes=memory_bytes
        )
        self.settings: Settings = configured.model_copy(
            update={"projects_dir": folder / "projects", "node_timeout_seconds": 3.0} | settings
        )
        self.manager = ManageCluster(self.settings)
        self._runs = itertools.count(1)
        local.start_cluster(self.settings)

    def __enter__(self) -> TestCluster:
        return self

    def __exit__(self, *exc: object) -> None:
        local.kill_cluster(self.settings)
        assert not self.processes(), "processes of the cluster are left"

    def processes(self) -> list[int]:
        """Every living process that belongs to this cluster."""
        mark = local.cluster_id(self.settings.home) + "/"
        return [
            pid
            for pid in (int(name) for name in os.listdir("/proc") if name.isdecimal())
            if (procfs.environment_value(pid, "MRCORE_SERVER") or "").startswith(mark) and procfs.state(pid) != "Z"
        ]

    def write_inputs(self, texts: dict[str, str], node: int | None = None, entry: str = "inputs/text") -> str:
        """Put files under the base_dir of one node, or one after the other under those of all; return the entry."""
        nodes = self.settings.nodes
        for number, (name, text) in enumerate(texts.items()):
            target = nodes[node if node is not None else number % len(nodes)].layout.base_dir / entry
            target.mkdir(parents=True, exist_ok=True)
            (target / name).write_text(text)
        return entry

    def job(self, **keys: Any) -> dict[str, Any]:
        """A valid job of the gated project."""
        wanted = {
            "job_name": "gated",
            "project_name": "gated",
            "input_dirs": ["inputs/text"],
            "map_function_name": "count_words",
            "reduce_function_name": "add_up",
            "run_once": True,
        }
        return jobs.validate(jobs.template("mapreduce") | wanted | keys, self.settings.projects_dir)

    def run(self, job: dict[str, Any], run: int | None = None) -> dict[str, Any]:
        """Run one attempt and return its manifest."""
        return self.manager.run(job, run=run or next(self._runs))

    def items(self, job_name: str = "gated") -> list[Any]:
        """The job's output, in the order of `mrcore cat`."""
        path = self.folder / "output"
        with path.open("wb") as out:
            self.manager.cat(job_name, out)
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    def close_gate(self, name: str) -> None:
        """Tasks that come to this gate wait from now on."""
        (self.gates / f"closed-{name}").touch()

    def open_gate(self, name: str) -> None:
        """Let them all go on."""
        (self.gates / f"open-{name}").touch()

    def waiting(self, name: str, count: int = 1) -> dict[int, str]:
        """Wait until `count` living tasks are at a gate; return their pids and servers."""

        def found() -> dict[int, str]:
            at_gate = {}
            for path in self.gates.glob(f"{name}-*"):
                with contextlib.suppress(ValueError, FileNotFoundError):
                    pid = int(path.name.rpartition("-")[2])
                    if procfs.state(pid) not in (None, "Z"):
                        at_gate[pid] = path.read_text()
            return at_gate if len(at_gate) >= count else {}

        answer: dict[int, str] = wait_until(found, 30, f"{count} tasks at the gate {name}")
        return answer

    def server_pid(self, name: str) -> int:
        """The pid of a cluster server's server child."""
        (record,) = [path for node in self.settings.nodes for path in node.layout.pids_dir.glob(f"{name}.server.json")]
        return int(json.loads(record.read_text())["pid"])

    def agent_pid(self, node: int) -> int:
        """The pid of a node's agent."""
        return int(json.loads((self.settings.nodes[node].layout.pids_dir / "agent.json").read_text())["pid"])

    def assert_clean(self, idle_processes: int | None = None) -> None:
        """No working file is left, and no task process."""
        for node in self.settings.nodes:
            left = [str(path) for path in node.layout.working_dir.rglob("*") if path.is_file()]
            assert not left, left
        if idle_processes is not None:
            wait_until(lambda: len(self.processes()) <= idle_processes, 10, "tasks ended")


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Fail if the block leaves a descriptor of ours open on `path`."""
    yield
    held = [
        os.readlink(f"/proc/self/fd/{name}")
        for name in os.listdir("/proc/self/fd")
        if os.path.exists(f"/proc/self/fd/{name}")
    ]
    assert not [name for name in held if name.startswith(str(path))]
