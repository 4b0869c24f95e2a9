"""Who reaches what: members each other, nobody else anything; and what the master does about a changed host key."""

from __future__ import annotations

import contextlib
import re
import socket

import pytest
from harness import AGENT_PORT, SERVER_PORT, Machine, Operator, Person, wait_until
from operate import FOREIGN_RULES

MEMBERS = ("m1", "w1", "w2")


@pytest.mark.parametrize("target", ["w1", "w2"])
@pytest.mark.parametrize("port", [AGENT_PORT, SERVER_PORT, SERVER_PORT + 1])
def test_members_reach_every_port_and_nobody_else_does(operator: Operator, target: str, port: int) -> None:
    address = operator.machine(target).address
    for name in MEMBERS:
        assert operator.machine(name).reaches(address, port), f"{name} → {target}:{port}"
    assert not operator.machine("outsider").reaches(address, port), f"outsider → {target}:{port}"
    with pytest.raises(TimeoutError), socket.create_connection((address, port), 3):  # dropped, not refused
        pass


@pytest.mark.parametrize("target", ["w1", "w2"])
def test_it_is_the_firewall_that_keeps_strangers_out(operator: Operator, target: str) -> None:
    machine = operator.machine(target)
    machine.nft("delete", "table", "inet", "mrcore")
    try:
        assert operator.machine("outsider").reaches(machine.address, AGENT_PORT)
    finally:
        machine.run("systemctl restart mrcore-firewall")
    assert not operator.machine("outsider").reaches(machine.address, AGENT_PORT)


LISTEN = """import selectors, socket
chosen = selectors.DefaultSelector()
for port in {ports}:
    listener = socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=False)
    chosen.register(listener, selectors.EVENT_READ)
while True:
    for key, _ in chosen.select():
        key.fileobj.accept()[0].close()
"""


def test_ipv6_is_closed_as_well(w1: Machine, outsider: Machine) -> None:
    """Our daemons listen on IPv4 here; something that listens on the same ports over IPv6 is out of reach, too."""
    ports, free = [AGENT_PORT, SERVER_PORT, SERVER_PORT + 1], 45999
    w1.write("/root/listen.py", LISTEN.format(ports=[*ports, free]))
    address = w1.text("ip -6 -o address show dev eth0 scope link").split()[3].split("/")[0]
    w1.run("systemd-run --quiet --unit=listen python3 /root/listen.py")
    try:
        wait_until(lambda: outsider.reaches(f"{address}%eth0", free), 20, "the free port answers over IPv6")
        assert [port for port in ports if outsider.reaches(f"{address}%eth0", port)] == []
    finally:
        w1.run("systemctl stop listen; rm /root/listen.py")


def test_a_rule_of_another_tool_that_blocks_is_named(operator: Operator, w1: Machine, w2: Machine) -> None:
    """An accept of ours cannot undo a drop of theirs; who deploys must be told."""
    w2.nft(*f"insert rule inet neighbour input tcp dport {AGENT_PORT} drop".split())
    try:
        assert not w1.reaches(w2.address, AGENT_PORT)
        said = " ".join(operator.make("deploy", status=2).output.split())
        assert "w2" in said and "neighbour" in said, said
    finally:
        listed = w2.nft("-a", "list", "chain", "inet", "neighbour", "input")
        handle = re.findall(rf"{AGENT_PORT} drop # handle (\d+)", listed)[0]
        w2.nft("delete", "rule", "inet", "neighbour", "input", "handle", handle)
    assert w1.reaches(w2.address, AGENT_PORT)


@contextlib.contextmanager
def other_host_keys(machine: Machine):  # type: ignore[no-untyped-def]
    machine.run("mkdir /root/keys && mv /etc/ssh/ssh_host_* /root/keys/ && systemctl restart ssh")
    try:
        yield
    finally:
        machine.run("rm -f /etc/ssh/ssh_host_* && mv /root/keys/* /etc/ssh/ && rmdir /root/keys; systemctl restart ssh")


def test_a_changed_host_key_is_refused_by_the_master(operator: Operator, w2: Machine, anna: Person) -> None:
    with other_host_keys(w2):
        done = anna.mrcore("cluster", "status", status=None)
        said = " ".join(done.output.split())
        assert "w2" in said and "host key" in said.lower(), done.output
        assert done.status != 0
        assert w2.address in said or "known_hosts" in said, "what to look at"
    assert "host key" not in anna.mrcore("cluster", "status").output.lower()


@pytest.mark.parametrize("verb", ["restart", "reload", "stop", "start"])
def test_our_table_comes_back_after_the_systems_own_rules(w1: Machine, verb: str) -> None:
    """Debian's nftables.service flushes the rules of everybody; after `stop` nobody has any, until it is started."""
    w1.run(f"systemctl {verb} nftables")
    wait_until(lambda: ("inet mrcore" in w1.nft("list", "tables")) == (verb != "stop"), 10, f"our table after {verb}")
    if verb == "start":
        w1.nft("-f", "-", stdin=FOREIGN_RULES)  # the neighbours' rules went as well
