"""Machines that are not fit are refused before any change, with one sentence that says what to mend.

The machines are still bare here. What is wrong is played: a Python that tells another time or version, another
/etc/os-release, a folder on a full disk, a machine that is switched off.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
from harness import Machine, Operator
from lab import PYTHONS, podman
from shim import python_shim

# Everything that a deploy changes: packages, accounts, settings, programs, data.
STATE = r"""
find /etc /opt /srv /usr/local -xdev -type f -not -path '/etc/shim/*' -exec sha256sum {} + | sort -k2
dpkg-query --show; cat /etc/passwd /etc/group; find /var/lib -maxdepth 1; systemctl list-unit-files --no-pager
nft list ruleset 2>/dev/null | sed 's/packets [0-9]* bytes [0-9]*//'
"""
LATER = "import time\nreal = time.time\ntime.time = lambda: real() + 600\n"
VERSION = "import sys\nsys.version_info = ({numbers}, 'final', 0)\n"


def state(machine: Machine) -> str:
    return machine.run(STATE).stdout


@contextlib.contextmanager
def another_system(machine: Machine) -> Iterator[None]:
    machine.run("cp --dereference /etc/os-release /root/os-release; rm /etc/os-release")
    machine.write("/etc/os-release", 'ID=ubuntu\nVERSION_ID="22.04"\nPRETTY_NAME="Ubuntu 22.04"\n')
    try:
        yield
    finally:
        machine.run("ln -sf ../usr/lib/os-release /etc/os-release")


@contextlib.contextmanager
def full_disk(machine: Machine) -> Iterator[None]:
    """The folder for data is to lie on a file system of 8 MiB."""
    podman("exec", "--privileged", machine.container, "sh", "-c", "mount -t tmpfs -o size=8m tmpfs /var/lib/misc")
    try:
        yield
    finally:
        podman("exec", "--privileged", machine.container, "umount", "/var/lib/misc")


def refused(operator: Operator, *words: str) -> str:
    """What deploy says; no host may have been changed."""
    played = operator.make("deploy", status=2)
    assert not any(played.changed.values()), played.output
    said = " ".join(played.output.split())
    for word in words:
        assert word in said, f"{word!r} is not said:\n{played.output}"
    return said


@pytest.fixture(autouse=True)
def unchanged(m1: Machine, w1: Machine, w2: Machine) -> Iterator[None]:
    before = [state(machine) for machine in (m1, w1, w2)]
    yield
    assert [state(machine) for machine in (m1, w1, w2)] == before


def test_a_clock_ten_minutes_off(operator: Operator, w1: Machine) -> None:
    with python_shim(operator, w1, LATER):
        said = refused(operator, "The clock of w1 is", "s ahead of the controller's")
        assert 595 < int(said.split("The clock of w1 is ")[1].split()[0]) < 660, said


def test_a_python_too_old(operator: Operator, w1: Machine) -> None:
    with python_shim(operator, w1, VERSION.format(numbers="3, 10, 12")):
        refused(operator, "w1", "Python 3.10", "3.11 or later")


def test_mixed_minors(operator: Operator, w1: Machine) -> None:
    with python_shim(operator, w1, VERSION.format(numbers="3, 12, 1")):
        refused(operator, f"{PYTHONS[operator.lab.system]} on", "3.12 on w1")


def test_a_wrong_system(operator: Operator, w2: Machine) -> None:
    with another_system(w2):
        refused(operator, "w2 runs ubuntu 22.04")


def test_a_full_disk(operator: Operator, w2: Machine) -> None:
    good, bad = operator.inventory(), operator.inventory()
    bad["all"]["children"]["nodes"]["hosts"]["w2"]["mrcore_compute_dir"] = "/var/lib/misc/compute"
    operator.write_inventory(bad)
    try:
        with full_disk(w2):
            refused(operator, "w2 has 8 MiB free", "make room")
    finally:
        operator.write_inventory(good)


def test_a_node_that_does_not_answer(operator: Operator, w3: Machine) -> None:
    good, bad = operator.inventory(), operator.inventory()
    bad["all"]["children"]["nodes"]["hosts"] |= operator.hosts("w3")
    operator.write_inventory(bad)
    w3.stop()
    try:
        refused(operator, "w3 cannot be reached")
    finally:
        w3.start()
        operator.write_inventory(good)


def test_somebody_without_an_account(operator: Operator) -> None:
    good, bad = operator.inventory(), operator.inventory()
    bad["all"]["vars"]["mrcore_users"] = ["anna", "nobody-there"]
    operator.write_inventory(bad)
    try:
        refused(operator, "nobody-there", "no account on m1")
    finally:
        operator.write_inventory(good)
