"""Where the files of a drained node go; nothing here asks or changes anything."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field

from mrcore.messages.nodes import HeldFile
from mrcore.state.moves import Move
from mrcore.system.readers import suffix_of
from mrcore.transfer.batches import MIN_FREE_DISK_BYTES


@dataclass
class Room:
    """What a node has: bytes under base_dir, bytes of free disk, and of the names in question those that are taken."""

    held: int
    free: int
    taken: set[str] = field(default_factory=set)


def renamed(name: str, node: str) -> str:
    """Return another name for a file whose own is taken: with its old node before its endings, which patterns match."""
    folder, slash, last = name.rpartition("/")
    packed = suffix_of(last)
    stem, dot, ending = last.removesuffix(packed).rpartition(".")
    if not stem:
        stem, dot, ending = last.removesuffix(packed), "", ""
    return f"{folder}{slash}{stem}.{node}{dot}{ending}{packed}"


def plan(
    files: Iterable[HeldFile], rooms: Mapping[str, Room], parts: Container[str], node: str
) -> tuple[list[Move], dict[str, str]]:
    """Choose for each file the node that holds the fewest bytes of those that have room and not its name already.

    Where all have the name it gets another, but for `parts`, which manifests name. Return the moves, and why the files
    that cannot be moved cannot, by name. `rooms` are brought up to date.
    """
    moves: list[Move] = []
    left: dict[str, str] = {}
    for file in files:
        name, size = file.name, file.size
        with_room = [other for other, room in rooms.items() if room.free - size >= MIN_FREE_DISK_BYTES]
        for new_name in (name,) if name in parts else (name, renamed(name, node)):
            if fitting := [other for other in with_room if new_name not in rooms[other].taken]:
                target = min(fitting, key=lambda other: (rooms[other].held, other))
                room = rooms[target]
                room.held, room.free = room.held + size, room.free - size
                room.taken.add(new_name)
                moves.append(Move(name, size, file.mtime_ns, file.mode, file.inode, target, new_name))
                break
        else:
            why = "has a file of that name" if with_room else f"is short of disk for its {size:,} bytes"
            left[name] = f"{name}: every other node {why}"
    return moves, left
