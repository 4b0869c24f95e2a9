"""Both ends of a connection: certificates of two clusters, raw TLS sockets, a server to play, short limits."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from mrcore.errors import MrcoreError
from mrcore.wire import pki, tls
from mrcore.wire.tls import LIMITS, Limits, Pki, client_context

FAST = replace(
    LIMITS,
    handshake_seconds=1,
    frame_seconds=0.5,
    stall_seconds=0.7,
    idle_data_seconds=0.6,
    finish_seconds=2,
    linger_seconds=0.5,
    frame_bytes=256 << 10,
    request_bytes=64 << 10,
    handshakes=16,
    connections=6,
    connections_per_peer=4,
)


@dataclass
class Certificates:
    """Two clusters: `own` with a master and the nodes a, b, stranger; `other` with a node of the name a."""

    folder: Path
    serials: dict[str, str]

    def pki(self, name: str) -> Pki:
        return Pki(self.folder / name, name)


def make_certificates(folder: Path) -> Certificates:
    serials = {}
    for cluster in ("own", "other"):
        pki.make_authority(folder / cluster, cluster)
    for name in ("master", "a", "b", "stranger"):
        role: Literal["master", "node"] = "master" if name == "master" else "node"
        serials[name] = pki.issue(folder / "own", folder / name, name, name, role, ["127.0.0.1"])
    pki.issue(folder / "other", folder / "foreign", "foreign", "a", "node", ["127.0.0.1"])
    return Certificates(folder, serials)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def tls_socket(port: int, pki_: Pki, alpn: str, limits: Limits = FAST) -> ssl.SSLSocket:
    """A raw TLS connection past the handshake, to send what no client of ours would."""
    raw = socket.create_connection(("127.0.0.1", port), timeout=5)
    return client_context(pki_, alpn).wrap_socket(raw, server_hostname="127.0.0.1")


def drain(sock: socket.socket) -> bytes:
    """Everything until the server closes; fails if it is silent for 5 s."""
    data = b""
    sock.settimeout(5)
    try:
        while piece := sock.recv(65536):
            data += piece
    except (ConnectionError, ssl.SSLError):
        pass
    return data


class fake_server:
    """Accepts one TLS connection as node a and plays a part on it in a thread."""

    def __init__(self, certificates: Certificates, play: Callable[[ssl.SSLSocket], None]) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.settimeout(5)
        self.context, self.play = tls.server_context(certificates.pki("a")), play
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.run)

    def run(self) -> None:
        raw, _ = self.listener.accept()
        with self.context.wrap_socket(raw, server_side=True) as sock:
            sock.settimeout(5)
            with contextlib.suppress(OSError, MrcoreError):
                self.play(sock)
            self.over.wait(5)

    def __enter__(self) -> int:
        self.thread.start()
        return int(self.listener.getsockname()[1])

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self.thread.join()
        self.listener.close()
