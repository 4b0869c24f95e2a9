"""The data channel: ranges in batches, uploads that resume, and what happens when bytes, files or peers go bad."""

from __future__ import annotations

import json
import os
import socket
import ssl
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from conditions import wait_until
from daemons import members
from peers import FAST, Certificates, descriptors, drain, fake_server, make_certificates, tls_socket

from mrcore import WIRE_VERSION
from mrcore.errors import ClusterFault, JobFault, Malformed, MrcoreError, Refused, Unreachable
from mrcore.wire.data import DataClient, DataHandler, Range, Relay, Upload, pieces
from mrcore.wire.data.pieces import FAULT, LAST, MORE, PIECE
from mrcore.wire.service import Server
from mrcore.wire.stream import Stream
from mrcore.wire.tls import DATA_PROTOCOL, LIMITS, Identity

LIMITS_HERE = replace(FAST, piece_bytes=64 << 10, stall_seconds=1, idle_data_seconds=1.2)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("pki"))


class Store:
    """A node's files: requests are `[name, offset, length]`, or lists of these; uploads go to `uploads/NAME`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.uploads = folder, folder / "uploads"
        self.uploads.mkdir()
        self.callers: list[Identity] = []
        self.finished = threading.Event()

    def write(self, name: str, size: int) -> bytes:
        content = os.urandom(size)
        (self.folder / name).write_bytes(content)
        return content

    def resolve(self, identity: Identity, request: Any) -> Iterator[Range]:
        self.callers.append(identity)
        if request == "fail":
            raise JobFault("no such run", run=3)
        if request == "crash":
            raise ZeroDivisionError("oops")
        for name, offset, length in [request] if request and isinstance(request[0], str) else request:
            yield Range(self.folder / name, offset, length, "run" if name.startswith("r") else "part")

    def receive(self, identity: Identity, request: dict[str, Any]) -> Upload:
        name = request["name"]
        if request.get("refuse"):
            raise Refused(f"{identity.name} may not write {name}")
        partial = self.uploads / f"{name}.partial"

        def finish() -> dict[str, Any]:
            self.finished.set()
            if request.get("fail"):
                raise ClusterFault("cannot unpack it")
            os.replace(partial, self.uploads / name)
            return {"stored": name}

        return Upload(partial, finish, resume=bool(request.get("resume")))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


@pytest.fixture
def handler(store: Store) -> DataHandler:
    return DataHandler(store.resolve, store.receive)


@pytest.fixture
def server(certificates: Certificates, handler: DataHandler) -> Iterator[Server]:
    threads = set(threading.enumerate())
    server = Server("127.0.0.1", 0, certificates.pki("a"), members("a", "b"), {}, handler, limits=LIMITS_HERE)
    server.start()
    yield server
    server.close()
    wait_until(lambda: set(threading.enumerate()) <= threads)


@pytest.fixture
def client(server: Server, certificates: Certificates) -> Iterator[DataClient]:
    with closing(DataClient("127.0.0.1", server.port, certificates.pki("b"), limits=LIMITS_HERE)) as client:
        yield client


def collect(client: DataClient, requests: list[Any]) -> tuple[dict[int, bytes], list[tuple[int, int]]]:
    got: dict[int, bytes] = dict.fromkeys(range(len(requests)), b"")

    def sink(index: int, chunk: memoryview) -> None:
        got[index] += bytes(chunk)

    return got, client.get(requests, sink)


# --- GET -------------------------------------------------------------------------------------------------------------


def test_a_batch_of_ranges_arrives_in_order(store: Store, handler: DataHandler, client: DataClient) -> None:
    run, part = store.write("r", 300_001), store.write("p", 1000)
    requests: list[Any] = [
        ["r", 0, 300_001],
        ["p", 10, 5],
        ["p", 1000, 0],
        [],
        [["r", 1, 2], ["p", 0, 1000], ["r", 300_000, 1], ["p", 3, 0]],
        ["r", 70_000, 65_536],
    ]
    expected = [run, part[10:15], b"", b"", run[1:3] + part + run[-1:], run[70_000:135_536]]
    got, told = collect(client, requests)
    assert list(got.values()) == expected
    assert told == [(len(content), zlib.crc32(content)) for content in expected]
    assert handler.served() == {"run": 300_001 + 3 + 65_536, "part": 1005}
    assert {caller.name for caller in store.callers} == {"b"}


def test_large_batches_go_in_several_frames(store: Store, client: DataClient) -> None:
    run = store.write("r", 4096)
    requests = [["r", n % 4096, 1] for n in range(LIMITS.batch_requests + 10)]
    client.limits = replace(LIMITS_HERE, batch_requests=1000)  # the frame of all would exceed the server's limit
    got, _ = collect(client, requests)
    assert b"".join(got.values()) == bytes(run[n % 4096] for n in range(len(requests)))


def test_a_descriptor_stays_open(store: Store, certificates: Certificates) -> None:
    content = store.write("r", 5000)
    descriptor = os.open(store.folder / "r", os.O_RDONLY)
    handler = DataHandler(lambda identity, request: [Range(descriptor, 1000, 2000), Range(descriptor, 0, 5000)])
    server = Server("127.0.0.1", 0, certificates.pki("a"), members(), {}, handler)
    server.start()
    with closing(DataClient("127.0.0.1", server.port, certificates.pki("master"))) as client:
        for _ in range(2):
            assert collect(client, [0])[0][0] == content[1000:3000] + content
    server.close()
    os.close(descriptor)


def test_the_answers_errors_are_raised_and_the_client_goes_on(store: Store, client: DataClient) -> None:
    store.write("r", 1000)
    with pytest.raises(JobFault, match="no such run") as fault:
        collect(client, [["r", 0, 10], "fail", ["r", 0, 10]])
    assert fault.value.details == {"run": 3}
    with pytest.raises(ClusterFault, match="ZeroDivisionError: oops"):
        collect(client, ["crash"])
    for offset, length in ((-1, 10), (5, -1)):
        with pytest.raises(Refused, match="there are no"):
            collect(client, [["r", offset, length]])
    with pytest.raises(ClusterFault, match="TypeError"):
        collect(client, [["r", "0", 5]])
    with pytest.raises(ClusterFault, match="No such file"):
        collect(client, [["missing", 0, 10]])
    with pytest.raises(ClusterFault, match="ends at byte 1000, before 2000: it shrank"):
        collect(client, [["r", 0, 2000]])
    assert len(collect(client, [["r", 0, 1000]])[0][0]) == 1000


def test_what_the_sink_raises_is_not_the_networks_fault(store: Store, client: DataClient) -> None:
    store.write("r", 1_000_000)

    def full(index: int, chunk: memoryview) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left") as error:
        client.get([["r", 0, 1_000_000]], full)
    assert not isinstance(error.value, MrcoreError)
    assert collect(client, [["r", 0, 10]])[1]


def test_a_flipped_bit_is_refused_before_it_is_delivered(
    store: Store, client: DataClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The piece is corrupted after its crc32 was taken: as by bad memory, where TLS protects nothing."""
    content = store.write("r", 200_000)
    good = pieces.Outbox.flush
    seen: list[int] = []

    def flip(outbox: pieces.Outbox) -> None:
        seen.append(outbox._used)
        if len(seen) == 2:
            outbox._view[5000] ^= 1
        good(outbox)

    monkeypatch.setattr(pieces.Outbox, "flush", flip)
    got = bytearray()
    with pytest.raises(Refused, match="arrived corrupt: crc32"):
        client.get([["r", 0, 200_000]], lambda index, chunk: got.extend(chunk))
    assert len(seen) >= 2
    assert len(got) == LIMITS_HERE.piece_bytes
    assert content.startswith(got)
    monkeypatch.undo()
    assert collect(client, [["r", 0, 200_000]])[0][0] == content


