"""The server's side: accept, judge the certificate, then serve calls (RPyC) or bulk bytes (`data.DataHandler`).

One thread per connection does everything, beginning with the TLS handshake, so a silent client holds up no one.
Unfinished handshakes are bounded apart from the connections that follow them: one more drops the oldest, hence a
flood of silent connects cannot keep a member out. Idle RPC connections live on; the data channel ends idle ones.

A call is `call(method, arguments)`, arguments a JSON object, answered by `{"result": …}` or `{"error": to_dict()}`.
Membership and the deny list are looked up at every call, so who is struck off loses live connections as well.
"""

from __future__ import annotations

import functools
import inspect
import json
import logging
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Literal, NamedTuple, get_type_hints

import msgspec

from mrcore import WIRE_VERSION
from mrcore.errors import ClusterFault, InternalError, MrcoreError, Refused, Unreachable, unforeseen
from mrcore.messages.kinds import decode
from mrcore.system.deadline import Deadline
from mrcore.system.limited_log import INTERVAL_SECONDS, LimitedLog
from mrcore.text import one_line
from mrcore.wire import tls
from mrcore.wire.channel import Connection
from mrcore.wire.data import DataHandler
from mrcore.wire.members import Membership
from mrcore.wire.stream import Stream, check_values
from mrcore.wire.tls import DATA_PROTOCOL, LIMITS, RPC_PROTOCOL, Identity, Limits, Pki

log = logging.getLogger(__name__)
REQUEST_BYTES = 64 << 10  # a call's arguments as JSON, unless its method says otherwise
BACKLOG = 1024
FULL_PAUSE_SECONDS = 0.1  # before the next accept when the process is out of descriptors
DROP_SECONDS = 1.0  # for a dropped handshake's thread to end


class Method(NamedTuple):
    """One callable of a daemon: `function(identity, **arguments)` returns a message, or what JSON can say.

    The arguments are decoded as the function's signature annotates them, strictly and with the bounds of `messages`;
    without annotations they are plain JSON.
    `role` "master": only the master's certificate may call it; "member": the nodes' as well. `request_bytes` bounds
    the arguments.
    """

    function: Callable[..., Any]
    role: Literal["master", "member"]
    request_bytes: int = REQUEST_BYTES


def _arguments_of(function: Callable[..., object]) -> Any:
    """Return the type that the arguments of a method have: a struct with a field for each parameter but the caller."""
    parameters = list(inspect.signature(function).parameters.values())[1:]
    hints = get_type_hints(function, include_extras=True)
    if not all(item.name in hints and item.kind is not item.VAR_KEYWORD for item in parameters):
        return dict[str, Any]
    fields = [
        (item.name, hints[item.name]) if item.default is item.empty else (item.name, hints[item.name], item.default)
        for item in parameters
    ]
    return msgspec.defstruct("arguments", fields, forbid_unknown_fields=True)


