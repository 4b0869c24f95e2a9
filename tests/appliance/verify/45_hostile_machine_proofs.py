"""Root on a node is not the master, and user mrcore is not root: what one of them plants is not followed."""

from __future__ import annotations

import tarfile

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


# Read line by line, the second name is one line of blanks and one that names root's file; the first is a link to it.
TRAPS = """
import os
logs = "/var/lib/mrcore/compute/logs"
os.symlink("/root/secret", f"{logs}/trap.log")
os.makedirs(f"{logs}/trap\\n/root")
open(f"{logs}/trap\\n/root/secret", "w").close()
"""


def test_collected_logs_hold_nothing_that_their_owner_may_not_read(operator: Operator, w1: Machine) -> None:
    before = set(operator.project.glob("mrcore-logs-*"))
    w1.write("/root/secret", "known to root only\n", "0600")
    w1.run("runuser -u mrcore -- python3 -", stdin=TRAPS)
    operator.make("collect-logs")
    w1.run("rm -r /root/secret /var/lib/mrcore/compute/logs/trap*")
    (archive,) = set(operator.project.glob("mrcore-logs-*")) - before
    with tarfile.open(archive) as tar:
        files = {each.name: tar.extractfile(each) for each in tar.getmembers() if each.isfile()}
        texts = {name: stream.read() for name, stream in files.items() if stream}
    archive.unlink()
    assert any(name.endswith("w1/logs/var/lib/mrcore/compute/logs/trap\n/root/secret") for name in texts), sorted(texts)
    assert [name for name, text in texts.items() if b"known to root only" in text] == []
    assert "mrcore-collect" not in w1.text("ls /var/tmp"), "nothing is left there"


CLIMBING = """#!/bin/sh
exec /usr/bin/tar --absolute-names --transform 's,^[.]/,../../,' "$@"
"""


def test_a_bad_archive_of_one_machine_leaves_the_others_theirs(operator: Operator, w1: Machine) -> None:
    """The program that packs the logs on w1 is another one: its names lead out of the archive."""
    before = set(operator.project.glob("mrcore-logs-*"))
    w1.write("/usr/sbin/tar", CLIMBING, "0755")
    try:
        said = " ".join(operator.make("collect-logs", status=2).output.split())
    finally:
        w1.run("rm /usr/sbin/tar")
    assert "not in it, w1: its archive was left out, the name ../" in said, said
    (archive,) = set(operator.project.glob("mrcore-logs-*")) - before
    with tarfile.open(archive) as tar:
        names = tar.getnames()
    archive.unlink()
    assert any("/m1/mrcore.txt" in name for name in names) and any("/w2/system.txt" in name for name in names), names
    assert [name for name in names if "/w1/" in name] == [name for name in names if name.endswith("/w1/missing.txt")]
    assert "mrcore-collect" not in w1.text("ls /var/tmp"), "nothing is left there"
