"""The node agent: one per node; made of `inputs`, `runs`, `snapshots` and `files`, for which it answers.

`python -m mrcore.node.node_agent SPEC.json`. Every name that comes over the wire is matched against a strict
pattern before it becomes part of a path; paths come over the wire from the master only, as entries of `input_dirs` and
as files listed by them.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

from mrcore import VERSIONS
from mrcore.errors import Refused
from mrcore.messages.kinds import ServerName, convert
from mrcore.messages.methods import LARGE_BYTES
from mrcore.messages.nodes import Health, KeptRun, Spec
from mrcore.node.inputs import Inputs
from mrcore.node.moves import MoveMethods
from mrcore.node.runs import Runs
from mrcore.node.snapshots import Snapshots
from mrcore.node.spec import pki_of, read_spec
from mrcore.system import logs, procfs
from mrcore.system.paths import Layout
from mrcore.system.terminal import log_to
from mrcore.wire.data import DataHandler, Range, Upload
from mrcore.wire.members import watch_membership
from mrcore.wire.service import Method, Server
from mrcore.wire.tls import Identity

LARGE_REQUESTS = (  # lists of names
    "list_inputs check_tails publish announce delete_files taken stage_moves publish_moves remove_moves"
)

Json = dict[str, Any]


class NodeAgent:
    """What the agent of one node does: RPC methods, and what `resolve` and `receive` do for data requests."""

    RPC = "sweep end_server"

    def __init__(self, spec: Spec) -> None:
        self._spec, self._layout = spec, Layout(Path(spec.compute_dir))
        self._layout.make()
        self._inputs = Inputs(self._layout, spec.node, spec.sibling_dirs)
        self._runs = Runs(self._layout, spec.node)
        self._snapshots = Snapshots(self._layout, spec.node)
        self._files = MoveMethods(self._layout, spec.node)
        self.data = DataHandler(self.resolve, self.receive)

    def methods(self) -> dict[str, Method]:
        """Return the RPC methods: `health` for any member, the others for the master only."""
        parts: tuple[Any, ...] = (self, self._inputs, self._runs, self._snapshots, self._files)
        masters = {name: Method(getattr(part, name), "master") for part in parts for name in part.RPC.split()}
        masters |= {name: masters[name]._replace(request_bytes=LARGE_BYTES) for name in LARGE_REQUESTS.split()}
        return masters | {"health": Method(self.health, "member")}

    def health(self, caller: Identity) -> Health:
        """Return who answers, and how this node is."""
        disk, served = shutil.disk_usage(self._layout.compute_dir), self.data.served()
        facts: Json = {"time": time.time(), "disk_free_bytes": disk.free, "disk_total_bytes": disk.total}
        facts |= {"served_bytes": served, "load": os.getloadavg()[0], "cpus": os.cpu_count() or 0}
        return convert(Health, facts | VERSIONS | {"name": self._spec.node, "python": platform.python_version()})

    def end_server(self, caller: Identity, name: ServerName) -> bool:
        """SIGKILL the server child of a cluster server of this node, which its supervisor then starts again.

        For one that is stopped or hangs. Its supervisor is continued, should it be stopped too. False: not running.
        """
        owner = f"{self._spec.cluster}/{name}"

        def send(record: str, number: int) -> bool:
            with contextlib.suppress(OSError, ValueError, KeyError):
                known = json.loads((self._layout.pids_dir / record).read_text())
                if procfs.environment_value(known["pid"], "MRCORE_SERVER") == owner:
                    return procfs.send_signal(known["pid"], known["start_ticks"], number)
            return False

        ended = send(f"{name}.server.json", signal.SIGKILL)
        send(f"{name}.json", signal.SIGCONT)
        return ended

    def sweep(self, caller: Identity, keep: list[KeptRun]) -> dict[str, int]:
        """Remove what dead runs and uploads left, but for the working folders of the runs to keep, and old snapshots.

        Return the number of working folders, projects and environments that went.
        """
        self._files.sweep_incoming()
        return {"working": self._runs.sweep(keep)} | self._snapshots.sweep()

    # ---- data requests

    def resolve(self, caller: Identity, request: Json) -> list[Range]:
        """Return where the bytes lie that a GET asks for. Raises Refused.

        Any member: {"run": …}, ranges of a spill (`runs.SpillRequest`); {"part": …}, a published part
        (`runs.PartRequest`). The master: {"file": [listing, number, offset]}, a listed file from a byte on.
        """
        match request:
            case {"run": asked, **rest} if not rest:
                return self._runs.spill(asked)
            case {"part": asked, **rest} if not rest:
                return self._runs.part(asked)
            case {"file": [listing, number, offset]} if caller.role == "master":
                return self._files.give_file(listing, number, offset)
        raise Refused(f"not served to a {caller.role}: {', '.join(request)!r:.100}")

    def receive(self, caller: Identity, request: Json) -> Upload:
        """Return where a PUT writes to, and what takes the file in. For the master only; raises Refused.

        {"project": hash}, a tar of that content; {"environment": hash}, the same of requirements and wheels, for
        `install_environment`; {"batch": [upload, number]}, announced files.
        """
        if caller.role == "master":
            match request:
                case {"batch": [upload, number]}:
                    return self._files.take_batch(upload, number)
                case {"project": content}:
                    return self._snapshots.receive_project(content)
                case {"environment": content}:
                    return self._snapshots.receive_environment(content)
        raise Refused(f"not taken from a {caller.role}: {', '.join(request)!r:.100}")


def main(spec_file: str) -> int:
    """Run the agent that a spec file describes until SIGTERM; return the exit status."""
    spec = read_spec(spec_file)
    ours = logs.TextLog(logs.take_over(spec.log_bytes or logs.LOG_BYTES))
    log_to(ours)
    agent = NodeAgent(spec)
    stop = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    signal.pthread_sigmask(signal.SIG_BLOCK, stop)  # before any thread, so that only the wait below takes them
    members = watch_membership(Path(spec.members_file))
    server = Server(spec.address, spec.port, pki_of(spec), members, agent.methods(), agent.data)
    server.start()
    procfs.announce_ready()
    # Python gives an empty answer when SIGSTOP has outlasted the time: hence the number.
    while not (got := signal.sigtimedwait(stop, logs.WINDOW_SECONDS)) or got.si_signo not in stop:
        ours.settle()
    server.close()
    ours.settle()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
