"""Empties a node: moves its inputs and committed output to the other nodes, with manifests and ledger.

It goes by steps of some hundred MiB, and each step by stages: the files are sent through the master, which keeps
nothing, and staged on their new nodes; the step is written down in the queue's file (`drain`); they get their names
there; manifests, and in one transaction the ledger, say so; the old node removes its own. What is written down can be
carried on from anywhere. Until then no run starts, nor while the drain goes on: see `Store.held_by_drain`.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mrcore.engine.listing import gather
from mrcore.errors import ClusterFault, UsageError
from mrcore.settings.config import NodeSettings, Settings
from mrcore.settings.validation import nearest
from mrcore.state import ledger, manifest, outputs
from mrcore.state.doorbell import Doorbell
from mrcore.state.store import Store
from mrcore.system import procfs
from mrcore.system.paths import PART
from mrcore.system.readers import suffix_of
from mrcore.transfer.file_transfer import BATCH_BYTES, BATCH_FILES, MIN_FREE_DISK_BYTES, SMALL_BYTES
from mrcore.transfer.session import Crew, Progress
from mrcore.wire.data import Relay

STEP_FILES, STEP_BYTES = 2_000, 256 << 20  # or one larger file: what is moved and written down at a time
AT_ONCE = 4
MAX_ROUNDS = 10  # over all files: what came, or was written to, meanwhile
WAIT_SECONDS = 3_600.0  # for the run that is under way
TICK_SECONDS = 0.2

Json = dict[str, Any]
Held = Sequence[Any]  # name, size, mtime_ns, mode, inode


class Move(NamedTuple):
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


# --- Planning --------------------------------------------------------------------------------------------------------


@dataclass
class Room:
    """What a node has: bytes under base_dir, bytes of free disk, and of the names in question those that are taken."""

    held: int
    free: int
    taken: set[str] = field(default_factory=set)


def renamed(name: str, node: str) -> str:
    """The name of a file whose own is taken: with its old node's name before its endings, which patterns look for."""
    folder, slash, last = name.rpartition("/")
    packed = suffix_of(last)
    stem, dot, ending = last.removesuffix(packed).rpartition(".")
    if not stem:
        stem, dot, ending = last.removesuffix(packed), "", ""
    return f"{folder}{slash}{stem}.{node}{dot}{ending}{packed}"


def plan(files: Iterable[Held], rooms: Mapping[str, Room], parts: Container[str], node: str) -> tuple[list[Move], Json]:
    """Choose for each file the node that holds the fewest bytes of those that have room and not its name already.

    Where all have the name it gets another, but for `parts`, which manifests name. Gives the moves, and why the files
    that cannot be moved cannot, by name. `rooms` are brought up to date.
    """
    moves: list[Move] = []
    left: Json = {}
    for name, size, mtime_ns, mode, inode in files:
        with_room = [each for each, room in rooms.items() if room.free - size >= MIN_FREE_DISK_BYTES]
        for new_name in (name,) if name in parts else (name, renamed(name, node)):
            if fitting := [each for each in with_room if new_name not in rooms[each].taken]:
                target = min(fitting, key=lambda each: (rooms[each].held, each))
                room = rooms[target]
                room.held, room.free = room.held + size, room.free - size
                room.taken.add(new_name)
                moves.append(Move(name, size, mtime_ns, mode, inode, target, new_name))
                break
        else:
            why = "has a file of that name" if with_room else f"is short of disk for its {size:,} bytes"
            left[name] = f"{name}: every other node {why}"
    return moves, left


def cut(moves: Iterable[Move], max_files: int, max_bytes: int, alone: int = 1 << 63) -> Iterator[list[Move]]:
    """Cut moves into pieces of at most so many files and bytes; what is `alone` bytes or larger is one by itself."""
    piece: list[Move] = []
    total = 0
    for move in moves:
        if piece and (len(piece) == max_files or total + move.size > max_bytes or max(move.size, total) >= alone):
            yield piece
            piece, total = [], 0
        piece.append(move)
        total += move.size
    if piece:
        yield piece


# --- What a node holds -----------------------------------------------------------------------------------------------


