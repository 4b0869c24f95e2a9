"""The RPC side of the wire against strangers, liars, the silent and the slow: real sockets, TLS and certificates."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from by_name import ByName
from conditions import wait_until
from daemons import members
from peers import FAST, Certificates, descriptors, drain, fake_server, make_certificates, tls_socket
from rpyc.core import brine, consts

from mrcore import WIRE_VERSION
from mrcore.errors import ClusterFault, InternalError, JobFault, Refused, Unreachable, UsageError
from mrcore.wire import pki, tls
from mrcore.wire.channel import HARDENED, Channel, Connection
from mrcore.wire.client import Client
from mrcore.wire.data import DataHandler
from mrcore.wire.members import Membership
from mrcore.wire.service import Method, Server
from mrcore.wire.stream import Stream
from mrcore.wire.tls import DATA_PROTOCOL, RPC_PROTOCOL, Identity, Pki, client_context

SOON_SECONDS = 8.0  # at once, on a busy machine too: less than what would be waited for otherwise
BOTH = pytest.mark.parametrize("alpn", [RPC_PROTOCOL, DATA_PROTOCOL])
Starter = Callable[..., Server]


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("pki"))


class Daemon:
    """The methods that the tests call."""

    def __init__(self) -> None:
        self.release = threading.Event()
        self.callers: list[Identity] = []

    def methods(self) -> dict[str, Method]:
        return {
            "echo": Method(lambda identity, **given: [identity.name, given], "member"),
            "order": Method(lambda identity: self.callers.append(identity) or {"accepted": True}, "master"),
            "fail": Method(self.fail, "member"),
            "wait": Method(lambda identity: self.release.wait(20), "member"),
            "large": Method(lambda identity, size: "x" * size, "member"),
        }

    def fail(self, identity: Identity, kind: str) -> None:
        if kind == "job":
            raise JobFault("line 3 is bad", file="in.txt", offset=17)
        raise ZeroDivisionError("one by zero")


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    daemon = Daemon()
    yield daemon
    daemon.release.set()


@pytest.fixture
def start(certificates: Certificates, daemon: Daemon) -> Iterator[Starter]:
    """Starts servers as node a; afterwards none of their threads may be left."""
    servers: list[Server] = []
    before = set(threading.enumerate())

    def starter(holder: str = "a", **settings: Any) -> Server:
        settings = dict[str, Any](membership=members("a", "b"), methods=daemon.methods(), limits=FAST) | settings
        handler = DataHandler(lambda identity, request: [])
        servers.append(Server("127.0.0.1", 0, certificates.pki(holder), data_handler=handler, **settings))
        servers[-1].start()
        return servers[-1]

    yield starter
    daemon.release.set()
    for server in servers:
        server.close()
    wait_until(lambda: set(threading.enumerate()) <= before)


@pytest.fixture
def connect(certificates: Certificates) -> Iterator[Callable[..., Client]]:
    clients: list[Client] = []

    def connector(server: Server, holder: str = "master", **settings: Any) -> Client:
        clients.append(ByName("127.0.0.1", server.port, certificates.pki(holder), **settings))
        return clients[-1]

    yield connector
    for client in clients:
        client.close()


# --- calls -----------------------------------------------------------------------------------------------------------


def test_a_call_takes_and_gives_json(start: Starter, connect: Callable[..., Client]) -> None:
    client = connect(start(), "b")
    given: dict[str, Any] = {"text": "ä\x00", "number": 2**80, "nested": [{"a": None}, 1.5, True]}
    assert client.call("echo", **given) == ["b", given]
    assert client.call("echo") == ["b", {}]
    with pytest.raises(Refused, match=r"echo: not arguments of this method: .*surrogate"):
        client.call("echo", text="half a character: \udc80")


def test_server_name_may_be_the_certificates_name(start: Starter, connect: Callable[..., Client]) -> None:
    assert connect(start(), server_name="a").call("echo") == ["master", {}]


def test_errors_of_ours_travel_whole_and_others_as_internal_errors(
    start: Starter, connect: Callable[..., Client], caplog: pytest.LogCaptureFixture
) -> None:
    client = connect(start())
    with pytest.raises(JobFault) as job:
        client.call("fail", kind="job")
    assert (job.value.message, job.value.details) == ("line 3 is bad", {"file": "in.txt", "offset": 17})
    with pytest.raises(InternalError, match=r"fail failed at .*ZeroDivisionError: one by zero; its log has") as other:
        client.call("fail", kind="other")
    assert "Traceback" in caplog.text and not other.value.details  # the log has what the wire does not carry
    with pytest.raises(Refused, match=r"order: not arguments of this method: .*surplus"):
        client.call("order", surplus=1)
    with pytest.raises(Refused, match="no method 'nothing'"):
        client.call("nothing")
    assert client.call("echo") == ["master", {}]  # none of this cost the connection


def test_too_large_requests_and_replies_are_refused_by_name(start: Starter, connect: Callable[..., Client]) -> None:
    client = connect(start(), limits=FAST)
    with pytest.raises(InternalError, match="large: a reply of 300,014 bytes"):  # the caller's job, not the cluster's
        client.call("large", size=300_000)
    with pytest.raises(UsageError, match="echo: arguments of"):
        client.call("echo", text="x" * 300_000)
    assert len(client.call("large", size=200_000)) == 200_000


def test_threads_may_share_a_client(start: Starter, connect: Callable[..., Client]) -> None:
    client = connect(start())
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda n: client.call("echo", n=n)[1]["n"], range(200)))
    assert answers == list(range(200))


def test_a_client_outlives_its_server(
    start: Starter, connect: Callable[..., Client], certificates: Certificates
) -> None:
    first = start()
    client = connect(first)
    client.call("echo")
    first.close()
    with pytest.raises(Unreachable, match=f"127.0.0.1:{first.port}.*refused"):
        client.call("echo")
    second = Server("127.0.0.1", first.port, certificates.pki("a"), members(), {"two": Method(lambda i: 2, "master")})
    second.start()
    try:
        assert client.call("two") == 2
    finally:
        second.close()


# --- who is let in ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("holder", "reason"),
    [("foreign", "UNKNOWN_CA|CERTIFICATE"), ("stranger", "stranger is no member of this cluster")],
)
def test_foreign_certificates_are_refused(start: Starter, certificates: Certificates, holder: str, reason: str) -> None:
    server = start()
    own = Pki(certificates.folder / f"client-{holder}", holder)
    own.folder.mkdir(exist_ok=True)
    for file in (f"{holder}.crt", f"{holder}.key"):
        (own.folder / file).write_bytes((certificates.folder / holder / file).read_bytes())
    (own.folder / "ca.crt").write_bytes((certificates.folder / "own" / "ca.crt").read_bytes())  # it trusts the server
    for _ in range(20):  # a TLS 1.3 client learns of it on its first read: a race if the server did not linger
        with pytest.raises(Refused, match=reason):
            ByName("127.0.0.1", server.port, own).call("echo")


def test_a_client_without_certificate_is_refused(
    start: Starter, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start()

    def bare(pki_: Pki, alpn: str) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(pki_.folder / "ca.crt")
        context.set_alpn_protocols([alpn])
        return context

    monkeypatch.setattr(tls, "client_context", bare)
    with pytest.raises(Refused, match="CERTIFICATE_REQUIRED"):
        ByName("127.0.0.1", server.port, certificates.pki("master")).call("echo")


def test_authorities_of_the_system_count_for_nothing(
    start: Starter, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates.folder / "other" / "ca.crt"))  # OpenSSL's "system store"
    test = ssl.create_default_context()
    assert any("other" in str(ca["subject"]) for ca in test.get_ca_certs()), "the trap is not set"
    with pytest.raises(Refused):
        ByName("127.0.0.1", start().port, certificates.pki("foreign")).call("echo")
    for context in (tls.server_context(certificates.pki("a")), client_context(certificates.pki("a"), RPC_PROTOCOL)):
        assert len(context.get_ca_certs()) == 1
        assert context.minimum_version == ssl.TLSVersion.TLSv1_3
        assert context.verify_mode == ssl.CERT_REQUIRED


def test_a_node_cannot_call_the_masters_methods(start: Starter, connect: Callable[..., Client], daemon: Daemon) -> None:
    server = start()
    with pytest.raises(Refused, match="order is the master's to call; b is a node"):
        connect(server, "b").call("order")
    assert not daemon.callers
    connect(server).call("order")
    assert [caller.name for caller in daemon.callers] == ["master"]


def test_the_client_refuses_a_server_of_the_wrong_name_or_authority(
    start: Starter, connect: Callable[..., Client], certificates: Certificates
) -> None:
    with pytest.raises(Refused, match=r"no acceptable certificate: Hostname mismatch.*'b'"):
        connect(start(), server_name="b").call("echo")
    with pytest.raises(Refused, match=r"no acceptable certificate: .*certificate"):
        connect(start("foreign")).call("echo")
    server = Server("127.0.0.3", 0, certificates.pki("a"), members(), {})
    server.start()
    try:
        with pytest.raises(Refused, match=r"no acceptable certificate: IP address mismatch.*127.0.0.3"):
            ByName("127.0.0.3", server.port, certificates.pki("master")).call("echo")
    finally:
        server.close()


def test_the_deny_list_and_membership_hold_at_once_also_on_live_connections(
    start: Starter, connect: Callable[..., Client], certificates: Certificates
) -> None:
    members, denied = {"a", "b"}, set[str]()

    def now() -> Membership:
        return Membership(dict.fromkeys(("node", name) for name in members), frozenset(denied))

    server = start(membership=now)
    node, master = connect(server, "b"), connect(server)
    assert node.call("echo")
    assert master.call("echo")
    members.remove("b")
    with pytest.raises(Refused, match="b is no member"):
        node.call("echo")
    denied.add(certificates.serials["master"])
    with pytest.raises(Refused, match="of master was withdrawn"):
        master.call("echo")
    with pytest.raises(Refused, match="of master was withdrawn"):
        connect(server).call("echo")


def test_another_wire_version_is_refused(
    start: Starter, connect: Callable[..., Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mrcore.wire.client.WIRE_VERSION", WIRE_VERSION + 1)
    with pytest.raises(Refused, match=f"speaks wire version {WIRE_VERSION}, this side {WIRE_VERSION + 1}"):
        connect(start()).call("echo")


def test_an_unknown_protocol_is_refused(start: Starter, certificates: Certificates) -> None:
    server = start()
    with tls_socket(server.port, certificates.pki("b"), "h2") as sock:
        assert b"does not speak" in drain(sock)


def test_connections_are_capped_for_members_but_never_for_the_master(
    start: Starter, connect: Callable[..., Client]
) -> None:
    server = start()
    for _ in range(FAST.connections_per_peer):
        connect(server, "b").call("echo")
    with pytest.raises(Refused, match="b has 4 connections"):
        connect(server, "b").call("echo")
    for _ in range(FAST.connections - FAST.connections_per_peer):
        connect(server, "a").call("echo")
    with pytest.raises(Refused, match="has 6 connections of members"):
        connect(server, "a").call("echo")
    assert connect(server).call("echo")


# --- nothing but `call` ----------------------------------------------------------------------------------------------


@pytest.fixture
def raw_call(start: Starter, certificates: Certificates) -> Iterator[Callable[..., Any]]:
    """Sends any request of RPyC's protocol to a server, as a member would, past our own client."""
    server, opened = start(), []

    def send(handler: Any, *args: Any, boxed: Any = None) -> Any:
        sock = tls_socket(server.port, certificates.pki("b"), RPC_PROTOCOL)
        opened.append(stream := Stream(sock, FAST, "peer"))
        stream.receive_json(2, "")
        connection = Connection(stream)
        with stream.within(2, ""):
            if boxed is None:
                return connection.sync_request(handler, *args)
            Channel(stream).send(brine.I1.pack(consts.MSG_REQUEST) + brine.dump((1, (handler, boxed))))
            return brine.load(Channel(stream).recv()[1:])

    yield send
    for stream in opened:
        stream.close()


