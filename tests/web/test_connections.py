"""Connections that lead to no request: they end, while what is served goes on."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import socket
import threading
from collections.abc import Iterator

import pytest
import uvicorn
from conditions import wait_until
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from mrcore.web import connections

IDLE_SECONDS = 0.3


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["path"] == "/slow":
        await asyncio.sleep(5 * IDLE_SECONDS)
    if scope["path"] == "/body":
        await Request(scope, receive).body()
    await PlainTextResponse("done")(scope, receive, send)


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(connections, "IDLE_SECONDS", IDLE_SECONDS)
    config = uvicorn.Config(
        app, http=connections.Connection, ws="none", lifespan="off", log_config=None, timeout_keep_alive=600
    )
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        wait_until(lambda: server.started)
        try:
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(30)


def is_ended(client: socket.socket) -> bool:
    """Whether the other end has closed, read without waiting."""
    client.setblocking(False)
    try:
        while client.recv(65_536):
            pass
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


@pytest.mark.parametrize("first", [b"", b"GET / HTTP/1.1\r\nhost: a\r\n\r\n"])
@pytest.mark.parametrize("drop", [b"", b"x"])
def test_who_asks_nothing_is_not_waited_for(port: int, first: bytes, drop: bytes) -> None:
    """Neither one that is silent, nor one that sends a byte now and then, before the first request and after one."""
    with socket.create_connection(("127.0.0.1", port), 30) as client:
        client.sendall(first)

        def has_ended() -> bool:
            with contextlib.suppress(OSError):
                client.sendall(drop)
            return is_ended(client)

        wait_until(has_ended)


def test_a_body_that_nobody_reads_keeps_no_connection(port: int) -> None:
    """As that of a POST without the token, which is refused before its body has come."""
    with socket.create_connection(("127.0.0.1", port), 30) as client:
        client.sendall(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1000000\r\n\r\n")

        def has_ended() -> bool:
            with contextlib.suppress(OSError):
                client.sendall(b"x")
            return is_ended(client)

        wait_until(has_ended)


def test_what_is_served_goes_on_however_long(port: int) -> None:
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(client):
        for path in ("/slow", "/", "/slow"):
            client.request("GET", path)
            assert client.getresponse().read() == b"done"
