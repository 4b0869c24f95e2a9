"""Fixtures of the living cluster, for proofs: a plugin of pytest that the lab's environment names.

No conftest.py: pytest would take it for the one of tests/.
"""

from __future__ import annotations

import os

import pytest
from harness import Machine, Operator, Person
from lab import Lab


@pytest.fixture(scope="session")
def lab() -> Lab:
    return Lab.of(os.environ["MRCORE_LAB_SCENARIO"])


@pytest.fixture(scope="session")
def operator(lab: Lab) -> Operator:
    return Operator(lab)


@pytest.fixture(scope="session")
def m1(lab: Lab) -> Machine:
    return Machine(lab, "m1")


@pytest.fixture(scope="session")
def w1(lab: Lab) -> Machine:
    return Machine(lab, "w1")


@pytest.fixture(scope="session")
def w2(lab: Lab) -> Machine:
    return Machine(lab, "w2")


@pytest.fixture(scope="session")
def w3(lab: Lab) -> Machine:
    return Machine(lab, "w3")


@pytest.fixture(scope="session")
def outsider(lab: Lab) -> Machine:
    return Machine(lab, "outsider")


@pytest.fixture(scope="session")
def anna(m1: Machine) -> Person:
    """A member of mrcore-users."""
    return Person(m1, "anna")


@pytest.fixture(scope="session")
def zoe(m1: Machine) -> Person:
    """Somebody with an account on the master who is no member."""
    return Person(m1, "zoe")
