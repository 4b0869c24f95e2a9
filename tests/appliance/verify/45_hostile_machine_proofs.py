"""Root on a node is not the master: the controller signs what it asked for, and nothing else."""

from __future__ import annotations

from harness import Machine, Operator
from shim import python_shim

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
    issued = sorted((operator.folder / "pki/issued").rglob("*.crt"))
    with python_shim(operator, w1, ANOTHER_ROLE, "ansible_python_interpreter"):
        said = " ".join(operator.make("deploy", status=2).output.split())
    assert "w1 asks for a certificate that is not its own" in said, said
    assert sorted((operator.folder / "pki/issued").rglob("*.crt")) == issued