@pytest.mark.parametrize(
    ("sent", "error", "text"),
    [
        (b"", Unreachable, "did not answer: bytes within 1 s"),
        (PIECE.pack(MORE, 100, 0)[:5], Unreachable, "did not answer: bytes within 1 s"),
        (PIECE.pack(LAST, 100, 0) + bytes(50), Unreachable, "did not answer: bytes within 1 s"),
        (PIECE.pack(LAST, 1 << 31, 0), Refused, "garbled content"),
        (PIECE.pack(9, 1, 0), Refused, "garbled content"),
        (PIECE.pack(LAST, 4, 0) + b"abcd", Refused, "arrived corrupt"),
        (PIECE.pack(FAULT, 2, zlib.crc32(b"[]")) + b"[]", Malformed, "an error that is none"),
        (PIECE.pack(FAULT, 1, zlib.crc32(b"{")) + b"{", Malformed, "an error that is none"),
    ],
)
def test_a_bad_server_costs_the_stall_time_at_most(
    certificates: Certificates, sent: bytes, error: type[MrcoreError], text: str
) -> None:
    def play(sock: ssl.SSLSocket) -> None:
        stream = Stream(sock, LIMITS_HERE, "peer")
        stream.send_json({"welcome": WIRE_VERSION})
        stream.receive_json(2, "")
        stream.send_json({"get": 1})
        stream.write(sent)

    began = monotonic()
    with fake_server(certificates, play) as port:
        client = DataClient("127.0.0.1", port, certificates.pki("b"), limits=LIMITS_HERE)
        with pytest.raises(error, match=text):
            collect(client, [0])
    assert monotonic() - began < LIMITS.stall_seconds  # long before, on a busy machine too