def test_the_raw_call_of_these_tests_can_succeed(raw_call: Callable[..., Any]) -> None:
    assert json.loads(raw_call(consts.HANDLE_CALLATTR, None, "call", ("echo", "{}"))) == {"result": ["b", {}]}


@pytest.mark.parametrize("handler", [h for h in range(1, 21) if h != consts.HANDLE_CALLATTR])
def test_every_other_request_of_rpyc_is_refused(raw_call: Callable[..., Any], handler: int) -> None:
    for args in ((), (None,), (None, "__class__"), (None, "call", ("echo", "{}"))):
        with pytest.raises(Refused, match="nothing but the method `call` is served"):
            raw_call(handler, *args)


@pytest.mark.parametrize(
    "args",
    [
        (None, "__class__", ()),
        (None, "_rpyc_getattr", ("__class__", "")),
        (None, "exposed_call", ("echo", "{}")),
        (None, "get_service_name", ()),
        (None, b"call", ("echo", "{}")),
        ("text", "upper", ()),
        ("text", "call", ("echo", "{}")),
        (None, "call", ("echo", "{}"), (("more", 1),)),
        (None, "call", ("echo",)),
        (None, "call", ("echo", b"{}")),
        (None, "call", (1, "{}")),
        (None, "call", None),
        (None, "call"),
    ],
)
def test_the_root_gives_nothing_but_call(raw_call: Callable[..., Any], args: tuple[Any, ...]) -> None:
    with pytest.raises(Refused, match=r"nothing but|takes two texts|missing"):
        raw_call(consts.HANDLE_CALLATTR, *args)


