"""The cluster's own certificate authority: EC P-256, one certificate for the master and one for each node.

The subject says who a peer is: O = cluster, OU = role ("master" may order, "node" may fetch), CN = name. Only those
count that are on the cluster's allow list (`wire.members`), hence the long life. No daemon imports this.

Also the key that signs backups, which has nothing to do with certificates.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from mrcore.errors import UsageError
from mrcore.system.paths import write_atomic

CLOCK_SKEW_DAYS = 1  # a node whose clock lags must not refuse a certificate made a moment ago
VALID_DAYS, NAME_CHARACTERS = 3650, 64  # the latter is X.509's bound of a common name


def make_authority(folder: Path, cluster_name: str) -> None:
    """Write `ca.crt` and `ca.key` (mode 0600) into `folder`. Raises UsageError if there is an authority already."""
    if (folder / "ca.key").exists() or (folder / "ca.crt").exists():
        raise UsageError(f"{folder} holds a certificate authority already; a new one would cut off every node")
    key, subject = ec.generate_private_key(ec.SECP256R1()), _subject(cluster_name, "authority", "mrcore CA")
    usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)  # sign certificates and CRLs
    builder = _builder(subject, subject, key, key, x509.BasicConstraints(ca=True, path_length=0), usage)
    _write(folder, "ca", builder.sign(key, hashes.SHA256()), key)


def issue(
    authority_folder: Path, target_folder: Path, file_stem: str,
    name: str, role: Literal["master", "node"], addresses: Sequence[str], cluster: str | None = None,
) -> str:  # fmt: skip
    """Write STEM.crt, STEM.key (mode 0600) and a copy of ca.crt into `target_folder`.

    `addresses`: the IP addresses and host names under which the holder serves; `cluster`: its O (None: the
    authority's). Return the certificate's serial as the members file wants it (upper-case hexadecimal). Raises
    UsageError for a bad name or role, or without an authority.
    """
    if role not in ("master", "node"):
        raise UsageError(f"unknown role {role!r} for the certificate of {name}: master or node")
    try:
        authority = x509.load_pem_x509_certificate((authority_folder / "ca.crt").read_bytes())
        signer = serialization.load_pem_private_key((authority_folder / "ca.key").read_bytes(), password=None)
    except OSError as error:
        raise UsageError(f"no certificate authority in {authority_folder}: {error.strerror}; make one first") from error
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    organization = authority.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)[0].value
    key, subject = ec.generate_private_key(ec.SECP256R1()), _subject(cluster or str(organization), role, name)
    usage = x509.KeyUsage(True, False, False, False, False, False, False, False, False)  # signatures only
    alternatives = x509.SubjectAlternativeName([_alternative(n) for n in dict.fromkeys([name, *addresses])])
    purposes = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    builder = _builder(subject, authority.subject, key, signer, x509.BasicConstraints(False, None), usage)
    builder = builder.add_extension(alternatives, critical=False).add_extension(purposes, critical=False)
    certificate = builder.sign(signer, hashes.SHA256())
    _write(target_folder, file_stem, certificate, key)
    write_atomic(target_folder / "ca.crt", authority.public_bytes(serialization.Encoding.PEM))
    return f"{certificate.serial_number:X}"


def make_backup_key(folder: Path) -> None:
    """Write `backup.key` (mode 0600), which signs backups, and `backup.pub`, which verifies them; once."""
    private, public, pem = folder / "backup.key", folder / "backup.pub", serialization.Encoding.PEM
    if not private.exists():
        made = ed25519.Ed25519PrivateKey.generate()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        pkcs8, open_ = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        write_atomic(private, made.private_bytes(pem, pkcs8, open_), mode=0o600)
        public.unlink(missing_ok=True)
    if not public.exists():
        half = _signer(private).public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
        write_atomic(public, half)


def sign(key_file: Path, message: bytes) -> bytes:
    """Return the Ed25519 signature (64 bytes) of a message. Raises UsageError for a file that holds no such key."""
    return _signer(key_file).sign(message)


def is_signed(public_file: Path, message: bytes, signature: bytes) -> bool:
    """Return whether a signature is of this message and this key. Raises UsageError as `sign`."""
    key = _loaded(public_file, serialization.load_pem_public_key)
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise UsageError(f"{public_file} holds no Ed25519 key")
    try:
        key.verify(signature, message)
    except InvalidSignature:
        return False
    return True


def _signer(file: Path) -> ed25519.Ed25519PrivateKey:
    key = _loaded(file, lambda pem: serialization.load_pem_private_key(pem, password=None))
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise UsageError(f"{file} holds no Ed25519 key")
    return key


def _loaded(file: Path, load: Callable[[bytes], object]) -> object:
    try:
        return load(file.read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise UsageError(f"cannot read the key {file}: {getattr(error, 'strerror', None) or error}") from None


def ends(certificate: Path) -> float:
    """Return when a certificate in a PEM file ends, in seconds since 1970. Raises UsageError if it cannot be read."""
    return _read(certificate).not_valid_after_utc.timestamp()


def serial(certificate: Path) -> str:
    """Return the serial of a certificate in a PEM file, as a members file wants it. Raises UsageError."""
    return f"{_read(certificate).serial_number:X}"


def _read(certificate: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(certificate.read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read the certificate {certificate}: {error}") from None


def _subject(organization: str, unit: str, name: str) -> x509.Name:
    for text in (organization, name):
        if not 0 < len(text) <= NAME_CHARACTERS or not text.isascii() or not text.isprintable() or "*" in text:
            raise UsageError(f"{text!r} cannot be a name in a certificate: 1 to {NAME_CHARACTERS} ASCII signs, no *")
    parts = {NameOID.ORGANIZATION_NAME: organization, NameOID.ORGANIZATIONAL_UNIT_NAME: unit, NameOID.COMMON_NAME: name}
    return x509.Name([x509.NameAttribute(oid, text) for oid, text in parts.items()])


def _alternative(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, signer: ec.EllipticCurvePrivateKey,
    constraints: x509.BasicConstraints, usage: x509.KeyUsage,
) -> x509.CertificateBuilder:  # fmt: skip
    now, public = datetime.now(UTC), key.public_key()
    builder = x509.CertificateBuilder(issuer, subject, public, x509.random_serial_number())
    first, last = now - timedelta(days=CLOCK_SKEW_DAYS), now + timedelta(days=VALID_DAYS)
    builder = builder.not_valid_before(first).not_valid_after(last)
    builder = builder.add_extension(constraints, critical=True).add_extension(usage, critical=True)
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    signed_by = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
    return builder.add_extension(signed_by, critical=False)


def _write(folder: Path, stem: str, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    write_atomic(folder / f"{stem}.key", key.private_bytes(pem, pkcs8, serialization.NoEncryption()), mode=0o600)
    write_atomic(folder / f"{stem}.crt", certificate.public_bytes(pem))
