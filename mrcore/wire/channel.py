"""All that we use of RPyC: its connection over our stream, with what was unsafe taken out. Limits are in `tls.Limits`.

On `mr-rpc/1` follow, after the welcome, RPyC's frames `[u32 length][u8 compressed] + brine + "\\n"`, where `compressed`
must be 0: a frame may inflate a thousandfold. Of RPyC's requests only HANDLE_CALLATTR with the name `call` is served,
on the root, which is addressed by None. Nothing travels by reference: there is no object to ask for attributes, and no
peer can make us call it back. Exceptions travel as text: RPyC's loader would let a peer raise SystemExit in us.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from rpyc import VoidService
from rpyc.core import brine, consts
from rpyc.core import channel as rpyc_channel
from rpyc.core.protocol import DEFAULT_CONFIG
from rpyc.core.protocol import Connection as RpycConnection

from mrcore.errors import Refused
from mrcore.text import one_line
from mrcore.wire.stream import Stream

# Everything that RPyC can allow or include is off; calls are bounded by the stream, on a clock that nobody sets.
_SWITCHES = ("allow_", "include_", "import_", "instantiate_", "propagate_", "log_", "bind_")
HARDENED = {name: False for name in DEFAULT_CONFIG if name.startswith(_SWITCHES)} | {"sync_request_timeout": None}
PLAIN_FRAME_BYTES, AROUND_TEXT_BYTES = 4096, 512  # a larger frame is one text with so much around it
ERROR_CHARACTERS = 500  # of an error of the RPC layer itself
_L4 = struct.Struct("!L")


class Channel(rpyc_channel.Channel):  # type: ignore[misc]
    """RPyC's frames, uncompressed, bounded in bytes, each with one deadline from its first byte to its last.

    `most_bytes` bounds what is received: a peer that may only ask for little cannot send much.
    """

    def __init__(self, stream: Stream, most_bytes: int | None = None) -> None:
        super().__init__(stream, compress=False)
        self.limits, self.most_bytes = stream.limits, most_bytes or stream.limits.frame_bytes

    def recv(self) -> bytes:
        """Return the next frame. Raises Refused for one that is compressed, too large or not ended properly."""
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
    """RPyC's request and reply engine, reduced to calls by value of one function of the peer: (method, arguments).

    `answer` is the function that the peer may call; without it, none.
    """

    _closed: bool

    def __init__(
        self, stream: Stream, answer: Callable[[str, str], str] | None = None, most_bytes: int | None = None
    ) -> None:
        super().__init__(VoidService(), Channel(stream, most_bytes), HARDENED)
        self._answer = answer or self._refuse

    def call(self, method: str, arguments: str, most_bytes: int) -> str:
        """Call the peer's function; the answer has at most so many bytes. Raises Refused, what Stream raises."""
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
        return self._answer(*args)

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