@pytest.mark.parametrize("arguments", ["[]", "{", "1", "[" * 50_000, '{"identity": 1}', "NaN"])
def test_arguments_that_are_no_object_are_refused(raw_call: Callable[..., Any], arguments: str) -> None:
    answer = json.loads(raw_call(consts.HANDLE_CALLATTR, None, "call", ("echo", arguments)))
    assert answer["error"]["class"] in ("Refused", "InternalError")


@pytest.mark.parametrize("label", [consts.LABEL_LOCAL_REF, consts.LABEL_REMOTE_REF, consts.LABEL_TUPLE, 9])
def test_references_are_refused_before_any_use(raw_call: Callable[..., Any], label: int) -> None:
    """A reference would make the server ask the client back what it is; the refusal comes instead."""
    inner = (label, ("builtins.str", 1, 2))
    for boxed in (inner, (consts.LABEL_TUPLE, ((1, None), (1, "call"), inner))):
        seq, text = raw_call(consts.HANDLE_CALLATTR, boxed=boxed)
        assert (seq, text) == (1, "Refused: refused a reference to an object: only values travel")


def test_a_server_cannot_reach_into_its_client(certificates: Certificates) -> None:
    """The master talks to nodes that may have been taken over: they get no objects, no callbacks, no SystemExit."""
    frames = [
        (consts.MSG_REQUEST, (9, (consts.HANDLE_GETROOT, (consts.LABEL_VALUE, ())))),
        (consts.MSG_EXCEPTION, (0, (("builtins", "SystemExit"), (1,), (), ""))),
    ]
    asked: list[Any] = []

    def play(sock: ssl.SSLSocket) -> None:
        stream = Stream(sock, FAST, "peer")
        stream.send_json({"welcome": WIRE_VERSION})
        channel = Channel(stream)
        channel.recv()
        for message, body in frames:
            channel.send(brine.I1.pack(message) + brine.dump(body))
        asked.append(brine.load(channel.recv()[1:]))

    with fake_server(certificates, play) as port, pytest.raises(Refused, match="the peer refused"):
        ByName("127.0.0.1", port, certificates.pki("master")).call("echo")
    assert asked == [(9, "Refused: nothing but the method `call` is served")]


