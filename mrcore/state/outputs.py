"""The published output of jobs: which parts manifests name, reading them, and what becomes of it when files go.

`cat`, downloads, removals, uploads, drains and the doctor all ask here what belongs to a job's output, so that what
one of them shows another does not remove without a word.
"""

from __future__ import annotations

import contextlib
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, BinaryIO, NamedTuple, TypedDict

from mrcore.errors import ClusterFault, MrcoreError, Refused, UsageError
from mrcore.messages.nodes import Removal
from mrcore.messages.tasks import PlacedPart
from mrcore.settings.config import NodeSettings, Settings
from mrcore.state import manifest
from mrcore.state.store import Store
from mrcore.system.paths import PART
from mrcore.wire.data import DataClient
from mrcore.wire.tls import Pki

NAMED = 3  # of many things in one text

Json = dict[str, Any]


class JobPart(NamedTuple):
    """A part of a job's output."""

    job: str
    part: PlacedPart


Parts = dict[str, dict[str, JobPart]]  # by node, then by "JOB/reduce/PART"


class Difference(TypedDict):
    """Parts of a job on one node that are not what manifests name."""

    kind: str  # "missing", "damaged" or "foreign"
    job: str
    node: str
    names: list[str]
    elsewhere: list[str]  # nodes that have one that is missing


class Output(TypedDict):
    """What a removal takes of the output of a run."""

    job_name: str
    run: int
    files: int
    bytes: int


# --- What manifests name ---------------------------------------------------------------------------------------------


def named(settings: Settings, jobs: Iterable[str] | None = None) -> Parts:
    """Return the parts that make up the output of these jobs (None: of all), by the node that is to have them."""
    known: Parts = {}
    if jobs is None:
        jobs = sorted(path.name for path in settings.state_dir.glob("manifests/*"))
    for job in jobs:
        for part in (part for made in manifest.output(settings.state_dir, job) for part in made.parts):
            known.setdefault(part.node, {})[f"{job}/reduce/{part.name}"] = JobPart(job, part)
    return known


def among(settings: Settings, held: Iterable[tuple[str, str]]) -> set[tuple[str, int]]:
    """Return the jobs and runs of whose output these files, (node, name under base_dir), are parts."""
    matches = [(node, match) for node, name in held if (match := PART.fullmatch(name))]
    known = named(settings, {match[1] for _, match in matches})
    return {(match[1], int(match[3])) for node, match in matches if match[0] in known.get(node, ())}


def compare(known: Parts, held: Mapping[str, Mapping[str, int]], busy: str | None) -> list[Difference]:
    """Return in what the parts that nodes hold (by node: name → bytes) are not those that manifests name.

    Of the job `busy`, whose run is under way, and of nodes that `held` lacks nothing is said.
    """
    differences: dict[tuple[str, str, str], Difference] = {}
    jobs = {part.job for parts in known.values() for part in parts.values()}

    def note(kind: str, job: str, node: str, name: str, elsewhere: Iterable[str] = ()) -> None:
        new = Difference(kind=kind, job=job, node=node, names=[], elsewhere=sorted(elsewhere))
        differences.setdefault((kind, job, node), new)["names"].append(name)

    for node, files in held.items():
        parts = known.get(node, {})
        for path, (job, part) in parts.items():
            if path not in files:
                note("missing", job, node, part.name, (other for other in held if path in held[other]))
            elif files[path] != part.bytes:
                note("damaged", job, node, part.name)
        for path in files.keys() - parts.keys():
            job, _, name = path.partition("/reduce/")
            if name and (PART.fullmatch(path) or job in jobs):
                note("foreign", job, node, name)
    return [difference for _, difference in sorted(differences.items()) if difference["job"] != busy]


# --- What goes -------------------------------------------------------------------------------------------------------


def going(settings: Settings, path: str, looks: Mapping[str, Removal]) -> Json:
    """Return what a removal of `path` would take, from what each node's `delete_files` says beforehand.

    {"files", "bytes", "nodes" (those two by node), "outputs" ([{"job_name", "run", "files", "bytes"}], of output that
    manifests name), "leave" ([job, run]: all whose parts may go when this was allowed)}.
    """
    nodes = {node: {"files": look.files, "bytes": look.bytes} for node, look in looks.items()}
    taken: dict[tuple[str, int], Output] = {}

    def take(job: str, run: int, files: int, size: int) -> None:
        output = taken.setdefault((job, run), Output(job_name=job, run=run, files=0, bytes=0))
        output["files"] += files
        output["bytes"] += size

    for look in looks.values():
        for output in look.outputs:
            take(output.job, output.run, output.files, output.bytes)
    whole = path.removesuffix("/reduce")  # all of a job's output goes, also what is missing anyhow
    jobs = {job for job, _ in taken} | ({whole} if "/" not in whole else set())
    paths = [path for parts in named(settings, jobs).values() for path in parts]
    runs = {(match[1], int(match[3])) for path in paths if (match := PART.fullmatch(path))}
    for job, run in runs:
        if job == whole:
            take(job, run, 0, 0)
    total = {key: sum(node[key] for node in nodes.values()) for key in ("files", "bytes")}
    named_outputs = [output for key, output in sorted(taken.items()) if key in runs]
    return total | {"nodes": nodes, "outputs": named_outputs, "leave": sorted(map(list, taken))}


