"""Which certificates count: what the controller keeps beside the authority, and the list of it that daemons read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

AUTHORITY_FILES = ("ca.crt", "ca-next.crt", "ca-previous.crt")  # the first signs; the others are trusted as well


def mrcore_serial(number: int) -> str:
    """A certificate's serial as the daemons compare it: upper-case hexadecimal."""
    return f"{int(number):X}"


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
        ours = (mrcore_serial, mrcore_list, mrcore_authority, mrcore_members, mrcore_replaced)
        return {function.__name__: function for function in ours}
