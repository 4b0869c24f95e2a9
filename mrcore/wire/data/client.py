"""The client's side of the data channel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic
from typing import Any

from mrcore.errors import ClusterFault, Refused
from mrcore.messages.methods import decode_error
from mrcore.wire.client import Caller
from mrcore.wire.data.pieces import LAST, MORE, Answered, Outbox, Relay, checksum, receive_piece
from mrcore.wire.stream import Stream
from mrcore.wire.tls import DATA_PROTOCOL


class DataClient(Caller):
    """Gets and puts bulk bytes at one server over one connection, which is kept for the next request.

    For one thread at a time. After any error the connection is dropped and the next request makes a new one.
    """

    ALPN = DATA_PROTOCOL
    _used_at = 0.0  # monotonic

    def get(self, requests: Sequence[Any], sink: Callable[[int, memoryview], object]) -> list[tuple[int, int]]:
        """Hand each request's bytes to `sink(index, chunk)` in order; a chunk is valid during the call only.

        Return (bytes, crc32) of each. Every chunk is verified before it is handed on, but a request is whole only when
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
                        kind, chunk, crc = receive_piece(stream, crc)
                        length += len(chunk)
                        if chunk:
                            sink(index, chunk)
                    got.append((length, crc))
        return got

    def put(
        self, request: Any, source: Path | bytes | tuple[int, int] | Relay, sent: Callable[[int], object] | None = None
    ) -> Any:
        """Send bytes, a file, of an open one (descriptor, how many bytes), or a Relay, from where the server has it.

        Return what the finish callback answered. `sent` is called with each piece's bytes; what it raises ends the
        upload. Raises what the server answered, Refused, Unreachable, ClusterFault (shrank), OSError (no such file).
        """
        content = Relay.of(source) if isinstance(source, bytes) else source
        if isinstance(content, Relay):
            length = content.length
        else:
            length = content.stat().st_size if isinstance(content, Path) else content[1]
        with self._dropping_on_error():
            stream, answer = self._ask({"put": request, "length": length})
            at = answer.get("offset")
            if type(at) is not int or not 0 <= at <= length:
                raise Refused(f"{stream.peer} wants to resume at byte {at} of {length}")
            with Outbox(stream, heed=True, sent=sent) as out, suppress(Answered):
                try:
                    if isinstance(content, Relay):
                        out.crc = content.checksum(at) if at else 0
                        out.relay(content, at)
                    else:
                        file = content if isinstance(content, Path) else content[0]
                        out.crc = checksum(file, at)
                        out.copy(file, at, length - at, True)
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
        """Send a request, on a fresh connection if the kept one may have idled out; return it and the first frame."""
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
