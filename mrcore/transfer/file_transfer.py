"""Files between the master ("local") and the nodes: upload, download, auxiliary data, removal.

An upload is: list both sides → choose a node for each file → send, in batches, to be staged there → commit on all
nodes, where the files get their names at once. A download stages in GATHERING in the local folder in the same way.
Whatever ends a transfer before that leaves the destination as it was; the next one goes on with what was staged.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import json
import os
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from mrcore.engine.listing import rendezvous
from mrcore.errors import ClusterFault, JobFault, MrcoreError, Refused, Unreachable, UsageError, is_disk_full
from mrcore.settings.config import NodeSettings, Settings, load_settings
from mrcore.state import manifest, outputs
from mrcore.system import procfs
from mrcore.system.paths import PARTIAL
from mrcore.system.readers import format_of
from mrcore.system.staging import File, Staging, checked_name, inside, walk
from mrcore.transfer.session import Crew, Json, Progress
from mrcore.wire.data import checksum

try:  # comes with xopen where it runs, and is four times as fast
    from isal.isal_zlib import compressobj
except ImportError:
    from zlib import compressobj  # type: ignore[assignment]

SMALL_BYTES = 1 << 20  # smaller files share a stream and cannot be resumed
BATCH_BYTES, BATCH_FILES = 8 << 20, 2_000
AT_ONCE = 4
BLOCK_BYTES = 1 << 20
MIN_FREE_DISK_BYTES = 256 << 20
GATHERING = f".mrcore-download{PARTIAL}"

Agree = Callable[[Json], None]


class _Remote(NamedTuple):
    """A file on a node, by its number in the node's listing, and the name that it is to have here."""

    node: NodeSettings
    listing: str
    number: int
    local: File


