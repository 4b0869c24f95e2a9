"""Bulk bytes: `mr-data/1`, beside RPyC on the same port (RPyC itself moves bytes at 1–2 % of TLS's speed).

Requests are JSON frames `[u32 length] + object`, answered in order by one JSON frame (`{"error": …}` ends the
connection) and then by content. Content is pieces `[u8 kind][u32 bytes][u32 crc32] + bytes`, at most `piece_bytes`
each: kind 0 more follows, 1 the last of this content, 2 a fault instead of it (bytes: an error as JSON), which ends the
answer. The crc32 runs over the content from the first byte sent up to this piece's end, so every piece is verified
before it is handed on.

GET  {"get": [request, …]}            → {"get": how many}, then each request's content, in order, without round trips
PUT  {"put": request, "length": n}    → {"offset": k}: what the server has already (a resumed transfer), else 0
     the content from byte k on       → {"result": …} once it is flushed to disk and the finish callback has run
The crc32 of a PUT begins with the first k bytes as either side has them: if they differ, the next PUT begins at 0.
Without progress for `stall_seconds` either side gives up; an idle connection ends after `idle_data_seconds`.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

from mrcore.errors import ClusterFault, MrcoreError, Refused
from mrcore.messages.methods import decode_error
from mrcore.text import one_line
from mrcore.wire.channel import TRACEBACKS, Stream
from mrcore.wire.client import Caller
from mrcore.wire.tls import DATA_PROTOCOL, Identity

try:  # comes with xopen where it runs, and is ten times as fast: the crc would cost a third of the channel's speed
    from isal.isal_zlib import crc32
except ImportError:
    from zlib import crc32

log = logging.getLogger(__name__)
MORE, LAST, FAULT = range(3)
PIECE = struct.Struct("!BII")


class Range(NamedTuple):
    """`length` bytes from `offset` of a file: a path, or an open descriptor that stays the resolver's to close.

    `kind` is the name under which the bytes are counted.
    """

    source: str | Path | int
    offset: int
    length: int
    kind: str = "bytes"


@dataclass(frozen=True)
class Upload:
    """Where a PUT goes: `partial` is written and flushed, then `finish()` publishes it and gives the JSON-able answer.

    With `resume` the bytes that are there already are kept and the client sends the rest. `flush` False: `finish` sees
    to it that what it makes of the content is on disk.
    """

    partial: Path
    finish: Callable[[], Any]
    resume: bool = False
    flush: bool = True


@dataclass(frozen=True)
class Relay:
    """Content that comes from elsewhere while it is sent, so that it is never here as a whole.

    `checksum(n)` gives the crc32 of its first n bytes; `feed(at, write)` writes the rest from byte `at` on.
    """

    length: int
    checksum: Callable[[int], int]
    feed: Callable[[int, Callable[[memoryview], object]], object]


Receive = Callable[[Identity, Any], Upload]


class _Answered(Exception):
    """The peer answered before it had everything: it wants no more."""


class _Outbox:
    """Gathers pieces of content in one reused buffer and writes it when it is full."""

    def __init__(self, stream: Stream, heed: bool = False, sent: Callable[[int], object] | None = None) -> None:
        self._stream, self._used, self._piece_bytes, self._sent = stream, 0, stream.limits.piece_bytes, sent
        self._heed = heed  # stop as soon as there is something to read
        self._view = memoryview(bytearray(PIECE.size + self._piece_bytes))
        self._file: tuple[Path | str, int] | None = None  # neighbouring ranges are often of one file

    def __enter__(self) -> _Outbox:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            os.close(self._file[1])

    def _open(self, path: str | Path) -> int:
        if self._file is None or self._file[0] != path:
            self.__exit__()
            self._file = None
            self._file = path, _asked(os.open, path, os.O_RDONLY | os.O_CLOEXEC)
        return self._file[1]

    def room(self, wanted: int) -> memoryview:
        """Give where the next piece's bytes go: `wanted` of them, or as many as one piece takes."""
        wanted = min(wanted, self._piece_bytes)
        if len(self._view) - self._used < PIECE.size + wanted:
            self.flush()
        begin = self._used + PIECE.size
        return self._view[begin : begin + wanted]

    def add(self, kind: int, size: int, crc: int) -> None:
        """Finish the piece whose `size` bytes were put into `room`."""
        PIECE.pack_into(self._view, self._used, kind, size, crc)
        self._used += PIECE.size + size

    def copy(self, source: str | Path | int | bytes, at: int, length: int, crc: int, last: bool) -> int:
        """Add `length` bytes from `at` of a file or of bytes; gives the running crc32. Raises ClusterFault, Refused."""
        if at < 0 or length < 0:
            raise Refused(f"there are no {length} bytes at {at}")
        end = at + length
        fd = self._open(source) if isinstance(source, str | Path) else source
        while True:
            view = self.room(end - at)
            if isinstance(fd, bytes):
                view[:], got = fd[at : at + len(view)], len(view)
            else:
                got = _asked(os.preadv, fd, [view], at) if view else 0
            if not got and at < end:
                raise ClusterFault(f"{source!s} ends at byte {at}, before {end}: it shrank while it was sent")
            crc, at = crc32(view[:got], crc), at + got
            self.add(LAST if last and at == end else MORE, got, crc)
            if self._sent is not None:
                self._sent(got)
            if at == end:
                return crc

    def relay(self, source: Relay, at: int) -> None:
        """Add all of a source from byte `at` on. Raises ClusterFault when it is not as long as it said."""
        crc, kind = source.checksum(at) if at else 0, MORE

        def write(chunk: memoryview) -> None:
            nonlocal at, crc, kind
            if at + len(chunk) > source.length:
                raise ClusterFault(f"there is more to send than the {source.length} bytes that were announced")
            while chunk:
                view = self.room(len(chunk))
                view[:], got = chunk[: len(view)], len(view)
                crc, at, chunk = crc32(view, crc), at + got, chunk[got:]
                kind = LAST if at == source.length else MORE
                self.add(kind, got, crc)
                if self._sent is not None:
                    self._sent(got)

        source.feed(at, write)
        if at < source.length:
            raise ClusterFault(f"what is to be sent ends at byte {at}, before {source.length}")
        if kind != LAST:  # nothing was left to send
            self.add(LAST, 0, crc)

    def fault(self, error: MrcoreError) -> None:
        """End the content that is under way with an error."""
        data = json.dumps(error.to_dict(), default=str).encode()
        if len(data) > self._piece_bytes:
            data = json.dumps(type(error)(error.message[:1000]).to_dict()).encode()
        self.room(len(data))[:] = data
        self.add(FAULT, len(data), crc32(data))

    def flush(self) -> None:
        """Write what was gathered. With `heed`, raises _Answered instead when the peer has said something."""
        if self._heed and self._stream.readable():
            raise _Answered
        self._stream.write(self._view[: self._used])
        self._used = 0


