"""The client's side of `mr-rpc/1`, and how both protocols connect.

Nothing is ever sent twice: a call whose connection breaks raises Unreachable, and its caller decides. The next
call connects afresh. A connection that died while idle is noticed before a call is sent on it.
"""

from __future__ import annotations

import json
import socket
import ssl
import threading
from typing import Any, TypeVar

import msgspec

from mrcore import WIRE_VERSION
from mrcore.errors import Malformed, MrcoreError, Refused, Unreachable, UsageError
from mrcore.messages.kinds import decode
from mrcore.messages.methods import Method, decode_error
from mrcore.system.deadline import Deadline
from mrcore.text import one_line
from mrcore.wire import tls
from mrcore.wire.channel import Connection
from mrcore.wire.members import watch_membership
from mrcore.wire.stream import Stream, check_values
from mrcore.wire.tls import LIMITS, RPC_PROTOCOL, Limits, Pki

T = TypeVar("T")


class Caller:
    """What both clients share: one server, the name that its certificate must have, one connection kept for reuse."""

    ALPN = ""

    def __init__(
        self, address: str, port: int, pki: Pki, server_name: str | None = None,
        connect_timeout_seconds: float = 5, call_timeout_seconds: float = 10, *, limits: Limits = LIMITS,
    ) -> None:  # fmt: skip
        self.address, self.port, self.limits = address, port, limits
        self._name, self._connect_seconds = server_name or address, connect_timeout_seconds
        self._call_seconds = call_timeout_seconds
        self._context = tls.watch_files(pki, lambda: tls.client_context(pki, self.ALPN))
        self._membership = watch_membership(pki.members) if pki.members is not None else None
        self._meant = server_name  # whose certificate it must be; None: of any node at the address
        self._made_with: ssl.SSLContext | None = None  # the context of the stream
        self._stream: Stream | None = None
        self._lock = threading.Lock()

    def certificate_ends(self) -> float | None:
        """Return when the certificate of this connection's server ends, in seconds since 1970; None: not connected."""
        shown = self._stream.sock.getpeercert() if self._stream is not None else None
        return ssl.cert_time_to_seconds(str(shown["notAfter"])) if shown else None

    def _objection(self, stream: Stream) -> str | None:
        """Return why the server of this stream is not to be trusted (any more), None: it is."""
        server = tls.peer_identity(stream.sock)
        if server.role != "node" or (self._meant is not None and server.name != self._meant):
            return f"there answers {server.name}, a {server.role}, not the node {self._meant or self._name}"
        who = self._membership() if self._membership is not None else None
        return who.objection(server.role, server.name, server.serial, server.cluster) if who else None

    def _is_good(self, stream: Stream) -> bool:
        """Return whether a kept stream may be used: nothing unasked for came, both certificates count still."""
        return not stream.readable() and self._context() is self._made_with and not self._objection(stream)

    def _connect(self) -> Stream:
        """Return a stream that the server has welcomed, all within the time to connect. Raises Unreachable, Refused."""
        peer, deadline = f"{self.address}:{self.port}", Deadline(self._connect_seconds)
        doing = f"connect within {self._connect_seconds:g} s"
        try:
            raw = socket.create_connection((self.address, self.port), self._connect_seconds)
            try:
                tls.tune(raw)
                self._made_with = self._context()
                sock = self._made_with.wrap_socket(raw, server_hostname=self._name, do_handshake_on_connect=False)
            except BaseException:
                raw.close()
                raise
        except (OSError, ValueError) as error:  # ValueError: no name that a certificate could have
            raise Unreachable(f"{peer} did not answer: {doing}: {error}") from error
        stream = Stream(sock, self.limits, peer)
        try:
            with stream.within(deadline.left_seconds, doing):
                stream.step(sock.do_handshake)
                greeting = stream.receive_json(self._connect_seconds, doing)
            if why := self._objection(stream):
                raise Refused(f"{peer} is not trusted: {why}", code="certificate")
            if "error" in greeting:
                raise decode_error(greeting["error"], self._name)
            if greeting.get("welcome") != WIRE_VERSION or sock.selected_alpn_protocol() != self.ALPN:
                raise Refused(f"{peer} speaks wire version {greeting.get('welcome')}, this side {WIRE_VERSION}")
        except BaseException:
            stream.close()
            raise
        return stream


class _Answer(msgspec.Struct):
    """What a server answers a call with: one of the two."""

    result: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    error: Any = msgspec.UNSET


class Client(Caller):
    """Calls the methods of one server. Connects at the first call, and again after trouble.

    `server_name`: the name in the server's certificate, by default the address. Raises UsageError (bad files). May be
    shared by threads, but makes one call at a time: a thread that waits long (a long poll) wants a client of its own.
    """

    ALPN = RPC_PROTOCOL
    _connection: Connection | None = None
    _closed = False

    def call(self, method: Method[T], *, timeout_seconds: float | None = None, **arguments: object) -> T:
        """Call a method; return its answer, checked. `arguments` are messages, or what JSON can say.

        Raises what the method raised (of `errors`), Refused, Unreachable (no answer within `timeout_seconds`, which
        does not count the time to connect), UsageError (the request is too large), TypeError (is no JSON).
        """
        name, text = method.name, json.dumps(msgspec.to_builtins(arguments))
        if len(text) >= self.limits.frame_bytes - self.limits.frame_room_bytes:
            raise UsageError(f"{name}: arguments of {len(text)} bytes exceed the frame limit")
        seconds = self._call_seconds if timeout_seconds is None else timeout_seconds
        if not self._lock.acquire(timeout=seconds):
            raise Unreachable(f"{self.address}:{self.port}: another call held the connection: {name} in {seconds:g} s")
        try:
            stream, connection = self._ready()
            if self._closed:  # looked at after the stream is where close() finds it
                raise Unreachable(f"{self.address}:{self.port} was not asked: this client is closed")
            with stream.within(seconds, f"{name} within {seconds:g} s"):
                most = min(method.most_bytes, self.limits.frame_bytes)
                answer = decode(_Answer, check_values(connection.call(name, text, most), self.limits))
        except Refused as error:
            self._drop()
            raise Refused(f"node {self._name}: {error.message}", **error.details) from error
        except MrcoreError:
            self._drop()
            raise
        except BaseException as error:  # an answer may still be under way: never reuse the connection
            self._drop()
            if isinstance(error, Exception):
                what = f"{self.address}:{self.port} garbled its answer to {name}"
                raise Malformed(f"node {self._name}: {what}: {one_line(repr(error), 300)}", node=self._name) from error
            raise
        finally:
            self._lock.release()
        if answer.result is not msgspec.UNSET:
            return method.decode(answer.result, arguments, self._name)
        if answer.error is not msgspec.UNSET:
            raise decode_error(answer.error, self._name, method)
        raise Malformed(f"node {self._name} answered {name} with something that is no answer", node=self._name)

    def close(self) -> None:
        """End for good, without waiting; a call that another thread has under way raises Unreachable."""
        self._closed, stream = True, self._stream
        if stream is not None:
            stream.abort()
        if self._lock.acquire(blocking=False):  # else the call that is ended drops the connection
            self._drop()
            self._lock.release()

    def _ready(self) -> tuple[Stream, Connection]:
        if self._stream is None or self._connection is None or not self._is_good(self._stream):
            self._drop()
            self._stream = self._connect()
            self._connection = Connection(self._stream)
        return self._stream, self._connection

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = self._stream = None
