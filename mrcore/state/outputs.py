"""The published output of jobs: which parts manifests name, reading them, and what becomes of it when files go.

`cat`, downloads, removals, uploads, drains and the doctor all ask here what belongs to a job's output, so that what
one of them shows another does not remove without a word.
"""

from __future__ import annotations

import contextlib
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, BinaryIO

from mrcore.errors import ClusterFault, MrcoreError, Refused, UsageError
from mrcore.messages.nodes import Removal
from mrcore.settings.config import NodeSettings, Settings
from mrcore.state import manifest
from mrcore.state.store import Store
from mrcore.system.paths import PART
from mrcore.wire.data import DataClient
from mrcore.wire.tls import Pki

NAMED = 3  # of many things in one text

Json = dict[str, Any]
Parts = dict[str, dict[str, Json]]  # by node: "JOB/reduce/PART" → what the manifest says of the part, and "job"


# --- What manifests name ---------------------------------------------------------------------------------------------


def named(settings: Settings, jobs: Iterable[str] | None = None) -> Parts:
    """Return the parts that make up the output of these jobs (None: of all), by the node that is to have them."""
    found: Parts = {}
    if jobs is None:
        jobs = sorted(path.name for path in settings.state_dir.glob("manifests/*"))
    for job in jobs:
        with contextlib.suppress(UsageError):  # it has none
            for part in manifest.parts(settings.state_dir, job):
                found.setdefault(part["node"], {})[f"{job}/reduce/{part['name']}"] = part | {"job": job}
    return found


def among(settings: Settings, held: Iterable[tuple[str, str]]) -> set[tuple[str, int]]:
    """Return the jobs and runs of whose output these files, (node, name under base_dir), are parts."""
    matches = [(node, match) for node, name in held if (match := PART.fullmatch(name))]
    known = named(settings, {match[1] for _, match in matches})
    return {(match[1], int(match[3])) for node, match in matches if match[0] in known.get(node, ())}


def compare(known: Parts, held: Mapping[str, Mapping[str, int]], busy: str | None) -> list[Json]:
    """Say in what the parts that nodes hold (by node: name → bytes) are not those that manifests name.

    Returns {"kind": "missing" | "damaged" | "foreign", "job", "node", "names", "elsewhere" (who has a missing one)} for
    each job and node; of the job `busy`, whose run is under way, and of nodes that `held` lacks nothing is said.
    """
    found: dict[tuple[str, str, str], Json] = {}

    def note(kind: str, job: str, node: str, name: str, elsewhere: Iterable[str] = ()) -> None:
        about = {"kind": kind, "job": job, "node": node, "names": [], "elsewhere": sorted(elsewhere)}
        found.setdefault((kind, job, node), about)["names"].append(name)

    for node, files in held.items():
        parts = known.get(node, {})
        for path, part in parts.items():
            if path not in files:
                note("missing", part["job"], node, part["name"], (each for each in held if path in held[each]))
            elif files[path] != part.get("bytes", files[path]):
                note("damaged", part["job"], node, part["name"])
        jobs = {part["job"] for each in known.values() for part in each.values()}
        for path in files.keys() - parts.keys():
            job, _, name = path.partition("/reduce/")
            if name and (PART.fullmatch(path) or job in jobs):
                note("foreign", job, node, name)
    return [each for _, each in sorted(found.items()) if each["job"] != busy]


# --- What goes -------------------------------------------------------------------------------------------------------


def going(settings: Settings, path: str, looks: Mapping[str, Removal]) -> Json:
    """Return what a removal of `path` would take, from what each node's `delete_files` says beforehand.

    {"files", "bytes", "nodes" (those two by node), "outputs" ([{"job_name", "run", "files", "bytes"}], of output that
    manifests name), "leave" ([job, run]: all whose parts may go when this was allowed)}.
    """
    nodes = {node: {key: look[key] for key in ("files", "bytes")} for node, look in looks.items()}
    told: dict[tuple[str, int], Json] = {}
    for look in looks.values():
        for job, run, files, size in look["outputs"]:
            each = told.setdefault((job, run), {"job_name": job, "run": run, "files": 0, "bytes": 0})
            each["files"], each["bytes"] = each["files"] + files, each["bytes"] + size
    whole = path.removesuffix("/reduce")  # all of a job's output goes, also what is missing anyhow
    jobs = {job for job, _ in told} | ({whole} if "/" not in whole else set())
    paths = [each for parts in named(settings, jobs).values() for each in parts]
    runs = {(match[1], int(match[3])) for each in paths if (match := PART.fullmatch(each))}
    for job, run in runs:
        if job == whole:
            told.setdefault((job, run), {"job_name": job, "run": run, "files": 0, "bytes": 0})
    total = {key: sum(each[key] for each in nodes.values()) for key in ("files", "bytes")}
    outputs = [each for key, each in sorted(told.items()) if key in runs]
    return total | {"nodes": nodes, "outputs": outputs, "leave": sorted(map(list, told))}


