"""Which certificates count: what the controller keeps beside the authority, and the list of it that daemons read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

AUTHORITY_FILES = ("ca.crt", "ca-next.crt", "ca-previous.crt")  # the first signs; the others are trusted as well


SUBJECT = (NameOID.ORGANIZATION_NAME, NameOID.ORGANIZATIONAL_UNIT_NAME, NameOID.COMMON_NAME)
NAMES: dict[type, str] = {x509.DNSName: "DNS", x509.IPAddress: "IP"}
NAMES_EXTENSION = x509.SubjectAlternativeName
# No authority; digital signature and nothing else.
CONSTRAINTS = (x509.BasicConstraints(ca=False, path_length=None), x509.KeyUsage(True, *[False] * 8))
PURPOSES = {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}


def mrcore_serial(certificate: str) -> str:
    """Return the serial as the daemons compare it, upper-case hexadecimal; "" of what is no certificate."""
    try:
        return f"{x509.load_pem_x509_certificate(certificate.encode()).serial_number:X}"
    except ValueError:
        return ""


def mrcore_ends_within(certificate: str, days: int) -> bool:
    """Return whether it is to be renewed: it ends in these days, or is no certificate at all."""
    try:
        ends = x509.load_pem_x509_certificate(certificate.encode()).not_valid_after_utc
    except ValueError:
        return True
    return bool(ends < datetime.now(UTC) + timedelta(days=int(days)))


def mrcore_keeps(folder: str, serial: str, certificate: str) -> bool:
    """Return whether the controller has this certificate under its serial already."""
    file = Path(folder) / f"{serial}.crt"
    return file.is_file() and file.read_text(encoding="utf-8", errors="replace") == certificate


def mrcore_request(text: str, subject: Sequence[str], names: Sequence[str]) -> dict[str, Any]:
    """Return whether a request, PEM, asks for what a machine of this cluster may have and nothing beyond it.

    `subject`: cluster, role and name; `names`: "DNS:…", "IP:…". {"fits", "subject", "names"}, the latter as they are in
    the request, for a sentence.
    """
    try:
        request = x509.load_pem_x509_csr(text.encode())
        found = {type(each.value): each.value for each in request.extensions}
        signed = request.is_signature_valid
    except (ValueError, UnsupportedAlgorithm, x509.DuplicateExtension) as error:
        return {"fits": False, "subject": f"no request that can be read: {error}", "names": []}
    rows = [(row.oid, row.value) for row in request.subject]
    asked = [f"{NAMES.get(type(each), type(each).__name__)}:{each.value}" for each in found.get(NAMES_EXTENSION, ())]
    fits = (
        signed
        and rows == list(zip(SUBJECT, subject, strict=True))
        and asked == list(names)
        and len(request.extensions) == len(found)
        and set(found) == {NAMES_EXTENSION, x509.SubjectKeyIdentifier, x509.ExtendedKeyUsage, *map(type, CONSTRAINTS)}
        and all(found[type(each)] == each for each in CONSTRAINTS)
        and set(found[x509.ExtendedKeyUsage]) == PURPOSES
    )
    return {"fits": fits, "subject": [[oid._name, str(value)] for oid, value in rows], "names": asked}


def mrcore_pair_is_whole(stem: str) -> bool:
    """Return whether stem.key, closed to others, and its public half stem.pub are there and belong together."""
    key, public = (Path(f"{stem}.{end}") for end in ("key", "pub"))
    try:
        if key.stat().st_mode & 0o177:
            return False
        ours = serialization.load_pem_private_key(key.read_bytes(), None).public_key()
        theirs = serialization.load_pem_public_key(public.read_bytes())
    except (OSError, ValueError, TypeError):
        return False
    form = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    return ours.public_bytes(*form) == theirs.public_bytes(*form)


def mrcore_list(folder: str, name: str) -> list[str]:
    """A list that the controller keeps beside the authority: denied.json (serials), removed.json (nodes)."""
    file = Path(folder) / name
    return list(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else []


def mrcore_authority(folder: str) -> str:
    """The CA certificates that the controller's folder holds: the one that signs, and during a rotation the other."""
    files = [Path(folder) / name for name in AUTHORITY_FILES]
    return "".join(file.read_text(encoding="ascii") for file in files if file.exists())


def _issued(folder: str, name: str) -> set[str]:
    return {file.stem for file in (Path(folder) / "issued" / name).glob("*.crt")}


def mrcore_members(folder: str, cluster: str, nodes: Iterable[str]) -> dict[str, Any]:
    """What members.json holds: of the master and of each node all certificates that were issued and are not denied.

    More than one of a machine only while one takes the other's place.
    """
    denied = set(mrcore_list(folder, "denied.json"))
    roles = dict.fromkeys(nodes, "node") | {"master": "master"}
    members = {name: {"role": role, "serials": sorted(_issued(folder, name) - denied)} for name, role in roles.items()}
    return {"cluster": cluster, "members": members, "denied": sorted(denied)}


def mrcore_replaced(folder: str, present: Iterable[dict[str, str]]) -> list[str]:
    """What denied.json is to hold once these certificates, [{name: serial}…], are in place: all others of theirs."""
    denied = set(mrcore_list(folder, "denied.json"))
    for names in present:
        for name, serial in names.items():
            denied |= _issued(folder, name) - {serial}
    return sorted(denied)


class FilterModule:
    """What Ansible looks for."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """The filters by name."""
        ours = (mrcore_serial, mrcore_ends_within, mrcore_keeps, mrcore_request, mrcore_pair_is_whole)
        ours += (mrcore_list, mrcore_authority, mrcore_members, mrcore_replaced)  # type: ignore[assignment]
        return {function.__name__: function for function in ours}