def test_the_rpyc_settings_are_hardened() -> None:
    allowed = {name: value for name, value in HARDENED.items() if value}
    assert not allowed
    for name in ("allow_safe_attrs", "allow_pickle", "include_local_traceback", "include_local_version"):
        assert HARDENED[name] is False


# --- the silent, the slow, the garbled -------------------------------------------------------------------------------


def test_silent_connections_stop_no_one_and_are_dropped(start: Starter, connect: Callable[..., Client]) -> None:
    server = start()
    silent = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(3 * FAST.handshakes)]
    began = monotonic()
    assert connect(server).call("echo")
    assert monotonic() - began < FAST.handshake_seconds
    for sock in silent:
        assert drain(sock) == b""
        sock.close()


@BOTH
def test_idle_data_connections_end_and_idle_rpc_connections_live(
    start: Starter, certificates: Certificates, alpn: str
) -> None:
    with tls_socket(start().port, certificates.pki("b"), alpn) as sock:
        stream = Stream(sock, FAST, "peer")
        assert stream.receive_json(1, "") == {"welcome": WIRE_VERSION}
        ended = stream.readable(FAST.idle_data_seconds + FAST.frame_seconds + 0.5)
        assert ended == (alpn == DATA_PROTOCOL)


def rpc_frame(data: bytes, compressed: int = 0, length: int | None = None, end: bytes = b"\n") -> bytes:
    return struct.pack("!LB", len(data) if length is None else length, compressed) + data + end


