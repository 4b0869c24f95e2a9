"""How the keys are cut into partitions, the shares that one reduce task each gets."""

from __future__ import annotations

import bisect
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from mrcore.engine.records import Key, order_key
from mrcore.messages.tasks import PlacedPart, Spill, read_key

FIRST_PARTITION_BYTES = 4 << 20  # a small job does not pay for more partitions than its data fills


class Partition(NamedTuple):
    """A share of the keys: those of one hash, or from `low` up to `high`, each as JSON text (None: no limit)."""

    number: int
    low: str | None = None
    high: str | None = None


@dataclass
class Partitioning:
    """How the keys of a job are dealt: to `count` partitions by hash, or to at most so many ranges.

    `earlier` is output that is merged with what is new, by partition. By range its `cuts` stay those of the new output;
    otherwise `plan` chooses them.
    """

    count: int
    by_range: bool
    earlier: Mapping[int, Sequence[PlacedPart]] = field(default_factory=dict)
    cuts: Sequence[Key] | None = None

    def plan(self, spills: Iterable[Spill]) -> list[Partition]:
        """Return the partitions in the order in which they are to be reduced: of a hash, the largest first."""
        spills = list(spills)
        if not self.by_range:
            return [Partition(number) for number, _ in self.sizes(spills).most_common()]
        if self.cuts is None:
            samples = [(read_key(key), weight) for spill in spills for key, weight in spill.samples]
            self.cuts = range_cuts(samples, self.count)
        if not spills and not self.earlier:
            return []
        borders = [None, *map(json.dumps, self.cuts), None]
        return [Partition(number, *ends) for number, ends in enumerate(itertools.pairwise(borders))]

    def sizes(self, spills: Iterable[Spill]) -> Counter[int]:
        """Return the bytes of each partition, earlier output among them; of ranges, once planned, as samples say."""
        sizes = Counter({number: sum(part.bytes for part in parts) for number, parts in self.earlier.items()})
        cuts = [order_key(cut) for cut in self.cuts or ()]
        for spill in spills:
            if self.by_range:
                for key, length in spill.samples:
                    sizes[bisect.bisect_right(cuts, order_key(read_key(key)))] += length
            else:
                sizes.update({int(number): length for number, length in spill.partitions.items()})
        return sizes

    def lies_on(self, partition: int, node: str) -> bool:
        """Whether a node has earlier output of a partition."""
        return any(part.node == node for part in self.earlier.get(partition, ()))


def range_cuts(samples: Sequence[tuple[Key, int]], partitions: int) -> list[Key]:
    """Choose at most `partitions` - 1 ascending keys that cut the samples `(first key, bytes)` into equal shares."""
    ordered = sorted(samples, key=lambda sample: order_key(sample[0]))
    total = sum(weight for _, weight in ordered)
    cuts: list[Key] = []
    before = 0
    for key, weight in ordered:
        # A frame belongs to the range in which its first key lies, so a cut is taken where a share is full.
        full = before * partitions >= total * (len(cuts) + 1)
        if full and len(cuts) < partitions - 1 and (not cuts or cuts[-1] != key):
            cuts.append(key)
        before += weight
    return cuts


def default_partitions(input_bytes: int, servers: int) -> int:
    """Return the number of hash partitions or key ranges: two for each server, fewer for little data."""
    return max(1, min(2 * servers, -(-input_bytes // FIRST_PARTITION_BYTES)))
