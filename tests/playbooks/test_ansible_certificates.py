"""Which certificates count: the list that Ansible writes is the list that daemons read."""

from __future__ import annotations

import ipaddress
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from checkout import module
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from mrcore.wire.members import Membership, read_membership

plugin = module("ansible/filter_plugins/certificates.py")


def test_the_bundle_is_what_the_folder_holds(tmp_path: Path) -> None:
    assert plugin.mrcore_authority(str(tmp_path)) == ""
    (tmp_path / "ca-previous.crt").write_text("old\n")
    (tmp_path / "ca.crt").write_text("new\n")
    assert plugin.mrcore_authority(str(tmp_path)) == "new\nold\n"


KEY = ec.generate_private_key(ec.SECP256R1())
NAMES = [x509.DNSName("w1"), x509.IPAddress(ipaddress.ip_address("10.0.0.1"))]
USAGES = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]


def name(*values: str) -> x509.Name:
    oids = (NameOID.ORGANIZATION_NAME, NameOID.ORGANIZATIONAL_UNIT_NAME, NameOID.COMMON_NAME)
    return x509.Name([x509.NameAttribute(oid, value) for oid, value in zip(oids, values, strict=False)])


def pem(thing: Any) -> str:
    text: str = thing.public_bytes(serialization.Encoding.PEM).decode()
    return text


def certificate(days: float, serial: int = 0x0A1B) -> str:
    now, whose = datetime.now(UTC), name("prod", "node", "w1")
    made = x509.CertificateBuilder().subject_name(whose).issuer_name(whose).public_key(KEY.public_key())
    made = made.serial_number(serial).not_valid_before(now - timedelta(days=9))
    return pem(made.not_valid_after(now + timedelta(days=days)).sign(KEY, hashes.SHA256()))


def request(**changed: Any) -> str:
    """What a node's own module asks for, with changes: subject, names, authority, usages, further extensions."""
    usage = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "key_cert_sign", "crl_sign",
         "encipher_only", "decipher_only"), False,
    )  # fmt: skip
    usage |= {"digital_signature": True} | changed.get("usage", {})
    extensions = [
        x509.SubjectAlternativeName(changed.get("names", NAMES)),
        x509.BasicConstraints(ca=changed.get("authority", False), path_length=None),
        x509.KeyUsage(**usage),
        x509.ExtendedKeyUsage(changed.get("purposes", USAGES)),
        x509.SubjectKeyIdentifier.from_public_key(KEY.public_key()),
        *changed.get("further", ()),
    ]
    builder = x509.CertificateSigningRequestBuilder(name(*changed.get("subject", ("prod", "node", "w1"))))
    for each in extensions[changed.get("without", 0) :]:
        builder = builder.add_extension(each, critical=True)
    return pem(builder.sign(KEY, hashes.SHA256()))


def asked(text: str) -> Any:
    return plugin.mrcore_request(text, ["prod", "node", "w1"], ["DNS:w1", "IP:10.0.0.1"])


def test_serials_are_told_as_the_daemons_compare_them() -> None:
    assert plugin.mrcore_serial(certificate(1)) == "A1B"
    assert plugin.mrcore_serial("no certificate") == ""


def test_a_certificate_is_renewed_before_it_ends_and_when_it_cannot_be_read() -> None:
    assert [plugin.mrcore_ends_within(certificate(10), days) for days in (9, 11)] == [False, True]
    assert plugin.mrcore_ends_within("no certificate", 1)


def test_the_controller_has_a_copy_only_when_it_is_the_same(tmp_path: Path) -> None:
    assert not plugin.mrcore_keeps(str(tmp_path), "A1", "text\n")
    (tmp_path / "A1.crt").write_text("text\n")
    assert plugin.mrcore_keeps(str(tmp_path), "A1", "text\n") and not plugin.mrcore_keeps(str(tmp_path), "A1", "text")


def test_a_request_for_what_the_machine_is_fits() -> None:
    subject = [["organizationName", "prod"], ["organizationalUnitName", "node"], ["commonName", "w1"]]
    assert asked(request()) == {"fits": True, "subject": subject, "names": ["DNS:w1", "IP:10.0.0.1"]}
    assert asked(request(purposes=USAGES[::-1]))["fits"]


@pytest.mark.parametrize(
    "changed",
    [
        {"subject": ("prod", "master", "w1")},
        {"subject": ("prod", "node", "w2")},
        {"subject": ("test", "node", "w1")},
        {"subject": ("prod", "node")},
        {"names": [*NAMES, x509.DNSName("w2")]},
        {"names": NAMES[:1]},
        {"names": [x509.DNSName("w1"), x509.DNSName("10.0.0.1")]},
        {"authority": True},
        {"usage": {"key_cert_sign": True}},
        {"purposes": [*USAGES, ExtendedKeyUsageOID.CODE_SIGNING]},
        {"further": [x509.OCSPNoCheck()]},
        {"without": 1},
    ],
)
def test_a_request_for_anything_else_does_not(changed: dict[str, Any]) -> None:
    assert asked(request(**changed))["fits"] is False


