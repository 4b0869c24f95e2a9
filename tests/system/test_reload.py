"""Members and certificates that change under running daemons: taken up with no restart, broken files change nothing."""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from by_name import ByName
from conditions import wait_until
from daemons import CLUSTER, Daemon
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mrcore.errors import MrcoreError, Refused, Unreachable, UsageError
from mrcore.wire import pki, tls
from mrcore.wire.client import Client
from mrcore.wire.members import Membership, watch_membership
from mrcore.wire.tls import Pki


def write(file: Path, content: bytes) -> None:
    """As every writer does: a new file takes the old one's place."""
    partial = file.with_name(file.name + ".new")
    partial.write_bytes(content)
    partial.replace(file)


def members(*names: str, denied: tuple[str, ...] = ()) -> bytes:
    return json.dumps({"members": names, "denied": denied}).encode()


NAMES = st.lists(st.sampled_from(["a", "b", "c"]), unique=True, max_size=3).map(tuple)
SERIALS = st.lists(st.sampled_from(["1F", "AB01", "9"]), unique=True, max_size=3).map(tuple)
GOOD = st.tuples(NAMES, SERIALS)
BROKEN = st.sampled_from(
    [b"", b"{", b"[]", b'{"denied": []}', b'{"members": [1]}', b'{"members": [], "denied": ["x y"]}']
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(st.one_of(GOOD, BROKEN, st.none()), max_size=12))
def test_what_is_in_force_is_the_last_good_state(
    steps: list[Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "members.json"
    write(file, members("a"))
    watch, expected, faults, there = watch_membership(file), Membership({("node", "a"): None}), 0, True
    caplog.clear()
    for step in steps:
        if step is None:
            file.unlink(missing_ok=True)
            faults, there = faults + there, False
        elif isinstance(step, bytes):
            write(file, step)
            faults, there = faults + 1, True
        else:
            write(file, members(*step[0], denied=step[1]))
            holders = dict.fromkeys(("node", name) for name in step[0])
            expected, there = Membership(holders, frozenset(step[1])), True
        assert [watch() for _ in range(3)] == [expected] * 3
        told = [record for record in caplog.records if record.levelno == logging.ERROR]
        assert len(told) == faults and all(str(file) in record.getMessage() for record in told), "once for each fault"


def test_serials_are_understood_in_every_usual_form(tmp_path: Path) -> None:
    write(tmp_path / "m", members(denied=("0a:bc:0F", "00ff")))
    assert watch_membership(tmp_path / "m")().denied == {"ABC0F", "FF"}


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "cannot read the members file .*No such file"), (b"{", "no JSON"), (b'{"members": "a"}', "must hold")],
)
def test_without_a_first_good_state_nothing_starts(tmp_path: Path, content: bytes | None, said: str) -> None:
    if content is not None:
        write(tmp_path / "m", content)
    with pytest.raises(UsageError, match=said):
        watch_membership(tmp_path / "m")


# ---- real daemons


