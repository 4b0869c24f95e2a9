"""RPyC's stream → channel → connection, each with what was unsafe taken out. Limits are in `tls.Limits`.

After TLS the server speaks first, on both protocols: a JSON frame `[u32 length] + {"welcome": wire version}` or
`{"error": …}`. A TLS 1.3 client believes its handshake done before the server has judged its certificate; waiting for
the welcome turns every refusal, also TLS's own alerts, into one clear answer at the time of connecting.

Then, on `mr-rpc/1`, RPyC's frames `[u32 length][u8 compressed] + brine + "\\n"`, where `compressed` must be 0: a
frame may inflate a thousandfold. Of RPyC's requests only HANDLE_CALLATTR with the name `call` is served, on the root,
which is addressed by None. Nothing travels by reference: there is no object to ask for attributes, and no peer can
make us call it back. Exceptions travel as text: RPyC's loader would let a peer raise SystemExit in us.
"""

from __future__ import annotations

import json
import re
import select
import socket
import ssl
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from time import monotonic
from typing import Any

from rpyc.core import brine, consts
from rpyc.core import channel as rpyc_channel
from rpyc.core.protocol import DEFAULT_CONFIG
from rpyc.core.protocol import Connection as RpycConnection
from rpyc.core.stream import SocketStream

from mrcore.errors import MrcoreError, Refused, Unreachable
from mrcore.system.limited_log import RateLimit
from mrcore.text import one_line
from mrcore.wire.tls import Limits

# Everything that RPyC can allow or include is off; calls are bounded by the stream, on a clock that nobody sets.
_SWITCHES = ("allow_", "include_", "import_", "instantiate_", "propagate_", "log_", "bind_")
HARDENED = {name: False for name in DEFAULT_CONFIG if name.startswith(_SWITCHES)} | {"sync_request_timeout": None}
LENGTH = struct.Struct("!I")
BUFFER_BYTES = 64 << 10
PLAIN_FRAME_BYTES, AROUND_TEXT_BYTES = 4096, 512  # a larger frame is one text with so much around it
ERROR_CHARACTERS = 500  # of an error of the RPC layer itself


TRACEBACKS = RateLimit(per_second=0.2, burst=5)  # of what a peer's requests made this daemon log
_TEXT = re.compile(r'"(?:[^"\\]|\\.)*"')
_L4 = struct.Struct("!L")


def check_values(text: str, limits: Limits) -> str:
    """Return a peer's JSON as it came. Raises ValueError when it has more values than a message needs.

    Decoded, a value takes up to a hundred bytes for its two in the text: 8 MiB of `[],` would become 200 MiB.
    """
    if _values(text) > limits.json_values and _values(_TEXT.sub("", text)) > limits.json_values:
        raise ValueError(f"more than {limits.json_values:,} values")
    return text


def load_json(text: str, limits: Limits) -> Any:
    """Decode a peer's JSON. Raises ValueError for what is none, or has more values than a message needs."""
    try:
        return json.loads(check_values(text, limits))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _values(text: str) -> int:
    return text.count(",") + text.count("[") + text.count("{")


