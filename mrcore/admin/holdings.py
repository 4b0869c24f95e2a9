"""What a node holds that would be lost with it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, TypedDict

from mrcore.engine.listing import gather
from mrcore.errors import UsageError
from mrcore.messages.methods import HOLDINGS, LIST_INPUTS
from mrcore.messages.nodes import File, HoldingsPage
from mrcore.settings.config import NodeSettings, Settings
from mrcore.settings.validation import nearest
from mrcore.state import moves, outputs
from mrcore.state.store import Store
from mrcore.system.paths import PART
from mrcore.transfer.session import Counts, Session, add, pages


class Holdings(TypedDict, total=False):
    """What `mrcore drain` reports, as JSON; the last three only when files were moved."""

    node: str
    empty: bool
    kinds: dict[str, Counts]  # "input", "output", "auxiliary" (what no other node has)
    jobs: list[dict[str, Any]]  # whose output: job_name, files, bytes
    cannot_move: list[str]  # no plain files
    elsewhere: list[dict[str, str]]  # input_dirs of queued jobs outside of base_dir: job_name, input_dir
    faults: list[dict[str, Any]]  # parts that should be here, and are missing or damaged; see `outputs.compare`
    moved: dict[str, Counts]  # by node
    renamed: list[list[str]]  # name, node, new name
    left: list[str]  # why


class Nodes:
    """The nodes of a cluster, of which `source` is looked at or emptied, and calls to their agents."""

    def __init__(self, settings: Settings, node: str) -> None:
        names = [known.name for known in settings.nodes]
        if node not in names:
            raise UsageError(f"there is no node {node!r}{nearest(node, names)}")
        self.session, self.settings = Session(settings), settings
        self.source = settings.node(node)
        self.others = [known for known in settings.nodes if known is not self.source]

    def pages(self, node: NodeSettings, auxiliary: bool = False) -> Iterator[HoldingsPage]:
        """Return what a node holds page by page, as `holdings` does."""
        return pages(functools.partial(self.session.call, node, HOLDINGS), auxiliary=auxiliary)

    def only_here(self) -> list[tuple[str, int, File]]:
        """Return the auxiliary data that no other node has: listing, number in it, file."""
        others = {file.name for node in self.others for page in self.pages(node, True) for file in page.files}
        files = [(page.listing, file) for page in self.pages(self.source, True) for file in page.files]
        return [(token, at, file.file) for at, (token, file) in enumerate(files) if file.name not in others]

    def holdings(self) -> Holdings:
        """Return what `source` holds."""
        kinds: dict[str, Counts] = {kind: {"files": 0, "bytes": 0} for kind in ("input", "output", "auxiliary")}
        jobs: dict[str, Any] = {}
        wrong: list[str] = []
        sizes: dict[str, int] = {}
        for page in self.pages(self.source):
            wrong += page.faults
            for name, size in ((held.name, held.size) for held in page.files):
                part = PART.fullmatch(name)
                add(kinds["output" if part else "input"], size)
                if part:
                    sizes[name] = size
                    add(jobs.setdefault(part[1], {"job_name": part[1], "files": 0, "bytes": 0}), size)
        for *_, file in self.only_here():
            add(kinds["auxiliary"], file.size)
        known = {self.source.name: outputs.named(self.settings).get(self.source.name, {})}
        different = outputs.compare(known, {self.source.name: sizes}, None)
        return {
            "node": self.source.name,
            "empty": not wrong and not any(kind["files"] for kind in kinds.values()),
            "kinds": kinds,
            "jobs": [*jobs.values()],
            "cannot_move": wrong,
            "elsewhere": self._elsewhere(),
            "faults": [item for item in different if item["kind"] != "foreign"],
        }

    def _elsewhere(self) -> list[dict[str, str]]:
        """Return what queued jobs read here that lies outside of base_dir, so that nothing else knows of it."""
        if self.settings.local:
            return []
        with contextlib.closing(Store(self.settings.state_dir)) as store:
            specs = [spec for spec in moves.waiting_jobs(store) if not spec["shared_input"]]
        elsewhere: list[dict[str, str]] = []
        call, name = functools.partial(self.session.call, self.source, LIST_INPUTS), self.source.name
        inside = f"{self.source.layout.base_dir}/"
        for spec in specs:
            entries = [entry for entry in spec["input_dirs"] if entry.startswith("/") and not entry.startswith(inside)]
            if entries:
                listing = gather(call, {"input_dirs": entries, "shared_input": False}, [name], name)
                matched = [entry for entry in entries if listing.matched.get(entry)]
                elsewhere += [{"job_name": spec["job_name"], "input_dir": entry} for entry in matched]
        return elsewhere


def look(settings: Settings, node: str) -> Holdings:
    """Return what a node holds that would be lost with it."""
    nodes = Nodes(settings, node)
    with nodes.session:
        return nodes.holdings()
