"""Mutual TLS 1.3 with the cluster's own CA and nothing else, the peer's identity, and every limit of the wire.

RPyC's own TLS is not used: it takes servers of any name by default, and loads the system's CAs as well.
"""

from __future__ import annotations

import hashlib
import re
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mrcore.errors import Refused, UsageError
from mrcore.system.reload import Watched
from mrcore.text import one_line

if TYPE_CHECKING:  # no daemon loads it
    from mrcore.settings.config import Settings

RPC_PROTOCOL, DATA_PROTOCOL = "mr-rpc/1", "mr-data/1"


@dataclass(frozen=True)
class Limits:
    """Every bound of the wire in one place; tests pass smaller ones."""

    handshake_seconds: float = 5  # from accept to the end of TLS
    frame_seconds: float = 20  # one whole frame, from its first byte to its last
    stall_seconds: float = 30  # bulk bytes: without any progress
    idle_data_seconds: float = 60  # a data connection between two requests; RPC connections may idle
    finish_seconds: float = 300  # the end of a PUT: flushing gigabytes to a slow disk, then the finish callback
    linger_seconds: float = 2  # after a refusal: for the peer to stop sending and read it
    close_seconds: float = 5  # for threads to end when a server closes
    frame_bytes: int = 32 << 20  # one RPC request or reply; methods and answers have smaller limits of their own
    member_frame_bytes: int = 64 << 10  # one RPC request of a node, which may ask for its health only
    json_values: int = 1_000_000  # in one JSON text of a peer: each costs up to 100 bytes once decoded
    request_bytes: int = 8 << 20  # one JSON frame: requests of the data channel
    piece_bytes: int = 256 << 10  # one piece of bulk bytes; 1 MiB is no faster, and a buffer each
    batch_requests: int = 4096  # GET requests in one frame
    handshakes: int = 64  # unfinished ones at a time; one more drops the oldest
    connections: int = 512  # of members; the master's come on top
    connections_per_peer: int = 128
    frame_room_bytes: int = 1024  # of an RPC frame, for what RPyC adds around the text


LIMITS = Limits()


@dataclass(frozen=True)
class Pki:
    """Where one holder's certificate lies: `folder`/ca.crt, STEM.crt and STEM.key; and the allow list of its cluster.

    Without `members` a client trusts every node of the authority: for tests, and programs without a list.
    """

    folder: Path
    stem: str
    members: Path | None = None


def master_pki(settings: Settings) -> Pki:
    """Return what a program of the master shows and checks when it connects."""
    return Pki(settings.pki_dir, "master", settings.members_file)


class Identity(NamedTuple):
    """The holder that a certificate names, and its cluster. `serial`: upper-case hexadecimal without leading zeros.

    `trusted`: fingerprints of the authorities that counted when the connection was made.
    """

    name: str
    role: str
    serial: str
    cluster: str = ""
    trusted: frozenset[str] = frozenset()


def watch_files(pki: Pki, make: Callable[[], ssl.SSLContext]) -> Watched[ssl.SSLContext]:
    """Return what `make` returns, made again when one of the holder's files changes: a renewed certificate or CA.

    A file that is half replaced keeps the context as it was. Raises UsageError when the first cannot be made.
    """
    names = ("ca.crt", f"{pki.stem}.crt", f"{pki.stem}.key")
    return Watched([Path(pki.folder) / name for name in names], make)


def watch_authorities(pki: Pki) -> Watched[frozenset[str]]:
    """Return the fingerprints of the certificates in ca.crt. Raises UsageError when the first look finds none."""
    file = Path(pki.folder) / "ca.crt"

    def read() -> frozenset[str]:
        try:
            blocks = re.findall(r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", file.read_text(), re.DOTALL)
            found = frozenset(hashlib.sha256(ssl.PEM_cert_to_DER_cert(block)).hexdigest() for block in blocks)
        except (OSError, ValueError) as error:
            raise UsageError(f"cannot read {file}: {error}") from error
        if not found:
            raise UsageError(f"{file} holds no certificate")
        return found

    return Watched([file], read)


def server_context(pki: Pki) -> ssl.SSLContext:
    """Make the context of a server that demands a certificate of the cluster's CA. Raises UsageError (bad files)."""
    context = _context(pki, ssl.PROTOCOL_TLS_SERVER, [RPC_PROTOCOL, DATA_PROTOCOL])
    context.num_tickets = 0  # they wake a waiting client without bringing it a byte to read
    return context


def client_context(pki: Pki, alpn: str) -> ssl.SSLContext:
    """Make the context of a client that verifies CA and name of its server. Raises UsageError (bad files)."""
    context = _context(pki, ssl.PROTOCOL_TLS_CLIENT, [alpn])
    context.check_hostname, context.hostname_checks_common_name = True, False
    return context


def _context(pki: Pki, protocol: int, alpn: list[str]) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version, context.verify_mode = ssl.TLSVersion.TLSv1_3, ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.set_alpn_protocols(alpn)
    folder, stem = Path(pki.folder), pki.stem
    try:
        context.load_verify_locations(cafile=folder / "ca.crt")
        context.load_cert_chain(folder / f"{stem}.crt", folder / f"{stem}.key")
    except OSError as error:  # ssl.SSLError is one
        raise UsageError(f"cannot load ca.crt, {stem}.crt and {stem}.key from {folder}: {error}") from error
    return context


def peer_identity(sock: ssl.SSLSocket) -> Identity:
    """Read the identity off the peer's verified certificate. Raises Refused if it names no one, no role or two."""
    certificate: dict[str, Any] = sock.getpeercert() or {}
    pairs = [pair for part in certificate.get("subject", ()) for pair in part]
    subject = dict(pairs)
    name, role = subject.get("commonName"), subject.get("organizationalUnitName")
    if not name or role not in ("master", "node") or len(pairs) != len(subject):
        what = f"the peer's certificate names no holder or no role of a cluster: {one_line(pairs, 300)}"
        raise Refused(what, code="certificate")
    serial = certificate["serialNumber"].upper().lstrip("0")
    return Identity(name, role, serial, subject.get("organizationName", ""))


def tune(sock: socket.socket) -> None:
    """Send small frames at once, and notice a peer whose machine vanished even while nothing is sent."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 5)):
        sock.setsockopt(socket.IPPROTO_TCP, option, value)