class Agent(Daemon):
    """A node agent whose cluster has a second node, n2, that connects to it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, ["-P", "-m", "mrcore.node.node_agent"], "agent")
        assert self.ready == b"ready\n", self.log.read_text()
        self.serial = pki.issue(self.pki / "ca", self.pki / "n2", "node", "n2", "node", ["127.0.0.1"])
        self.members = Path(self.spec["members_file"])

    def as_node(self, name: str) -> Client:
        self.clients.append(client := ByName(self.address, self.port, Pki(self.pki / name, "node"), "n1"))
        return client

    def log_says(self, text: str, times: int = 1) -> None:
        wait_until(lambda: self.log.read_text().count(text) == times, 10, f"{times} × {text!r} in the log")


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    started = Agent(tmp_path)
    yield started
    started.close()


def test_a_member_that_is_struck_off_loses_its_live_connection(agent: Agent) -> None:
    node, master = agent.as_node("n2"), agent.client()
    with pytest.raises(Refused, match="n2 is no member"):
        node.call("health")
    write(agent.members, members("n1", "n2"))
    assert node.call("health") and master.call("health")
    write(agent.members, b"{ half a fi")
    assert node.call("health"), "a broken file changes nothing"
    agent.log_says("is no JSON")
    write(agent.members, members("n1", "n2", denied=(agent.serial,)))
    with pytest.raises(Refused, match="of n2 was withdrawn"):
        node.call("health")
    write(agent.members, members("n1"))
    with pytest.raises(Refused, match="n2 is no member"):
        node.call("health")
    assert master.call("health") and agent.process.poll() is None


def presented(agent: Agent) -> str:
    """The serial of the certificate that the agent shows to a new connection."""
    context = tls.client_context(Pki(agent.pki / "master", "master"), tls.RPC_PROTOCOL)
    with (
        socket.create_connection((agent.address, agent.port), timeout=5) as plain,
        context.wrap_socket(plain, server_hostname="n1") as secured,
    ):
        return tls.peer_identity(secured).serial


def renew(agent: Agent, authority: str, holder: str, stem: str, name: str) -> str:
    """A new certificate, whose files are replaced one after the other; ca.crt stays as it is."""
    authorities = (agent.pki / holder / "ca.crt").read_bytes()
    role: Any = "master" if stem == "master" else "node"
    serial = pki.issue(agent.pki / authority, agent.pki / "new", stem, name, role, [agent.address])
    for suffix in ("key", "crt"):
        os.replace(agent.pki / "new" / f"{stem}.{suffix}", agent.pki / holder / f"{stem}.{suffix}")
    write(agent.pki / holder / "ca.crt", authorities)
    return serial


def test_a_renewed_certificate_is_shown_without_a_restart(agent: Agent) -> None:
    before, live = presented(agent), agent.client()
    assert live.call("health")
    key = agent.pki / "n1" / "node.key"
    old = key.read_bytes()
    write(key, b"no key at all")
    assert presented(agent) == before, "what is broken or half replaced keeps the certificate as it was"
    agent.log_says("cannot load ca.crt, node.crt and node.key")
    write(key, old)
    renewed = renew(agent, "ca", "n1", "node", "n1")
    assert presented(agent) == renewed != before
    assert live.call("health") and agent.process.poll() is None


def test_two_authorities_are_trusted_while_one_takes_the_others_place(agent: Agent) -> None:
    """Both have the same name, as the next authority of a cluster has; nothing restarts, no connection ends before."""
    pki.make_authority(agent.pki / "ca2", CLUSTER)
    master, holders = agent.client(), ("n1", "n2", "master")
    old, new = ((agent.pki / name / "ca.crt").read_bytes() for name in ("ca", "ca2"))
    write(agent.members, members("n1", "n2"))
    node = agent.as_node("n2")
    assert master.call("health") and node.call("health")

    for holder in holders:
        write(agent.pki / holder / "ca.crt", old + new)
    renewed = renew(agent, "ca2", "n1", "node", "n1")
    assert presented(agent) == renewed, "the old master believes the new certificate"
    node._drop()
    assert node.call("health"), "an old node's client takes up the second authority, and is believed still"
    renew(agent, "ca2", "master", "master", "master")
    master._drop()
    assert master.call("health"), "a client shows its renewed certificate at its next connection"

    write(agent.pki / "n1" / "ca.crt", new)
    for client in (master, node):
        with pytest.raises(Unreachable):  # a connection from before is ended, whoever holds it
            client.call("health")
    assert master.call("health")
    for holder in holders:
        write(agent.pki / holder / "ca.crt", new)
    assert master.call("health"), "its files have changed: it connects afresh before it asks"
    with pytest.raises(MrcoreError, match="refused TLS or this side's certificate"):
        node.call("health")
    renew(agent, "ca2", "n2", "node", "n2")
    assert node.call("health") and agent.process.poll() is None
