"""What the tests of the daemons share: addresses of their own, certificates, and a cluster server to talk to."""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from by_name import ByName
from conditions import wait_until
from signals import kill

from mrcore.messages.methods import LARGE_BYTES, Method
from mrcore.messages.nodes import Spec
from mrcore.system import procfs
from mrcore.wire import pki
from mrcore.wire.client import Client
from mrcore.wire.data import DataClient
from mrcore.wire.members import Membership, members_content
from mrcore.wire.tls import Pki

_hosts = itertools.count(1)
ANY_POLL = Method[dict[str, Any]]("poll", dict[str, Any], LARGE_BYTES)  # with events that only tests have
CLUSTER = f"test{os.getpid()}"


def own_address() -> str:
    """A loopback address that no other test process uses at the same time."""
    return f"127.{1 + os.getpid() // 250 % 250}.{1 + os.getpid() % 250}.{next(_hosts)}"


def free_port(address: str) -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        port: int = probe.getsockname()[1]
        return port


def members(*names: str) -> Callable[[], Membership]:
    """An allow list with these nodes, and the master, whatever their certificates."""
    listed = Membership(dict.fromkeys(("node", name) for name in names))
    return lambda: listed


def living(pid: int) -> bool:
    return procfs.state(pid) is not None


def make_pki(folder: Path, *nodes: tuple[str, str]) -> Path:
    """An authority with a master's and the nodes' certificates: folder/master, folder/NODE; folder/members.json."""
    pki.make_authority(folder / "ca", CLUSTER)
    serials = {("master", "master"): [pki.issue(folder / "ca", folder / "master", "master", "master", "master", [])]}
    for name, address in nodes:
        serials["node", name] = [pki.issue(folder / "ca", folder / name, "node", name, "node", [address])]
    (folder / "members.json").write_bytes(members_content(CLUSTER, serials))
    return folder


def made_spec(compute_dir: Path) -> Spec:
    """The spec of a daemon that is not started."""
    folder = str(compute_dir)
    return Spec(
        name="S_0",
        node="n1",
        address="127.0.0.1",
        port=0,
        cluster=CLUSTER,
        compute_dir=folder,
        pki_dir=folder,
        members_file=f"{folder}/members.json",
    )


class Daemon:
    """A daemon of a test, started as a launcher would; `close` leaves nothing of it."""

    def __init__(self, folder: Path, command: list[str], name: str, **spec: Any) -> None:
        self.folder = folder
        self.address, self.port, self.name = own_address(), 0, name
        self.port = free_port(self.address)
        self.pki = make_pki(folder / "pki", ("n1", self.address))
        self.spec = {
            "name": name,
            "node": "n1",
            "address": self.address,
            "port": self.port,
            "cluster": CLUSTER,
            "compute_dir": str(folder / "node"),
            "pki_dir": str(self.pki / "n1"),
            "members_file": str(self.pki / "members.json"),
            "memory_bytes": 256 << 20,
            "servers": 1,
        } | spec
        (folder / "node" / "pids").mkdir(parents=True, exist_ok=True)
        file = folder / "spec.json"
        file.write_text(json.dumps(self.spec))
        ready, theirs = os.pipe()
        self.log = folder / "log"
        environment = os.environ | {"MRCORE_SERVER": f"{CLUSTER}/{name}", "MRCORE_READY_FD": str(theirs)}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, *command, str(file)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment | {"MALLOC_ARENA_MAX": "1"},
                pass_fds=[theirs],
                start_new_session=True,
            )
        os.close(theirs)
        self.ready = os.read(ready, 10)
        os.close(ready)
        self.clients: list[Client | DataClient] = []

    def client(self) -> Client:
        client = ByName(self.address, self.port, Pki(self.pki / "master", "master", self.pki / "members.json"), "n1")
        self.clients.append(client)
        return client

    def data_client(self, holder: str = "master") -> DataClient:
        stem = "master" if holder == "master" else "node"
        client = DataClient(self.address, self.port, Pki(self.pki / holder, stem, self.pki / "members.json"), "n1")
        self.clients.append(client)
        return client

    def close(self) -> None:
        for client in self.clients:
            client.close()
        left = procfs.descendants(self.process.pid)
        self.process.kill()
        self.process.wait()
        for pid in left:
            if procfs.environment_value(pid, "MRCORE_SERVER") == f"{CLUSTER}/{self.name}":
                kill(pid)
        wait_until(lambda: not any(living(pid) for pid in left), 10, "the end of all processes of a daemon")


class Listener:
    """Polls a cluster server like a master does."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.incarnation = client.call("hello")["incarnation"]
        self.after = 0
        self.events: list[dict[str, Any]] = []

    def until(self, wanted: Callable[[dict[str, Any]], bool] | str, deadline_seconds: float = 10) -> dict[str, Any]:
        """Poll until an event satisfies (or is called) `wanted`, and give it."""

        def heard() -> dict[str, Any] | None:
            for event in self.events:
                if event["event"] == wanted if isinstance(wanted, str) else wanted(event):
                    self.events.remove(event)
                    return event
            return None

        def poll() -> dict[str, Any] | None:
            if event := heard():
                return event
            answer = self.client.call(ANY_POLL, incarnation=self.incarnation, after=self.after, wait_seconds=0.5)
            assert answer["incarnation"] == self.incarnation
            for number, event in answer["events"]:
                assert number > self.after
                self.after = number
                self.events.append(event)
            return heard()

        found: dict[str, Any] = wait_until(poll, deadline_seconds, f"event {wanted}")
        return found
