"""How far an attempt is, and what each server did in it: what the master decides and what tasks report, added up.

Pure: `cluster.attempt` tells it what happens, `clock` what time it is (seconds since 1970). What it keeps is bounded
whatever nodes say. Bytes of MAP are bytes of files: of a compressed one its packed bytes, though tasks count what they
unpack. SORT and REDUCE count bytes of partitions, once each.
"""

from __future__ import annotations

import heapq
import itertools
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from msgspec.structs import replace

from mrcore.messages.tasks import (
    MAP,
    MAX_USER_COUNTERS,
    Bundle,
    Progressed,
    RunIdentity,
    Split,
    TaskIdentity,
    TaskResult,
)
from mrcore.state.progress import (
    MAX_DEATHS,
    MAX_HEAVY_KEYS,
    MAX_SLOWEST,
    HeavyKey,
    Phase,
    Progress,
    RunDetail,
    ServerNow,
    ServerShare,
    TaskRow,
)
from mrcore.text import one_line

USUAL_RATIO = 4.0  # of unpacked to packed bytes, until a packed file of this attempt has been read
MOST_OF_A_BUNDLE = 0.95  # is done at most until the task says that all of it is
NAME_CHARACTERS, WHY_CHARACTERS = 200, 500  # of a status, a counter, a key; of the reason of a death
MAX_AMOUNT = 1 << 62  # of a sum, as of what is added
MAX_STACKS, MAX_STACK_BYTES = 20_000, 16 << 20  # of the profile of one phase of a run
OTHERS = "(others)"  # counters of more names than a run may have, and rare stacks
NOTHING_SAID = Progressed(phase=MAP, bytes=0, records=0)


@dataclass
class Hand:
    """The task that a server has. `todo`: what it is to read, by bundle: plain and packed bytes."""

    identity: TaskIdentity
    started: float
    todo: dict[int, tuple[int, int]] = field(default_factory=dict)
    size: int = 0  # of its partition
    mapped: int = 0  # bytes of its bundles that are done
    mark: int = 0  # what it counted when the last of them was
    said: Progressed = NOTHING_SAID
    sorted_at: float | None = None
    sorted_records: int = 0
    most: dict[str, int] = field(default_factory=dict)  # bytes by phase: what was shown does not fall again