class _Nodes:
    """The nodes of a cluster, one of which is looked at or emptied, and calls to their agents."""

    def __init__(self, settings: Settings, node: str) -> None:
        names = [each.name for each in settings.nodes]
        if node not in names:
            raise UsageError(f"there is no node {node!r}{nearest(node, names)}")
        self.crew, self.settings = _crew(settings), settings
        self.source = settings.nodes[names.index(node)]
        self.others = [each for each in settings.nodes if each is not self.source]

    def pages(self, node: NodeSettings, auxiliary: bool = False) -> Iterator[Json]:
        """Give what a node holds page by page, as `holdings` does."""
        page = self.crew.call(node, "holdings", auxiliary=auxiliary)
        while True:
            yield page
            if page["next"] is None:
                return
            page = self.crew.call(node, "holdings", auxiliary=auxiliary, listing=page["listing"], start=page["next"])

    def only_here(self) -> dict[str, Any]:
        """The auxiliary data that no other node has: name → page, number and file."""
        others = {
            file[0] for node in self.others for page in self.pages(node, auxiliary=True) for file in page["files"]
        }
        start, found = 0, dict[str, Any]()
        for page in self.pages(self.source, auxiliary=True):
            found |= {file[0]: (page["listing"], start + at, file) for at, file in enumerate(page["files"])}
            start += len(page["files"])
        return {name: each for name, each in found.items() if name not in others}

    def told(self) -> Json:
        """What the node holds; see `look`."""
        kinds = {kind: {"files": 0, "bytes": 0} for kind in ("input", "output", "auxiliary")}
        jobs: dict[str, Json] = {}
        wrong: list[str] = []
        sizes: dict[str, int] = {}

        def count(kind: Json, size: int) -> None:
            kind["files"], kind["bytes"] = kind["files"] + 1, kind["bytes"] + size

        for page in self.pages(self.source):
            wrong += page.get("faults", [])
            for name, size, *_ in page["files"]:
                part = PART.fullmatch(name)
                count(kinds["output" if part else "input"], size)
                if part:
                    sizes[name] = size
                    count(jobs.setdefault(part[1], {"job_name": part[1], "files": 0, "bytes": 0}), size)
        for _, _, file in self.only_here().values():
            count(kinds["auxiliary"], file[1])
        empty = not wrong and not any(kind["files"] for kind in kinds.values())
        answer = {"node": self.source.name, "empty": empty, "kinds": kinds, "jobs": [*jobs.values()]}
        known = {self.source.name: outputs.named(self.settings).get(self.source.name, {})}
        faults = outputs.compare(known, {self.source.name: sizes}, None)
        faults = [each for each in faults if each["kind"] != "foreign"]
        return answer | {"cannot_move": wrong, "elsewhere": self._elsewhere(), "faults": faults}

    def _elsewhere(self) -> list[Json]:
        """What queued jobs read on this node that lies outside of base_dir, so that nothing here knows of it."""
        found = []
        with contextlib.closing(Store(self.settings.state_dir)) as store:
            specs = [row.spec for row in store.queued() if row.job_type == "mapreduce"]
        inside = str(self.source.layout.base_dir) + "/"
        for spec in specs:
            entries = [each for each in spec["input_dirs"] if each.startswith("/") and not each.startswith(inside)]
            if entries and not spec["shared_input"] and not self.settings.local:
                asked = {"input_dirs": entries, "shared_input": False}
                listed = gather(
                    functools.partial(self.crew.call, self.source), asked, [self.source.name], self.source.name
                )
                matched = [each for each in entries if listed["matched"].get(each)]
                found += [{"job_name": spec["job_name"], "input_dir": each} for each in matched]
        return found


def look(settings: Settings, node: str) -> Json:
    """Tell what a node holds that would be lost with it.

    Gives {"node", "empty", "kinds" ("input", "output", "auxiliary", which is what no other node has: files, bytes),
    "jobs" (whose output), "cannot_move" (no plain files), "elsewhere" (input_dirs of queued jobs outside base_dir),
    "faults" (parts that should be here, and are missing or damaged; see `outputs.compare`)}.
    """
    nodes = _Nodes(settings, node)
    with nodes.crew:
        return nodes.told()


# --- Moving ----------------------------------------------------------------------------------------------------------


def drain(settings: Settings, node: str, progress: Progress | None = None, wait_seconds: float = WAIT_SECONDS) -> Json:
    """Move all that a node holds to the others; may be repeated until nothing is left.

    Waits up to `wait_seconds` for the run that is under way; no other starts until this returns. Gives {"moved"
    (files, bytes, by node), "renamed" (name, node, new name), "left" (why)} and what `look` gives. Raises UsageError
    (no such node, no other one, another drain is under way), ClusterFault (a node does not answer: repeat it).
    """
    with contextlib.closing(Store(settings.state_dir)) as store:
        return _Drain(settings, store, progress or (lambda phase, **facts: None)).run(node, wait_seconds)