def listed(outputs: Iterable[Output | tuple[str, int]]) -> str:
    """Return "word_count (run 3), …" for people."""
    pairs = [(output["job_name"], output["run"]) if isinstance(output, dict) else output for output in outputs]
    names = [f"{job} (run {run})" for job, run in sorted(pairs)]
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def forget(settings: Settings, outputs: Iterable[Output], by: str) -> None:
    """Note that output goes knowingly, before it does: `cat` then says so, and jobs that go on from it fail with a way
    out. Raises UsageError, with nothing noted, while a run of one of the jobs is under way."""
    with contextlib.closing(Store(settings.state_dir)) as store:
        outputs, running = list(outputs), store.running()
        names = {output["job_name"] for output in outputs}
        if running and running.job_name in names and running.job_type == "mapreduce":
            what = f"run {running.run} of {running.job_name}"
            raise UsageError(f"{what} is under way, whose output this would remove: wait for its end, or cancel it")
        for output in outputs:
            manifest.remove_parts(settings.state_dir, output["job_name"], output["run"], by)
            store.note(output["job_name"], output["run"], f"its output is removed by {by}", time.time())


# --- Reading ---------------------------------------------------------------------------------------------------------


def node_of(settings: Settings, name: str) -> NodeSettings:
    """Return the node of this name. Raises ClusterFault."""
    for node in settings.nodes:
        if node.name == name:
            return node
    raise ClusterFault(f"what is asked for lies on {name}, which is no node of the cluster any more")


def cat(
    settings: Settings, pki: Pki, job_name: str, out: BinaryIO, head: int | None = None, run: int | None = None
) -> int:
    """Write a job's output to `out` in part order, one JSON item a line, at most `head` lines; return their number.

    With `run` only what that run added to it. Parts are fetched from the nodes and checked. Raises UsageError when
    there is no such output.
    """
    head_writer = _HeadWriter(out, head)
    with contextlib.suppress(_Enough):
        for part in manifest.parts(settings.state_dir, job_name, run):
            read_part(settings, pki, job_name, part, head_writer.write)
    return head_writer.lines


def read_part(
    settings: Settings, pki: Pki, job_name: str, part: PlacedPart,
    write: Callable[[bytes], object] = lambda text: None,
) -> None:  # fmt: skip
    """Fetch a part and write its text; raises Refused when it is not what was committed."""
    node = node_of(settings, part.node)
    unzip = zlib.decompressobj(wbits=31) if part.name.endswith(".gz") else None
    checksum = length = text_length = 0

    def sink(_: int, chunk: memoryview) -> None:
        nonlocal checksum, length, text_length
        length += len(chunk)
        text = unzip.decompress(chunk, part.text_bytes - text_length + 1) if unzip else bytes(chunk)
        text_length += len(text)
        if length > part.bytes or text_length > part.text_bytes:
            raise Refused(f"part {part.name} on {part.node} is longer than what was committed")
        checksum = zlib.crc32(text, checksum)
        write(text)

    damaged = Refused(f"part {part.name} on {part.node} is damaged: its checksum is not the committed one")
    try:
        with contextlib.closing(DataClient(node.address, node.agent_port, pki, node.name)) as client:
            client.get([{"part": {"job": job_name, "name": part.name}}], sink)
    except zlib.error:
        raise damaged from None
    if checksum != part.crc32:
        raise damaged


def check_contents(settings: Settings, pki: Pki, known: Parts) -> list[Difference]:
    """Read every part of the nodes in `known` as `cat` does; return what is wrong as `compare` does."""
    differences: dict[tuple[str, str], Difference] = {}
    for node, parts in known.items():
        for job, part in parts.values():
            try:
                read_part(settings, pki, job, part)
            except MrcoreError:
                new = Difference(kind="damaged", job=job, node=node, names=[], elsewhere=[])
                differences.setdefault((job, node), new)["names"].append(part.name)
    return [*differences.values()]


class _Enough(Exception):
    """As many lines as wanted are written."""


class _HeadWriter:
    """Writes text to `out` up to its `limit`th line (None: all of it), then raises _Enough."""

    def __init__(self, out: BinaryIO, limit: int | None) -> None:
        self._out, self._limit, self.lines = out, limit, 0
        if limit is not None and limit <= 0:
            raise UsageError("the number of lines must be 1 or more")

    def write(self, text: bytes) -> None:
        """Write as much of `text` as is wanted."""
        count = text.count(b"\n")
        if self._limit is not None and self.lines + count >= self._limit:
            wanted = self._limit - self.lines
            text = b"".join(line + b"\n" for line in text.split(b"\n", wanted)[:wanted])
            self._out.write(text)
            self.lines = self._limit
            raise _Enough
        self._out.write(text)
        self.lines += count