class FileTransfer:
    """Moves files now. `progress(phase, **counts)` hears how it goes; setting `stop` ends it with an MrcoreError.
    `agree` is told what would go from the nodes before anything does, and may raise.

    Folders of nodes are relative to each node's base_dir. All methods give counts: files, bytes, sent_bytes (over the
    wire), skipped, removed. They raise JobFault or UsageError (what was asked cannot be), ClusterFault (try again).
    """

    def __init__(
        self, settings: Settings | None = None, progress: Progress | None = None, stop: threading.Event | None = None,
        agree: Agree | None = None,
    ) -> None:  # fmt: skip
        self._settings = settings or load_settings()
        self._agree = agree
        self._progress, self._stop = progress or (lambda phase, **facts: None), stop or threading.Event()

    def upload(self, input_dir: str, output_dir: str, reload_files: bool = True) -> Json:
        """Send a local folder (or file) to the nodes, each file to one of them, one after the other.

        With `reload_files` the destination is replaced as a whole when all files are there; otherwise only files that
        are new, or of another size or time, are sent.
        """
        return self._upload(input_dir, output_dir, reload_files, False, 1)

    def upload_bulk(self, input_dir: str, output_dir: str, reload_files: bool = True, compress: bool = False) -> Json:
        """`upload` with several files at once; with `compress` they arrive as NAME.gz."""
        return self._upload(input_dir, output_dir, reload_files, compress, AT_ONCE)

    def download(self, input_dir: str, output_dir: str, delete_files: bool = True) -> Json:
        """Fetch a folder, a file or what a name with wildcards matches from all nodes into a local folder.

        Names that several nodes have land in a folder per node. With `delete_files` nothing else is left there.
        """
        return self._download(input_dir, output_dir, delete_files, 1)

    def download_bulk(self, input_dir: str, output_dir: str, delete_files: bool = True) -> Json:
        """`download` with several files at once."""
        return self._download(input_dir, output_dir, delete_files, AT_ONCE)

    def upload_auxiliary(self, input_file_name: str, auxiliary_data_name: str) -> Json:
        """Give every node a local JSON file as auxiliary data of this name."""
        path = Path(input_file_name).expanduser().resolve()
        try:
            with path.open("rb") as stream:
                json.load(stream)
        except OSError as error:
            raise JobFault(f"cannot read {path}: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise JobFault(f"{path} is no JSON, which auxiliary data must be: {error}") from None
        file = next(walk(path.parent, path.name))[0]
        target = (_checked(f"{auxiliary_data_name}.data", "auxiliary_data_name"), *file[1:])
        with Crew(self._settings, self._progress, self._stop) as crew:
            plan = {node.name: [(file, target)] for node in self._settings.nodes}
            return self._deliver(crew, path.parent, None, plan, replace=False, compress=False, at_once=AT_ONCE)

    def delete_files(
        self, output_dir: str, also_outputs: bool = False, *, by: str = "a program", dry_run: bool = False,
    ) -> Json:  # fmt: skip
        """Remove a file, a folder or what wildcards match from all nodes; gives what `outputs.going` does.

        Output that manifests name is refused (JobFault), and a wildcard in the first part of the name, which may mean
        that, unless `also_outputs`, or the `agree` of this object lets it pass. Output that went is
        forgotten: see `outputs.forget`. With `dry_run` nothing happens.
        """
        path = _checked(output_dir, "output_dir")
        with Crew(self._settings, self._progress, self._stop) as crew:
            order, nodes = {"path": path, "wildcards": crew.has_wildcards(path)}, self._settings.nodes
            looks = crew.each("LIST", lambda node: crew.call(node, "delete_files", dry_run=True, **order), nodes)
            told = outputs.going(self._settings, path, dict(zip((node.name for node in nodes), looks, strict=True)))
            told["everywhere"] = order["wildcards"] and glob.has_magic(path.partition("/")[0])
            if dry_run:
                return told
            if self._agree:
                self._agree(told)
            elif not also_outputs and (told["outputs"] or told["everywhere"]):
                what = f"is output of {outputs.listed(told['outputs'])}" if told["outputs"] else "may be output of jobs"
                raise JobFault(f"what {output_dir!r} names {what}: name other folders, or set also_outputs: true")
            outputs.forget(self._settings, told["outputs"], by)
            order["leave"] = told["leave"]
            crew.each("DELETE", lambda node: crew.call(node, "delete_files", **order), nodes, may_stop=False)
            return told

    # --- upload ---

    def _upload(self, input_dir: str, output_dir: str, replace: bool, compress: bool, at_once: int) -> Json:
        folder, source = _checked(output_dir, "output_dir"), Path(input_dir).expanduser().resolve()
        if not source.exists():
            raise JobFault(f"input_dir {source} does not exist on the master")
        top, name = (source, "") if source.is_dir() else (source.parent, source.name)
        with Crew(self._settings, self._progress, self._stop) as crew:
            crew.tell("LIST")
            pairs = [(file, _target(file, compress)) for file, _ in walk(top, name)]
            if not pairs:
                raise JobFault(f"input_dir {source} holds no file")
            held, names = self._held(crew, folder), {target[0] for _, target in pairs}
            self._check_replaced(folder, held, names, replace)
            self._ask(held, names, replace)
            plan, skipped = self._plan(pairs, held, replace, compress)

            def look_again() -> None:  # a run may have published meanwhile
                if folder.removesuffix("/reduce").count("/") == 0:
                    self._check_replaced(folder, self._held(crew, folder), names, replace)

            how: Json = {"replace": replace, "compress": compress, "at_once": at_once}
            return self._deliver(crew, top, folder, plan, look_again, **how) | {"skipped": skipped}

    def _held(self, crew: Crew, folder: str) -> dict[str, dict[str, File]]:
        """What lies in a folder of the nodes: by name, then by node."""
        held: dict[str, dict[str, File]] = {}
        for node, _, files in crew.list_nodes(folder):
            for file in files:
                held.setdefault(file[0], {})[node.name] = file
        return held

    def _check_replaced(self, folder: str, held: dict[str, dict[str, File]], names: set[str], replace: bool) -> None:
        """Refuse to fill a folder anew, or up, when output of a job would go by that."""
        lost = {name: files for name, files in held.items() if replace or name in names}
        parts = [(node, f"{folder}/{name}") for name, files in lost.items() for node in files]
        if whose := outputs.among(self._settings, parts):
            raise JobFault(
                f"output_dir {folder!r} holds output of {outputs.listed(whose)}, which this upload would replace: "
                "choose another folder, or remove the output first"
            )

    def _ask(self, held: dict[str, dict[str, File]], names: set[str], replace: bool) -> None:
        """Tell what goes from a folder that is filled anew, and is not to come again."""
        nodes: dict[str, Json] = {}
        for name in held.keys() - names if replace else ():
            for node, file in held[name].items():
                count = nodes.setdefault(node, {"files": 0, "bytes": 0})
                count["files"], count["bytes"] = count["files"] + 1, count["bytes"] + file[1]
        if self._agree:
            self._agree({"files": sum(each["files"] for each in nodes.values()), "nodes": nodes, "outputs": []})

    def _plan(
        self, pairs: list[tuple[File, File]], held: dict[str, dict[str, File]], replace: bool, compress: bool
    ) -> tuple[dict[str, list[tuple[File, File]]], int]:
        """Choose who gets which file, its holder before anyone else; give that, and how many need not be sent."""
        nodes = [node.name for node in self._settings.nodes]
        plan: dict[str, list[tuple[File, File]]] = {name: [] for name in nodes}
        names, skipped = {target[0] for _, target in pairs}, 0
        if len(names) < len(pairs):
            raise JobFault("with compress two files would get one name: NAME and NAME.gz; leave one of them out")
        for file, target in pairs:
            holders = held.get(target[0], {})
            other = file[0] if _packed(file, target) else f"{target[0]}.gz"
            if not replace and (len(holders) > 1 or (other in held and other not in names)):
                where = f"on {', '.join(holders)}" if len(holders) > 1 else f"there as {other!r} already"
                raise JobFault(f"{target[0]!r} lies {where}: it would be read twice; remove one, or use reload_files")
            node = rendezvous(target[0], sorted(holders) or nodes)
            old = holders.get(node)
            if not replace and old and old[2] == target[2] and (_packed(file, target) or old[1] == target[1]):
                skipped += 1
            else:
                plan[node].append((file, target))
        return plan, skipped

    def _deliver(
        self, crew: Crew, source: Path, folder: str | None, plan: dict[str, list[tuple[File, File]]],
        look_again: Callable[[], None] = lambda: None, *, replace: bool, compress: bool, at_once: int,
    ) -> Json:  # fmt: skip
        """Stage all files on their nodes, then commit on all nodes; a fault leaves the nodes as they were."""
        nodes, uploads = self._settings.nodes, dict[str, str]()

        def begin(node: NodeSettings) -> None:
            begun = crew.call(node, "begin_upload", folder=folder)
            uploads[node.name] = begun["upload"]
            needed = 0 if compress else sum(target[1] for _, target in plan[node.name])
            _check_free(f"node {node.name}", begun["disk_free_bytes"], needed)

        def send(task: tuple[NodeSettings, list[tuple[File, File]]]) -> None:
            node, batch = task
            self._send(crew, source, node, uploads[node.name], batch)

        batches = ([(node, batch) for batch in _batches(plan[node.name], lambda pair: pair[1][1])] for node in nodes)
        tasks = [task for task in chain.from_iterable(zip_longest(*batches)) if task is not None]
        crew.total = sum(target[1] for pairs in plan.values() for _, target in pairs)
        try:
            crew.each("BEGIN", begin, nodes)
            crew.each("TRANSFER", send, tasks, at_once)
            look_again()
            crew.stop_here()
            crew.tell("PUBLISH")
            removed = crew.each(
                "PUBLISH", lambda node: crew.call(node, "commit_upload", upload=uploads[node.name], replace=replace),
                nodes, may_stop=False,
            )  # fmt: skip
        except (JobFault, ClusterFault, OSError) as error:
            if not isinstance(error, Unreachable | Refused):  # another try would find the same: make room
                crew.drop(uploads)
            raise _told(error) from error
        return crew.counts() | {"removed": sum(removed)}

    def _send(self, crew: Crew, source: Path, node: NodeSettings, upload: str, batch: list[tuple[File, File]]) -> None:
        with contextlib.ExitStack() as stack:
            contents = [_content(stack, inside(source, file[0]), file, target, crew) for file, target in batch]
            content = contents[0] if len(batch) == 1 else b"".join(each for each in contents if isinstance(each, bytes))
            sizes = [len(each) if isinstance(each, bytes) else each[1] for each in contents]
            files = [(target[0], size, *target[2:]) for (_, target), size in zip(batch, sizes, strict=True)]
            number = crew.call(node, "announce", upload=upload, files=files)
            if number is not None:
                with _of(node):
                    crew.data(node).put({"batch": [upload, number]}, content, crew.moved)
        crew.count(len(batch), sum(file[1] for file, _ in batch))

    # --- download ---

    def _download(self, input_dir: str, output_dir: str, delete_files: bool, at_once: int) -> Json:
        path, target = _checked(input_dir, "input_dir"), Path(output_dir).expanduser().resolve()
        if delete_files:
            self._check_may_be_cleared(target)
        with Crew(self._settings, self._progress, self._stop) as crew, contextlib.ExitStack() as stack:
            crew.tell("LIST")
            found = self._name_here(path, crew.list_nodes(path, crew.has_wildcards(path)))
            if not found:
                raise JobFault(f"input_dir {path!r} matches no file under any node's base_dir")
            staging = Staging(target / GATHERING, target, 0o777 & ~procfs.umask())
            _lock(stack, staging.folder)
            crew.total = sum(each.local[1] for each in found)
            _check_free("the master", shutil.disk_usage(target).free, crew.total)
            by_node = {node.name: [each for each in found if each.node is node] for node in self._settings.nodes}
            batches = [list(_batches(each, lambda remote: remote.local[1])) for each in by_node.values()]
            tasks = [task for task in chain.from_iterable(zip_longest(*batches)) if task is not None]
            try:
                crew.each("TRANSFER", lambda batch: self._fetch(crew, staging, batch), tasks, at_once)
                crew.stop_here()
                crew.tell("PUBLISH")
                removed = staging.publish([each.local for each in found], delete_files)
            except (JobFault, ClusterFault, OSError) as error:
                if not isinstance(error, Unreachable | Refused):
                    staging.drop()
                raise _told(error) from error
            return crew.counts() | {"removed": removed}

    def _name_here(self, path: str, listings: Iterable[tuple[NodeSettings, str, list[File]]]) -> list[_Remote]:
        """Give each listed file its name here. Of a job's output only what is committed counts, and all of it."""
        every = [_Remote(node, token, at, file) for node, token, files in listings for at, file in enumerate(files)]
        job, _, last = path.rpartition("/")
        if last == "reduce" and manifest.newest(self._settings.state_dir, job):
            wanted = {(part.node, part.name) for part in manifest.parts(self._settings.state_dir, job)}
            every = [each for each in every if (each.node.name, each.local[0]) in wanted]
            if missing := wanted - {(each.node.name, each.local[0]) for each in every}:
                node, name = min(missing)
                raise ClusterFault(f"part {name} of {job} is not on {node}: its run has not ended, or it was removed")
        holders = Counter(each.local[0] for each in every)
        found = [
            each._replace(local=(f"{each.node.name}/{each.local[0]}", *each.local[1:]))
            if holders[each.local[0]] > 1
            else each
            for each in every
        ]
        if len({each.local[0] for each in found}) < len(found):
            raise JobFault(f"{path!r} has files in a folder that is named like a node: fetch a part of it at a time")
        if any(each.local[0].partition("/")[0] == GATHERING for each in found):
            raise JobFault(f"{path!r} holds {GATHERING!r}, where downloads gather: give that another name")
        return found

    def _fetch(self, crew: Crew, staging: Staging, batch: list[_Remote]) -> None:
        node = batch[0].node
        if batch[0].local[1] >= SMALL_BYTES:
            self._fetch_large(crew, staging, batch[0])
        else:
            contents = [bytearray() for _ in batch]

            def sink(index: int, chunk: memoryview) -> None:
                contents[index].extend(chunk)
                crew.moved(len(chunk))

            with _of(node):
                crew.data(node).get([{"file": [each.listing, each.number, 0]} for each in batch], sink)
            for each, content in zip(batch, contents, strict=True):
                _check_length(each, len(content))
                staging.put(each.local, content)
        crew.count(len(batch), sum(each.local[1] for each in batch))

    def _fetch_large(self, crew: Crew, staging: Staging, remote: _Remote) -> None:
        if staging.has(remote.local):
            return
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        with open(os.open(staging.partial(remote.local), flags, 0o600), "r+b", buffering=0) as stream:
            fd, at = stream.fileno(), os.fstat(stream.fileno()).st_size
            known = {"listing": remote.listing, "number": remote.number, "length": at}
            if at and (at > remote.local[1] or crew.call(remote.node, "file_checksum", **known) != checksum(fd, at)):
                at = 0
            os.ftruncate(fd, at)
            stream.seek(at)

            def sink(index: int, chunk: memoryview) -> None:
                crew.moved(len(chunk))
                while chunk:
                    chunk = chunk[stream.write(chunk) :]

            with _of(remote.node):
                crew.data(remote.node).get([{"file": [remote.listing, remote.number, at]}], sink)
            _check_length(remote, stream.tell())
            os.fsync(fd)
        staging.take(remote.local)

    def _check_may_be_cleared(self, target: Path) -> None:
        """A slip of the finger must not cost the user's home or the cluster's state."""
        own = self._settings
        for kept in (Path.home(), Path.cwd(), own.home, own.state_dir, own.pki_dir, own.projects_dir):
            if kept.resolve().is_relative_to(target):
                raise UsageError(
                    f"output_dir {target} would be cleared, with {kept} in it: choose a folder of its own, or set "
                    "delete_files: false"
                )


def run(job: Json, settings: Settings, progress: Progress, stop: threading.Event) -> Json:
    """Execute a validated file_transfer job; gives {"counts"}. May be repeated: it then moves what is missing."""
    transfer, kind = FileTransfer(settings, progress, stop), job["transfer_type"]
    if kind == "delete":
        told = transfer.delete_files(job["output_dir"], job["also_outputs"], by=f"the job {job['job_name']}")
        return {"counts": {key: told[key] for key in ("files", "bytes")}}
    if kind == "upload_auxiliary":
        return {"counts": transfer.upload_auxiliary(job["input_file_name"], job["auxiliary_data_name"])}
    folders = job["input_dir"], job["output_dir"]
    if kind in ("download", "download_bulk"):
        return {"counts": getattr(transfer, kind)(*folders, job["delete_files"])}
    if kind == "upload":
        return {"counts": transfer.upload(*folders, job["reload_files"])}
    return {"counts": transfer.upload_bulk(*folders, job["reload_files"], job["compress"])}


def _told(error: MrcoreError | OSError) -> MrcoreError:
    """What the master's own disk has to say, as an error of ours: a full one is no fault of the job."""
    if isinstance(error, MrcoreError):
        return error
    kind = ClusterFault if is_disk_full(error) else JobFault
    return kind(f"on the master: {error.filename or 'disk'}: {error.strerror or error}")


def _checked(name: str, key: str) -> str:
    try:
        return checked_name(name.rstrip("/"))
    except Refused:
        raise UsageError(f"{key} {name!r} must lie under the nodes' base_dir: a relative path without '..'") from None


def _target(file: File, compress: bool) -> File:
    return (f"{file[0]}.gz", *file[1:]) if compress and not format_of(file[0]) else file


def _packed(file: File, target: File) -> bool:
    return target[0] == f"{file[0]}.gz"


def _batches(files: Iterable[Any], size_of: Callable[[Any], int]) -> Iterator[list[Any]]:
    """Give large files one by one and small ones in batches of a stream's worth."""
    batch: list[Any] = []
    total = 0
    for file in files:
        if size_of(file) >= SMALL_BYTES:
            yield [file]
            continue
        batch.append(file)
        total += size_of(file)
        if total >= BATCH_BYTES or len(batch) == BATCH_FILES:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def _content(stack: contextlib.ExitStack, path: Path, file: File, target: File, crew: Crew) -> bytes | tuple[int, int]:
    """Give what is to be sent of a file: a small one's bytes, of a large one an open descriptor and the length."""
    size = file[1]
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    stack.callback(os.close, fd)
    if os.fstat(fd).st_size < size:
        raise JobFault(f"{path} shrank since it was listed: run the transfer again")
    compressor = compressobj(wbits=31) if _packed(file, target) else None
    if size < SMALL_BYTES:
        content = os.pread(fd, size, 0)
        if len(content) < size:
            raise JobFault(f"{path} shrank since it was listed: run the transfer again")
        return compressor.compress(content) + compressor.flush() if compressor else content
    if compressor is None:
        return fd, size
    packed = stack.enter_context(tempfile.TemporaryFile())
    for at in range(0, size, BLOCK_BYTES):
        crew.stop_here()
        packed.write(compressor.compress(os.pread(fd, min(BLOCK_BYTES, size - at), at)))
    packed.write(compressor.flush())
    packed.flush()
    return packed.fileno(), packed.tell()


def _check_length(remote: _Remote, length: int) -> None:
    if length != remote.local[1]:
        raise Refused(f"node {remote.node.name}: {remote.local[0]!r} came with {length} bytes, not {remote.local[1]}")


def _check_free(where: str, free: int, needed: int) -> None:
    if free < needed + MIN_FREE_DISK_BYTES:
        raise ClusterFault(
            f"{where} has {free >> 20} MiB of free disk, the transfer needs {needed >> 20} and "
            f"{MIN_FREE_DISK_BYTES >> 20} to spare: make room"
        )


def _lock(stack: contextlib.ExitStack, folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    stack.callback(os.close, descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(f"another download into {folder.parent} is under way: wait for its end") from None


@contextlib.contextmanager
def _of(node: NodeSettings) -> Iterator[None]:
    """Name the node in what its data channel has to say."""
    try:
        yield
    except ClusterFault as error:
        raise type(error)(f"node {node.name}: {error.message}", **error.details) from error