BOMB = zlib.compress(bytes(64 << 20))
BAD_RPC = {
    "half frame": rpc_frame(b"x" * 100)[:50],
    "half header": b"\0\0",
    "oversized header": rpc_frame(b"", length=0xFFFFFFFF),
    "just over the cap": rpc_frame(b"", length=FAST.frame_bytes + 1),
    "bomb": rpc_frame(BOMB, compressed=1),
    "garbage": os.urandom(4096),
    "no end mark": rpc_frame(b"abc", end=b"x"),
    "not brine": rpc_frame(b"\x01\xff\xff\xff"),
    "endless tuple": rpc_frame(b"\x01" + brine.TAG_TUP_L4 + b"\xff\xff\xff\xff"),
    "deep tuple": rpc_frame(b"\x01" + brine.TAG_TUP1 * 50_000),
    "unknown message": rpc_frame(b"\x09" + brine.dump((1, 2))),
    "reply unasked for": rpc_frame(b"\x02" + brine.dump((77, (2, ())))),
}
BAD_DATA = {
    "half frame": struct.pack("!I", 100) + b'{"get": [',
    "half header": b"\0",
    "oversized header": b"\xff\xff\xff\xff",
    "bomb": struct.pack("!I", len(BOMB)) + BOMB,
    "garbage": os.urandom(4096),
    "no JSON": struct.pack("!I", 4) + b"\xff\xfe{}",
    "deep JSON": struct.pack("!I", 50_000) + b"[" * 50_000,
    "no object": struct.pack("!I", 2) + b"[]",
    "no request": struct.pack("!I", 2) + b"{}",
}
BAD = [(RPC_PROTOCOL, *item) for item in BAD_RPC.items()] + [(DATA_PROTOCOL, *item) for item in BAD_DATA.items()]


@pytest.mark.parametrize(("alpn", "what", "data"), BAD, ids=[f"{alpn}: {what}" for alpn, what, _ in BAD])
def test_garbled_frames_cost_their_own_connection_only(
    start: Starter, connect: Callable[..., Client], certificates: Certificates, alpn: str, what: str, data: bytes
) -> None:
    server = start()
    other = connect(server)
    other.call("echo")
    with tls_socket(server.port, certificates.pki("b"), alpn) as sock:
        sock.settimeout(5)
        with contextlib.suppress(ssl.SSLEOFError, ConnectionError):  # dropped while we were still sending
            sock.sendall(data)
        assert other.call("echo") == ["master", {}]
        drain(sock)  # ends: the server dropped it
    assert other.call("echo") == ["master", {}]


def test_garbage_instead_of_tls_does_no_harm(start: Starter, connect: Callable[..., Client]) -> None:
    server = start()
    for data in (b"GET / HTTP/1.1\r\n\r\n", os.urandom(2000), b"\x16\x03\x01\xff\xff" + b"\0" * 100):
        with socket.create_connection(("127.0.0.1", server.port), timeout=5) as sock:
            sock.sendall(data)
            drain(sock)
    assert connect(server).call("echo")