class Stream(SocketStream):  # type: ignore[misc]
    """A buffered TLS stream to `peer` whose every wait ends: at the deadline of `within`, else after `stall_seconds`.

    Raises Unreachable (late, closed, broken) or Refused (TLS's verdict), and is closed then. For one thread.
    """

    def __init__(self, sock: ssl.SSLSocket, limits: Limits, peer: str) -> None:
        super().__init__(sock)
        self.limits, self.peer = limits, peer
        self._deadline: tuple[float, str] | None = None  # monotonic; what for
        self._timeout = -1.0
        self._view, self._start, self._end = memoryview(bytearray(BUFFER_BYTES)), 0, 0

    @contextmanager
    def within(self, seconds: float, doing: str) -> Iterator[None]:
        """Bound everything inside by one common deadline; an earlier one stays. `doing` is for the error's text."""
        before, mine = self._deadline, (monotonic() + seconds, doing)
        self._deadline = mine if before is None else min(before, mine)
        try:
            yield
        finally:
            self._deadline = before

    def step(self, operation: Callable[..., Any], *arguments: Any) -> Any:
        """Do one operation of the socket in the time that is left; whatever goes wrong closes the stream."""
        try:
            left = self._left()
            if left != self._timeout:  # setting it is a system call
                self.sock.settimeout(left)
                self._timeout = left
            return operation(*arguments)
        except (OSError, EOFError, ValueError) as error:
            if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
                self.linger()
            self.close()
            raise self._fault(error) from error

    def _left(self) -> float:
        left = self.limits.stall_seconds if self._deadline is None else self._deadline[0] - monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        return left

    def _fault(self, error: Exception) -> MrcoreError:
        if isinstance(error, ssl.SSLCertVerificationError):
            return Refused(f"{self.peer} has no acceptable certificate: {error.verify_message}")
        if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
            return Refused(f"{self.peer} refused TLS or this side's certificate: {error.reason or error}")
        doing = self._deadline[1] if self._deadline else f"bytes within {self.limits.stall_seconds:g} s"
        return Unreachable(f"{self.peer} did not answer: {doing}: {error or type(error).__name__}")

    def take(self, count: int) -> memoryview:
        """Give exactly `count` bytes; the view holds them until the next `take`."""
        while self._end - self._start < count:
            if self._start + count > len(self._view):
                self._make_room(count)
            self._end += self.step(self._receive)
        self._start += count
        return self._view[self._start - count : self._start]

    def _receive(self) -> int:
        if got := self.sock.recv_into(self._view[self._end :]):
            return int(got)
        raise EOFError("the connection was closed")

    def _make_room(self, count: int) -> None:
        """Move what is left to the front; grow only as bytes arrive, never on the word of a header."""
        left = bytes(self._view[self._start : self._end])
        if len(left) == len(self._view):
            self._view = memoryview(bytearray(min(2 * len(left), count)))
        self._view[: len(left)] = left
        self._start, self._end = 0, len(left)

    def read(self, count: int) -> bytes:
        """Give exactly `count` bytes as an object of their own, and the memory of a large frame back."""
        data = bytes(self.take(count))
        if self._start == self._end and len(self._view) > BUFFER_BYTES:
            self._view, self._start, self._end = memoryview(bytearray(BUFFER_BYTES)), 0, 0
        return data

    def write(self, data: bytes | memoryview) -> None:
        """Send everything."""
        view = memoryview(data)
        while view:
            view = view[self.step(self.sock.send, view) :]

    def poll(self, timeout: Any = None) -> bool:
        """Wait for something to read, until the deadline if there is one, else for ever; never gives False."""
        return bool(self.step(self._wait))

    def _wait(self) -> bool:
        if self.readable(self._left() if self._deadline else None):
            return True
        raise TimeoutError("timed out")

    def readable(self, seconds: float | None = 0) -> bool:
        """Tell whether something (or the end) can be read within `seconds`; RPyC's misses what TLS has decrypted."""
        if self._end > self._start or self.sock.pending():
            return True
        poller = select.poll()
        poller.register(self.sock, select.POLLIN)
        return bool(poller.poll(None if seconds is None else seconds * 1000))

    def send_json(self, value: Any) -> None:
        """Send one JSON frame within `frame_seconds`. Raises Refused, too, if it is larger than a peer would take."""
        data = json.dumps(value, default=str).encode()
        if len(data) > self.limits.request_bytes:
            raise Refused(
                f"a frame of {len(data)} bytes exceeds the limit of {self.limits.request_bytes}; ask for less"
            )
        with self.within(self.limits.frame_seconds, "taking a frame"):
            self.write(LENGTH.pack(len(data)) + data)

    def receive_json(self, seconds: float, doing: str) -> dict[str, Any]:
        """Give the next JSON frame, which must be an object and be here whole within `seconds`. Raises Refused."""
        with self.within(seconds, doing):
            (length,) = LENGTH.unpack(self.take(LENGTH.size))
            if length > self.limits.request_bytes:
                raise Refused(f"{self.peer} sent a frame of {length} bytes, limit {self.limits.request_bytes}")
            data = self.read(length)
        with suppress(ValueError):
            if type(value := load_json(data.decode(), self.limits)) is dict:
                return value
        raise Refused(f"{self.peer} sent a frame that is no JSON object")

    def linger(self) -> None:
        """Before closing: let a peer that is still sending read our last words, which a reset would destroy."""
        deadline = monotonic() + self.limits.linger_seconds
        with suppress(OSError, TypeError, EOFError):
            socket.socket.shutdown(self.sock, socket.SHUT_WR)  # underneath TLS, as is recv
            while (left := deadline - monotonic()) > 0:
                self.sock.settimeout(left)
                if not socket.socket.recv(self.sock, BUFFER_BYTES):
                    return

    def abort(self) -> None:
        """Wake whoever waits on this stream, from any thread, without blocking; its owner closes it."""
        with suppress(OSError, TypeError):  # TypeError: closed already
            socket.socket.shutdown(self.sock, socket.SHUT_RDWR)  # underneath TLS, whose object is the owner's


