"""With the firewall out of the way, mutual TLS alone still refuses every wrong identity.

The clients run on the podman host, which is no member. Each refusal stands beside a control: the same call with the
right certificate succeeds.
"""

from __future__ import annotations

import json
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import certificates
import pytest
from harness import AGENT_PORT, SERVER_PORT, Machine, Operator, wait_until

from mrcore.errors import Refused, Unreachable
from mrcore.messages.methods import METHODS
from mrcore.wire.client import Client
from mrcore.wire.tls import RPC_PROTOCOL, Pki

WRONG = ["foreign", "expired", "early", "stranger", "no-role", "unlisted", "second-master", "other-cluster"]


@pytest.fixture(scope="module")
def keys(operator: Operator, m1: Machine, w1: Machine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ca.crt, the master's and a node's real certificates, and wrong ones."""
    folder = tmp_path_factory.mktemp("keys")
    for machine, stem in ((m1, "master"), (w1, "node")):
        for name in ("ca.crt", f"{stem}.crt", f"{stem}.key"):
            (folder / name).write_text(machine.read(f"/etc/mrcore/pki/{name}"))
    real, foreign = operator.folder / "pki", folder / "foreign"
    certificates.authority(foreign)
    master = {"role": "master", "name": "m1", "address": m1.address}
    certificates.issue(foreign, folder, "foreign", **master)
    certificates.issue(real, folder, "expired", **master, days=(-10, -1))
    certificates.issue(real, folder, "early", **master, days=(2, 10))
    certificates.issue(real, folder, "stranger", role="node", name="w9", address="192.0.2.9")
    certificates.issue(real, folder, "no-role", role="operator", name="m1", address=m1.address)
    certificates.issue(real, folder, "unlisted", role="node", name="w1", address=w1.address)
    certificates.issue(real, folder, "second-master", **master | {"name": "master"})
    certificates.issue(real, folder, "other-cluster", **master | {"name": "master"}, organization="other")
    return folder


@pytest.fixture(scope="module", autouse=True)
def no_firewall(w2: Machine) -> Iterator[None]:
    """w2 without our table."""
    w2.nft("delete", "table", "inet", "mrcore")
    yield
    w2.run("systemctl restart mrcore-firewall")
    assert "mrcore" in w2.nft("list", "tables")


def ask(machine: Machine, keys: Path, stem: str, port: int = AGENT_PORT, method: str = "health") -> object:
    client = Client(machine.address, port, Pki(keys, stem), connect_timeout_seconds=5)
    try:
        return client.call(METHODS[method])
    finally:
        client.close()


def is_refused(machine: Machine, keys: Path, stem: str, port: int = AGENT_PORT, method: str = "health") -> bool:
    try:
        ask(machine, keys, stem, port, method)
    except Refused:
        return True
    except Unreachable as error:
        assert "timed out" not in str(error), error  # an answer, not a firewall's silence
        return True
    return False


def test_the_right_certificates_are_taken(w2: Machine, keys: Path) -> None:
    assert ask(w2, keys, "master") and ask(w2, keys, "node")
    assert ask(w2, keys, "master", SERVER_PORT, "hello") and ask(w2, keys, "master", SERVER_PORT + 1, "hello")


@pytest.mark.parametrize("port", [AGENT_PORT, SERVER_PORT, SERVER_PORT + 1])
@pytest.mark.parametrize("stem", WRONG)
def test_a_wrong_certificate_is_refused(w2: Machine, keys: Path, stem: str, port: int) -> None:
    assert is_refused(w2, keys, stem, port, "health" if port == AGENT_PORT else "hello")


@pytest.mark.parametrize("port", [AGENT_PORT, SERVER_PORT, SERVER_PORT + 1])
def test_without_a_certificate_nothing_is_answered(w2: Machine, keys: Path, port: int) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cafile=keys / "ca.crt")
    context.set_alpn_protocols([RPC_PROTOCOL])
    with socket.create_connection((w2.address, port), 5) as raw, pytest.raises((ssl.SSLError, ConnectionError)):
        sock = context.wrap_socket(raw, server_hostname=w2.address)  # in TLS 1.3 the client ends its part first
        sock.settimeout(5)
        if not sock.recv(1):
            raise ConnectionError("closed without a word")


def test_a_node_may_not_do_what_the_master_may(w2: Machine, keys: Path) -> None:
    for port, method in ((SERVER_PORT, "hello"), (SERVER_PORT, "poll"), (AGENT_PORT, "sweep")):
        with pytest.raises(Refused):
            ask(w2, keys, "node", port, method)
    assert ask(w2, keys, "node"), "as a node it is welcome"


def test_a_certificate_counts_while_it_is_listed_and_not_denied(
    w2: Machine, keys: Path, operator: Operator, w1: Machine
) -> None:
    serial = certificates.issue(operator.folder / "pki", keys, "second", role="node", name="w1", address=w1.address)
    assert is_refused(w2, keys, "second"), "it was never listed"
    before = w2.read("/etc/mrcore/members.json")
    listed = json.loads(before)
    listed["members"]["w1"]["serials"].append(serial)
    try:
        w2.write("/etc/mrcore/members.json", json.dumps(listed))
        wait_until(lambda: not is_refused(w2, keys, "second"), 30, "the daemon takes up the list")
        w2.write("/etc/mrcore/members.json", json.dumps(listed | {"denied": [*listed["denied"], serial]}))
        wait_until(lambda: is_refused(w2, keys, "second"), 30, "the daemon takes up what is denied")
        assert ask(w2, keys, "node"), "another certificate of the same node is not meant"
    finally:
        w2.write("/etc/mrcore/members.json", before)
    wait_until(lambda: is_refused(w2, keys, "second"), 30, "the daemon takes up the former list")


def test_a_server_that_is_not_of_the_cluster_gets_no_word(w2: Machine, keys: Path, tmp_path: Path) -> None:
    """The master's side: it verifies whom it calls. Here its authority is another one."""
    certificates.authority(tmp_path / "other")
    (tmp_path / "ca.crt").write_bytes((tmp_path / "other/ca.crt").read_bytes())
    for name in ("master.crt", "master.key"):
        (tmp_path / name).write_bytes((keys / name).read_bytes())
    with pytest.raises((Refused, Unreachable), match=r"(?i)certificate"):
        ask(w2, tmp_path, "master")
