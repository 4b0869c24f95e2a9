"""Log lines that strangers cause: one per peer and reason, then a count, whoever comes however often."""

from __future__ import annotations

import logging
import re
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from by_name import ByName
from conditions import wait_until
from daemons import members

from mrcore.errors import Refused
from mrcore.system.deadline import Deadline
from mrcore.system.limited_log import MAX_KEYS, LimitedLog
from mrcore.wire import pki
from mrcore.wire.service import Method, Server
from mrcore.wire.tls import Pki

LOG = logging.getLogger("test")


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_the_first_of_each_peer_and_reason_is_told_and_then_how_many_more(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    limited = LimitedLog(LOG, 3600)
    for number in range(4322):
        limited.log(logging.INFO, "10.0.0.9", "no certificate")
        if number % 1000 == 0:
            limited.log(logging.WARNING, "10.0.0.8", "no certificate")
            limited.log(logging.INFO, "10.0.0.9", "not a member")
    assert lines(caplog) == ["10.0.0.9: no certificate", "10.0.0.8: no certificate", "10.0.0.9: not a member"]
    caplog.clear()
    limited.flush()
    assert lines(caplog) == [
        "and 4,321 more in the last 3600 s from 10.0.0.9: no certificate",
        "and 4 more in the last 3600 s from 10.0.0.8: no certificate",
        "and 4 more in the last 3600 s from 10.0.0.9: not a member",
    ]
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING", "INFO"]
    limited.log(logging.INFO, "10.0.0.9", "no certificate")
    assert lines(caplog)[-1] == "10.0.0.9: no certificate", "a new interval"


def test_the_count_comes_by_itself_when_the_flood_is_over(
    server: Server, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    limited = LimitedLog(LOG, 3600)
    monkeypatch.setattr(server, "_limited", limited)
    server._listener.settimeout(0.05)
    for _ in range(20):
        scan(server)
    assert "more in the last" not in caplog.text
    limited._end = Deadline(0)  # an hour later, nobody comes
    wait_until(lambda: "more in the last 3600 s from 127.0.0.1: dropped" in caplog.text)


def test_a_thousand_peers_with_a_thousand_reasons_make_few_lines_of_bounded_clean_text(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    limited = LimitedLog(LOG, 3600)
    for number in range(10_000):
        limited.log(logging.INFO, f"10.0.{number // 256}.{number % 256}", f"\x1b[2J\n{number}" + "x" * 100_000)
    limited.flush()
    assert len(caplog.records) <= 2 * (MAX_KEYS + 1)
    assert f"and {10_000 - MAX_KEYS - 1:,} more" in lines(caplog)[-1]
    assert all(len(line) < 1000 and "\x1b" not in line and "\n" not in line for line in lines(caplog))


def test_a_broken_request_leaves_its_traceback_once(caplog: pytest.LogCaptureFixture) -> None:
    limited = LimitedLog(LOG, 3600)
    for _ in range(50):
        try:
            raise ValueError("of the request")
        except ValueError:
            limited.log(logging.ERROR, "w1", "poll failed: ValueError", exc_info=True)
    assert caplog.text.count("Traceback") == 1 and "of the request" in caplog.text


# ---- a real server


def scan(server: Server) -> None:
    """Connect as a port scan does."""
    with socket.create_connection(("127.0.0.1", server.port), 10) as sock:
        sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
        while sock.recv(4096):
            pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    pki.make_authority(tmp_path / "ca", "c")
    for name, role in (("n1", "node"), ("stranger", "node"), ("master", "master")):
        pki.issue(tmp_path / "ca", tmp_path / name, name, name, role, ["127.0.0.1"])  # type: ignore[arg-type]
    methods = {"fail": Method(lambda identity: [][1], "member")}
    started = Server("127.0.0.1", 0, Pki(tmp_path / "n1", "n1"), members("n1"), methods)
    started.start()
    yield started
    started.close()


def told_of_150(server: Server, caplog: pytest.LogCaptureFixture) -> str:
    """Close the server, which tells its counts, and give the log, in which there are a first line and 149 more."""
    server.close()
    text = "\n".join(lines(caplog))
    more = [int(count.replace(",", "")) for count in re.findall(r"and ([\d,]+) more", text)]
    assert len(more) == 1 and more[0] == 149 and len(caplog.records) == 2, text
    return text


def test_a_port_scan_leaves_two_lines(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for _ in range(150):
        scan(server)
    assert "127.0.0.1: dropped" in told_of_150(server, caplog)


def test_a_flood_of_one_who_is_no_member_leaves_two_lines(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for _ in range(150):
        client = ByName("127.0.0.1", server.port, Pki(tmp_path / "stranger", "stranger"), "n1")
        with pytest.raises(Refused, match="no member"):
            client.call("fail")
        client.close()
    assert "stranger is no member" in told_of_150(server, caplog)


def test_requests_that_fail_leave_one_traceback(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    client = ByName("127.0.0.1", server.port, Pki(tmp_path / "master", "master"), "n1")
    for _ in range(150):
        with pytest.raises(Exception, match="IndexError"):
            client.call("fail")
    client.close()
    assert "master: fail failed: IndexError" in told_of_150(server, caplog)
    assert caplog.text.count("Traceback") == 1


def test_a_reset_while_the_server_reads_is_counted_too(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    """A connection that is cut off by a reset says nothing at all, or one line: never one for each."""
    caplog.set_level(logging.INFO)
    for _ in range(100):
        with socket.create_connection(("127.0.0.1", server.port), 10) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.sendall(b"\x16\x03\x01")
    server.close()
    assert len(caplog.records) <= 4
