"""Content on its way: the pieces that both sides send and take, and what content is made of."""

from __future__ import annotations

import json
import logging
import os
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mrcore.errors import ClusterFault, MrcoreError, Refused
from mrcore.messages.methods import decode_error
from mrcore.system.limited_log import RateLimit
from mrcore.text import one_line
from mrcore.wire.stream import Stream

try:  # comes with xopen where it runs, and is ten times as fast: the crc would cost a third of the channel's speed
    from isal.isal_zlib import crc32
except ImportError:
    from zlib import crc32

log = logging.getLogger(__name__)
MORE, LAST, FAULT = range(3)
PIECE = struct.Struct("!BII")
TRACEBACKS = RateLimit(per_second=0.2, burst=5)  # of what a peer's requests made this daemon log


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
    """Where a PUT goes: `partial` is written and flushed, then `finish()` publishes it and returns the answer (JSON).

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

    `checksum(n)` returns the crc32 of its first n bytes; `feed(at, write)` writes the rest from byte `at` on.
    """

    length: int
    checksum: Callable[[int], int]
    feed: Callable[[int, Callable[[memoryview], object]], object]

    @classmethod
    def of(cls, content: bytes) -> Relay:
        """Return bytes as such content."""
        return cls(len(content), lambda end: crc32(content[:end]), lambda at, write: write(memoryview(content)[at:]))


class Answered(Exception):
    """The peer answered before it had everything: it wants no more."""


class Outbox:
    """Gathers pieces of content in one reused buffer and writes it when it is full.

    `heed`: stop as soon as there is something to read. `crc` is the running crc32 of the content that is under way.
    """

    def __init__(self, stream: Stream, heed: bool = False, sent: Callable[[int], object] | None = None) -> None:
        self._stream, self._used, self._piece_bytes, self._sent = stream, 0, stream.limits.piece_bytes, sent
        self._heed, self.crc = heed, 0
        self._view = memoryview(bytearray(PIECE.size + self._piece_bytes))
        self._file: tuple[Path | str, int] | None = None  # neighbouring ranges are often of one file

    def __enter__(self) -> Outbox:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            os.close(self._file[1])
            self._file = None

    def _open(self, path: str | Path) -> int:
        if self._file is None or self._file[0] != path:
            self.__exit__()
            self._file = path, asked(os.open, path, os.O_RDONLY | os.O_CLOEXEC)
        return self._file[1]

    def _room(self, wanted: int) -> memoryview:
        """Return where the next piece's bytes go: `wanted` of them, or as many as one piece takes."""
        wanted = min(wanted, self._piece_bytes)
        if len(self._view) - self._used < PIECE.size + wanted:
            self.flush()
        begin = self._used + PIECE.size
        return self._view[begin : begin + wanted]

    def _add(self, kind: int, view: memoryview) -> None:
        """Finish the piece whose bytes were put into `_room`; they end where `view` does."""
        self.crc = crc32(view, self.crc)
        PIECE.pack_into(self._view, self._used, kind, len(view), self.crc)
        self._used += PIECE.size + len(view)
        if self._sent is not None:
            self._sent(len(view))

    def copy(self, source: str | Path | int, at: int, length: int, last: bool) -> None:
        """Add `length` bytes from `at` of a file, the `last` of the content. Raises ClusterFault, Refused."""
        if at < 0 or length < 0:
            raise Refused(f"there are no {length} bytes at {at}")
        end = at + length
        fd = self._open(source) if isinstance(source, str | Path) else source
        while True:
            view = self._room(end - at)
            got = asked(os.preadv, fd, [view], at) if view else 0
            if not got and at < end:
                raise ClusterFault(f"{source!s} ends at byte {at}, before {end}: it shrank while it was sent")
            at += got
            self._add(LAST if last and at == end else MORE, view[:got])
            if at == end:
                return

    def relay(self, source: Relay, at: int) -> None:
        """Add all of a source from byte `at` on. Raises ClusterFault when it is not as long as it was announced."""
        is_ended = False

        def write(chunk: memoryview) -> None:
            nonlocal at, is_ended
            if at + len(chunk) > source.length:
                raise ClusterFault(f"there is more to send than the {source.length} bytes that were announced")
            while chunk:
                view = self._room(len(chunk))
                view[:], chunk = chunk[: len(view)], chunk[len(view) :]
                at += len(view)
                is_ended = at == source.length
                self._add(LAST if is_ended else MORE, view)

        source.feed(at, write)
        if at < source.length:
            raise ClusterFault(f"what is to be sent ends at byte {at}, before {source.length}")
        if not is_ended:  # nothing was left to send
            self._add(LAST, self._room(0))

    def fault(self, error: MrcoreError) -> None:
        """End the content that is under way with an error."""
        data = json.dumps(error.to_dict(), default=str).encode()
        if len(data) > self._piece_bytes:
            data = json.dumps(type(error)(error.message[:1000]).to_dict()).encode()
        view, self.crc, self._sent = self._room(len(data)), 0, None
        view[:] = data
        self._add(FAULT, view)

    def flush(self) -> None:
        """Write what was gathered. With `heed`, raises Answered instead when the peer has sent something."""
        if self._heed and self._stream.readable():
            raise Answered
        self._stream.write(self._view[: self._used])
        self._used = 0


def checksum(file: int | Path, length: int) -> int:
    """Return the crc32 of a file's first `length` bytes. Raises ClusterFault (it ends before), OSError."""
    view, at, crc = memoryview(bytearray(1 << 20)), 0, 0
    with open(file, "rb", buffering=0, closefd=isinstance(file, Path)) as stream:
        while at < length:
            if not (got := os.preadv(stream.fileno(), [view[: length - at]], at)):
                raise ClusterFault(f"a file ends at byte {at}, before {length}: it shrank while it was read")
            crc, at = crc32(view[:got], crc), at + got
    return crc


def receive_piece(stream: Stream, crc: int) -> tuple[int, memoryview, int]:
    """Return kind, bytes (until the next piece) and running crc32 of one verified piece; raise the error that it is."""
    kind, size, theirs = PIECE.unpack(stream.take(PIECE.size))
    if kind > FAULT or size > stream.limits.piece_bytes:
        raise Refused(f"{stream.peer} sent garbled content: a piece of kind {kind} with {size} bytes")
    chunk = stream.take(size)
    crc = crc32(chunk, 0 if kind == FAULT else crc)
    if crc != theirs:
        raise Refused(
            f"content from {stream.peer} arrived corrupt: crc32 {crc:08x}, not {theirs:08x}; check its memory and disk"
        )
    if kind == FAULT:
        plain = None
        with suppress(ValueError, RecursionError):
            plain = json.loads(bytes(chunk))
        raise decode_error(plain, stream.peer)
    return kind, chunk, crc


def asked(function: Callable[..., Any], *arguments: Any) -> Any:
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