def test_an_idle_connection_is_replaced_without_a_word(store: Store, client: DataClient) -> None:
    store.write("r", 10)
    collect(client, [["r", 0, 10]])
    first = client._stream
    collect(client, [["r", 0, 10]])
    assert client._stream is first
    assert first is not None
    wait_until(first.readable)  # the server ended it
    collect(client, [["r", 0, 10]])
    assert client._stream is not first


def test_a_reader_that_stalls_is_dropped_and_leaves_nothing(
    store: Store, server: Server, client: DataClient, certificates: Certificates
) -> None:
    store.write("r", 50_000_000)
    collect(client, [["r", 0, 10]])
    threads, files = threading.active_count(), descriptors()
    with tls_socket(server.port, certificates.pki("b"), DATA_PROTOCOL) as sock:
        request = json.dumps({"get": [["r", 0, 50_000_000]] * 3}).encode()
        sock.sendall(struct.pack("!I", len(request)) + request)
        wait_until(lambda: threading.active_count() > threads)
        assert collect(client, [["r", 0, 10]])[1]  # nobody else is stopped
        wait_until(lambda: threading.active_count() <= threads)
    wait_until(lambda: descriptors() <= files)


def test_who_is_struck_off_gets_no_more_bytes(store: Store, certificates: Certificates, handler: DataHandler) -> None:
    listed = [members("b")]
    store.write("r", 10)
    server = Server("127.0.0.1", 0, certificates.pki("a"), lambda: listed[0](), {}, handler)
    server.start()
    with closing(DataClient("127.0.0.1", server.port, certificates.pki("b"))) as client:
        collect(client, [["r", 0, 10]])
        listed[0] = members()
        for _ in range(2):
            with pytest.raises(Refused, match="b is no member"):
                collect(client, [["r", 0, 10]])
    server.close()


# --- PUT -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 65_536, 1_000_000])
@pytest.mark.parametrize("from_file", [True, False])
def test_an_upload_is_published_whole(store: Store, client: DataClient, size: int, from_file: bool) -> None:
    content = store.write("source", size)
    answer = client.put({"name": "x"}, store.folder / "source" if from_file else content)
    assert answer == {"stored": "x"}
    assert (store.uploads / "x").read_bytes() == content
    assert os.listdir(store.uploads) == ["x"]


@pytest.mark.parametrize(
    ("present", "resume"), [(400_000, True), (1_000_000, True), (2_000_000, True), (400_000, False)]
)
def test_an_upload_resumes_at_what_the_server_has(store: Store, client: DataClient, present: int, resume: bool) -> None:
    content = store.write("source", 1_000_000)
    (store.uploads / "x.partial").write_bytes((content * 2)[:present])
    sent: list[int] = []
    copy = pieces.Outbox.copy

    def spy(outbox: pieces.Outbox, source: Path, at: int, *more: Any) -> None:
        sent.append(at)
        copy(outbox, source, at, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces.Outbox, "copy", spy)
        client.put({"name": "x", "resume": resume}, store.folder / "source")
    assert sent == [present if resume and present <= 1_000_000 else 0]
    assert (store.uploads / "x").read_bytes() == content


def test_a_broken_upload_leaves_a_partial_that_the_next_one_resumes(
    store: Store, server: Server, client: DataClient, certificates: Certificates
) -> None:
    content = os.urandom(200_000)
    with tls_socket(server.port, certificates.pki("b"), DATA_PROTOCOL) as sock:
        stream = Stream(sock, LIMITS_HERE, "peer")
        stream.receive_json(1, "")
        stream.send_json({"put": {"name": "x", "resume": True}, "length": len(content)})
        assert stream.receive_json(1, "") == {"offset": 0}
        stream.write(PIECE.pack(MORE, 50_000, zlib.crc32(content[:50_000])) + content[:50_000])
        stream.write(PIECE.pack(MORE, 50_000, 1) + content[50_000:100_000])
        with pytest.raises(Refused, match="arrived corrupt"):
            client._answer(stream, 1, "")
    assert (store.uploads / "x.partial").read_bytes() == content[:50_000]  # verified bytes only
    assert not store.finished.is_set()
    client.put({"name": "x", "resume": True}, content)
    assert (store.uploads / "x").read_bytes() == content


