"""A TLS stream on which every wait ends, and the JSON frames with which both protocols begin. Limits: `tls.Limits`.

After TLS the server speaks first, on both protocols: a JSON frame `[u32 length] + {"welcome": wire version}` or
`{"error": …}`. A TLS 1.3 client believes its handshake done before the server has judged its certificate; waiting for
the welcome turns every refusal, also TLS's own alerts, into one clear answer at the time of connecting.
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
from typing import Any

from mrcore.errors import MrcoreError, Refused, Unreachable
from mrcore.system.deadline import Deadline
from mrcore.wire.tls import Limits

LENGTH = struct.Struct("!I")
BUFFER_BYTES = 64 << 10


_TEXT = re.compile(r'"(?:[^"\\]|\\.)*"')


def check_values(text: str, limits: Limits) -> str:
    """Return a peer's JSON as it came. Raises ValueError when it has more values than a message needs.

    Decoded, a value takes up to a hundred bytes for its two in the text: 8 MiB of `[],` would become 200 MiB.
    """
    if _values(text) > limits.json_values and _values(_TEXT.sub("", text)) > limits.json_values:
        raise ValueError(f"more than {limits.json_values:,} values")
    return text


def _values(text: str) -> int:
    return text.count(",") + text.count("[") + text.count("{")


class Stream:
    """A buffered TLS stream to `peer` whose every wait ends: at the deadline of `within`, else after `stall_seconds`.

    Raises Unreachable (late, closed, broken) or Refused (TLS's verdict), and is closed then. For one thread.
    """

    def __init__(self, sock: ssl.SSLSocket, limits: Limits, peer: str) -> None:
        self.sock, self.limits, self.peer, self.closed = sock, limits, peer, False
        self._deadline: tuple[Deadline, str] | None = None  # and what for
        self._timeout = -1.0
        self._view, self._start, self._end = memoryview(bytearray(BUFFER_BYTES)), 0, 0

    @contextmanager
    def within(self, seconds: float, doing: str) -> Iterator[None]:
        """Bound everything inside by one common deadline; an earlier one stays. `doing` is for the error's text."""
        before, mine = self._deadline, (Deadline(seconds), doing)
        self._deadline = mine if before is None or mine[0] < before[0] else before
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
            raise self._verdict(error) from error

    def _left(self) -> float:
        left = self.limits.stall_seconds if self._deadline is None else self._deadline[0].left_seconds
        if left <= 0:
            raise TimeoutError("timed out")
        return left

    def _verdict(self, error: Exception) -> MrcoreError:
        if isinstance(error, ssl.SSLCertVerificationError):
            return Refused(f"{self.peer} has no acceptable certificate: {error.verify_message}", code="certificate")
        if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
            what = f"{self.peer} refused TLS or this side's certificate: {error.reason or error}"
            return Refused(what, code="certificate")
        doing = self._deadline[1] if self._deadline else f"bytes within {self.limits.stall_seconds:g} s"
        return Unreachable(f"{self.peer} did not answer: {doing}: {error or type(error).__name__}")

    def take(self, count: int) -> memoryview:
        """Return exactly `count` bytes; the view holds them until the next `take`."""
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
        """Return exactly `count` bytes as an object of their own; free the memory of a large frame."""
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
        """Wait for something to read, until the deadline if there is one, else for ever; never returns False."""
        return bool(self.step(self._wait))

    def _wait(self) -> bool:
        if self.readable(self._left() if self._deadline else None):
            return True
        raise TimeoutError("timed out")

    def readable(self, seconds: float | None = 0) -> bool:
        """Return whether something (or the end) can be read within `seconds`, or was decrypted by TLS already."""
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
        """Return the next JSON frame, which must be an object and be here whole within `seconds`. Raises Refused."""
        with self.within(seconds, doing):
            (length,) = LENGTH.unpack(self.take(LENGTH.size))
            if length > self.limits.request_bytes:
                raise Refused(f"{self.peer} sent a frame of {length} bytes, limit {self.limits.request_bytes}")
            data = self.read(length)
        with suppress(ValueError, RecursionError):
            if type(value := json.loads(check_values(data.decode(), self.limits))) is dict:
                return value
        raise Refused(f"{self.peer} sent a frame that is no JSON object")

    def linger(self) -> None:
        """Before closing: let a peer that is still sending read our last frame, which a reset would destroy."""
        deadline = Deadline(self.limits.linger_seconds)
        with suppress(OSError):
            socket.socket.shutdown(self.sock, socket.SHUT_WR)  # underneath TLS, as is recv
            while left := deadline.left_seconds:
                self.sock.settimeout(left)
                if not socket.socket.recv(self.sock, BUFFER_BYTES):
                    return

    def close(self) -> None:
        """Drop the connection at once."""
        self.closed = True
        self.abort()
        self.sock.close()

    def abort(self) -> None:
        """Wake who waits on this stream, from any thread, without blocking; its owner closes it."""
        with suppress(OSError):
            socket.socket.shutdown(self.sock, socket.SHUT_RDWR)  # underneath TLS, whose object is the owner's
