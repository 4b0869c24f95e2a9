"""Floods against running daemons: what a stranger, a node or the master may cost them; a member gets in meanwhile."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from by_name import ByName
from clusters import TestCluster
from conditions import wait_until
from forged import NODE, Forger
from rpyc.core import brine, consts

from mrcore.errors import MrcoreError, Refused, Unreachable
from mrcore.launchers import local
from mrcore.system import procfs
from mrcore.wire.data import DataClient
from mrcore.wire.tls import DATA_PROTOCOL, LIMITS, RPC_PROTOCOL, Pki, client_context, master_pki

GROWN_BYTES = 250 << 20  # what one peer may make a daemon take, for a moment
HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(505)


class Target:
    """The agent of the first node: how it is, and ways to it."""

    def __init__(self, cluster: TestCluster) -> None:
        self.cluster, self.node = cluster, cluster.settings.nodes[0]
        self.master = master_pki(cluster.settings)
        other = cluster.settings.nodes[1]
        self.member = Pki(other.layout.pki_dir, "node", other.compute_dir / "members.json")
        self.pid = cluster.agent_pid(0)
        self.log = self.node.layout.logs_dir / "agent.log"

    def raw(self) -> socket.socket:
        return socket.create_connection((self.node.address, self.node.agent_port), 10)

    def secured(self, keys: Pki, alpn: str) -> ssl.SSLSocket:
        sock = client_context(keys, alpn).wrap_socket(self.raw(), server_hostname=self.node.name)
        (length,) = struct.unpack("!I", sock.recv(4))
        assert b"welcome" in sock.recv(length)
        sock.settimeout(60)
        return sock

    def answers(self) -> bool:
        """Whether the master gets in and is answered, on a fresh connection."""
        client = ByName(self.node.address, self.node.agent_port, self.master, self.node.name, 30, 30)
        with contextlib.closing(client), contextlib.suppress(Unreachable):
            return bool(client.call("health"))
        return False

    def rss(self) -> int:
        return procfs.anonymous_bytes(self.pid)

    def descriptors(self) -> int:
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))

    @contextlib.contextmanager
    def bounded(self, grown_bytes: int = GROWN_BYTES, logged_bytes: int = 100_000) -> Iterator[None]:
        """Fail if the agent takes more memory or writes more of a log than that, or keeps descriptors."""
        before, files, logged = self.rss(), self.descriptors(), self.log.stat().st_size
        peak, ended = [before], threading.Event()

        def watch() -> None:
            while not ended.wait(0.01):
                peak[0] = max(peak[0], self.rss())

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()
        assert peak[0] - before < grown_bytes, f"grew by {(peak[0] - before) >> 20} MiB"
        assert self.answers()
        wait_until(lambda: self.descriptors() <= files + 4, 60, "descriptors come back")
        assert self.log.stat().st_size - logged < logged_bytes, self.log.read_text()[-3000:]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    with TestCluster(tmp_path_factory.mktemp("floods"), nodes=2, servers=1) as cluster:
        yield Target(cluster)


def rest(sock: socket.socket) -> bytes:
    """What comes until the server closes."""
    got = b""
    with contextlib.suppress(OSError):
        while piece := sock.recv(65536):
            got += piece
    return got


# --- without a certificate --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_silent_connects_keep_nobody_out(target: Target) -> None:
    with target.bounded(), contextlib.ExitStack() as opened:
        for _ in range(600):
            opened.callback(target.raw().close)
        assert target.answers()
        assert target.descriptors() < 3 * LIMITS.handshakes + 50


@pytest.mark.slow
def test_handshakes_byte_by_byte_keep_nobody_out(target: Target) -> None:
    with target.bounded(), contextlib.ExitStack() as opened:
        socks = [target.raw() for _ in range(60)]
        for sock in socks:
            opened.callback(sock.close)
        for at in range(6):
            for sock in socks:
                with contextlib.suppress(OSError):
                    sock.send(HELLO[at : at + 1])
            assert target.answers()


@pytest.mark.slow
def test_handshakes_of_strangers_keep_nobody_out(target: Target, tmp_path: Path) -> None:
    settings = target.cluster.settings
    forger = Forger(tmp_path, settings.pki_dir, settings.nodes[1].layout.pki_dir, local.cluster_id(settings.home))
    stranger = forger("stranger", NODE | {"signer": None}, ("node-1",))
    context, ended = client_context(stranger, RPC_PROTOCOL), threading.Event()

    def flood() -> None:
        for _ in range(150):
            if ended.is_set():
                return
            with (
                contextlib.suppress(OSError),
                target.raw() as raw,
                context.wrap_socket(raw, server_hostname=target.node.name) as sock,
            ):
                sock.recv(1)

    with target.bounded():
        threads = [threading.Thread(target=flood) for _ in range(3)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(3):
                assert target.answers()
        finally:
            ended.set()
            for thread in threads:
                thread.join()


# --- with a node's certificate ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [LIMITS.member_frame_bytes + 1, 1 << 20, LIMITS.frame_bytes, 0xFFFFFFFF])
def test_a_node_is_not_listened_to_at_length(target: Target, length: int) -> None:
    with target.bounded(20 << 20), target.secured(target.member, RPC_PROTOCOL) as sock:
        sock.sendall(struct.pack("!IB", length, 0))
        began = time.monotonic()
        assert rest(sock) == b"" and time.monotonic() - began < LIMITS.frame_seconds, "at once, by its header"


def test_a_nodes_many_connections_are_bounded_and_the_master_gets_in(target: Target) -> None:
    with target.bounded(), contextlib.ExitStack() as opened:
        for _ in range(LIMITS.connections_per_peer):
            opened.enter_context(target.secured(target.member, RPC_PROTOCOL))
        with pytest.raises(Refused, match=f"has {LIMITS.connections_per_peer} connections"):
            ByName(target.node.address, target.node.agent_port, target.member, target.node.name, 30).call("health")
        assert target.answers()


def test_half_frames_do_not_keep_memory(target: Target) -> None:
    with target.bounded(), contextlib.ExitStack() as opened:
        for _ in range(50):
            sock = opened.enter_context(target.secured(target.member, RPC_PROTOCOL))
            sock.sendall(struct.pack("!IB", LIMITS.member_frame_bytes, 0) + b"x" * (LIMITS.member_frame_bytes // 2))
        assert target.answers()


TEXTS = {
    "deep lists": '{"get": ' + "[" * 200_000 + "]" * 200_000 + "}",
    "deep tables": '{"get": ' + '{"x":' * 100_000 + "1" + "}" * 100_001,
    "millions of lists": '{"get": [' + "[]," * 2_500_000 + "1]}",
    "millions of requests": '{"get": [' + "0," * 3_000_000 + "0]}",
    "more requests than a frame may have": '{"get": [' + "0," * LIMITS.batch_requests + "0]}",
    "a million digits": '{"get": ' + "9" * 1_000_000 + "}",
    "not an object": "[1]",
    "a surrogate": '{"get": "\\ud800"}',
    "no UTF-8": "\udcff",
}


@pytest.mark.parametrize("what", TEXTS)
def test_a_bad_request_for_bytes_costs_little_and_is_refused(target: Target, what: str) -> None:
    data = TEXTS[what].encode(errors="surrogateescape")
    with target.bounded(logged_bytes=2_000), target.secured(target.member, DATA_PROTOCOL) as sock:
        with contextlib.suppress(OSError):
            sock.sendall(struct.pack("!I", len(data)) + data)
        said = rest(sock)
    assert b'"error"' in said and b'"Refused"' in said, said


def test_one_bad_frame_is_one_line_of_the_log_and_one_error(target: Target) -> None:
    """20 KB of requests that each failed used to log 4.4 MB."""
    requests: list[Any] = [{"run": {}}, {"part": 5}, 0, None, {"run": {"job": "x"}}, {"file": [1]}] * 600
    with target.bounded(logged_bytes=8_000):
        for request in (
            requests,
            [0] * 4_000,
            [{"run": {"job": "g", "run": 1, "id": "x", "low": 5, "high": 5}}],
        ):
            for _ in range(20):
                client = DataClient(target.node.address, target.node.agent_port, target.member, target.node.name, 30)
                with contextlib.closing(client), pytest.raises(MrcoreError):
                    client.get(request, lambda *_: None)


# --- with the master's certificate ------------------------------------------------------------------------------------


def frame(payload: bytes) -> bytes:
    return struct.pack("!IB", len(payload), 0) + payload + b"\n"


def tuples() -> bytes:
    item = brine.TAG_TUP1 + brine.TAG_EMPTY_TUPLE
    count = (30 << 20) // len(item)
    return brine.TAG_TUP_L4 + struct.pack("!L", count) + item * count


def call(method: str, arguments: str) -> bytes:
    boxed = (consts.LABEL_VALUE, None), (consts.LABEL_VALUE, "call"), (consts.LABEL_VALUE, (method, arguments))
    return brine.I1.pack(consts.MSG_REQUEST) + brine.dump((1, (consts.HANDLE_CALLATTR, boxed)))


FRAMES: dict[str, Callable[[], bytes]] = {
    "millions of tuples": lambda: brine.I1.pack(consts.MSG_REQUEST) + tuples(),
    "tuples behind a text": lambda: call("health", "x" * 5_000) + tuples(),
    "arguments that a small method never has": lambda: call("health", '{"x": "' + "x" * (30 << 20) + '"}'),
    "millions of values for a small method": lambda: call("health", '{"x": [' + "[]," * (10 << 20) + "1]}"),
    "millions of values for a large one": lambda: call("taken", '{"names": [' + "[]," * (10 << 20) + "1]}"),
    "deep arguments": lambda: call("taken", '{"names": ' + "[" * 1_000_000 + "]" * 1_000_000 + "}"),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", FRAMES)
def test_a_large_frame_costs_no_multiple_of_itself(target: Target, what: str) -> None:
    """One request of 30 MiB used to take 895 MB."""
    with target.bounded(logged_bytes=5_000), target.secured(target.master, RPC_PROTOCOL) as sock:
        with contextlib.suppress(OSError):
            sock.sendall(frame(FRAMES[what]()))
        with contextlib.suppress(OSError):
            sock.settimeout(5)
            said = sock.recv(2_000)
            assert not said or b"Refused" in said, said


RANGES: list[Any] = [
    {"run": {"job": "gated", "run": 1, "id": "x", "partition": 1 << 70}},
    {"run": {"job": "a", "run": -1, "id": "x", "partition": 0}},
    {"run": {"job": "../..", "run": 1, "id": "x", "partition": 0}},
    {"run": {"job": "a", "run": 1, "id": "../../x", "partition": 0}},
    {"run": {"job": "a\n", "run": 1, "id": "x", "partition": 0}},
    {"run": {"job": "a", "run": True, "id": "x", "partition": 0}},
    {"run": {"job": "a", "run": 1.0, "id": "x", "partition": 0}},
    {"part": {"job": "gated", "name": "../../../pki/node.key"}},
    {"part": {"job": "gated", "name": "/etc/passwd"}},
    {"part": {"job": "gated", "name": "part-000001-00000-00000.data\n"}},
    {"part": {"job": "gated", "name": "part-000001-00000-00000.data\0"}},
    {"part": {"job": "gated", "name": "p" * 100_000}},
    {"part": {"job": "gated", "name": "part-٠٠٠٠٠١-0-0.data"}},
    {"part": {"job": ["x"], "name": {}}},
    {"file": ["x", 0, 0]}, {"file": ["../x", -1, -1]}, {}, {"run": None}, {"part": 5}, "x", None,
]  # fmt: skip


@pytest.mark.parametrize("request_", RANGES)
@pytest.mark.parametrize("holder", ["member", "master"])
def test_no_odd_request_is_given_a_byte(target: Target, request_: Any, holder: str) -> None:
    keys = target.member if holder == "member" else target.master
    given: list[int] = []
    client = DataClient(target.node.address, target.node.agent_port, keys, target.node.name)
    with contextlib.closing(client), pytest.raises(MrcoreError) as fault:
        client.get([request_], lambda _, chunk: given.append(len(chunk)))
    assert not given and len(fault.value.message) < 1_000


@pytest.mark.parametrize(
    "frame_",
    [
        {"put": {"project": "0" * 32}, "length": 1 << 62},
        {"put": {"project": "../x"}, "length": 1},
        {"put": {"project": "0" * 32}, "length": -1},
        {"put": {"project": "0" * 32}, "length": True},
        {"put": {"batch": ["x", 1]}, "length": 1},
        {"put": {"environment": 5}, "length": 1},
        {"put": None, "length": 1},
    ],
)
@pytest.mark.parametrize("holder", ["member", "master"])
def test_no_odd_upload_is_taken(target: Target, frame_: dict[str, Any], holder: str) -> None:
    keys = target.member if holder == "member" else target.master
    data = json.dumps(frame_).encode()
    with target.secured(keys, DATA_PROTOCOL) as sock:
        sock.sendall(struct.pack("!I", len(data)) + data + b"nonsense" * 10)
        said = rest(sock)
    assert b'"result"' not in said and b"error" in said
    assert not [path for path in target.node.layout.projects_dir.iterdir() if not path.name.startswith(".")]
