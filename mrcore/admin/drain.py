"""Empties a node: moves its inputs and committed output to the other nodes, with manifests and ledger.

It goes by steps of some hundred MiB. The files of a step are sent through the master, which keeps nothing, and staged
on their new nodes; from then on it is written down, and can be carried on from anywhere (`drain_steps`). Until that is
at its end no run starts, nor while the drain goes on: see `Store.held_by_drain`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence

import msgspec

from mrcore.admin.drain_plan import Room, plan, renamed
from mrcore.admin.drain_steps import Steps, by_target
from mrcore.admin.holdings import Holdings, Nodes
from mrcore.admin.holdings import look as look
from mrcore.errors import ClusterFault, UsageError
from mrcore.messages import methods
from mrcore.messages.nodes import File
from mrcore.settings.config import NodeSettings, Settings
from mrcore.state import moves, outputs
from mrcore.state.moves import Move
from mrcore.state.store import Store
from mrcore.system.paths import PART
from mrcore.transfer.batches import AT_ONCE, cut
from mrcore.transfer.session import Progress, Session, no_progress
from mrcore.wire.data import Relay

STEP_FILES, STEP_BYTES = 2_000, 256 << 20  # or one larger file: what is moved and written down at a time
MAX_ROUNDS = 10  # over all files: what came, or was written to, meanwhile
WAIT_SECONDS = 3_600.0  # for the run that is under way
TICK_SECONDS = 0.2


def drain(
    settings: Settings, node: str, progress: Progress | None = None, wait_seconds: float = WAIT_SECONDS
) -> Holdings:
    """Move all that a node holds to the others; may be repeated until nothing is left.

    Waits up to `wait_seconds` for the run that is under way; no other starts until this returns. Return what moved and
    what `look` does. Raises UsageError (no such node, no other one, another drain is under way), ClusterFault (a node
    does not answer: repeat it).
    """
    with contextlib.closing(Store(settings.state_dir)) as store:
        return _Drain(settings, store, progress or no_progress).run(node, wait_seconds)


class _Drain:
    """One drain, from the wait for the run under way to the last file."""

    def __init__(self, settings: Settings, store: Store, progress: Progress) -> None:
        self._settings, self._store, self._progress = settings, store, progress
        self._steps = Steps(settings, store)
        self._sent_bytes = self._total_bytes = 0

    def run(self, node: str, wait_seconds: float) -> Holdings:
        steps, names = self._steps, [known.name for known in self._settings.nodes]
        removed = node not in names and moves.read(self._store).source == node  # while a drain of it was cut off
        nodes = None if removed else Nodes(self._settings, node)
        with moves.alone(self._store, node):
            self._wait(wait_seconds)
            steps.carry_on()  # what an earlier drain, perhaps of another node, left in its middle
            moves.write(self._store, source=node)
            if nodes is None:  # this was all that could be done
                return {"node": node, "empty": True, "moved": steps.moved, "renamed": steps.renamed}
            with nodes.session:
                if not nodes.others:
                    raise UsageError(f"{node} is the only node: there is none that could take what it holds")
                self._send_auxiliary(nodes)
                idle = 0
                for _ in range(MAX_ROUNDS):
                    before = steps.files
                    self._round(nodes)
                    idle = idle + 1 if steps.files == before else 0
                    if idle > bool(steps.left):  # what is written to now may be at rest the next time
                        break
                moved: Holdings = {"moved": steps.moved, "renamed": steps.renamed, "left": [*steps.left.values()]}
                return nodes.holdings() | moved

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while running := self._store.running():
            what = f"run {running.run} of {running.job_name}"
            if time.monotonic() >= deadline:
                raise ClusterFault(
                    f"{what} is still under way: wait for it, cancel it, or, if no Runner runs, start one to end it"
                )
            self._progress(f"waiting for {what}", files=0, sent_bytes=0, total_bytes=0)
            time.sleep(TICK_SECONDS)

    def _send_auxiliary(self, nodes: Nodes) -> None:
        """Auxiliary data belongs on every node: what only this one has goes to all others."""
        only = nodes.only_here()
        for target in nodes.others if only else ():
            upload = nodes.session.call(target, methods.BEGIN_UPLOAD, folder=None).upload
            for listing, number, file in only:
                _send(nodes.session, nodes.source, target, upload, listing, [(number, file)])
            nodes.session.call(target, methods.COMMIT_UPLOAD, upload=upload, replace=False)

    def _round(self, nodes: Nodes) -> None:
        """Move what the node holds now, a page at a time."""
        rooms, start, source = {}, 0, nodes.source
        self._steps.left = {}
        for other in nodes.others:
            free = nodes.session.call(other, methods.HEALTH).disk_free_bytes
            rooms[other.name] = Room(next(nodes.pages(other)).bytes or 0, free)
        for page in nodes.pages(source):
            self._total_bytes = self._total_bytes if page.bytes is None else page.bytes
            names = [file.name for file in page.files]
            for room in rooms.values():
                room.taken = set()
            _ask_taken(nodes, rooms, names)
            taken = set[str]().union(*(room.taken for room in rooms.values()))
            _ask_taken(nodes, rooms, [renamed(name, source.name) for name in taken])
            known = outputs.named(self._settings, {part[1] for name in names if (part := PART.fullmatch(name))})
            planned, left = plan(page.files, rooms, known.get(source.name, ()), source.name)
            self._steps.left |= left
            numbers = {name: start + at for at, name in enumerate(names)}
            for step in cut(planned, lambda move: move.size, STEP_FILES, STEP_BYTES, 1 << 63):
                self._step(source, page.listing, numbers, step)
            start += len(names)

    def _step(self, source: NodeSettings, listing: str, numbers: Mapping[str, int], step: Sequence[Move]) -> None:
        """Move some files, all or none of which have moved when this ends or is carried on later."""
        targets = {self._settings.node(target): group for target, group in by_target(step).items()}
        with Session(self._settings, self._report) as session:  # its connections, one per thread, end with the step
            uploads = {
                target.name: session.call(target, methods.BEGIN_UPLOAD, folder=None, source=source.name).upload
                for target in targets
            }

            def send(batch: tuple[NodeSettings, list[Move]]) -> None:
                target, group = batch
                files = [(numbers[move.name], move.staged.file) for move in group]
                _send(session, source, target, uploads[target.name], listing, files)

            batches = [(target, batch) for target in targets for batch in cut(targets[target], lambda move: move.size)]
            session.work_on("TRANSFER", send, batches, AT_ONCE)
            staged: list[Move] = []
            for target, group in targets.items():
                there = session.call(
                    target, methods.STAGE_MOVES, source=source.name, files=[move.staged.file for move in group]
                )
                staged += [
                    msgspec.structs.replace(move, new_inode=status.inode, new_mtime_ns=status.mtime_ns)
                    for move, status in zip(group, there, strict=True)
                    if status
                ]
            self._sent_bytes += session.counts()["sent_bytes"]
        self._steps.begin(source, staged)

    def _report(self, phase: str, sent_bytes: int, **counts: int) -> None:
        sent_bytes += self._sent_bytes
        self._progress(phase, files=self._steps.files, sent_bytes=sent_bytes, total_bytes=self._total_bytes)


def _ask_taken(nodes: Nodes, rooms: Mapping[str, Room], names: Sequence[str]) -> None:
    """Find out which of these names are taken, and where."""
    for other in nodes.others if names else ():
        answers = nodes.session.call(other, methods.TAKEN, names=names)
        rooms[other.name].taken |= {name for name, taken in zip(names, answers, strict=True) if taken}


def _send(
    session: Session, source: NodeSettings, target: NodeSettings, upload: str, listing: str,
    files: Sequence[tuple[int, File]],
) -> None:  # fmt: skip
    """Stream files of one node, by their numbers in its listing, into an upload of another."""
    batch = session.call(target, methods.ANNOUNCE, upload=upload, files=[file for _, file in files])
    if batch is None:  # it is there since an earlier try
        return

    def checksum(length: int) -> int:
        return session.call(source, methods.FILE_CHECKSUM, listing=listing, number=files[0][0], length=length)

    def feed(at: int, write: Callable[[memoryview], object]) -> None:
        def sink(_: int, chunk: memoryview) -> None:
            session.moved(len(chunk))
            write(chunk)

        with session.data(source) as channel:
            channel.get([{"file": [listing, number, at]} for number, _ in files], sink)

    relay = Relay(sum(file.size for _, file in files), checksum, feed)
    with session.data(target) as channel:
        channel.put({"batch": [upload, batch]}, relay)