def test_a_reply_that_inflates_is_refused_by_the_client(certificates: Certificates) -> None:
    def play(sock: ssl.SSLSocket) -> None:
        stream = Stream(sock, FAST, "peer")
        stream.send_json({"welcome": WIRE_VERSION})
        Channel(stream).recv()
        sock.sendall(rpc_frame(BOMB, compressed=1))

    with fake_server(certificates, play) as port, pytest.raises(Refused, match="compressed frame"):
        ByName("127.0.0.1", port, certificates.pki("master")).call("echo")


@pytest.mark.parametrize("holder", [None, "b", "foreign"])
def test_a_thousand_connects_leave_nothing(
    start: Starter, connect: Callable[..., Client], certificates: Certificates, holder: str | None
) -> None:
    server = start()
    keeper = connect(server)
    keeper.call("echo")
    threads, files = threading.active_count(), descriptors()
    held: list[socket.socket] = []
    context = None if holder is None else client_context(Pki(certificates.folder / holder, holder), RPC_PROTOCOL)
    if context is not None:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    for _ in range(1000 if holder is None else 150):
        held.append(sock := socket.create_connection(("127.0.0.1", server.port), timeout=5))
        if context is not None:
            with context.wrap_socket(sock, do_handshake_on_connect=False) as wrapped:
                wrapped.do_handshake()
        assert threading.active_count() <= threads + 2 * FAST.handshakes + FAST.connections_per_peer
    for sock in held:
        sock.close()
    wait_until(lambda: threading.active_count() <= threads and descriptors() <= files)
    assert keeper.call("echo") == ["master", {}]


# --- deadlines -------------------------------------------------------------------------------------------------------