class Board:
    """What is known of an attempt under way."""

    def __init__(
        self,
        run: RunIdentity,
        servers: Mapping[str, str],
        bundles: Mapping[str, Sequence[Bundle]],
        clock: Callable[[], float],
    ) -> None:
        self._run, self._servers, self._clock = run, servers, clock
        self._up: set[str] = set()
        self._hands: dict[str, Hand] = {}
        pieces = (piece for some in bundles.values() for bundle in some for piece in bundle.pieces)
        self.phases = {"MAP": Phase(name="MAP", started=clock(), total=sum(map(sum, map(_sizes, pieces))))}
        self._done: Counter[str] = Counter()  # bytes of tasks that are done, by phase
        self._records: Counter[str] = Counter()
        self._spills = self._deaths = self._reduced = 0
        self._unpacked = self._packed = 0
        self._sizes: Mapping[int, int] = {}  # bytes of partitions
        self._whole = 0  # of all of them
        self._shares: dict[tuple[str, str], ServerShare] = {}
        self._rows: list[tuple[float, int, TaskRow]] = []  # a heap: the shortest of the longest goes first
        self._number = itertools.count()
        self._dead: list[TaskRow] = []
        self._heavy: list[HeavyKey] = []
        self.counters: Counter[str] = Counter()  # of the user's functions, in tasks that are done
        self.profiles: dict[str, Counter[str]] = defaultdict(Counter)  # samples by phase and stack

    # --- what happens ---

    def up(self, server: str, up: bool) -> None:
        """A server answers, or does so no longer."""
        (self._up.add if up else self._up.discard)(server)

    def start(self, server: str, identity: TaskIdentity, bundles: Iterable[Bundle], partition: int | None) -> None:
        """A server is ordered to start a task."""
        hand = self._hands[server] = Hand(identity, self._clock(), size=self._sizes.get(partition or 0, 0))
        if partition is None:
            self.give(server, bundles)
        else:
            hand.said = replace(hand.said, phase="SORT")
            self.phases.setdefault("SORT", Phase(name="SORT", started=hand.started, total=self._whole))

    def give(self, server: str, bundles: Iterable[Bundle]) -> None:
        """The task of a server gets more bundles."""
        for bundle in bundles:
            sizes = [_sizes(piece) for piece in bundle.pieces]
            self._hands[server].todo[bundle.id] = (sum(plain for plain, _ in sizes), sum(packed for _, packed in sizes))

    def bundle_done(self, server: str, number: int) -> None:
        """The task of a server has mapped one of its bundles."""
        hand = self._hands[server]
        if (sizes := hand.todo.pop(number, None)) is None:
            return
        plain, packed = sizes
        counted = hand.said.bytes if packed else hand.mark + plain
        if packed and (fresh := counted - hand.mark - plain) > 0:
            self._unpacked, self._packed = self._unpacked + fresh, self._packed + packed
        hand.mark, hand.mapped = max(hand.mark, counted), hand.mapped + plain + packed

    def progressed(self, server: str, event: Progressed) -> None:
        """The task of a server says how far it is."""
        hand = self._hands[server]
        hand.said = replace(event, status=one_line(event.status, NAME_CHARACTERS))
        if event.phase == "SORT":
            hand.sorted_records = event.records

    def sorted(self, server: str) -> None:
        """The task of a server has merged its partition."""
        hand, now = self._hands[server], self._clock()
        if hand.sorted_at is None:
            hand.sorted_at = now
            hand.said = replace(hand.said, phase="REDUCE", bytes=0, records=0)
            self.phases.setdefault("REDUCE", Phase(name="REDUCE", started=now, total=self._whole))

    def done(self, server: str, result: TaskResult) -> None:
        """The task of a server is done."""
        hand = self._hands.pop(server)
        _add_counters(self.counters, result.user_counters)
        if result.profile:
            _add_stacks(self.profiles[hand.identity.phase], result.profile)
        if hand.identity.phase == MAP:
            size, records = hand.mapped + sum(map(sum, hand.todo.values())), result.counters.get("lines", 0)
            self._add("MAP", size, records)
            self._spills += len(result.runs)
        else:
            size, records = hand.size, result.counters.get("values", 0)
            self._add("SORT", size, hand.sorted_records)
            self._add("REDUCE", size, records)
            self._reduced += 1
            self._add_heavy(hand.identity.task, result)
        self._end(server, hand, "done", size, records, len(result.runs), result.peak_bytes)

    def died(self, server: str, why: str) -> None:
        """The task of a server is lost: what it did does not count."""
        hand = self._hands.pop(server)
        self._deaths += 1
        size, said = max(self._now(hand).values(), default=0), hand.said
        row = self._end(server, hand, "died", size, said.records, said.spills, 0, one_line(why, WHY_CHARACTERS))
        if len(self._dead) < MAX_DEATHS:
            self._dead.append(row)

    def end_map(self, sizes: Mapping[int, int]) -> None:
        """All is mapped: these are the bytes of the partitions, none without a reduce function."""
        self._sizes = {number: min(MAX_AMOUNT, size) for number, size in sizes.items()}
        self._whole = min(MAX_AMOUNT, sum(sizes.values()))
        self.phases["MAP"].ended = self._clock()

    def _add(self, phase: str, size: int, records: int) -> None:
        self._done[phase] = min(MAX_AMOUNT, self._done[phase] + size)
        self._records[phase] = min(MAX_AMOUNT, self._records[phase] + records)

    def _add_heavy(self, partition: int, result: TaskResult) -> None:
        keys = [
            HeavyKey(key=one_line(group.key, NAME_CHARACTERS), values=group.values, partition=partition)
            for group in result.heavy
        ]
        self._heavy = sorted(self._heavy + keys, key=lambda key: -key.values)[:MAX_HEAVY_KEYS]

    def _end(
        self, server: str, hand: Hand, outcome: str, size: int, records: int, spills: int, peak: int, why: str = ""
    ) -> TaskRow:
        """Keep what a try of a task was, if it is one of the longest, and add it to what its server did."""
        now, phase, node = self._clock(), hand.identity.phase, self._servers[server]
        row = TaskRow(
            phase=phase, task=hand.identity.task, try_=hand.identity.try_, server=server, node=node,
            started=hand.started, seconds=max(0.0, now - hand.started), bytes=size, records=records, spills=spills,
            peak_bytes=peak, outcome=outcome, why=why,
        )  # fmt: skip
        (heapq.heappush if len(self._rows) < MAX_SLOWEST else heapq.heappushpop)(
            self._rows, (row.seconds, next(self._number), row)
        )
        if phase == MAP:
            self._share("MAP", server, row.seconds, size, records, outcome)
        else:
            merged = hand.sorted_at or now
            self._share("SORT", server, merged - hand.started, size, hand.sorted_records, outcome)
            if hand.sorted_at:
                self._share("REDUCE", server, now - merged, size, records, outcome)
        return row

    def _share(self, phase: str, server: str, seconds: float, size: int, records: int, outcome: str) -> None:
        share = self._shares.setdefault(
            (phase, server),
            ServerShare(
                phase=phase, server=server, node=self._servers[server], tasks=0, seconds=0.0, bytes=0, records=0
            ),
        )
        share.seconds += max(0.0, seconds)
        if outcome == "done":
            share.tasks += 1
            share.bytes, share.records = min(MAX_AMOUNT, share.bytes + size), min(MAX_AMOUNT, share.records + records)

    # --- what is known ---

    def view(self) -> Progress:
        """Return how far the attempt is at this moment."""
        done, records, counters = Counter(self._done), Counter(self._records), Counter(self.counters)
        spills = self._spills
        for hand in self._hands.values():
            done.update(self._now(hand))
            records[hand.said.phase] += hand.said.records
            if hand.said.phase == "REDUCE":
                records["SORT"] += hand.sorted_records
            spills += hand.said.spills if hand.said.phase == "MAP" else 0
            _add_counters(counters, hand.said.user_counters)
        return Progress(
            job_name=self._run.job,
            run=self._run.run,
            job_type="mapreduce",
            started=self.phases["MAP"].started,
            updated=self._clock(),
            phases=[
                replace(phase, done=min(phase.total, done[name]), records=min(MAX_AMOUNT, records[name]))
                for name, phase in self._with_ends().items()
            ],
            servers=[self._server_now(name, node) for name, node in self._servers.items()],
            counters=dict(counters),
            spills=min(MAX_AMOUNT, spills),
            deaths=self._deaths,
        )

    def detail(self) -> RunDetail:
        """Return what stays known of the attempt, which has ended, whatever its end."""
        seen = self.view()
        for name, hand in self._hands.items():
            size, said = max(self._now(hand).values(), default=0), hand.said
            self._end(name, hand, "running", size, said.records, said.spills, 0)
        sizes = sorted(self._sizes.values())
        return RunDetail(
            phases=seen.phases,
            servers=list(self._shares.values()),
            slowest=[row for *_, row in sorted(self._rows, reverse=True)],
            deaths=self._dead,
            heavy_keys=self._heavy,
            largest_partition_bytes=sizes[-1] if sizes else 0,
            median_partition_bytes=int(statistics.median(sizes)) if sizes else 0,
            counters=dict(self.counters),
        )

    def _with_ends(self) -> dict[str, Phase]:
        """Return the phases; a death may open again one that had ended."""
        merged = self._reduced + sum(hand.sorted_at is not None for hand in self._hands.values())
        for name, count in (("SORT", merged), ("REDUCE", self._reduced)):
            if phase := self.phases.get(name):
                phase.ended = (phase.ended or self._clock()) if count == len(self._sizes) else None
        return self.phases

    def _now(self, hand: Hand) -> dict[str, int]:
        """Return the bytes that a task under way has done, by phase."""
        for phase, size in self._estimate(hand).items():
            hand.most[phase] = max(size, hand.most.get(phase, 0))
        return hand.most

    def _estimate(self, hand: Hand) -> dict[str, int]:
        said = hand.said
        if hand.identity.phase != MAP:
            if hand.sorted_at is None:
                return {"SORT": min(hand.size, said.bytes)}
            return {"SORT": hand.size, "REDUCE": min(hand.size, said.bytes) if said.phase == "REDUCE" else 0}
        plain, packed = next(iter(hand.todo.values()), (0, 0))
        ratio = self._unpacked / self._packed if self._packed else USUAL_RATIO
        share = (said.bytes - hand.mark) / max(1.0, plain + ratio * packed)
        return {"MAP": hand.mapped + int((plain + packed) * min(MOST_OF_A_BUNDLE, max(0.0, share)))}

    def _server_now(self, name: str, node: str) -> ServerNow:
        up, hand = name in self._up, self._hands.get(name)
        if hand is None:
            return ServerNow(server=name, node=node, up=up)
        said = hand.said
        size = self._now(hand).get(said.phase, 0)
        return ServerNow(
            server=name, node=node, up=up, phase=said.phase, task=hand.identity.task, since=hand.started, bytes=size,
            records=said.records, spills=said.spills, status=said.status,
        )  # fmt: skip


