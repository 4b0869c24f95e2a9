"""What a task process does: obey one order, report on it, end.

Messages are JSON lines on `connection`, its end of a socket pair with the cluster server:
  task → server  an event of `messages.tasks`: want, bundle_done, phase, progress, done, failed
  server → task  a `messages.tasks.More`
One map process pulls bundles of splits until there are no more, so imports and auxiliary data are loaded once.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from mrcore import task
from mrcore.engine.disk_sort import DiskSort
from mrcore.engine.functions import load_auxiliary, load_function, make_combiner
from mrcore.engine.inputs import Reader, Sample
from mrcore.engine.mapper import Map
from mrcore.engine.memory import MemoryWatch
from mrcore.engine.output import DirectOutput, Parts, PartWriter
from mrcore.engine.profile import Sampler
from mrcore.engine.progress import Progress
from mrcore.engine.reducer import Reduce
from mrcore.engine.shuffler import Combine, Shuffle
from mrcore.engine.spills import DamagedFrame, Segment, select
from mrcore.errors import ClusterFault, Interrupted, JobFault, MrcoreError, Refused, TaskDied, is_disk_full, unforeseen
from mrcore.messages import tasks
from mrcore.messages.kinds import convert, decode
from mrcore.messages.tasks import Bundle, Order, Part, Source, TaskResult
from mrcore.project.packages import use_packages
from mrcore.system import forks
from mrcore.system.paths import Layout, remove_tree
from mrcore.text import one_line

Request = dict[str, Any]  # of the data channel
Sink = Callable[[int, memoryview], None]
Fetch = Callable[[Source, list[Request], Sink], None]
RANGES_PER_REQUEST = 512
READ_BLOCK_BYTES = 1 << 20


class Process:
    """Carries out one order of phase MAP or REDUCE.

    `fetch(source, requests, sink)` brings byte ranges of spills, or parts, from another node; `sink` is called with
    (number of the request, bytes).
    """

    def __init__(self, order: Order, connection: socket.socket, layout: Layout, fetch: Fetch, server_name: str) -> None:
        self._order, self._job = order, order.job
        self._connection, self._layout, self._fetch, self._server = connection, layout, fetch, server_name
        self._lines = connection.makefile("rb")
        identity = order.identity
        self._run = identity.job, identity.run
        self._task_name = f"{identity.phase.lower()}-{identity.task}-{identity.try_}"
        self._folder = layout.run_dir(*self._run) / self._task_name
        self._seconds: dict[str, float] = {}
        self._sending = threading.Lock()
        self._progress = Progress(self._report)
        self._fetched_bytes = 0

    def process(self) -> None:
        """Obey and report "done" or "failed"; never raises for what the order or the user's code does wrong."""
        with forks.guarded():
            try:
                result = self._obey()
            except BaseException as error:  # noqa: BLE001  whatever it is, the master must know of it
                plain = self._as_ours(error).to_dict()
                self._report(tasks.Failed(error=convert(tasks.PlainError, plain)))
            else:
                self._report(tasks.Done(result=result))

    def _obey(self) -> TaskResult:
        order, (job, run), phase = self._order, self._run, self._order.identity.phase
        # attempt: what projects of the original may ask for; a run that is handed back has a new number.
        task.set_surroundings(job=job, run=run, attempt=1, phase=phase, server=self._server, node=order.node)
        task.set_surroundings(partition=order.partition if phase == "REDUCE" else None)
        for folder in (self._folder, self._layout.runs_dir(job, run), self._layout.parts_dir(job, run)):
            folder.mkdir(parents=True, exist_ok=True)
        os.chdir(self._folder)  # a file that user code opens by a relative name goes when the task goes
        gc.disable()  # the hot loops make no cycles; collections happen at each spill
        sampler = Sampler() if self._job.get("profile") else None  # jobs of earlier releases have no such key
        with MemoryWatch(order.memory_bytes) as watch, self._progress, sampler or contextlib.nullcontext():
            try:
                made = self._map(watch) if phase == "MAP" else self._reduce(watch)
            finally:
                forks.check()  # the folder is the parent's
                os.chdir("/")
                remove_tree(self._folder)
        made |= {"user_counters": task.counters, "profile": sampler.stacks() if sampler else {}}
        return TaskResult(**made, peak_bytes=watch.peak_bytes, seconds=self._seconds)

    def _report(self, event: tasks.TaskEvent) -> None:
        forks.check()
        line = json.dumps(msgspec.to_builtins(event)).encode() + b"\n"
        with (
            self._sending,
            contextlib.suppress(BrokenPipeError, ConnectionResetError),
        ):  # the server is gone, we with it
            self._connection.sendall(line)

    def _as_ours(self, error: BaseException) -> MrcoreError:
        """Return what ended the task as one of our errors: its class decides whether the task is tried again."""
        where = f"task {self._task_name} on {self._server}"
        if isinstance(error, MrcoreError):
            return error
        if isinstance(error, MemoryError):
            return JobFault(
                "the task ran out of memory: give the servers more (memory_bytes) or the job smaller groups",
                code="out_of_memory",
            )
        if isinstance(error, Interrupted):
            return TaskDied(
                f"{where} was interrupted: somebody sent it SIGINT (Ctrl-C in the window of {self._server})"
            )
        if is_disk_full(error):
            return ClusterFault(
                f"the disk of {self._layout.compute_dir} is full on {self._order.node}: make room there; "
                "the job goes on by itself",
                hold=True,
            )
        if isinstance(error, OSError | DamagedFrame):
            return TaskDied(f"{where}: {one_line(error, 500)}")
        return unforeseen(error, where)

    def _user_code(self, function: str) -> tuple[Path, Any]:
        """Make the project's packages importable; return its folder and the auxiliary data of the mapper or reducer."""
        task.in_hand(f"the import of project {self._job['project_name']}")
        if self._order.environment:
            use_packages(self._layout.venvs_dir / self._order.environment)
        auxiliary = load_auxiliary(self._layout.auxiliary_dir, self._job[f"auxiliary_data_name_{function}"])
        return self._layout.projects_dir / self._order.project, auxiliary

    def _combiner(self, project: Path) -> Combine | None:
        name = self._job["combine_function_name"]
        if name is None:
            return None
        auxiliary = load_auxiliary(self._layout.auxiliary_dir, self._job["auxiliary_data_name_reducer"])
        return make_combiner(load_function(project, "reduce", name), name, auxiliary)

    # --- MAP ---------------------------------------------------------------------------------------------------------

    def _map(self, watch: MemoryWatch) -> dict[str, Any]:
        job, name = self._job, self._job["map_function_name"]
        project, auxiliary = self._user_code("mapper")
        function = load_function(project, "map", name)
        sink: Shuffle | DirectOutput
        if job["reduce_function_name"] is None:
            sink = DirectOutput(self._part_writer(self._order.identity.task), watch)
        else:
            sink = Shuffle(
                self._layout.runs_dir(*self._run),
                self._task_name,
                watch,
                partitions=self._order.partitions,
                by_range=job["partitioner"] == "range",
                combine=self._combiner(project),
                max_items=job["max_number_dumped_items_shuffler"],
            )
        sample = None
        if job["downsample"] < 1:
            by_lines, base_dir = self._order.sample_by_lines, str(self._layout.base_dir)
            sample = Sample(job["downsample"], job["sample_seed"] or 0, by_lines, base_dir)
        block_bytes = min(READ_BLOCK_BYTES, max(64 << 10, watch.budget_bytes // 256))
        reader = Reader(max_line_bytes=job["max_line_bytes"], block_bytes=block_bytes, sample=sample)
        mapper = Map(function, name, auxiliary, sink, reader, on_bad_text=job["on_bad_text"])
        gc.collect()
        gc.freeze()
        started = time.monotonic()
        self._progress.begin("MAP", lambda: (*mapper.so_far(), sink.spills))
        totals = {"lines": 0, "items": 0, "bytes": 0}
        for bundle in self._bundles():
            counters = mapper.map(bundle.pieces)
            totals = {key: totals[key] + counters[key] for key in totals}
            self._report(tasks.BundleDone(id=bundle.id))
        odd = {name: getattr(mapper, name) for name in ("unfinished_characters", "replaced_lines")}
        totals |= {name: count for name, count in odd.items() if count}
        mapped = time.monotonic()
        sealed = mapper.finish()
        self._seconds = {"map": mapped - started, "seal": time.monotonic() - mapped}
        return {"counters": totals, "parts" if isinstance(sink, DirectOutput) else "runs": sealed}

    def _bundles(self) -> Iterator[Bundle]:
        """Yield bundles; ask for more as soon as the last one in hand is begun, so that there is no waiting."""
        waiting = list(self._order.bundles)
        known = {bundle.id for bundle in waiting}  # a master that got no answer may repeat itself
        no_more, asked = self._order.no_more, False
        while waiting or not no_more:
            if len(waiting) <= 1 and not no_more and not asked:
                self._report(tasks.Want())
                asked = True
            if waiting:
                yield waiting.pop(0)
                continue
            if not (line := self._lines.readline()):
                raise TaskDied(f"task {self._task_name}: its cluster server hung up")
            more = decode(tasks.More, line)
            waiting += [bundle for bundle in more.bundles if bundle.id not in known]
            known.update(bundle.id for bundle in waiting)
            no_more, asked = no_more or more.no_more, False

    def _part_writer(self, partition: int) -> PartWriter:
        return PartWriter(
            self._layout.parts_dir(*self._run),
            run=self._run[1],
            partition=partition,
            attempt_try=self._order.identity.try_,
            max_items=self._job["max_number_dumped_items_reducer"],
            compress=self._job["compress"],
        )

    # --- SORT and REDUCE ---------------------------------------------------------------------------------------------

    def _reduce(self, watch: MemoryWatch) -> dict[str, Any]:
        job, partition = self._job, self._order.partition
        started = time.monotonic()
        project, auxiliary = self._user_code("reducer")
        function = load_function(project, "reduce", job["reduce_function_name"])
        low, high = ([tasks.read_key(key)] if key is not None else None for key in (self._order.low, self._order.high))
        sorter = DiskSort(
            self._folder,
            watch,
            combine=self._combiner(project),
            ascending_values=job["sort_values"],
            low=low,
            high=high,
        )
        gc.collect()
        gc.freeze()
        task.in_hand(f"the runs of partition {partition}, to be fetched and merged")
        self._progress.begin("SORT", lambda: (self._fetched_bytes, 0, sorter.merge_passes))
        by_range = job["partitioner"] == "range"
        fetched = self._fetch_spills(sorter, {"low": low, "high": high} if by_range else {"partition": partition})
        merged = self._add_earlier_output(sorter)
        reducer = Reduce(
            function,
            job["reduce_function_name"],
            auxiliary,
            sorter,
            self._part_writer(partition),
            watch,
            self._folder,
            disk_based_input=job["disk_based_input"],
            disk_based_output=job["disk_based_output"],
        )
        reducer.sort()
        sorted_at = time.monotonic()
        self._report(tasks.PhaseBegun(phase="REDUCE"))
        self._progress.begin("REDUCE", lambda: (sorter.bytes_read, reducer.values, sorter.merge_passes))
        parts = reducer.reduce()
        self._seconds = {"sort": sorted_at - started, "reduce": time.monotonic() - sorted_at}
        counters = {"groups": reducer.groups, "values": reducer.values, "merge_passes": sorter.merge_passes} | merged
        made = {"counters": counters, "parts": parts, "fetched": fetched, "keys_kept": reducer.keys_kept}
        return made | {"heavy": reducer.heavy()}

    def _fetch_spills(self, sorter: DiskSort, selector: Request) -> dict[str, int]:
        """Give the sorter its share of every spill: ranges on this node in place, the others fetched.

        Returns the bytes taken by source node.
        """
        job, run = self._run
        fetched: dict[str, int] = {}
        for source in self._order.sources:
            path, offset = self._folder / f"fetched-{source.node}", 0
            if source.node == self._order.node:
                runs_dir = self._layout.runs_dir(job, run)
                for spill in source.runs:
                    for start, length in select(runs_dir, spill.id, selector):
                        sorter.add_spill(Segment(runs_dir / f"{spill.id}.data", start, length, spill.max_decoded))
                        offset += length
                self._fetched_bytes += offset
            else:
                requests = [{"run": {"job": job, "run": run, "id": spill.id} | selector} for spill in source.runs]
                lengths = self._fetch_into(path, source, requests)
                for spill, length in zip(source.runs, lengths, strict=True):
                    sorter.add_spill(Segment(path, offset, length, spill.max_decoded))
                    offset += length
            fetched[source.node] = offset
        return fetched

    def _fetch_into(self, path: Path, source: Source, requests: Sequence[Request]) -> list[int]:
        """Append what the requests bring to one file, in their order, and return their lengths."""
        lengths = [0] * len(requests)
        at_once = self._job["simultaneous_files_in_redis"] or RANGES_PER_REQUEST
        with open(path, "wb", buffering=1 << 20) as stream:
            for first in range(0, len(requests), at_once):

                def sink(index: int, chunk: memoryview, first: int = first) -> None:
                    lengths[first + index] += len(chunk)
                    self._fetched_bytes += len(chunk)
                    if lengths[first + index] > source.runs[first + index].most_bytes:
                        raise Refused(f"a spill run on {source.node} is longer than it was said to be")
                    stream.write(chunk)

                self._fetch(source, list(requests[first : first + at_once]), sink)
        return lengths

    def _add_earlier_output(self, sorter: DiskSort) -> dict[str, int]:
        """Give the sorter the partition's earlier output, for `merge_output`: in place, or fetched from its nodes."""
        if not (earlier := self._order.earlier):
            return {}
        job, parts = self._run[0], earlier.parts
        here = self._layout.reduce_dir(job)
        for source in earlier.sources:
            if source.node != self._order.node:
                self._fetch_parts(source, [part for part in parts if part.node == source.node])
        paths = [(here if part.node == self._order.node else self._folder) / part.name for part in parts]
        sorter.add_spill(Parts(paths, parts))
        return {"merged_items": sum(part.records for part in parts), "merged_bytes": sum(part.bytes for part in parts)}

    def _fetch_parts(self, source: Source, parts: Sequence[Part]) -> None:
        """Bring parts of a node into files of their names. Raises JobFault when one is not to be had, or longer."""
        lengths = [0] * len(parts)

        def sink(index: int, chunk: memoryview) -> None:
            part = parts[index]
            lengths[index] += len(chunk)
            if lengths[index] > part.bytes:
                raise Refused(f"{part.name} on {source.node} is longer than when it was made")
            with open(self._folder / part.name, "ab") as stream:
                stream.write(chunk)

        try:
            self._fetch(source, [{"part": {"job": self._run[0], "name": part.name}} for part in parts], sink)
        except Refused as error:
            raise JobFault(f"the earlier output is not to be had: {error.message}", code="ledger") from error
