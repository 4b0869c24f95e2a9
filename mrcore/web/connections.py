"""Connections of the dashboard: HTTP as uvicorn speaks it, for who gets on with it.

Any account of the machine may connect, with no token, and uvicorn waits for a request for ever. So whoever only
connects, or sends a byte now and then, would keep all others out.
"""

from __future__ import annotations

import asyncio
from enum import Enum

from uvicorn.protocols.http.h11_impl import H11Protocol

IDLE_SECONDS = 15  # of a connection between two requests, and between two looks whether one of it is served


class _Before(Enum):
    """What the look before has found of a connection, if not which request was the last that was answered."""

    BUSY, NEW, CLOSED = range(3)


class Connection(H11Protocol):
    """One connection: closed when two looks find that no request of it is served, and that none was in between."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to look."""
        super().connection_made(transport)
        self._look(_Before.BUSY)

    def _look(self, before: object) -> None:
        if self not in self.connections:  # it has ended
            return None
        if before is _Before.CLOSED:  # and its other end does not take the last bytes
            return self.transport.abort()
        cycle = self.cycle or _Before.NEW
        now: object = cycle if cycle is _Before.NEW or self.cycle.response_complete else _Before.BUSY
        if now is before and now is not _Before.BUSY:
            self.transport.close()
            now = _Before.CLOSED
        self.loop.call_later(IDLE_SECONDS, self._look, now)
        return None