class Channel(rpyc_channel.Channel):  # type: ignore[misc]
    """RPyC's frames, uncompressed, bounded in bytes, each with one deadline from its first byte to its last.

    `most_bytes` bounds what is received: who may only ask for little is not listened to at length.
    """

    def __init__(self, stream: Stream, most_bytes: int | None = None) -> None:
        super().__init__(stream, compress=False)
        self.limits, self.most_bytes = stream.limits, most_bytes or stream.limits.frame_bytes

    def recv(self) -> bytes:
        """Give the next frame. Raises Refused for one that is compressed, too large or not ended properly."""
        with self.stream.within(self.limits.frame_seconds, "the rest of a frame"):
            length, compressed = self.FRAME_HEADER.unpack(self.stream.take(self.FRAME_HEADER.size))
            if compressed or length > self.most_bytes:
                what = "compressed " if compressed else ""
                raise Refused(f"{self.stream.peer}: refused a {what}frame of {length} bytes, limit {self.most_bytes}")
            data: bytes = self.stream.read(length)
            end = bytes(self.stream.take(len(self.FLUSHER)))
        if end != self.FLUSHER:
            raise Refused("refused a frame without its end mark")
        if length > PLAIN_FRAME_BYTES and not _is_one_text(data):
            raise Refused(f"refused a frame of {length} bytes that is not one text")
        return data

    def send(self, data: bytes) -> None:
        """Send one frame. Raises Refused if it is larger than the peer would take."""
        if len(data) > self.limits.frame_bytes:
            raise Refused(f"a message of {len(data)} bytes exceeds the limit of {self.limits.frame_bytes}")
        with self.stream.within(self.limits.frame_seconds, "taking a frame"):
            self.stream.write(self.FRAME_HEADER.pack(len(data), 0) + data + self.FLUSHER)


def _is_one_text(data: bytes) -> bool:
    """Whether nearly all of a frame is one text, as in every call and answer; others grow thirtyfold in brine."""
    at = data.find(brine.TAG_UNICODE + brine.TAG_STR_L4, 0, AROUND_TEXT_BYTES) + 2
    return at > 1 and 0 <= len(data) - at - _L4.size - _L4.unpack_from(data, at)[0] <= AROUND_TEXT_BYTES


class Connection(RpycConnection):  # type: ignore[misc]
    """RPyC's request and reply engine, reduced to calls by value of the root's one method, `exposed_call`."""

    _closed: bool

    def __init__(self, root: Any, stream: Stream, most_bytes: int | None = None) -> None:
        super().__init__(root, Channel(stream, most_bytes), HARDENED)

    def call(self, method: str, arguments: str, most_bytes: int) -> str:
        """Call the peer's `exposed_call`; the answer has at most so many bytes. Raises Refused, what Stream raises."""
        self._channel.most_bytes = most_bytes
        reply = self.sync_request(consts.HANDLE_CALLATTR, None, "call", (method, arguments))
        if type(reply) is not str:
            raise Refused(f"the peer answered with {type(reply).__name__} instead of text")
        return reply

    @classmethod
    def _request_handlers(cls) -> dict[int, Any]:
        every = range(consts.HANDLE_PING, consts.HANDLE_INSTANCECHECK + 1)
        return {**dict.fromkeys(every, cls._refuse), consts.HANDLE_CALLATTR: cls._handle_callattr}

    def _refuse(self, *args: Any) -> None:
        raise Refused("nothing but the method `call` is served")

    def _handle_callattr(self, target: Any, name: Any, args: Any, *more: Any) -> Any:
        if target is not None or more or type(name) is not str or name != "call":
            self._refuse()
        if type(args) is not tuple or len(args) != 2 or any(type(arg) is not str for arg in args):
            raise Refused("`call` takes two texts: a method and its arguments as JSON")
        return getattr(self._local_root, "exposed_call", self._refuse)(*args)

    def _box(self, obj: Any) -> tuple[int, Any]:
        if not brine.dumpable(obj):
            raise TypeError(f"{type(obj).__name__} does not travel by value")
        return consts.LABEL_VALUE, obj

    def _unbox(self, package: Any) -> Any:
        if type(package) is not tuple or len(package) != 2 or package[0] != consts.LABEL_VALUE:
            raise Refused("refused a reference to an object: only values travel")
        return package[1]

    def _box_exc(self, typ: type[BaseException], val: BaseException, tb: Any) -> str:
        return one_line(f"{typ.__name__}: {val}", ERROR_CHARACTERS)

    def _unbox_exc(self, raw: Any) -> Refused:
        return Refused(
            f"the peer refused: {one_line(raw, ERROR_CHARACTERS)}" if type(raw) is str else "the peer refused"
        )

    def close(self) -> None:
        """Drop the connection at once. RPyC's own asks the peer first, and waits for a stopped one."""
        if not self._closed:
            self._closed = True
            self._cleanup()
