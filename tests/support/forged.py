"""Certificates that are right, or wrong in a single way, made without mrcore's own code."""

from __future__ import annotations

import ipaddress
import json
import shutil
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from mrcore.wire.tls import Pki

BOTH = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)
NODE = {"ou": "node", "cn": "node-1"}
# What each is: the master's certificate but for …; `serial` "theirs" is that of the real one, which is listed.
IDENTITIES: dict[str, dict[str, Any]] = {
    "self-signed": {"signer": None},
    "other authority, master": {"signer": "other"},
    "other authority, node": {"signer": "other", **NODE},
    "signed by a node": {"signer": "node"},
    "expired master": {"days": (-30, -1)},
    "expired node": {"days": (-30, -1), **NODE},
    "master of tomorrow": {"days": (5, 50)},
    "unlisted master": {},
    "unlisted node": {**NODE},
    "denied master": {"denied": True, "listed": True},
    "denied node": {"denied": True, "listed": True, **NODE},
    "master of another cluster": {"o": "another", "listed": True},
    "node of another cluster": {"o": "another", "listed": True, **NODE},
    "master of no cluster": {"o": None, "listed": True},
    "a name that is no member": {**NODE, "cn": "node-9"},
    "a name in other letters": {**NODE, "cn": "NODE-1", "listed": True},
    "a node called master": {**NODE, "cn": "master", "listed": True},
    "a node's name with the master's role": {"cn": "node-1", "listed": True},
    "for servers only": {"purposes": BOTH[:1], "listed": True},
    "for servers only, node": {"purposes": BOTH[:1], "listed": True, **NODE},
    "role in other letters": {"ou": "Master", "listed": True},
    "no role": {"ou": None, "listed": True},
    "role of an authority": {"ou": "authority", "listed": True},
    "two roles": {"first_ou": "node", "listed": True},
    "no name": {"cn": None, "listed": True},
    "the authority's own": {"copy": "ca"},
}


class Forger:
    """Makes certificates for one cluster: `ca` is the folder of its authority, `node` that of a node's pair."""

    def __init__(self, folder: Path, ca: Path, node: Path, cluster: str) -> None:
        self.folder, self._ca, self._node, self._cluster = folder, ca, node, cluster
        self.serials: dict[str, str] = {}
        self._made: dict[str, Pki] = {}

    def __call__(self, what: str, about: Mapping[str, Any], names: tuple[str, ...]) -> Pki:
        """The certificate of IDENTITIES, or of any such description, for these host names and addresses."""
        if what in self._made:
            return self._made[what]
        folder = self.folder / f"{len(self._made)}"
        folder.mkdir(parents=True)
        shutil.copy(self._ca / "ca.crt", folder)
        if about.get("copy"):
            for suffix in ("crt", "key"):
                shutil.copy(self._ca / f"{about['copy']}.{suffix}", folder / f"x.{suffix}")
        else:
            self._issue(folder, what, about, names)
        self._made[what] = Pki(folder, "x")
        return self._made[what]

    def _signer(self, kind: str | None) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey, bytes] | None:
        if kind is None:
            return None
        files = {"own": self._ca / "ca", "node": self._node / "node", "other": self.folder / "other/ca"}[kind]
        if kind == "other" and not files.with_suffix(".crt").exists():
            from mrcore.wire import pki

            pki.make_authority(files.parent, self._cluster)
        pem = files.with_suffix(".crt").read_bytes()
        key = serialization.load_pem_private_key(files.with_suffix(".key").read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        return x509.load_pem_x509_certificate(pem), key, pem if kind == "node" else b""

    def _issue(self, folder: Path, what: str, about: Mapping[str, Any], names: tuple[str, ...]) -> None:
        key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
        about = {"o": self._cluster, "ou": "master", "cn": "master", "signer": "own", "days": (-1, 100)} | dict(about)
        oids = (NameOID.ORGANIZATION_NAME, NameOID.ORGANIZATIONAL_UNIT_NAME, NameOID.COMMON_NAME)
        pairs = [
            (oids[0], about["o"]),
            (oids[1], about.get("first_ou")),
            (oids[1], about["ou"]),
            (oids[2], about["cn"]),
        ]
        subject = x509.Name([x509.NameAttribute(oid, text) for oid, text in pairs if text])
        signer = self._signer(about["signer"])
        issuer, signing, chain = (signer[0].subject, signer[1], signer[2]) if signer else (subject, key, b"")
        builder = x509.CertificateBuilder(issuer, subject, key.public_key(), x509.random_serial_number())
        first, last = (now + timedelta(days=each) for each in about["days"])
        builder = builder.not_valid_before(first).not_valid_after(last)
        builder = builder.add_extension(x509.BasicConstraints(False, None), critical=True)
        usage = x509.KeyUsage(True, False, False, False, False, False, False, False, False)
        builder = builder.add_extension(usage, critical=True)
        builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        by = x509.AuthorityKeyIdentifier.from_issuer_public_key(signing.public_key())
        builder = builder.add_extension(by, critical=False)
        builder = builder.add_extension(x509.ExtendedKeyUsage(about.get("purposes", BOTH)), critical=False)
        alternatives = x509.SubjectAlternativeName([_alternative(name) for name in about.get("names", names)])
        made = builder.add_extension(alternatives, critical=False).sign(signing, hashes.SHA256())
        pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        (folder / "x.crt").write_bytes(made.public_bytes(pem) + chain)
        (folder / "x.key").write_bytes(key.private_bytes(pem, pkcs8, serialization.NoEncryption()))
        self.serials[what] = f"{made.serial_number:X}"

    def enter(self, members_file: Path) -> None:
        """Put into a members file what IDENTITIES says of those made so far: listed, denied."""
        plain = json.loads(members_file.read_text())
        for what, serial in self.serials.items():
            about = {"ou": "master", "cn": "master"} | IDENTITIES.get(what, {})
            if about.get("listed"):
                for each in plain["members"].values():  # under every name that there is: what is wrong must tell
                    each["serials"].append(serial)
            plain["denied"] += [serial] if about.get("denied") else []
        partial = members_file.with_suffix(".new")
        partial.write_text(json.dumps(plain))
        partial.replace(members_file)


def _alternative(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)
