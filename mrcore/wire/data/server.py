"""The server's side of the data channel."""

from __future__ import annotations

import fcntl
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from mrcore.errors import MrcoreError, Refused
from mrcore.wire.data.pieces import LAST, MORE, Outbox, Range, Upload, asked, checksum, receive_piece
from mrcore.wire.stream import Stream
from mrcore.wire.tls import Identity

Receive = Callable[[Identity, Any], Upload]


class DataHandler:
    """Serves data connections. Requests are opaque JSON; both functions may raise errors of ours.

    `resolve(identity, request)` returns the ranges that make up an answer, `receive(identity, request)` where a PUT
    goes.
    """

    def __init__(self, resolve: Callable[[Identity, Any], Iterable[Range]], receive: Receive | None = None) -> None:
        self._resolve, self._receive = resolve, receive
        self._lock, self._served = threading.Lock(), Counter[str]()

    def served(self) -> dict[str, int]:
        """Return the bytes served so far by kind."""
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
            except MrcoreError as error:  # sent to the peer, which may be sending still; then the connection ends
                if not stream.closed:
                    stream.send_json({"error": error.to_dict()})
                    stream.linger()
                raise

    def _get(self, stream: Stream, identity: Identity, requests: list[Any]) -> None:
        if len(requests) > stream.limits.batch_requests:
            raise Refused(f"{len(requests)} requests in one GET, limit {stream.limits.batch_requests}")
        stream.send_json({"get": len(requests)})
        with Outbox(stream) as out:
            for request in requests:
                try:
                    ranges, out.crc = asked(list, asked(self._resolve, identity, request)) or [Range(-1, 0, 0)], 0
                    for number, (source, offset, length, kind) in enumerate(ranges, 1):
                        asked(out.copy, source, offset, length, number == len(ranges))
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
        upload: Upload = asked(receive, identity, frame["put"])
        name, flags = upload.partial.name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = asked(os.open, upload.partial, flags, 0o600)
        try:
            asked(_lock_file, fd, upload.partial)
            size = os.fstat(fd).st_size
            at = size if upload.resume and size <= length else 0
            asked(os.ftruncate, fd, at)
            stream.send_json({"offset": at})
            kind, crc, begin = MORE, asked(checksum, fd, at), at
            if at:  # the peer reads what it has as well, at the same time
                with stream.within(stream.limits.finish_seconds, "the first bytes"):
                    stream.poll()
            while kind != LAST:
                try:
                    kind, chunk, crc = receive_piece(stream, crc)
                except Refused:
                    if at == begin:  # what is here may be of another file, or damaged
                        os.ftruncate(fd, 0)
                    raise
                if at + len(chunk) > length:
                    raise Refused(f"{name}: more than the {length} bytes that were announced")
                while chunk:
                    written = asked(os.pwrite, fd, chunk, at)
                    chunk, at = chunk[written:], at + written
            if at != length:
                raise Refused(f"{name}: {at} bytes instead of the {length} that were announced")
            if upload.flush:
                asked(os.fsync, fd)
            result = asked(upload.finish)  # still locked: nobody may write what is being published
        finally:
            os.close(fd)
        stream.send_json({"result": result})


def _lock_file(fd: int, path: Path) -> None:
    with suppress(BlockingIOError, FileNotFoundError):
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(fd).st_ino == path.stat().st_ino:  # else it was published since we opened it
            return
    raise Refused(f"{path.name} is being written by another transfer; try again when that has ended")