def checksum(fd: int, length: int) -> int:
    """Give the crc32 of a file's first `length` bytes. Raises ClusterFault (it ends before), OSError."""
    view, at, crc = memoryview(bytearray(1 << 20)), 0, 0
    while at < length:
        if not (got := os.preadv(fd, [view[: length - at]], at)):
            raise ClusterFault(f"a file ends at byte {at}, before {length}: it shrank while it was read")
        crc, at = crc32(view[:got], crc), at + got
    return crc


def _receive_piece(stream: Stream, crc: int) -> tuple[int, memoryview, int]:
    """Give kind, bytes (until the next piece) and running crc32 of one verified piece; raise the fault that it is."""
    kind, size, told = PIECE.unpack(stream.take(PIECE.size))
    if kind > FAULT or size > stream.limits.piece_bytes:
        raise Refused(f"{stream.peer} sent garbled content: a piece of kind {kind} with {size} bytes")
    chunk = stream.take(size)
    crc = crc32(chunk, 0 if kind == FAULT else crc)
    if crc != told:
        raise Refused(
            f"content from {stream.peer} arrived corrupt: crc32 {crc:08x}, not {told:08x}; check its memory and disk"
        )
    if kind == FAULT:
        plain = None
        with suppress(ValueError, RecursionError):
            plain = json.loads(bytes(chunk))
        raise decode_error(plain, stream.peer)
    return kind, chunk, crc