def test_what_is_no_request_or_has_another_signature_does_not_fit() -> None:
    body = request().splitlines()
    body[-2] = body[-2][:4] + ("A" if body[-2][4] != "A" else "B") + body[-2][5:]
    assert asked("\n".join(body))["fits"] is False
    assert (
        "no request" in asked("-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----")["subject"]
    )
    assert asked("")["fits"] is False


def test_a_pair_is_whole_when_its_halves_belong_together_and_the_key_is_closed(tmp_path: Path) -> None:
    stem = str(tmp_path / "backup")
    assert not plugin.mrcore_pair_is_whole(stem)
    form = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (tmp_path / "backup.key").write_bytes(KEY.private_bytes(serialization.Encoding.PEM, *form))
    (tmp_path / "backup.key").chmod(0o600)
    assert not plugin.mrcore_pair_is_whole(stem)
    for key, whole in ((ec.generate_private_key(ec.SECP256R1()), False), (KEY, True)):
        public = key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        (tmp_path / "backup.pub").write_bytes(public)
        assert plugin.mrcore_pair_is_whole(stem) is whole
    (tmp_path / "backup.key").chmod(0o640)
    assert not plugin.mrcore_pair_is_whole(stem)


class Controller:
    """The folder of an authority: what was issued, what is denied; and what daemons make of the list."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def issue(self, name: str, *serials: str) -> None:
        for serial in serials:
            file = self.folder / "issued" / name / f"{serial}.crt"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()

    def deny(self, serials: list[str]) -> None:
        (self.folder / "denied.json").write_text(json.dumps(serials))

    def listed(self, *nodes: str) -> Membership:
        file = self.folder / "members.json"
        file.write_text(json.dumps(plugin.mrcore_members(str(self.folder), "prod", nodes)))
        return read_membership(file)

    def counts(self, *nodes: str) -> dict[str, set[str]]:
        return {name: set(serials or ()) for (_, name), serials in self.listed(*nodes).holders.items()}


@pytest.fixture
def controller(tmp_path: Path) -> Controller:
    return Controller(tmp_path)


def test_what_was_issued_counts_unless_it_is_denied(controller: Controller) -> None:
    controller.issue("master", "A1")
    controller.issue("w1", "B1", "B2")
    controller.issue("gone", "C1")
    controller.deny(["B1", "C1"])
    assert controller.counts("w1", "w2") == {"master": {"A1"}, "w1": {"B2"}, "w2": set()}
    found = controller.listed("w1", "w2")
    assert found.cluster == "prod" and found.denied == {"B1", "C1"}
    assert found.objection("master", "master", "A1", "prod") is None
    assert "of the cluster 'test'" in str(found.objection("master", "master", "A1", "test"))
    assert "no member" in str(found.objection("node", "gone", "C2", "prod"))
    assert "no member" in str(found.objection("node", "master", "A1", "prod")), "a role is not another one"


def test_both_count_while_one_takes_the_others_place_and_then_the_new_one_only(controller: Controller) -> None:
    controller.issue("master", "A1")
    controller.issue("w1", "B1")
    controller.issue("w2", "C1")
    present = [{"master": "A1", "w1": "B1"}, {"w2": "C1"}]
    assert plugin.mrcore_replaced(str(controller.folder), present) == []
    for name, serial in (("master", "A2"), ("w1", "B2"), ("w2", "C2")):
        controller.issue(name, serial)
    assert controller.counts("w1", "w2") == {"master": {"A1", "A2"}, "w1": {"B1", "B2"}, "w2": {"C1", "C2"}}
    controller.deny(plugin.mrcore_replaced(str(controller.folder), [{"master": "A2", "w1": "B2"}, {"w2": "C2"}]))
    assert controller.counts("w1", "w2") == {"master": {"A2"}, "w1": {"B2"}, "w2": {"C2"}}


def test_what_a_rotation_that_was_cut_off_made_and_never_brought_goes_too(controller: Controller) -> None:
    controller.issue("w1", "B1", "B2", "B3")
    controller.deny(["F0"])
    assert plugin.mrcore_replaced(str(controller.folder), [{"w1": "B3"}]) == ["B1", "B2", "F0"]


def test_machines_that_a_run_left_out_keep_theirs(controller: Controller) -> None:
    controller.issue("w1", "B1")
    controller.issue("w2", "C1", "C2")
    assert plugin.mrcore_replaced(str(controller.folder), [{"w1": "B1"}]) == []