def stopped_server(certificates: Certificates) -> tuple[subprocess.Popen[str], int]:
    """A server in a process of its own, so that it can be stopped."""
    code = (
        "import sys; from pathlib import Path\n"
        "from mrcore.wire.service import Method, Server; from mrcore.wire.tls import Pki\n"
        "from mrcore.wire.members import Membership\n"
        "pki, echo = Pki(Path(sys.argv[1]), 'a'), {'echo': Method(lambda i: 1, 'master')}\n"
        "server = Server('127.0.0.1', 0, pki, lambda: Membership({}), echo)\n"
        "server.start(); print(server.port, flush=True); sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(certificates.folder / "a")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def test_a_stopped_server_costs_the_deadline_and_no_more(certificates: Certificates) -> None:
    process, port = stopped_server(certificates)
    try:
        client = ByName("127.0.0.1", port, certificates.pki("master"), connect_timeout_seconds=0.5)
        assert client.call("echo") == 1
        os.kill(process.pid, signal.SIGSTOP)
        tasks = Path(f"/proc/{process.pid}/task")
        wait_until(lambda: all(stat.read_text().rpartition(")")[2].split()[0] == "T" for stat in tasks.glob("*/stat")))
        began = monotonic()
        with pytest.raises(Unreachable, match=f"127.0.0.1:{port} did not answer: echo within 0.3 s"):
            client.call("echo", timeout_seconds=0.3)
        assert monotonic() - began < SOON_SECONDS
        with pytest.raises(Unreachable, match=r"connect within 0.5 s"):  # the kernel accepts, nobody shakes hands
            client.call("echo", timeout_seconds=0.3)
        assert monotonic() - began < SOON_SECONDS
        os.kill(process.pid, signal.SIGCONT)
        assert client.call("echo") == 1
        client.close()
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("sent", [b"", b"\0\0", rpc_frame(b"x" * 1000)[:500]])
def test_a_server_that_stalls_in_mid_frame_costs_the_deadline(certificates: Certificates, sent: bytes) -> None:
    def play(sock: ssl.SSLSocket) -> None:
        stream = Stream(sock, FAST, "peer")
        stream.send_json({"welcome": WIRE_VERSION})
        Channel(stream).recv()
        sock.sendall(sent)

    with fake_server(certificates, play) as port:
        client = ByName("127.0.0.1", port, certificates.pki("master"))
        began = monotonic()
        with pytest.raises(Unreachable, match=r"echo within 0.4 s"):
            client.call("echo", timeout_seconds=0.4)
        assert 0.3 < monotonic() - began < SOON_SECONDS
        client.close()
        assert monotonic() - began < SOON_SECONDS


@pytest.mark.parametrize("greet", [False, True])
def test_a_chattering_server_cannot_stretch_the_deadline(certificates: Certificates, greet: bool) -> None:
    """Requests, empty frames and replies to nobody, one after the other, without end."""

    def play(sock: ssl.SSLSocket) -> None:
        if not greet:
            while True:
                sock.sendall(b"\0")  # a greeting of length 0, read as garbage or awaited for ever
                threading.Event().wait(0.05)
        stream = Stream(sock, replace(FAST, frame_seconds=5), "peer")
        stream.send_json({"welcome": WIRE_VERSION})
        while True:
            Channel(stream).send(b"")
            Channel(stream).send(brine.I1.pack(consts.MSG_REPLY) + brine.dump((5, (1, "x"))))

    with fake_server(certificates, play) as port:
        client = ByName("127.0.0.1", port, certificates.pki("master"), connect_timeout_seconds=0.5)
        began = monotonic()
        with pytest.raises((Unreachable, Refused)):
            client.call("echo", timeout_seconds=0.5)
        assert monotonic() - began < SOON_SECONDS
        client.close()


def test_a_clients_close_ends_its_own_call(start: Starter, connect: Callable[..., Client]) -> None:
    client = connect(start())
    client.call("echo")
    errors: list[BaseException] = []

    def wait() -> None:
        try:
            client.call("wait", timeout_seconds=10)
        except Unreachable as error:
            errors.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    wait_until(lambda: client._lock.locked())
    began = monotonic()
    client.close()
    thread.join(SOON_SECONDS)
    assert errors
    assert monotonic() - began < SOON_SECONDS
    with pytest.raises(Unreachable, match="this client is closed"):
        client.call("echo")


def test_closing_a_server_drops_live_connections(start: Starter, connect: Callable[..., Client]) -> None:
    server = start()
    clients = [connect(server, "b") for _ in range(3)]
    for client in clients:
        client.call("echo")
    silent = socket.create_connection(("127.0.0.1", server.port), timeout=5)
    began = monotonic()
    server.close()
    assert monotonic() - began < FAST.close_seconds
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("peer:", "accept:"))]
    for client in clients:
        with pytest.raises(Unreachable):
            client.call("echo")
    assert drain(silent) == b""
    silent.close()
    server.close()  # again is fine


def test_a_taken_port_is_a_cluster_fault(start: Starter, certificates: Certificates) -> None:
    with pytest.raises(ClusterFault, match=r"cannot listen on 127.0.0.1"):
        Server("127.0.0.1", start().port, certificates.pki("a"), members(), {})


# --- certificates ----------------------------------------------------------------------------------------------------


def test_certificate_files(certificates: Certificates, tmp_path: Path) -> None:
    for key in certificates.folder.glob("[!c]*/*.key"):
        assert key.stat().st_mode & 0o777 == 0o600
    with pytest.raises(UsageError, match="holds a certificate authority already"):
        pki.make_authority(certificates.folder / "own", "own")
    with pytest.raises(UsageError, match="no certificate authority in"):
        pki.issue(tmp_path, tmp_path, "x", "x", "node", [])
    for name in ("", "x" * 65, "*", "ä", "a\nb"):
        with pytest.raises(UsageError, match="cannot be a name"):
            pki.issue(certificates.folder / "own", tmp_path, "x", name, "node", [])
    with pytest.raises(UsageError, match="unknown role"):
        pki.issue(certificates.folder / "own", tmp_path, "x", "x", "root", [])  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"cannot load ca.crt, x.crt and x.key"):
        tls.server_context(Pki(tmp_path, "x"))


def test_daemons_load_nothing_heavy() -> None:
    code = (
        "import sys, mrcore.wire.service, mrcore.wire.client, mrcore.wire.data; "
        "print([m for m in ('pydantic', 'cryptography', 'fabric', 'click', 'rich', 'yaml') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
