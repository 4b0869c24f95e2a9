"""What the tasks of an attempt made, and what was counted meanwhile."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from mrcore.messages.tasks import MAX_USER_COUNTERS, REDUCE, PlacedPart, Spill, SpillShare, TaskIdentity, TaskResult
from mrcore.state.progress import MAX_HEAVY_KEYS, HeavyKey
from mrcore.text import one_line

MAX_AMOUNT = 1 << 62  # of a sum, as of what is added
MAX_STACKS, MAX_STACK_BYTES = 20_000, 16 << 20  # of the profile of one phase of a run
OTHERS = "(others)"  # counters of more names than a run may have, and rare stacks


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
    user_counters: Counter[str] = field(default_factory=Counter)
    heavy: list[HeavyKey] = field(default_factory=list)
    profiles: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))  # samples by phase, stack

    def add(self, node: str, identity: TaskIdentity, result: TaskResult) -> None:
        """Take the result of a task of this node."""
        add_counters(self.user_counters, result.user_counters)
        if identity.phase == REDUCE:
            keys = [
                HeavyKey(key=one_line(each.key, 200), values=each.values, partition=identity.task)
                for each in result.heavy
            ]
            self.heavy = sorted(self.heavy + keys, key=lambda key: -key.values)[:MAX_HEAVY_KEYS]
        if result.profile:
            self._add_profile(self.profiles[identity.phase], result.profile)
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

    def _add_profile(self, profile: Counter[str], fresh: Mapping[str, int]) -> None:
        """Add samples; when there are too many stacks, the rarer ones become one."""
        profile.update(fresh)
        if len(profile) <= MAX_STACKS and sum(map(len, profile)) <= MAX_STACK_BYTES:
            return
        room, kept = MAX_STACK_BYTES // 2, Counter[str]()
        for stack, samples in profile.most_common():
            room -= len(stack)
            kept[stack if room > 0 and len(kept) < MAX_STACKS // 2 else OTHERS] += samples
        profile.clear()
        profile.update(kept)


def add_counters(totals: Counter[str], counters: Mapping[str, int]) -> None:
    """Add counters of a task to those of a run, which has at most MAX_USER_COUNTERS names: what is more is OTHERS."""
    for name, amount in counters.items():
        shown = one_line(name, 200)
        if shown not in totals and len(totals) >= MAX_USER_COUNTERS:
            shown = OTHERS
        totals[shown] = max(-MAX_AMOUNT, min(MAX_AMOUNT, totals[shown] + amount))