class Server:
    """Listens on `address`:`port` (0: a free one, see `.port`) and serves `methods`, and bytes by `data_handler`.

    `membership` is the allow list as it is now, asked at every call. Raises UsageError (bad certificate files) and
    ClusterFault (the port is taken).
    """

    def __init__(
        self, address: str, port: int, pki: Pki, membership: Callable[[], Membership], methods: Mapping[str, Method],
        data_handler: DataHandler | None = None, *, limits: Limits = LIMITS,
    ) -> None:  # fmt: skip
        self._trusted = tls.watch_authorities(pki)
        self._context = tls.watch_files(pki, lambda: tls.server_context(pki))
        self._membership, self._methods = membership, dict(methods)
        self._arguments = {name: _arguments_of(method.function) for name, method in methods.items()}
        self._data_handler, self._limits = data_handler, limits
        self._changed = threading.Condition()
        self._peers: dict[Stream, Identity | None] = {}  # oldest first; None until the handshake is done
        self._threads: dict[Stream, threading.Thread] = {}
        self._closing = threading.Event()
        self._limited = LimitedLog(log)
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            self._listener = socket.create_server((address, port), family=family, backlog=BACKLOG)
        except OSError as error:
            raise ClusterFault(f"cannot listen on {address}:{port}: {error}") from error
        self._listener.settimeout(INTERVAL_SECONDS)
        self.address, self.port = address, int(self._listener.getsockname()[1])
        self._acceptor = threading.Thread(target=self._accept, name=f"accept:{self.port}", daemon=True)

    def start(self) -> None:
        """Serve from threads of its own; return at once."""
        self._acceptor.start()

    def close(self) -> None:
        """Stop listening, drop every live connection, wait `close_seconds` at most for the threads."""
        deadline = Deadline(self._limits.close_seconds)
        self._closing.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # closing alone would not wake accept()
        with self._changed:
            for stream in self._peers:
                stream.abort()
            threads = [self._acceptor, *self._threads.values()]
        for thread in threads:
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join(deadline.left_seconds)
        self._listener.close()
        self._limited.flush()

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                raw, peer = self._listener.accept()
            except TimeoutError:
                self._limited.tick()
                continue
            except OSError as error:
                if not self._closing.is_set():
                    self._limited.log(logging.WARNING, f"accept on {self.address}:{self.port}", error)
                    self._closing.wait(FULL_PAUSE_SECONDS)
                continue
            try:
                tls.tune(raw)
                trusted = self._trusted()  # before the context: rather too many than too few
                sock = self._context().wrap_socket(raw, server_side=True, do_handshake_on_connect=False)
                self._admit(Stream(sock, self._limits, f"{peer[0]}:{peer[1]}"), trusted)
            except (OSError, ValueError, RuntimeError) as error:  # it left; RuntimeError: the limit of threads
                self._limited.log(logging.INFO, peer[0], f"dropped: {error}")
                raw.close()

    def _admit(self, stream: Stream, trusted: frozenset[str]) -> None:
        with self._changed:
            handshaking = [other for other, identity in self._peers.items() if identity is None]
            if len(handshaking) >= self._limits.handshakes:
                oldest = handshaking[0]
                oldest.abort()
                self._changed.wait_for(lambda: self._peers.get(oldest) or oldest not in self._peers, DROP_SECONDS)
            thread = threading.Thread(target=self._run, args=(stream, trusted), name=f"peer:{stream.peer}", daemon=True)
            if not self._closing.is_set():
                self._peers[stream], self._threads[stream] = None, thread
                try:
                    thread.start()
                    return
                except RuntimeError:
                    del self._peers[stream], self._threads[stream]
                    stream.close()
                    raise
        stream.close()

    def _run(self, stream: Stream, trusted: frozenset[str]) -> None:
        host = stream.peer.rpartition(":")[0]
        try:
            self._converse(stream, trusted)
        except Unreachable as error:
            log.debug("%s", error)
        except (OSError, MrcoreError) as error:
            self._limited.log(logging.INFO, host, f"dropped: {str(error).replace(stream.peer, host)}")
        except Exception as error:  # noqa: BLE001  logged; the server goes on
            self._limited.log(logging.ERROR, host, f"dropped: {type(error).__name__}", exc_info=True)
        finally:
            stream.close()
            with self._changed:
                del self._peers[stream], self._threads[stream]
                self._changed.notify_all()

    def _converse(self, stream: Stream, trusted: frozenset[str]) -> None:
        with stream.within(self._limits.handshake_seconds, "TLS"):
            stream.step(stream.sock.do_handshake)
        data, protocol = self._data_handler, stream.sock.selected_alpn_protocol()
        try:
            identity = tls.peer_identity(stream.sock)._replace(trusted=trusted)
            self.authorise(identity)
            self._enter(stream, identity)
            if protocol != RPC_PROTOCOL and (protocol != DATA_PROTOCOL or data is None):
                raise Refused(f"{self.address}:{self.port} does not speak {protocol}")
        except Refused as error:
            stream.send_json({"error": error.to_dict()})
            stream.linger()
            raise
        stream.send_json({"welcome": WIRE_VERSION})
        if protocol == DATA_PROTOCOL and data is not None:
            return data.serve(stream, identity, self.authorise)
        limits = self._limits
        most = limits.frame_bytes if identity.role == "master" else limits.member_frame_bytes
        with Connection(stream, functools.partial(self._answer, identity), most) as connection:
            while True:
                connection.serve(None)

    def authorise(self, identity: Identity) -> None:
        """Raise Refused unless the holder is on the allow list, with this very certificate.

        A connection from when another authority counted is ended instead: its holder comes again with a new
        certificate, or not at all.
        """
        if identity.trusted - self._trusted():
            with self._changed:
                for stream in [stream for stream, other in self._peers.items() if other == identity]:
                    stream.abort()
            raise Refused(f"{identity.name} connected when another authority counted")
        if why := self._membership().objection(identity.role, identity.name, identity.serial, identity.cluster):
            raise Refused(f"{why} (asked at {self.address}:{self.port})", code="certificate")

    def _enter(self, stream: Stream, identity: Identity) -> None:
        with self._changed:
            others = [other for other in self._peers.values() if other is not None]
            same = sum(other.name == identity.name for other in others)
            members = sum(other.role != "master" for other in others)
            if same >= self._limits.connections_per_peer:
                raise Refused(f"{identity.name} has {same} connections to {self.address}:{self.port}, the limit")
            if identity.role != "master" and members >= self._limits.connections:
                raise Refused(f"{self.address}:{self.port} has {members} connections of members, the limit")
            self._peers[stream] = identity
            self._changed.notify_all()

    def _answer(self, identity: Identity, method: str, arguments: str) -> str:
        try:
            self.authorise(identity)
            entry = self._methods.get(method)
            if entry is None:
                raise Refused(f"{self.address}:{self.port} has no method {method[:100]!r}")
            if entry.role != "member" and identity.role != "master":
                raise Refused(f"{method} is the master's to call; {identity.name} is a {identity.role}")
            if len(arguments) > entry.request_bytes:
                raise Refused(f"{method}: arguments of {len(arguments)} bytes, limit {entry.request_bytes}")
            try:
                given = decode(self._arguments[method], check_values(arguments, self._limits))
            except ValueError as error:
                raise Refused(f"{method}: not arguments of this method: {one_line(error, 200)}") from None
            named = given if type(given) is dict else msgspec.structs.asdict(given)
            text = json.dumps({"result": msgspec.to_builtins(entry.function(identity, **named))})
            if len(text) >= self._limits.frame_bytes - self._limits.frame_room_bytes:
                raise InternalError(f"{method}: a reply of {len(text):,} bytes exceeds the limit of a frame")
            return text
        except MrcoreError as error:
            plain = error.to_dict()
        except Exception as error:  # noqa: BLE001  logged; the server goes on
            self._limited.log(logging.ERROR, identity.name, f"{method} failed: {type(error).__name__}", exc_info=True)
            fault = unforeseen(error, f"{method} failed at {self.address}:{self.port}")
            plain = type(fault)(f"{fault.message}; its log has the traceback").to_dict()
        return json.dumps({"error": plain})
