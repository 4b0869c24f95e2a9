"""Takes one attempt through its phases: what `attempt` decides goes to the servers, what they report to it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

from msgspec.structs import replace

from mrcore.cluster.attempt import Attempt, EndServer, Give, Instruction, Start
from mrcore.cluster.connections import Agents, Links
from mrcore.cluster.partitions import Partitioning, default_partitions
from mrcore.cluster.preflight import Plan, Stopped
from mrcore.engine.inputs import SAMPLE_BLOCK_BYTES, THIN_BY_LINES_BELOW
from mrcore.errors import JobFault
from mrcore.messages.tasks import Earlier, Order, PlacedPart, RunIdentity, Source, SpillShare
from mrcore.settings.config import Settings
from mrcore.state.outputs import node_of
from mrcore.wire.tls import Pki

TICK_SECONDS = 0.5
PROGRESS_SECONDS = 1.0  # between two words on how far an attempt is

Job = dict[str, Any]
Progress = Callable[..., None]


class Coordinator:
    """One attempt of a job by the plan of its preflight, with the links to the servers that carry it out."""

    def __init__(self, settings: Settings, pki: Pki, agents: Agents, job: Job, run: int, plan: Plan) -> None:
        self._settings, self._pki, self._agents, self._job, self._plan = settings, pki, agents, job, plan
        self._servers = {server.name: server for server in settings.servers()}
        self.attempt = Attempt(
            RunIdentity(job=job["job_name"], run=run),
            {name: server.node.name for name, server in self._servers.items()},
            plan.bundles,
            self._partitioning(),
            map_only=job["reduce_function_name"] is None,
            max_attempts=job["max_attempts"] or settings.max_attempts,
            node_timeout_seconds=settings.node_timeout_seconds,
            now=time.monotonic(),
        )

    def run(self, clock: PhaseClock, stop: threading.Event) -> Attempt:
        """Return the attempt when it has succeeded. Raises the error that ended it, Stopped when asked to stop."""
        attempt = self.attempt
        bundles = sum(map(len, self._plan.bundles.values()))
        with Links(self._settings, self._pki, attempt) as links, clock.told_at_the_end(attempt):
            while True:
                for instruction in attempt.instructions():
                    self._carry_out(instruction, links)
                clock.enter(attempt.phase, attempt, bundles_done=attempt.results.bundles_done, bundles=bundles)
                if attempt.finished or attempt.fault:
                    break
                links.take_events(TICK_SECONDS)
                attempt.tick(time.monotonic())
                if stop.is_set():
                    raise Stopped("stopped by the Runner")
        if attempt.fault:
            raise attempt.fault
        self._check_sample()
        return attempt

    def _partitioning(self) -> Partitioning:
        job, by_range = self._job, self._job["partitioner"] == "range"
        if base := self._plan.increment.base:
            earlier: dict[int, list[PlacedPart]] = defaultdict(list)
            for part in base.parts:
                earlier[part.partition].append(part)
            return Partitioning(base.partitions, by_range, earlier, base.cuts)
        # Those of a job with merge_output are for good, so they are not counted by what the first run happens to read.
        input_bytes = (1 << 62) if job["merge_output"] else self._plan.bytes
        return Partitioning(
            job["number_of_partitions"] or default_partitions(input_bytes, len(self._servers)), by_range
        )

    def _carry_out(self, instruction: Instruction, links: Links) -> None:
        name = instruction.server
        match instruction:
            case Start():
                links.servers[name].put(self._order(instruction))
            case Give():
                links.servers[name].put(instruction)
            case EndServer():
                self._agents.end_server(self._servers[name].node, name)

    def _order(self, start: Start) -> Order:
        plan, partitioning = self._plan, self.attempt.partitioning
        order = Order(
            identity=start.identity,
            node=self._servers[start.server].node.name,
            job=self._job,
            project=plan.project,
            environment=plan.environment,
            partitions=partitioning.count,
            sample_by_lines=plan.bytes < THIN_BY_LINES_BELOW,
        )
        if start.partition is None:
            return replace(order, bundles=start.bundles, no_more=start.no_more)
        number, low, high = start.partition
        shares = self.attempt.results.shares(number, partitioning.by_range)
        earlier = None
        if parts := partitioning.earlier.get(number):
            holders = sorted({part.node for part in parts})  # more than one, after a drain
            earlier = Earlier(parts=list(parts), sources=[self._source(node) for node in holders])
        sources = [self._source(node, runs) for node, runs in shares.items()]
        return replace(order, partition=number, low=low, high=high, sources=sources, earlier=earlier)

    def _source(self, name: str, runs: list[SpillShare] | None = None) -> Source:
        node = node_of(self._settings, name)
        return Source(node=name, address=node.address, port=node.agent_port, runs=runs or [])

    def _check_sample(self) -> None:
        total_bytes, wanted = self._plan.bytes, self._job["downsample"]
        if wanted < 1 and total_bytes and not self.attempt.results.counters["lines"]:
            least = min(1.0, (3 * SAMPLE_BLOCK_BYTES if total_bytes >= THIN_BY_LINES_BELOW else 300) / total_bytes)
            raise JobFault(
                f"the sample of {wanted} of {total_bytes:,} bytes holds no line; the smallest useful "
                f"downsample for this input is about {least:.2g}",
                code="sample",
            )


class PhaseClock:
    """Notes when each phase began, and tells `progress` when one begins and, of an attempt, how far it is."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._begun: dict[str, float] = {}
        self._phase, self._told = "", 0.0

    def enter(self, phase: str, attempt: Attempt | None = None, **facts: int) -> None:
        """A phase begins, or goes on: then it is told once in PROGRESS_SECONDS."""
        now = time.monotonic()
        self._begun.setdefault(phase, now)
        if phase != self._phase or now - self._told >= PROGRESS_SECONDS:
            self._phase, self._told = phase, now
            self._progress(phase, **facts, **({"seen": attempt.board.view()} if attempt else {}))

    @contextlib.contextmanager
    def told_at_the_end(self, attempt: Attempt) -> Iterator[None]:
        """Tell what stays known of an attempt, whatever ends it."""
        try:
            yield
        finally:
            self._progress(
                self._phase or attempt.phase,
                seen=attempt.board.view(),
                detail=attempt.board.detail(),
                profiles=attempt.board.profiles,
            )

    def seconds(self) -> dict[str, float]:
        """Return the wall time of each phase so far."""
        ends = [*self._begun.values(), time.monotonic()][1:]
        return {phase: round(end - begun, 4) for (phase, begun), end in zip(self._begun.items(), ends, strict=True)}
