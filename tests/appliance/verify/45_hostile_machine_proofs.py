"""Root on a node is not the master: the controller signs what it asked for, and nothing else."""

from __future__ import annotations

from harness import Machine, Operator

SHIM = '#!/bin/sh\nPYTHONPATH=/etc/shim exec /usr/bin/python3 "$@"\n'
ANOTHER_ROLE = """
from cryptography import x509
from cryptography.x509.oid import NameOID

real = x509.CertificateSigningRequestBuilder.subject_name


def subject_name(self, name):
    unit = NameOID.ORGANIZATIONAL_UNIT_NAME
    return real(self, x509.Name([x509.NameAttribute(a.oid, "master" if a.oid == unit else a.value) for a in name]))


x509.CertificateSigningRequestBuilder.subject_name = subject_name
"""


def test_a_node_that_asks_for_the_masters_role_is_refused(operator: Operator, w1: Machine) -> None:
    usual, inventory = operator.inventory(), operator.inventory()
    inventory["all"]["children"]["nodes"]["hosts"]["w1"]["ansible_python_interpreter"] = "/etc/shim/python3"
    w1.write("/etc/shim/python3", SHIM, "0755")
    w1.write("/etc/shim/sitecustomize.py", ANOTHER_ROLE)
    issued = sorted((operator.folder / "pki/issued").rglob("*.crt"))
    operator.write_inventory(inventory)
    try:
        said = " ".join(operator.make("deploy", status=2).output.split())
    finally:
        operator.write_inventory(usual)
        w1.run("rm -r /etc/shim")
    assert "w1 asks for a certificate that is not its own" in said, said
    assert sorted((operator.folder / "pki/issued").rglob("*.crt")) == issued
