"""What a task process does: obey one order, tell how it goes, end.

It talks JSON lines with its cluster server over `connection`:
  task → server  {"event": "want"} · {"event": "bundle_done", "id"} · {"event": "phase", "phase"}
                 {"event": "done", "result"} · {"event": "failed", "error"}
  server → task  {"bundles": […]} · {"no_more": true}
One map process pulls bundles of splits until there are no more, so imports and auxiliary data are loaded once.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
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
from mrcore.engine.reducer import Reduce
from mrcore.engine.shuffler import Combine, Shuffle
from mrcore.engine.spills import DamagedFrame, Segment, select
from mrcore.errors import ClusterFault, Interrupted, JobFault, MrcoreError, Refused, TaskDied, is_disk_full, unforeseen
from mrcore.messages.kinds import convert
from mrcore.messages.tasks import PlacedPart, Split
from mrcore.project.packages import use_packages
from mrcore.system import forks
from mrcore.system.paths import PART_NAME, Layout, remove_tree
from mrcore.text import one_line

Json = dict[str, Any]
Fetch = Callable[[Json, list[Json], Callable[[int, memoryview], None]], None]
RANGES_PER_REQUEST = 512
READ_BLOCK_BYTES = 1 << 20


class Process:
    """Carries out one order (see `manage_cluster` for its fields) of phase MAP or REDUCE.

    `fetch(source, requests, sink)` brings byte ranges of spill runs from another node; `source` has node, address and
    port, `sink` is called with (number of the request, bytes).
    """

    def __init__(self, order: Json, connection: socket.socket, layout: Layout, fetch: Fetch, server_name: str) -> None:
        self._order, self._identity, self._job = order, order["identity"], order["job"]
        self._connection, self._layout, self._fetch, self._server = connection, layout, fetch, server_name
        self._lines = connection.makefile("rb")
        identity = self._identity
        self._attempt = (identity["job"], identity["run"], identity["attempt"])
        self._task_name = f"{identity['phase'].lower()}-{identity['task']}-{identity['try']}"
        self._folder = layout.attempt_dir(*self._attempt) / self._task_name
        self._seconds: dict[str, float] = {}

    def process(self) -> None:
        """Obey and report "done" or "failed"; never raises for what the order or the user's code does wrong."""
        with forks.guarded():
            self._process()

    def _process(self) -> None:
        try:
            result = self._obey()
        except BaseException as error:  # noqa: BLE001  whatever it is, the master must hear of it
            self._tell(event="failed", error=self._fault(error).to_dict())
        else:
            self._tell(event="done", result=result)

    def _obey(self) -> Json:
        task.set_surroundings(
            job=self._attempt[0],
            run=self._attempt[1],
            attempt=self._attempt[2],
            phase=self._identity["phase"],
            server=self._server,
            node=self._order.get("node"),
            partition=self._order.get("partition"),
        )
        for folder in (self._folder, self._layout.runs_dir(*self._attempt), self._layout.parts_dir(*self._attempt)):
            folder.mkdir(parents=True, exist_ok=True)
        os.chdir(self._folder)  # a file that user code opens by a relative name goes when the task goes
        gc.disable()  # the hot loops make no cycles; collections happen at each spill
        with MemoryWatch(self._order["memory_bytes"]) as watch:
            try:
                result = self._map(watch) if self._identity["phase"] == "MAP" else self._reduce(watch)
            finally:
                forks.check()  # the folder is the parent's
                os.chdir("/")
                remove_tree(self._folder)
            return result | {"peak_bytes": watch.peak_bytes, "seconds": self._seconds}

    def _tell(self, **message: Any) -> None:
        forks.check()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the server is gone, and we with it
            self._connection.sendall(msgspec.json.encode(message) + b"\n")

    def _fault(self, error: BaseException) -> MrcoreError:
        """What ended the task, as one of our errors: its class decides whether the task is tried again."""
        where = f"task {self._task_name} on {self._server}"
        if isinstance(error, MrcoreError):
            return error
        if isinstance(error, MemoryError):
            return JobFault(
                "the task ran out of memory: give the servers more (memory_bytes) or the job smaller groups"
            )
        if isinstance(error, Interrupted):
            return TaskDied(
                f"{where} was interrupted: somebody sent it SIGINT (Ctrl-C in the window of {self._server})"
            )
        if is_disk_full(error):
            return ClusterFault(
                f"the disk of {self._layout.compute_dir} is full on {self._order.get('node')}: make room there; "
                "the job goes on by itself",
                hold=True,
            )
        if isinstance(error, OSError | DamagedFrame):
            return TaskDied(f"{where}: {one_line(error, 500)}")
        return unforeseen(error, where)

    def _user_code(self, watch: MemoryWatch) -> tuple[Path, Any]:
        task.in_hand(f"the import of project {self._job['project_name']}")
        project = self._layout.projects_dir / self._order["project"]
        if environment := self._order.get("environment"):
            use_packages(self._layout.venvs_dir / environment)
        reducing = self._identity["phase"] == "REDUCE"
        name = self._job["auxiliary_data_name_reducer" if reducing else "auxiliary_data_name_mapper"]
        return project, load_auxiliary(self._layout.auxiliary_dir, name)

    def _combiner(self, project: Path) -> Combine | None:
        name = self._job["combine_function_name"]
        if name is None:
            return None
        auxiliary = load_auxiliary(self._layout.auxiliary_dir, self._job["auxiliary_data_name_reducer"])
        return make_combiner(load_function(project, "reduce", name), name, auxiliary)

    # --- MAP ---------------------------------------------------------------------------------------------------------

    def _map(self, watch: MemoryWatch) -> Json:
        job, name = self._job, self._job["map_function_name"]
        project, auxiliary = self._user_code(watch)
        function = load_function(project, "map", name)
        by_range = job["partitioner"] == "range"
        sink: Shuffle | DirectOutput
        if job["reduce_function_name"] is None:
            sink = DirectOutput(self._part_writer(self._identity["task"]), watch)
        else:
            sink = Shuffle(
                self._layout.runs_dir(*self._attempt),
                self._task_name,
                watch,
                partitions=self._order["partitions"],
                by_range=by_range,
                combine=self._combiner(project),
                max_items=job["max_number_dumped_items_shuffler"],
            )
        sample = None
        if job["downsample"] < 1:
            sample = Sample(
                job["downsample"], job["sample_seed"] or 0, self._order["sample_by_lines"], str(self._layout.base_dir)
            )
        block_bytes = min(READ_BLOCK_BYTES, max(64 << 10, watch.budget_bytes // 256))
        reader = Reader(max_line_bytes=job["max_line_bytes"], block_bytes=block_bytes, sample=sample)
        mapper = Map(function, name, auxiliary, sink, reader, on_bad_text=job["on_bad_text"])
        gc.collect()
        gc.freeze()
        started = time.monotonic()
        totals = {"lines": 0, "items": 0, "bytes": 0}
        for bundle in self._bundles():
            counters = mapper.map(convert(list[Split], bundle["pieces"]))
            totals = {key: totals[key] + counters[key] for key in totals}
            self._tell(event="bundle_done", id=bundle["id"])
        if mapper.unfinished_characters:
            totals["unfinished_characters"] = mapper.unfinished_characters
        mapped = time.monotonic()
        sealed = mapper.finish()
        self._seconds = {"map": mapped - started, "seal": time.monotonic() - mapped}
        return {"counters": totals, "parts" if isinstance(sink, DirectOutput) else "runs": sealed}

    def _bundles(self) -> Iterator[Json]:
        """Yield bundles; ask for more as soon as the last one in hand is begun, so that there is no waiting."""
        waiting: list[Json] = list(self._order["bundles"])
        known = {bundle["id"] for bundle in waiting}  # a master that got no answer may repeat itself
        no_more, asked = self._order.get("no_more", False), False
        while True:
            if not waiting and no_more:
                return
            if len(waiting) <= 1 and not no_more and not asked:
                self._tell(event="want")
                asked = True
            if waiting:
                yield waiting.pop(0)
                continue
            line = self._lines.readline()
            if not line:
                raise TaskDied(f"task {self._task_name}: its cluster server hung up")
            message = json.loads(line)
            waiting += [bundle for bundle in message.get("bundles", ()) if bundle["id"] not in known]
            known.update(bundle["id"] for bundle in waiting)
            no_more = no_more or message.get("no_more", False)
            asked = False

    def _part_writer(self, partition: int) -> PartWriter:
        return PartWriter(
            self._layout.parts_dir(*self._attempt),
            run=self._attempt[1],
            partition=partition,
            attempt_try=self._identity["try"],
            max_items=self._job["max_number_dumped_items_reducer"],
            compress=self._job["compress"],
        )

    # --- SORT and REDUCE ---------------------------------------------------------------------------------------------

    def _reduce(self, watch: MemoryWatch) -> Json:
        job, order = self._job, self._order
        started = time.monotonic()
        project, auxiliary = self._user_code(watch)
        function = load_function(project, "reduce", job["reduce_function_name"])
        sorter = DiskSort(
            self._folder,
            watch,
            combine=self._combiner(project),
            ascending_values=job["sort_values"],
            low=order["low"],
            high=order["high"],
        )
        gc.collect()
        gc.freeze()
        task.in_hand(f"the runs of partition {order['partition']}, to be fetched and merged")
        fetched = self._fetch_runs(sorter)
        merged = self._add_earlier_output(sorter)
        reducer = Reduce(
            function,
            job["reduce_function_name"],
            auxiliary,
            sorter,
            self._part_writer(order["partition"]),
            watch,
            self._folder,
            disk_based_input=job["disk_based_input"],
            disk_based_output=job["disk_based_output"],
        )
        reducer.sort()
        sorted_at = time.monotonic()
        self._tell(event="phase", phase="REDUCE")
        parts = reducer.reduce()
        self._seconds = {"sort": sorted_at - started, "reduce": time.monotonic() - sorted_at}
        counters = {"groups": reducer.groups, "values": reducer.values}
        return {
            "counters": counters | merged | {"merge_passes": sorter.merge_passes},
            "parts": parts,
            "fetched": fetched,
            "keys_kept": reducer.keys_kept,
        }

    def _fetch_runs(self, sorter: DiskSort) -> dict[str, int]:
        """Give the sorter its share of every run: ranges on this node in place, the others fetched.

        Returns the bytes taken by source node.
        """
        order = self._order
        if self._job["partitioner"] == "range":
            selector = {"low": order["low"], "high": order["high"]}
        else:
            selector = {"partition": order["partition"]}
        identity = dict(zip(("job", "run", "attempt"), self._attempt, strict=True))
        fetched: dict[str, int] = {}
        for source in order["sources"]:
            if source["node"] == order["node"]:
                runs_dir = self._layout.runs_dir(*self._attempt)
                for run in source["runs"]:
                    for offset, length in select(runs_dir, run["id"], selector):
                        path = runs_dir / f"{run['id']}.data"
                        sorter.add_spill(Segment(path, offset, length, run["max_decoded"]))
                        fetched[source["node"]] = fetched.get(source["node"], 0) + length
                continue
            requests = [{"run": identity | {"id": run["id"]} | selector} for run in source["runs"]]
            lengths = self._fetch_from(source, requests, [run["most_bytes"] for run in source["runs"]])
            offset = 0
            for run, length in zip(source["runs"], lengths, strict=True):
                sorter.add_spill(Segment(self._fetched_path(source), offset, length, run["max_decoded"]))
                offset += length
            fetched[source["node"]] = offset
        return fetched

    def _add_earlier_output(self, sorter: DiskSort) -> dict[str, int]:
        """Give the sorter the partition's earlier output, for `merge_output`: in place, or fetched from its nodes."""
        earlier = self._order.get("earlier")
        if not earlier:
            return {}
        job, parts = self._attempt[0], earlier["parts"]
        for part in parts:  # names that become paths here, and were a node's to tell once
            if not PART_NAME.fullmatch(part["name"]):
                raise JobFault(
                    f"the manifest of the earlier output names a part {part['name']!r:.100}, which is none: restore it "
                    f"from a backup, or have all inputs read anew by `mrcore ledger forget {job}`"
                )
        folders = {source["node"]: self._folder for source in earlier["sources"]}
        folders[self._order["node"]] = self._layout.reduce_dir(job)
        for source in earlier["sources"]:
            if source["node"] == self._order["node"]:
                continue
            theirs = [part for part in parts if part["node"] == source["node"]]
            got = [0] * len(theirs)

            def sink(index: int, chunk: memoryview, theirs: list[Json] = theirs, got: list[int] = got) -> None:
                got[index] += len(chunk)
                if got[index] > theirs[index]["bytes"]:
                    raise Refused(f"{theirs[index]['name']} on {theirs[index]['node']} is longer than when it was made")
                with open(self._folder / theirs[index]["name"], "ab") as stream:
                    stream.write(chunk)

            try:
                self._fetch(source, [{"part": {"job": job, "name": part["name"]}} for part in theirs], sink)
            except Refused as error:
                raise JobFault(f"the earlier output is not to be had: {error.message}") from error
        sorter.add_spill(
            Parts([folders[part["node"]] / part["name"] for part in parts], convert(list[PlacedPart], parts))
        )
        return {
            "merged_items": sum(part["records"] for part in parts),
            "merged_bytes": sum(part["bytes"] for part in parts),
        }

    def _fetched_path(self, source: Json) -> Path:
        return self._folder / f"fetched-{source['node']}"

    def _fetch_from(self, source: Json, requests: list[Json], most_bytes: list[int]) -> list[int]:
        """Append what the requests bring to one file, in their order, and give their lengths."""
        lengths = [0] * len(requests)
        at_once = self._job["simultaneous_files_in_redis"] or RANGES_PER_REQUEST
        with open(self._fetched_path(source), "wb", buffering=1 << 20) as stream:
            for first in range(0, len(requests), at_once):

                def sink(index: int, chunk: memoryview, first: int = first) -> None:
                    lengths[first + index] += len(chunk)
                    if lengths[first + index] > most_bytes[first + index]:
                        raise Refused(f"a spill run on {source['node']} is longer than it was said to be")
                    stream.write(chunk)

                self._fetch(source, requests[first : first + at_once], sink)
        return lengths
