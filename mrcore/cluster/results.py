"""What the tasks of an attempt made, and what was counted meanwhile."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

import msgspec

from mrcore.messages.tasks import PlacedPart, Spill, SpillShare, TaskResult


@dataclass
class Results:
    """The spills and parts of finished tasks, by the node where they lie, and the sums of their counters."""

    spills: dict[str, list[Spill]] = field(default_factory=lambda: defaultdict(list))
    parts: list[PlacedPart] = field(default_factory=list)
    counters: Counter[str] = field(default_factory=Counter)
    shuffled: Counter[tuple[str, str]] = field(default_factory=Counter)  # bytes by source and reducing node
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    deaths: list[str] = field(default_factory=list)
    bundles_done: int = 0  # for progress only: those of tasks that died are in it twice
    keys_kept: bool = True
    peak_bytes: int = 0

    def add(self, node: str, result: TaskResult) -> None:
        """Take the result of a task of this node."""
        self.peak_bytes = max(self.peak_bytes, result.peak_bytes)
        self.counters.update(result.counters)
        for name, seconds in result.seconds.items():
            self.seconds[name] += seconds
        self.parts += [PlacedPart(node=node, **msgspec.structs.asdict(part)) for part in result.parts]
        self.spills[node] += result.runs
        self.keys_kept = self.keys_kept and result.keys_kept
        self.shuffled.update({(source, node): length for source, length in result.fetched.items()})

    def all_spills(self) -> list[Spill]:
        """Return the spills of all nodes."""
        return [spill for spills in self.spills.values() for spill in spills]

    def shares(self, partition: int, by_range: bool) -> dict[str, list[SpillShare]]:
        """Return, by node, the spills that may hold something of a partition."""
        shares: dict[str, list[SpillShare]] = {}
        for node, spills in self.spills.items():
            for spill in spills:
                most_bytes = spill.bytes if by_range else spill.partitions.get(str(partition))
                if most_bytes is not None:
                    share = SpillShare(id=spill.id, max_decoded=spill.max_decoded, most_bytes=most_bytes)
                    shares.setdefault(node, []).append(share)
        return shares
