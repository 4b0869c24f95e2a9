"""The mark of a drain in the queue's file: which node is emptied, by which process, and the step that has begun.

While it stands no run starts: see `Store.held_by_drain`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import msgspec

from mrcore.errors import UsageError
from mrcore.messages.kinds import convert
from mrcore.messages.nodes import HeldFile
from mrcore.state.doorbell import Doorbell
from mrcore.state.store import Store
from mrcore.system import procfs


class Move(msgspec.Struct, frozen=True, array_like=True):
    """A file, where it goes, and the name that it gets there; once it is staged, its time and inode there."""

    name: str
    size: int
    mtime_ns: int
    mode: int
    inode: int
    target: str
    new_name: str
    new_mtime_ns: int = 0
    new_inode: int = 0

    @property
    def old(self) -> HeldFile:
        """The file as the old node lists it."""
        return HeldFile(self.name, self.size, self.mtime_ns, self.mode, self.inode)

    @property
    def staged(self) -> HeldFile:
        """The file as the new node stages it."""
        return HeldFile(self.new_name, self.size, self.mtime_ns, self.mode, self.new_inode)

    @property
    def new(self) -> HeldFile:
        """The file as the new node has it then."""
        return HeldFile(self.new_name, self.size, self.new_mtime_ns, self.mode, self.new_inode)


class Mark(msgspec.Struct):
    """What is written down of a drain."""

    source: str | None = None  # the node
    pid: int | None = None
    start_ticks: int | None = None
    moves: list[Move] | None = None  # of the step under way, None: no file is on two nodes
    stage: str = ""  # of it: "publish", "remove", "take back"
    places: dict[str, tuple[str, str]] = {}  # by node, as the ledger has them: holder and base_dir


def read(store: Store) -> Mark:
    """Return what is written down; of no drain an empty mark."""
    return convert(Mark, store.get("drain") or {})


def write(store: Store, **facts: Any) -> None:
    """Write these fields of a Mark down."""
    with store.change("drain"):
        store.put("drain", msgspec.to_builtins(msgspec.structs.replace(read(store), **facts)))


@contextlib.contextmanager
def alone(store: Store, node: str) -> Iterator[None]:
    """Be the one process that drains, and keep runs from starting. Raises UsageError if another drains.

    A step that has not ended keeps runs from starting also afterwards.
    """
    with store.change("drain"):
        mark = read(store)
        if mark.pid and procfs.start_ticks(mark.pid) == mark.start_ticks:
            raise UsageError(f"process {mark.pid} is draining node {mark.source}: wait for its end")
        write(store, source=mark.source or node, pid=os.getpid(), start_ticks=procfs.start_ticks(os.getpid()))
    try:
        yield
    finally:
        with store.change("drain"):
            if read(store).moves:
                write(store, pid=None)
            else:
                store.put("drain", None)
        Doorbell(store.path.parent).ring()