class _Drain:
    """One drain: the mark in the queue's file that keeps runs from starting, and the files that move."""

    def __init__(self, settings: Settings, store: Store, progress: Progress) -> None:
        self._settings, self._store, self._progress = settings, store, progress
        self._by_name = {each.name: each for each in settings.nodes}
        self._files = self._sent_bytes = self._total_bytes = 0
        self._moved: dict[str, Json] = {}
        self._renamed: list[list[str]] = []
        self._left: dict[str, str] = {}  # by name: why a file did not move in this round

    def run(self, node: str, wait_seconds: float) -> Json:
        cut_off = (self._store.get("drain") or {"source": None})["source"] == node
        nodes = None if cut_off and node not in self._by_name else _Nodes(self._settings, node)
        with self._alone(node):
            self._wait(wait_seconds)
            self._carry_on()  # what an earlier drain, perhaps of another node, left in its middle
            self._write_down(source=node)
            told: Json = {"moved": self._moved, "renamed": self._renamed}
            if nodes is None:  # it was taken out of the cluster meanwhile, and this was all that could be done
                return {"node": node, "empty": True} | told
            with nodes.crew:
                if not nodes.others:
                    raise UsageError(f"{node} is the only node: there is none that could take what it holds")
                self._give_auxiliary(nodes)
                idle = 0
                for _ in range(MAX_ROUNDS):
                    before = self._files
                    self._round(nodes)
                    idle = idle + 1 if self._files == before else 0
                    if idle > bool(self._left):  # what is written to now may be at rest the next time
                        break
                return nodes.told() | told | {"left": [*self._left.values()]}

    @contextlib.contextmanager
    def _alone(self, node: str) -> Iterator[None]:
        """Keep runs from starting, also those of a Runner in another process, and other drains."""
        mine = {"pid": os.getpid(), "start_ticks": procfs.start_ticks(os.getpid())}
        with self._store.change("drain"):
            found = self._store.get("drain") or {"source": node, "moves": None}
            if found.get("pid") and procfs.start_ticks(found["pid"]) == found["start_ticks"]:
                raise UsageError(f"process {found['pid']} is draining node {found['source']}: wait for its end")
            self._store.put("drain", found | mine)
        try:
            yield
        finally:
            with self._store.change("drain"):
                found = self._store.get("drain")
                self._store.put("drain", found | {"pid": None} if found["moves"] else None)
            Doorbell(self._settings.state_dir).ring()

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

    def _give_auxiliary(self, nodes: _Nodes) -> None:
        """Auxiliary data belongs on every node: what only this one has goes to all others."""
        only = nodes.only_here()
        for target in nodes.others if only else ():
            upload = nodes.crew.call(target, "begin_upload", folder=None)["upload"]
            for listing, number, (*file, _) in only.values():
                self._send(nodes.crew, nodes.source, target, upload, listing, [(number, tuple(file))])
            nodes.crew.call(target, "commit_upload", upload=upload, replace=False)

    def _round(self, nodes: _Nodes) -> None:
        """Move what the node holds now, a page at a time."""
        rooms, start = {}, 0
        self._left = {}
        for other in nodes.others:
            health = nodes.crew.call(other, "health")
            rooms[other.name] = Room(next(nodes.pages(other))["bytes"], health["disk_free_bytes"])
        for page in nodes.pages(nodes.source):
            self._total_bytes = page.get("bytes", self._total_bytes)
            names = [file[0] for file in page["files"]]
            for room in rooms.values():
                room.taken = set()
            self._ask(nodes, rooms, names)
            taken = set().union(*(room.taken for room in rooms.values()))
            self._ask(nodes, rooms, [renamed(name, nodes.source.name) for name in taken])
            known = outputs.named(self._settings, {part[1] for name in names if (part := PART.fullmatch(name))})
            moves, more = plan(page["files"], rooms, known.get(nodes.source.name, ()), nodes.source.name)
            self._left |= more
            numbers = {name: start + at for at, name in enumerate(names)}
            for step in cut(moves, STEP_FILES, STEP_BYTES):
                self._step(nodes, page["listing"], numbers, step)
            start += len(names)

    def _ask(self, nodes: _Nodes, rooms: Mapping[str, Room], names: Sequence[str]) -> None:
        """Find out which of these names are taken, and where."""
        for other in nodes.others if names else ():
            found = nodes.crew.call(other, "taken", names=names)
            rooms[other.name].taken |= {name for name, taken in zip(names, found, strict=True) if taken}

    def _step(self, nodes: _Nodes, listing: str, numbers: Mapping[str, int], step: Sequence[Move]) -> None:
        """Move some files, all or none of which have moved when this ends or is carried on later."""
        source = nodes.source
        with _crew(self._settings, self._tell) as crew:  # its connections, one per thread, end with the step
            uploads = {
                name: crew.call(self._by_name[name], "begin_moves", source=source.name)["upload"]
                for name in {move.target for move in step}
            }
            batches = [
                batch
                for target in uploads
                for batch in cut((m for m in step if m.target == target), BATCH_FILES, BATCH_BYTES, SMALL_BYTES)
            ]

            def send(batch: list[Move]) -> None:
                files = [(numbers[each.name], (each.new_name, each.size, each.mtime_ns, each.mode)) for each in batch]
                target = self._by_name[batch[0].target]
                self._send(crew, source, target, uploads[target.name], listing, files)

            crew.each("TRANSFER", send, batches, AT_ONCE)
            staged: list[Move] = []
            for target, moves in _by_target(step):
                files = [[each.new_name, each.size, each.mtime_ns, each.mode] for each in moves]
                found = crew.call(self._by_name[target], "stage_moves", source=source.name, files=files)
                staged += [
                    move._replace(new_inode=inode[0], new_mtime_ns=inode[1])
                    for move, inode in zip(moves, found, strict=True)
                    if inode
                ]
            self._sent_bytes += crew.counts()["sent_bytes"]
        involved = [source, *(self._by_name[target] for target in uploads)]
        places = {
            each.name: ["" if self._settings.local else each.name, str(each.layout.base_dir)] for each in involved
        }
        self._write_down(source=source.name, stage="publish", moves=staged, places=places)
        self._carry_on()

    def _send(
        self, crew: Crew, source: NodeSettings, target: NodeSettings, upload: str, listing: str,
        files: Sequence[tuple[int, tuple[Any, ...]]],
    ) -> None:  # fmt: skip
        """Stream files of one node, by their numbers in its listing, into an upload of another."""
        batch = crew.call(target, "announce", upload=upload, files=[file for _, file in files])
        if batch is None:  # it is there since an earlier try
            return

        def checksum(length: int) -> int:
            asked = {"listing": listing, "number": files[0][0], "length": length}
            return crew.call(source, "file_checksum", **asked)  # type: ignore[no-any-return]

        def feed(at: int, write: Callable[[memoryview], object]) -> None:
            def sink(_: int, chunk: memoryview) -> None:
                crew.moved(len(chunk))
                write(chunk)

            crew.data(source).get([{"file": [listing, number, at]} for number, _ in files], sink)

        relay = Relay(sum(file[1] for _, file in files), checksum, feed)
        crew.data(target).put({"batch": [upload, batch]}, relay)

    # --- from what is written down ---

    def _write_down(self, **facts: Any) -> None:
        with self._store.change("drain"):
            self._store.put("drain", self._store.get("drain") | facts)

    def _carry_on(self) -> None:
        """Bring the step that is written down to its end."""
        noted = self._store.get("drain")
        if not noted["moves"]:
            return
        moves = [Move(*each) for each in noted["moves"]]
        with _crew(self._settings) as crew:
            if noted["stage"] == "publish":
                moves = self._publish(crew, noted, moves)
                noted["stage"] = "remove"
            if noted["stage"] == "remove":
                moves = self._remove(crew, noted, moves)
            self._take_back(crew, moves)
        self._write_down(moves=None)

    def _publish(self, crew: Crew, noted: Json, moves: list[Move]) -> list[Move]:
        """Give the files their names on their new nodes, let manifests and ledger say so; gives those that moved."""
        done: list[Move] = []
        for target, those in _by_target(moves):
            if node := self._by_name.get(target):
                files = [[each.new_name, each.size, each.mtime_ns, each.mode, each.new_inode] for each in those]
                answers = crew.call(node, "publish_moves", source=noted["source"], files=files)
                done += [move for move, answer in zip(those, answers, strict=True) if answer]
        lost = set(moves) - set(done)  # they are where they were
        self._left |= {move.name: f"{move.name}: {move.target} could not give it the name" for move in lost}
        self._enter(noted, done, lost)
        with self._store.change("drain"):
            ledger.relocate(self._store, [_places(noted, move) for move in done])
            self._write_down(stage="remove", moves=done)
        return done

    def _remove(self, crew: Crew, noted: Json, moves: list[Move]) -> list[Move]:
        """Have the old node remove its files; gives those that it keeps, as they were written to, which go back."""
        source, kept = self._by_name.get(noted["source"]), list[Move]()
        for target, those in _by_target(moves):
            if source is None:  # gone for good: what the new nodes have is all there is
                answers = [True] * len(those)
            elif target in self._by_name:
                files = [[each.name, each.size, each.mtime_ns, each.mode, each.inode] for each in those]
                answers = crew.call(source, "remove_moves", files=files)
            else:  # taken out of the cluster meanwhile: what the old node still has is the only copy
                answers = [not each for each in crew.call(source, "taken", names=[each.name for each in those])]
            kept += [move for move, gone in zip(those, answers, strict=True) if not gone]
        for move in set(moves) - set(kept):
            count = self._moved.setdefault(move.target, {"files": 0, "bytes": 0})
            count["files"], count["bytes"] = count["files"] + 1, count["bytes"] + move.size
            self._files += 1
            if move.new_name != move.name:
                self._renamed.append([move.name, move.target, move.new_name])
        if kept:
            self._left |= {move.name: f"{move.name}: it is locked, or was written to meanwhile" for move in kept}
            self._enter(noted, (), kept)
            with self._store.change("drain"):
                ledger.relocate(self._store, [_places(noted, move, back=True) for move in kept])
                self._write_down(stage="take back", moves=kept)
        return kept

    def _take_back(self, crew: Crew, moves: list[Move]) -> None:
        """Remove from their new nodes files that stay where they were."""
        for target, those in _by_target(moves):
            if node := self._by_name.get(target):
                files = [[each.new_name, each.size, each.new_mtime_ns, each.mode, each.new_inode] for each in those]
                answers = crew.call(node, "remove_moves", files=files)
                if stuck := [move.new_name for move, gone in zip(those, answers, strict=True) if not gone]:
                    raise ClusterFault(
                        f"{stuck[0]!r} is written to on {target} and on the drained node at once: end who writes "
                        f"there, remove it from {target}, and drain again"
                    )

    def _enter(self, noted: Json, moved: Iterable[Move], kept: Iterable[Move]) -> None:
        """Have the manifests say where committed parts are: on their new nodes, or where they were."""
        source = noted["source"]
        ways = [(move, source, move.target) for move in moved] + [(move, move.target, source) for move in kept]
        runs: dict[tuple[str, int], dict[str, tuple[str, str]]] = {}
        for move, old, new in ways:
            if (found := PART.fullmatch(move.name)) and move.name == move.new_name:
                runs.setdefault((found[1], int(found[3])), {})[found[2]] = old, new
        for (job, run), nodes in runs.items():
            manifest.relocate(self._settings.state_dir, job, run, nodes)

    def _tell(self, phase: str, sent_bytes: int, **facts: int) -> None:
        sent_bytes += self._sent_bytes
        self._progress(phase, files=self._files, sent_bytes=sent_bytes, total_bytes=self._total_bytes)


def _crew(settings: Settings, progress: Progress | None = None) -> Crew:
    return Crew(settings, progress or (lambda phase, **facts: None), threading.Event())


def _by_target(moves: Iterable[Move]) -> list[tuple[str, list[Move]]]:
    found: dict[str, list[Move]] = {}
    for move in moves:
        found.setdefault(move.target, []).append(move)
    return [*found.items()]


def _places(noted: Json, move: Move, back: bool = False) -> tuple[tuple[str, str], tuple[str, str], int, int, int]:
    """A move as the ledger wants it; `back`: of a file that is where it was again."""
    (old_holder, old_dir), (new_holder, new_dir) = noted["places"][noted["source"]], noted["places"][move.target]
    old, new = (old_holder, f"{old_dir}/{move.name}"), (new_holder, f"{new_dir}/{move.new_name}")
    if back:
        return new, old, move.new_mtime_ns, move.mtime_ns, move.inode
    return old, new, move.mtime_ns, move.new_mtime_ns, move.new_inode
