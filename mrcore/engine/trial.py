"""`mrcore try`: a job in this process, over the same modules as on a cluster, to develop functions."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mrcore import task
from mrcore.engine.disk_sort import DiskSort
from mrcore.engine.functions import load_function, make_combiner
from mrcore.engine.inputs import Reader, plan_bundles
from mrcore.engine.listing import list_inputs
from mrcore.engine.mapper import Map
from mrcore.engine.memory import MemoryWatch
from mrcore.engine.output import DirectOutput, PartWriter
from mrcore.engine.records import Key, Value, as_key, loads
from mrcore.engine.reducer import Reduce
from mrcore.engine.shuffler import Shuffle
from mrcore.engine.spills import Segment
from mrcore.errors import JobFault, UsageError, interrupt
from mrcore.messages.tasks import Part, Spill
from mrcore.project.packages import use_packages
from mrcore.system import forks, terminal
from mrcore.system.paths import Layout
from mrcore.text import json_text, listed


@dataclass
class Request:
    """A trial as the command line asks for it; `packages`: the folder of a project's installed packages."""

    project_dir: str
    map_name: str
    reduce_name: str | None
    inputs: Sequence[str]
    combine: str | None
    auxiliary_file: str | None
    packages: str | None


def print_trial(request: Request) -> None:
    """Run a trial and print its items, one as JSON per line. Raises UsageError."""
    with contextlib.suppress(OSError, RuntimeError, ValueError):  # a stderr that is closed, or no file
        faulthandler.enable()
    name = request.auxiliary_file
    signal.signal(signal.SIGINT, interrupt)
    try:
        auxiliary = json.loads(Path(name).read_bytes()) if name else None
    except ValueError as error:
        raise UsageError(f"the auxiliary data {name} is no JSON: {error}") from None
    project, names = Path(request.project_dir), (request.map_name, request.reduce_name)
    for item in try_job(project, *names, request.inputs, combine=request.combine, auxiliary=auxiliary):
        sys.stdout.write(json_text(json.dumps(item, ensure_ascii=not terminal.speaks_unicode(sys.stdout))) + "\n")
    sys.stdout.flush()
    for counter, total in task.counters.items():
        print(f"counter {counter}: {total:,}", file=sys.stderr)


def main(request: Request) -> int:
    """Run a trial in a process of its own, with a project's packages; returns the exit status, as `mrcore` does."""
    use_packages(Path(request.packages or ""))
    return terminal.run(lambda: print_trial(request))


def try_job(
    project_dir: Path,
    map_name: str,
    reduce_name: str | None,
    inputs: Sequence[str],
    *,
    combine: str | None = None,
    auxiliary: Any = None,
    memory_bytes: int = 1 << 30,
    on_bad_text: str = "fail",
    max_line_bytes: int = 64 << 20,
    sort_values: bool = False,
    disk_based_input: bool = False,
    disk_based_output: bool = False,
) -> Iterator[tuple[Key, Value]]:
    """Map and reduce `inputs` (folders, files, globs; relative to the current folder) and yield the items.

    Without a reduce function the map function's items come as they are, in order. `memory_bytes` is the budget of
    this process. Raises JobFault as a cluster would report it.
    """
    task.forget()
    task.set_surroundings(job="trial", run=0, attempt=0, phase="MAP", server="local", node="local")
    with tempfile.TemporaryDirectory(prefix="mrcore-try-") as name, MemoryWatch(memory_bytes) as watch, forks.guarded():
        folder = Path(name)
        layout = Layout(folder)
        layout.make()
        listing = list_inputs({"input_dirs": [str(Path(entry).absolute()) for entry in inputs]}, layout, ["me"], "me")
        missing = [entry for entry, count in listing.matched.items() if not count]
        if listing.faults or missing:
            raise JobFault(listed(listing.faults + [f"input {entry} matches no file" for entry in missing]))
        map_function = load_function(project_dir, "map", map_name)
        reduce_function = load_function(project_dir, "reduce", reduce_name) if reduce_name else None
        parts = PartWriter(folder, run=0, partition=0, attempt_try=0, max_items=None, compress=False)
        combiner = make_combiner(load_function(project_dir, "reduce", combine), combine, auxiliary) if combine else None
        sink = (
            Shuffle(folder, "map", watch, partitions=1, combine=combiner) if reduce_name else DirectOutput(parts, watch)
        )
        reader = Reader(max_line_bytes=max_line_bytes, block_bytes=1 << 20)
        mapper = Map(map_function, map_name, auxiliary, sink, reader, on_bad_text=on_bad_text)
        for bundle in plan_bundles(listing.files, 1):
            mapper.map(bundle.pieces)
        sealed = mapper.finish()
        if reduce_function and reduce_name:
            task.set_surroundings(phase="REDUCE", input_file=None, partition=0)
            sorter = DiskSort(folder, watch, combine=combiner, ascending_values=sort_values)
            for spill in sealed:
                assert isinstance(spill, Spill)
                sorter.add_spill(Segment(folder / f"{spill.id}.data", 0, spill.bytes, spill.max_decoded))
            reducer = Reduce(
                reduce_function,
                reduce_name,
                auxiliary,
                sorter,
                parts,
                watch,
                folder,
                disk_based_input=disk_based_input,
                disk_based_output=disk_based_output,
            )
            sealed = reducer.reduce()
        gc.collect()
        for part in sealed:
            assert isinstance(part, Part)
            with open(folder / part.name, encoding="utf-8", newline="\n") as lines:
                for key, value in map(loads, lines):
                    yield as_key(key), value


if __name__ == "__main__":
    sys.exit(main(Request(**json.loads(sys.argv[1]))))
