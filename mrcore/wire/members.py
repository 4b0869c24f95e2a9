"""The allow list: who is a member of the cluster, with which certificates, as one file on each machine."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mrcore.errors import UsageError
from mrcore.system.reload import Watched

_SERIAL = re.compile(r"[0-9A-F]{1,40}")


class Membership(NamedTuple):
    """The allow list: who belongs to the cluster, and with which certificates. Servers ask it, and clients.

    `holders`: (role, name) → serials (as `tls.Identity` has them) of the certificates that count; None: any, which a
    list that an older release wrote means. `denied`: serials that never count. `cluster`: the O of all of them.
    """

    holders: Mapping[tuple[str, str], frozenset[str] | None]
    denied: frozenset[str] = frozenset()
    cluster: str | None = None

    def objection(self, role: str, name: str, serial: str, cluster: str) -> str | None:
        """Return why the holder of this certificate is not to be trusted; None: it is."""
        if serial in self.denied:
            return f"the certificate {serial} of {name} was withdrawn"
        if self.cluster is None and role == "master":  # an older release's list names nodes only
            return None
        if self.cluster is not None and cluster != self.cluster:
            return f"the certificate {serial} of {name} is of the cluster {cluster!r:.100}, not of {self.cluster!r}"
        if (role, name) not in self.holders:
            return f"{name} is no member of this cluster as a {role}"
        listed = self.holders[role, name]
        if listed is not None and serial not in listed:
            return f"the certificate {serial} of {name} is not on this cluster's list: it was replaced, or never listed"
        return None


def members_content(
    cluster: str, serials: Mapping[tuple[str, str], Iterable[str]], denied: Iterable[str] = ()
) -> bytes:
    """Return what a members file holds for these serials by (role, name). No two roles may share a name."""
    holders = {name: {"role": role, "serials": sorted(each)} for (role, name), each in serials.items()}
    return json.dumps({"cluster": cluster, "members": holders, "denied": sorted(denied)}, sort_keys=True).encode()


def read_membership(file: Path) -> Membership:
    """Read `{"cluster": O, "members": {NAME: {"role": "master" | "node", "serials": [...]}}, "denied": [serials]}`.

    Or what an older release wrote: `{"members": [names of nodes], "denied": [serials]}`. Raises UsageError.
    """
    try:
        plain: Any = json.loads(file.read_bytes())
    except OSError as error:
        raise UsageError(f"cannot read the members file {file}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the members file {file} is no JSON: {error}") from None
    match plain:
        case {"members": list(names), **rest} if "cluster" not in rest and all(isinstance(name, str) for name in names):
            return Membership(dict.fromkeys(("node", name) for name in names), _serials(file, rest.get("denied", [])))
        case {"members": dict(members), "cluster": str(cluster), **rest} if cluster:
            holders: dict[tuple[str, str], frozenset[str] | None] = {}
            for name, about in members.items():
                match about:
                    case {"role": "master" | "node" as role, "serials": serials}:
                        holders[role, name] = _serials(file, serials)
                    case _:
                        raise UsageError(f"the members file {file} gives {name!r:.100} no role or no serials")
            return Membership(holders, _serials(file, rest.get("denied", [])), cluster)
    raise UsageError(
        f'the members file {file} must hold {{"cluster": …, "members": {{NAME: {{"role", "serials"}}}}, "denied": […]}}'
    )


def _serials(file: Path, plain: Any) -> frozenset[str]:
    if not isinstance(plain, list) or not all(isinstance(text, str) for text in plain):
        raise UsageError(f"the members file {file} must hold lists of serials")
    serials = {text.replace(":", "").upper().lstrip("0") for text in plain}
    if wrong := [text for text in serials if not _SERIAL.fullmatch(text)]:
        raise UsageError(f"the members file {file} holds {wrong[0]!r:.100}, which is no serial in hexadecimal")
    return frozenset(serials)


def watch_membership(file: Path) -> Watched[Membership]:
    """Return the members as this file has them from now on. Raises UsageError if it cannot be read at first."""
    return Watched([file], lambda: read_membership(file))