@pytest.mark.parametrize(
    ("request_", "error", "text"),
    [
        ({"name": "x", "refuse": True}, Refused, "b may not write x"),
        ({"name": "x", "fail": True}, ClusterFault, "cannot unpack it"),
        ({"name": "no/such/folder"}, ClusterFault, "No such file"),
        ({"nameless": 1}, ClusterFault, "KeyError"),
    ],
)
def test_the_receivers_errors_are_raised(
    store: Store, client: DataClient, request_: Any, error: type[MrcoreError], text: str
) -> None:
    with pytest.raises(error, match=text):
        client.put(request_, bytes(3_000_000))
    assert client.put({"name": "y"}, b"abc") == {"stored": "y"}


def test_a_full_disk_stops_a_long_upload_early(
    store: Store, client: DataClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    pwrite = os.pwrite

    def full(fd: int, chunk: memoryview, at: int) -> int:
        written.append(at)
        if at > 500_000:
            raise OSError(28, "No space left on device")
        return pwrite(fd, chunk, at)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(ClusterFault, match="No space left on device"):
        client.put({"name": "x"}, bytes(100_000_000))
    assert max(written) < 1_000_000


def test_a_source_that_shrinks_fails_on_both_sides(
    store: Store, client: DataClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.write("source", 1000)
    stat = Path.stat
    monkeypatch.setattr(
        Path, "stat", lambda path, **more: _Longer(stat(path, **more)) if path.name == "source" else stat(path, **more)
    )
    with pytest.raises(ClusterFault, match="source ends at byte 1000, before 5000"):
        client.put({"name": "x"}, store.folder / "source")
    assert not store.finished.is_set()


@pytest.mark.parametrize("size", [0, 1, LIMITS_HERE.piece_bytes, 3 * LIMITS_HERE.piece_bytes + 7])
@pytest.mark.parametrize("share", [0, 0.4, 1])
def test_content_is_passed_on_while_it_comes_and_resumed(
    store: Store, client: DataClient, server: Server, certificates: Certificates, size: int, share: float
) -> None:
    content, present = store.write("r", size), int(size * share)
    (store.uploads / "copy.partial").write_bytes(content[:present])

    def feed(at: int, write: Callable[[memoryview], object]) -> None:
        with closing(DataClient("127.0.0.1", server.port, certificates.pki("b"), limits=LIMITS_HERE)) as other:
            other.get([["r", at, size - at]], lambda _, chunk: write(chunk))

    sent: list[int] = []
    relay = Relay(size, lambda length: zlib.crc32(content[:length]), feed)
    client.put({"name": "copy", "resume": True}, relay, sent.append)
    assert (store.uploads / "copy").read_bytes() == content and sum(sent) == size - present


@pytest.mark.parametrize("wrong", [-1, 1, "gone"])
def test_what_is_passed_on_must_be_as_long_as_was_said(store: Store, client: DataClient, wrong: Any) -> None:
    def feed(at: int, write: Callable[[memoryview], object]) -> None:
        write(memoryview(bytes(100_000)))
        if wrong == "gone":
            raise Unreachable("the node that has it died")
        write(memoryview(bytes(100_000 + wrong)))

    with pytest.raises(ClusterFault, match=r"died|ends at byte 199999|more to send"):
        client.put({"name": "copy", "resume": True}, Relay(200_000, lambda length: 0, feed))
    assert not (store.uploads / "copy").exists()
    client.put({"name": "next"}, b"usable")


class _Longer:
    def __init__(self, result: os.stat_result) -> None:
        self.st_size = result.st_size + 4000


def test_two_uploads_of_one_file_do_not_mix(
    store: Store, server: Server, client: DataClient, certificates: Certificates
) -> None:
    with tls_socket(server.port, certificates.pki("b"), DATA_PROTOCOL) as sock:
        stream = Stream(sock, LIMITS_HERE, "peer")
        stream.receive_json(1, "")
        stream.send_json({"put": {"name": "x"}, "length": 3})
        stream.receive_json(1, "")
        with pytest.raises(Refused, match=r"x.partial is being written by another transfer"):
            client.put({"name": "x"}, b"def")
        stream.write(PIECE.pack(LAST, 3, zlib.crc32(b"abc")) + b"abc")
        assert stream.receive_json(1, "") == {"result": {"stored": "x"}}
    assert (store.uploads / "x").read_bytes() == b"abc"


@pytest.mark.parametrize(
    ("length", "pieces", "text"),
    [
        (2, PIECE.pack(LAST, 3, zlib.crc32(b"abc")) + b"abc", "more than the 2 bytes"),
        (4, PIECE.pack(LAST, 3, zlib.crc32(b"abc")) + b"abc", "3 bytes instead of the 4"),
        (-1, b"", "must tell its length"),
        (True, b"", "must tell its length"),
        ("3", b"", "must tell its length"),
        (None, b"", "must tell its length"),
        (4, PIECE.pack(MORE, 1 << 30, 0), "garbled content"),
    ],
)
def test_a_lying_uploader_is_refused(
    store: Store, server: Server, certificates: Certificates, length: Any, pieces: bytes, text: str
) -> None:
    with tls_socket(server.port, certificates.pki("b"), DATA_PROTOCOL) as sock:
        stream = Stream(sock, LIMITS_HERE, "peer")
        stream.receive_json(1, "")
        stream.send_json({"put": {"name": "x"}, "length": length})
        stream.write(pieces)
        answer = stream.receive_json(1, "")
        if "offset" in answer:
            answer = stream.receive_json(1, "")
        assert text in answer["error"]["message"]
        assert drain(sock) == b""
    assert not store.finished.is_set()


def test_a_link_in_the_way_of_an_upload_is_not_followed(store: Store, client: DataClient) -> None:
    (store.folder / "precious").write_bytes(b"precious")
    (store.uploads / "x.partial").symlink_to(store.folder / "precious")
    with pytest.raises(ClusterFault, match="symbolic links"):
        client.put({"name": "x"}, b"abc")
    assert (store.folder / "precious").read_bytes() == b"precious"


def test_an_upload_that_stalls_is_dropped(
    store: Store, server: Server, client: DataClient, certificates: Certificates
) -> None:
    with tls_socket(server.port, certificates.pki("b"), DATA_PROTOCOL) as sock:
        sock.settimeout(4)
        stream = Stream(sock, LIMITS_HERE, "peer")
        stream.receive_json(1, "")
        stream.send_json({"put": {"name": "x"}, "length": 1000})
        stream.receive_json(1, "")
        stream.write(PIECE.pack(LAST, 1000, 0) + bytes(10))
        assert client.put({"name": "y"}, b"abc") == {"stored": "y"}
        assert drain(sock) == b""
    assert client.put({"name": "x"}, b"abc") == {"stored": "x"}  # the lock went with the connection


def test_puts_are_refused_where_nothing_is_received(certificates: Certificates) -> None:
    server = Server("127.0.0.1", 0, certificates.pki("a"), members(), {}, DataHandler(lambda identity, request: []))
    server.start()
    client = DataClient("127.0.0.1", server.port, certificates.pki("master"))
    with pytest.raises(Refused, match="no such data request here"):
        client.put({}, bytes(10))
    server.close()


def test_connecting_to_nobody_is_unreachable(certificates: Certificates) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    client = DataClient("127.0.0.1", port, certificates.pki("b"))
    with pytest.raises(Unreachable, match=f"127.0.0.1:{port} did not answer: connect within 5 s"):
        collect(client, [0])


def run_many(functions: list[Callable[[], object]]) -> list[BaseException]:
    errors: list[BaseException] = []

    def guarded(function: Callable[[], object]) -> None:
        try:
            function()
        except BaseException as error:  # noqa: BLE001  told to the test
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def test_many_clients_at_once(store: Store, server: Server, certificates: Certificates) -> None:
    content = store.write("r", 500_000)

    def fetch() -> None:
        with closing(DataClient("127.0.0.1", server.port, certificates.pki("b"), limits=LIMITS_HERE)) as client:
            for _ in range(3):
                got, _ = collect(client, [["r", 0, 500_000], ["r", 1, 2]])
                assert got == {0: content, 1: content[1:3]}

    assert run_many([fetch] * LIMITS_HERE.connections_per_peer) == []