def _sizes(piece: Split) -> tuple[int, int]:
    """Return the plain and the packed bytes of a split: all of it is one or the other."""
    return (0, piece.size - piece.start) if piece.end is None else (piece.end - piece.start, 0)


def _add_counters(totals: Counter[str], counters: Mapping[str, int]) -> None:
    """Add counters of a task to those of a run, which has at most MAX_USER_COUNTERS names: what is more is OTHERS."""
    for name, amount in counters.items():
        shown = one_line(name, NAME_CHARACTERS)
        if shown not in totals and len(totals) >= MAX_USER_COUNTERS:
            shown = OTHERS
        totals[shown] = max(-MAX_AMOUNT, min(MAX_AMOUNT, totals[shown] + amount))


def _add_stacks(profile: Counter[str], fresh: Mapping[str, int]) -> None:
    """Add samples; when there are too many stacks, the rarer half becomes one."""
    profile.update(fresh)
    if len(profile) <= MAX_STACKS and sum(map(len, profile)) <= MAX_STACK_BYTES:
        return
    room, kept = MAX_STACK_BYTES // 2, Counter[str]()
    for stack, samples in profile.most_common():
        room -= len(stack)
        kept[stack if room > 0 and len(kept) < MAX_STACKS // 2 else OTHERS] += samples
    profile.clear()
    profile.update(kept)