def listed(outputs: Iterable[Json | tuple[str, int]]) -> str:
    """Return "word_count (run 3), …" for people."""
    pairs = [(each["job_name"], each["run"]) if isinstance(each, dict) else each for each in outputs]
    names = [f"{job} (run {run})" for job, run in sorted(pairs)]
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def forget(settings: Settings, outputs: Iterable[Json], by: str) -> None:
    """Note that output goes knowingly, before it does: `cat` then says so, and jobs that go on from it fail with a way
    out. Raises UsageError, with nothing noted, while a run of one of the jobs is under way."""
    with contextlib.closing(Store(settings.state_dir)) as store:
        outputs, running = list(outputs), store.running()
        names = {each["job_name"] for each in outputs}
        if running and running["job_name"] in names and running["spec"]["job_type"] == "mapreduce":
            what = f"run {running['run']} of {running['job_name']}"
            raise UsageError(f"{what} is under way, whose output this would remove: wait for its end, or cancel it")
        for each in outputs:
            manifest.remove_parts(settings.state_dir, each["job_name"], each["run"], by)
            store.note(each["job_name"], each["run"], f"its output is removed by {by}", time.time())


# --- Reading ---------------------------------------------------------------------------------------------------------


def node_of(settings: Settings, name: str) -> NodeSettings:
    """Return the node of this name. Raises ClusterFault."""
    node = next((each for each in settings.nodes if each.name == name), None)
    if node is None:
        raise ClusterFault(f"what is asked for lies on {name}, which is no node of the cluster any more")
    return node


def cat(settings: Settings, pki: Pki, job_name: str, out: BinaryIO, head: int | None = None) -> int:
    """Write a job's output to `out` in part order, one JSON item a line, at most `head` lines; return their number.

    Parts are fetched from the nodes and checked. Raises UsageError when the job has no output.
    """
    head_writer = _HeadWriter(out, head)
    with contextlib.suppress(_Enough):
        for part in manifest.parts(settings.state_dir, job_name):
            read_part(settings, pki, job_name, part, head_writer.write)
    return head_writer.lines


def read_part(
    settings: Settings, pki: Pki, job_name: str, part: Json, write: Callable[[bytes], object] = lambda text: None
) -> None:
    """Fetch a part and write its text; raises Refused when it is not what was committed."""
    node = node_of(settings, part["node"])
    unzip = zlib.decompressobj(wbits=31) if part["name"].endswith(".gz") else None
    checksum = length = text_length = 0

    def sink(_: int, chunk: memoryview) -> None:
        nonlocal checksum, length, text_length
        length += len(chunk)
        text = unzip.decompress(chunk, part["text_bytes"] - text_length + 1) if unzip else bytes(chunk)
        text_length += len(text)
        if length > part["bytes"] or text_length > part["text_bytes"]:
            raise Refused(f"part {part['name']} on {part['node']} is longer than what was committed")
        checksum = zlib.crc32(text, checksum)
        write(text)

    damaged = f"part {part['name']} on {part['node']} is damaged: its checksum is not the committed one"
    try:
        with contextlib.closing(DataClient(node.address, node.agent_port, pki, node.name)) as client:
            client.get([{"part": {"job": job_name, "name": part["name"]}}], sink)
    except zlib.error:
        raise Refused(damaged) from None
    if checksum != part["crc32"]:
        raise Refused(damaged)


def check_contents(settings: Settings, pki: Pki, known: Parts) -> list[Json]:
    """Read every part of the nodes in `known` as `cat` does; return what is wrong as `compare` does."""
    found: dict[tuple[str, str], Json] = {}
    for node, parts in known.items():
        for part in parts.values():
            try:
                read_part(settings, pki, part["job"], part)
            except MrcoreError:
                about = {"kind": "damaged", "job": part["job"], "node": node, "names": [], "elsewhere": []}
                found.setdefault((part["job"], node), about)["names"].append(part["name"])
    return [*found.values()]


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
