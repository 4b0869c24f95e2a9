"""One step of a drain, by stages that are written down: what one has begun, another can bring to its end.

The files are staged on their new nodes; the step is written down; they get their names there ("publish"); manifests,
and in one transaction the ledger, say so; the old node removes its own ("remove"), or keeps what was written to, which
the new nodes then remove ("take back").
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from mrcore.errors import ClusterFault
from mrcore.messages.methods import PUBLISH_MOVES, REMOVE_MOVES, TAKEN, Method
from mrcore.messages.nodes import HeldFile
from mrcore.settings.config import NodeSettings, Settings
from mrcore.state import ledger, manifest, moves
from mrcore.state.moves import Mark, Move
from mrcore.state.store import Store
from mrcore.system.paths import PART
from mrcore.transfer.session import Counts, Session, add


def by_target(step: Iterable[Move]) -> dict[str, list[Move]]:
    """Return the moves by their new node."""
    groups: dict[str, list[Move]] = {}
    for move in step:
        groups.setdefault(move.target, []).append(move)
    return groups


class Steps:
    """Brings the step that is written down to its end, and keeps count of what has moved and what has not."""

    def __init__(self, settings: Settings, store: Store) -> None:
        self._settings, self._store = settings, store
        self._nodes = {node.name: node for node in settings.nodes}
        self.moved: dict[str, Counts] = {}
        self.renamed: list[list[str]] = []
        self.left: dict[str, str] = {}  # by name: why a file did not move in this round

    @property
    def files(self) -> int:
        """How many files have moved."""
        return sum(count["files"] for count in self.moved.values())

    def begin(self, source: NodeSettings, step: list[Move]) -> None:
        """Write down a step whose files are staged, and bring it to its end."""
        involved = [source, *(self._nodes[target] for target in by_target(step))]
        local = self._settings.local
        places = {node.name: ("" if local else node.name, str(node.layout.base_dir)) for node in involved}
        moves.write(self._store, source=source.name, stage="publish", moves=step, places=places)
        self.carry_on()

    def carry_on(self) -> None:
        """Bring the step that is written down, if there is one, to its end."""
        mark = moves.read(self._store)
        if not mark.moves:
            return
        step = mark.moves
        with Session(self._settings) as session:
            if mark.stage == "publish":
                step = self._publish(session, mark, step)
            if mark.stage in ("publish", "remove"):
                step = self._remove(session, mark, step)
            self._take_back(session, step)
        moves.write(self._store, moves=None)

    def _publish(self, session: Session, mark: Mark, step: Sequence[Move]) -> list[Move]:
        """Give the files their names on their new nodes, let manifests and ledger say so; return those that moved."""
        done, lost = self._ask(session, PUBLISH_MOVES, {move: move.staged for move in step}, False, source=mark.source)
        # What is lost is where it was.
        self.left |= {move.name: f"{move.name}: {move.target} could not give it the name" for move in lost}
        self._enter(mark, done, lost)
        self._write_down("remove", done, [_places(mark, move) for move in done])
        return done

    def _remove(self, session: Session, mark: Mark, step: Sequence[Move]) -> list[Move]:
        """Have the old node remove its files; return those that it keeps, as they were written to, which go back."""
        source = self._nodes.get(mark.source or "")
        # Where its new node is gone, what the old one still has is the only copy; where that is gone, the new one's.
        only = [move for move in step if move.target not in self._nodes]
        both = [move for move in step if move.target in self._nodes]
        kept: list[Move] = []
        if source is not None:
            removed = session.call(source, REMOVE_MOVES, files=[move.old for move in both])
            taken = session.call(source, TAKEN, names=[move.name for move in only])
            kept = [move for move, gone in zip(both, removed, strict=True) if not gone]
            kept += [move for move, here in zip(only, taken, strict=True) if here]
        for move in set(step) - set(kept):
            add(self.moved.setdefault(move.target, {"files": 0, "bytes": 0}), move.size)
            if move.new_name != move.name:
                self.renamed.append([move.name, move.target, move.new_name])
        if kept:
            self.left |= {move.name: f"{move.name}: it is locked, or was written to meanwhile" for move in kept}
            self._enter(mark, (), kept)
            self._write_down("take back", kept, [_places(mark, move, back=True) for move in kept])
        return kept

    def _take_back(self, session: Session, step: Sequence[Move]) -> None:
        """Remove from their new nodes files that stay where they were."""
        if stuck := self._ask(session, REMOVE_MOVES, {move: move.new for move in step}, True)[1]:
            name, target = stuck[0].new_name, stuck[0].target
            raise ClusterFault(
                f"{name!r} is written to on {target} and on the drained node at once: end who writes there, remove it "
                f"from {target}, and drain again"
            )

    def _ask(
        self, session: Session, method: Method[list[bool]], files: Mapping[Move, HeldFile], absent: bool, **more: object
    ) -> tuple[list[Move], list[Move]]:
        """Ask each new node about its files; return the moves with the answer yes, and no. `absent`: of no node."""
        answers: dict[Move, bool] = {}
        for target, step in by_target(files).items():
            answer = [absent] * len(step)
            if node := self._nodes.get(target):
                answer = session.call(node, method, files=[files[move] for move in step], **more)
            answers |= zip(step, answer, strict=True)
        return [move for move, yes in answers.items() if yes], [move for move, yes in answers.items() if not yes]

    def _enter(self, mark: Mark, moved: Iterable[Move], kept: Iterable[Move]) -> None:
        """Have the manifests say where committed parts are: on their new nodes, or where they were."""
        source = mark.source or ""
        ways = [(move, source, move.target) for move in moved] + [(move, move.target, source) for move in kept]
        runs: dict[tuple[str, int], dict[str, tuple[str, str]]] = {}
        for move, old, new in ways:
            if (part := PART.fullmatch(move.name)) and move.name == move.new_name:
                runs.setdefault((part[1], int(part[3])), {})[part[2]] = old, new
        for (job, run), nodes in runs.items():
            manifest.relocate(self._settings.state_dir, job, run, nodes)

    def _write_down(self, stage: str, step: list[Move], places: list[Places]) -> None:
        """Have the ledger say where files are, and the mark at which stage the step is, in one transaction."""
        with self._store.change("drain"):
            ledger.relocate(self._store, places)
            moves.write(self._store, stage=stage, moves=step)


Places = tuple[tuple[str, str], tuple[str, str], int, int, int]  # as `ledger.relocate` wants them


def _places(mark: Mark, move: Move, back: bool = False) -> Places:
    """Return the old and the new place of a file; `back`: of one that is where it was again."""
    (old_holder, old_dir), (new_holder, new_dir) = mark.places[mark.source or ""], mark.places[move.target]
    old, new = (old_holder, f"{old_dir}/{move.name}"), (new_holder, f"{new_dir}/{move.new_name}")
    if back:
        return new, old, move.new_mtime_ns, move.mtime_ns, move.inode
    return old, new, move.mtime_ns, move.new_mtime_ns, move.new_inode