def _asked(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call something of this side; whatever it raises becomes an error that can be sent."""
    try:
        return function(*arguments)
    except MrcoreError:
        raise
    except OSError as error:
        raise ClusterFault(f"cannot serve the bytes: {error}") from error
    except Exception as error:
        if TRACEBACKS.allow():
            log.exception("a data request failed%s", TRACEBACKS.since())
        what = one_line(f"{type(error).__name__}: {error}", 300)
        raise ClusterFault(f"the request failed: {what}; the log has the traceback") from error


class DataHandler:
    """Serves data connections. Requests are opaque JSON; both functions may raise errors of ours.

    `resolve(identity, request)` gives the ranges that make up an answer, `receive(identity, request)` where a PUT goes.
    """

    def __init__(self, resolve: Callable[[Identity, Any], Iterable[Range]], receive: Receive | None = None) -> None:
        self._resolve, self._receive = resolve, receive
        self._lock, self._served = threading.Lock(), Counter[str]()

    def served(self) -> dict[str, int]:
        """Give the bytes served so far by kind."""
        with self._lock:
            return dict(self._served)

    def serve(self, stream: Stream, identity: Identity, authorise: Callable[[Identity], None]) -> None:
        """Serve one connection until it idles; `authorise` is asked before each request. Raises what Stream raises."""
        while stream.readable(stream.limits.idle_data_seconds):
            try:
                frame = stream.receive_json(stream.limits.frame_seconds, "a data request")
                authorise(identity)
                if type(frame.get("get")) is list:
                    self._get(stream, identity, frame["get"])
                elif "put" in frame and self._receive is not None:
                    self._put(stream, identity, frame, self._receive)
                else:
                    raise Refused("no such data request here")
            except MrcoreError as error:  # said to the peer, who may be sending still; then the connection ends
                if not stream.closed:
                    stream.send_json({"error": error.to_dict()})
                    stream.linger()
                raise

    def _get(self, stream: Stream, identity: Identity, requests: list[Any]) -> None:
        if len(requests) > stream.limits.batch_requests:
            raise Refused(f"{len(requests)} requests in one GET, limit {stream.limits.batch_requests}")
        stream.send_json({"get": len(requests)})
        with _Outbox(stream) as out:
            for request in requests:
                try:
                    ranges, crc = _asked(list, _asked(self._resolve, identity, request)) or [Range(-1, 0, 0)], 0
                    for number, (source, offset, length, kind) in enumerate(ranges, 1):
                        crc = _asked(out.copy, source, offset, length, crc, number == len(ranges))
                        if length:
                            with self._lock:
                                self._served[kind] += length
                except MrcoreError as error:
                    if stream.closed:
                        raise
                    out.fault(error)
                    break  # no client reads on, and one bad frame must not cost an error for each of its requests
            out.flush()

    def _put(self, stream: Stream, identity: Identity, frame: dict[str, Any], receive: Receive) -> None:
        length = frame.get("length")
        if type(length) is not int or length < 0:
            raise Refused("a PUT must tell its length in bytes")
        upload: Upload = _asked(receive, identity, frame["put"])
        name, flags = upload.partial.name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = _asked(os.open, upload.partial, flags, 0o600)
        try:
            _asked(_lock_file, fd, upload.partial)
            size = os.fstat(fd).st_size
            at = size if upload.resume and size <= length else 0
            _asked(os.ftruncate, fd, at)
            stream.send_json({"offset": at})
            kind, crc, begin = MORE, _asked(checksum, fd, at), at
            if at:  # the peer reads what it has as well, at the same time
                with stream.within(stream.limits.finish_seconds, "the first bytes"):
                    stream.poll()
            while kind != LAST:
                try:
                    kind, chunk, crc = _receive_piece(stream, crc)
                except Refused:
                    if at == begin:  # what is here may be of another file, or damaged
                        os.ftruncate(fd, 0)
                    raise
                if at + len(chunk) > length:
                    raise Refused(f"{name}: more than the {length} bytes that were announced")
                while chunk:
                    written = _asked(os.pwrite, fd, chunk, at)
                    chunk, at = chunk[written:], at + written
            if at != length:
                raise Refused(f"{name}: {at} bytes instead of the {length} that were announced")
            if upload.flush:
                _asked(os.fsync, fd)
            result = _asked(upload.finish)  # still locked: nobody may write what is being published
        finally:
            os.close(fd)
        stream.send_json({"result": result})


def _lock_file(fd: int, path: Path) -> None:
    with suppress(BlockingIOError, FileNotFoundError):
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(fd).st_ino == path.stat().st_ino:  # else it was published since we opened it
            return
    raise Refused(f"{path.name} is being written by another transfer; try again when that has ended")


def _start(source: Path | bytes | int, length: int) -> int:
    """The crc32 of the first bytes, which a resumed upload leaves out."""
    if isinstance(source, bytes):
        return crc32(source[:length])
    if isinstance(source, int):
        return checksum(source, length)
    with source.open("rb") as stream:
        return checksum(stream.fileno(), length)


class DataClient(Caller):
    """Gets and puts bulk bytes at one server over one connection, which is kept for the next request.

    For one thread at a time. After any error the connection is dropped and the next request makes a new one.
    """

    ALPN = DATA_PROTOCOL
    _used_at = 0.0  # monotonic

    def get(self, requests: Sequence[Any], sink: Callable[[int, memoryview], object]) -> list[tuple[int, int]]:
        """Hand each request's bytes to `sink(index, chunk)` in order; a chunk is valid during the call only.

        Gives (bytes, crc32) of each. Every chunk is verified before it is handed on, but a request is whole only when
        `get` returns. Raises what the server answered, Refused (corrupt), Unreachable (no progress), and what `sink`
        raises.
        """
        got: list[tuple[int, int]] = []
        with self._dropping_on_error():
            for first in range(0, len(requests), self.limits.batch_requests):
                batch = requests[first : first + self.limits.batch_requests]
                stream, _ = self._ask({"get": batch})
                for index in range(first, first + len(batch)):
                    kind, crc, length = MORE, 0, 0
                    while kind != LAST:
                        kind, chunk, crc = _receive_piece(stream, crc)
                        length += len(chunk)
                        if chunk:
                            sink(index, chunk)
                    got.append((length, crc))
        return got

    def put(
        self, request: Any, source: Path | bytes | tuple[int, int] | Relay, sent: Callable[[int], object] | None = None
    ) -> Any:
        """Send bytes, a file, of an open one (descriptor, how many bytes), or a Relay, from where the server has it.

        Gives what the finish callback answered. `sent` hears of each piece's bytes; what it raises ends the upload.
        Raises what the server answered, Refused, Unreachable, ClusterFault (shrank), OSError (no such file).
        """
        content: Path | bytes | int | Relay
        if isinstance(source, tuple):
            content, length = source
        elif isinstance(source, Relay):
            content, length = source, source.length
        else:
            content, length = source, source.stat().st_size if isinstance(source, Path) else len(source)
        with self._dropping_on_error():
            stream, answer = self._ask({"put": request, "length": length})
            at = answer.get("offset")
            if type(at) is not int or not 0 <= at <= length:
                raise Refused(f"{stream.peer} wants to resume at byte {at} of {length}")
            with _Outbox(stream, heed=True, sent=sent) as out, suppress(_Answered):
                try:
                    if isinstance(content, Relay):
                        out.relay(content, at)
                    else:
                        out.copy(content, at, length - at, _start(content, at), True)
                except ClusterFault as error:
                    if stream.closed:
                        raise
                    out.fault(error)  # the server forgets the upload and answers with this error
                out.flush()
            return self._answer(stream, self.limits.finish_seconds, "the end of an upload").get("result")

    def abort(self) -> None:
        """From any thread: what another has under way raises Unreachable."""
        if (stream := self._stream) is not None:
            stream.abort()

    def close(self) -> None:
        """Drop the connection at once."""
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()

    @contextmanager
    def _dropping_on_error(self) -> Iterator[None]:
        try:
            yield
            self._used_at = monotonic()
        except BaseException:
            self.close()
            raise

    def _ask(self, frame: dict[str, Any]) -> tuple[Stream, dict[str, Any]]:
        """Send a request, on a fresh connection if the kept one may have idled out; give the answer's first frame."""
        stream, idle = self._stream, monotonic() - self._used_at
        if stream is None or idle > self.limits.idle_data_seconds / 2 or not self._is_good(stream):
            self.close()
            stream = self._stream = self._connect()
        stream.send_json(frame)
        return stream, self._answer(stream, self.limits.stall_seconds, "a data request")

    def _answer(self, stream: Stream, seconds: float, doing: str) -> dict[str, Any]:
        answer = stream.receive_json(seconds, f"{doing} within {seconds:g} s")
        if "error" in answer:
            raise decode_error(answer["error"], self._name)
        return answer
