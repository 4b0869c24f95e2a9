"""Certificates made for proofs: right ones, and ones that are wrong in a single way. Independent of mrcore's own."""

from __future__ import annotations

import ipaddress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

PEM = serialization.Encoding.PEM


def subject(organization: str, role: str, name: str) -> x509.Name:
    """O, OU, CN as the cluster's certificates have them."""
    parts = ((NameOID.ORGANIZATION_NAME, organization), (NameOID.ORGANIZATIONAL_UNIT_NAME, role))
    return x509.Name([x509.NameAttribute(oid, text) for oid, text in (*parts, (NameOID.COMMON_NAME, name))])


def authority(folder: Path) -> None:
    """ca.crt and ca.key of an authority that is none of the cluster's, though it is called the same."""
    folder.mkdir(parents=True)
    key, name = ec.generate_private_key(ec.SECP256R1()), subject("mrcore", "authority", "mrcore CA")
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=10))
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    builder = builder.add_extension(usage, critical=True)
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    _write(folder, "ca", builder.sign(key, hashes.SHA256()), key)


def issue(
    signer_folder: Path, folder: Path, stem: str, *,
    role: str, name: str, address: str, organization: str = "mrcore", days: tuple[int, int] = (-1, 10),
) -> str:  # fmt: skip
    """STEM.crt and STEM.key, signed by the ca.key of `signer_folder`; gives the serial as deny lists write it."""
    issuer = x509.load_pem_x509_certificate((signer_folder / "ca.crt").read_bytes())
    signer = serialization.load_pem_private_key((signer_folder / "ca.key").read_bytes(), password=None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    owner, serial = subject(organization, role, name), x509.random_serial_number()
    builder = x509.CertificateBuilder(issuer.subject, owner, key.public_key(), serial)
    builder = builder.not_valid_before(now + timedelta(days=days[0])).not_valid_after(now + timedelta(days=days[1]))
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    usage = x509.KeyUsage(True, False, False, False, False, False, False, False, False)
    builder = builder.add_extension(usage, critical=True)
    purposes = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    builder = builder.add_extension(purposes, critical=False)
    names = [x509.DNSName(name), x509.IPAddress(ipaddress.ip_address(address))]
    builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    same = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
    _write(folder, stem, builder.add_extension(same, critical=False).sign(signer, hashes.SHA256()), key)
    return f"{serial:X}"


def _write(folder: Path, stem: str, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
    secret = key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / f"{stem}.key").write_bytes(secret)
    (folder / f"{stem}.crt").write_bytes(certificate.public_bytes(PEM))
