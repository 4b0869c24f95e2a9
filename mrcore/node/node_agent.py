"""The node agent: one per node; lists inputs, serves run files and parts, keeps snapshots and publishes output.

`python -m mrcore.node.node_agent SPEC.json`. The spec has node, address, port, cluster (id or name), compute_dir,
pki_dir, members_file (`wire.members`). Every name that comes over the wire is matched against a strict pattern before
it becomes part of a path; paths come over the wire from the master only, as entries of `input_dirs` and as files listed
by them.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import platform
import re
import secrets
import shutil
import signal
import sys
import tarfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mrcore import VERSIONS
from mrcore.engine import spills
from mrcore.engine.listing import Listing
from mrcore.errors import ClusterFault, Refused
from mrcore.messages.methods import LARGE_BYTES
from mrcore.node import tails
from mrcore.node.moves import MoveMethods
from mrcore.project import packages, snapshot
from mrcore.system import failpoints, logs, procfs
from mrcore.system.paths import PART_NAME, PARTIAL, Layout, fsync_dir, fsync_file, remove_tree
from mrcore.system.staging import flush
from mrcore.system.terminal import log_to
from mrcore.wire.data import DataHandler, Range, Upload
from mrcore.wire.members import watch_membership
from mrcore.wire.service import Method, Server
from mrcore.wire.tls import Identity, Pki

FILES_A_PAGE = 5_000
MAX_LISTINGS = 4  # begun and not read to their end
LARGE_REQUESTS = (  # lists of names
    "list_inputs look_into publish announce delete_files taken stage_moves publish_moves remove_moves"
)
LISTING_SECONDS = 300.0  # until one that nobody goes on with is dropped
SLICE_SECONDS = 1.0  # of a walk, in one call
KEPT_PROJECTS, KEPT_VENVS = 20, 5

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
_RUN_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")
_HASH = re.compile(r"[0-9a-f]{32,64}")

Json = dict[str, Any]
log = logging.getLogger("mrcore.node.node_agent")


def _named(pattern: re.Pattern[str], text: Any) -> str:
    if not isinstance(text, str) or not pattern.fullmatch(text):
        raise Refused(f"not a valid name: {text!r:.200}")
    return text


def _number(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise Refused(f"not a valid number: {value!r:.200}")
    return value


@dataclass
class _Held:
    """A listing of inputs that is not read to its end."""

    walk: Listing
    found: Json | None = None  # once the walk has come to its end
    start: int = 0  # of the next page
    asked: float = 0.0  # monotonic, when somebody wanted to go on


class NodeAgent(MoveMethods):
    """What the agent of one node does; public methods are RPC methods, `resolve` and `receive` serve data requests."""

    def __init__(self, spec: Json) -> None:
        self._spec = spec
        layout = Layout(Path(spec["compute_dir"]))
        layout.make()
        super().__init__(layout, spec["node"])
        self._listings: dict[str, _Held] = {}  # by cursor
        self._lock = threading.Lock()  # listings and snapshots; never held while listing
        self._installing = threading.Lock()
        self.data = DataHandler(self.resolve, self.receive)
        for folder in (self._layout.projects_dir, self._layout.venvs_dir):
            remove_tree(folder / PARTIAL)

    def methods(self) -> dict[str, Method]:
        """The RPC methods: `health` for any member, the others for the master only."""
        names = "list_inputs look_into project_state environment_state install_environment auxiliary start_run publish"
        names += " end_run sweep end_server"
        masters = {name: Method(getattr(self, name), "master") for name in [*names.split(), *self.RPC.split()]}
        masters |= {name: masters[name]._replace(request_bytes=LARGE_BYTES) for name in LARGE_REQUESTS.split()}
        return masters | {"health": Method(self.health, "member")}

    # ---- state of the node

    def health(self, caller: Identity) -> Json:
        """Who answers, its versions and clock (seconds since 1970), free disk in bytes, bytes served by kind."""
        versions = VERSIONS | {"python": platform.python_version()}
        disk = {"disk_free_bytes": shutil.disk_usage(self._layout.compute_dir).free, "served_bytes": self.data.served()}
        return {"name": self._spec["node"], "time": time.time()} | versions | disk

    def end_server(self, caller: Identity, name: str) -> bool:
        """SIGKILL the server child of a cluster server of this node, which its supervisor then starts afresh.

        For one that is stopped or hangs. Its supervisor is continued, should it be stopped too. False: not running.
        """
        owner = f"{self._spec['cluster']}/{_named(_NAME, name)}"

        def send(record: str, number: int) -> bool:
            with contextlib.suppress(OSError, ValueError, KeyError):
                known = json.loads((self._layout.pids_dir / record).read_text())
                if procfs.environment_value(known["pid"], "MRCORE_SERVER") == owner:
                    return procfs.send_signal(known["pid"], known["start_ticks"], number)
            return False

        ended = send(f"{name}.server.json", signal.SIGKILL)
        send(f"{name}.json", signal.SIGCONT)
        return ended

    # ---- before a run

    def list_inputs(self, caller: Identity, job: Json, node_names: list[str], cursor: str | None = None) -> Json:
        """List the input files of a job (`input_dirs`, `shared_input`) on this node: by slices of time, then by pages.

        Return what `Listing.result` does, of at most FILES_A_PAGE files, and "next": the cursor to go on with, or None.
        Until the walk has come to its end all is empty. A listing that nobody goes on with walks no further.
        Raises Refused when it is no longer held: begin anew.
        """
        now = time.monotonic()
        with self._lock:
            for key in [key for key, held in self._listings.items() if held.asked < now - LISTING_SECONDS]:
                del self._listings[key]
            held = self._listings.pop(cursor, None) if cursor is not None else None
        if held is None and cursor is not None:
            raise Refused("this listing of inputs is no longer held: begin anew")
        if held is None:
            asked = job | {"sibling_dirs": self._spec.get("sibling_dirs")}
            held = _Held(Listing(asked, self._layout, node_names, self._spec["node"]))
        if held.found is None and held.walk.advance(SLICE_SECONDS):
            held.found = held.walk.result()
        found = held.found or {"files": [], "matched": {}, "skipped": {}, "fingerprint": "", "faults": []}
        files, start = found["files"], held.start
        held.start = min(start + FILES_A_PAGE, len(files))
        page = found | {"files": files[start : held.start], "next": None}
        if held.found is None or held.start < len(files):
            page["next"], held.asked = secrets.token_hex(8), time.monotonic()
            with self._lock:
                self._listings[page["next"]] = held
                while len(self._listings) > MAX_LISTINGS:
                    del self._listings[next(iter(self._listings))]
        return page

    def look_into(self, caller: Identity, files: list[list[Any]]) -> list[list[Any]]:
        """What `tails.look_into` finds in each of these listed files: [path, size, mtime_ns, inode, read before]."""
        now = time.time()
        return [tails.look_into(path, size, inode, mtime, read, now) for path, size, mtime, inode, read in files]

    def project_state(self, caller: Identity, hash: str) -> bool:
        """Whether this snapshot of a project is here; if it is, it counts as used just now."""
        return _touched(self._layout.projects_dir / _named(_HASH, hash))

    def environment_state(self, caller: Identity, hash: str) -> bool:
        """Whether these packages of a project are installed here; if they are, they count as used just now."""
        return _touched(self._layout.venvs_dir / _named(_HASH, hash))

    def install_environment(self, caller: Identity, hash: str, project: str) -> bool:
        """Install the packages that a PUT brought; False: they are here. Raises JobFault (pip's complaint)."""
        final = self._layout.venvs_dir / _named(_HASH, hash)
        source = final.parent / PARTIAL / hash
        target = source.with_suffix(".installed")
        with self._installing:
            if final.is_dir():
                return False
            if not source.is_dir():
                raise Refused(f"the wheels of environment {hash} never came: send them again")
            try:
                packages.install(source, target, _named(_NAME, project), f"node {self._spec['node']}")
                flush(target)
                os.replace(target, final)
                fsync_dir(final.parent)
            except OSError as error:
                raise ClusterFault(f"node {self._spec['node']}: cannot install {final}: {error.strerror}") from None
            finally:
                remove_tree(source)
        return True

    def auxiliary(self, caller: Identity, name: str) -> bool:
        """Whether auxiliary data of this name is on this node."""
        return (self._layout.auxiliary_dir / f"{_named(_NAME, name)}.data").is_file()

    def start_run(self, caller: Identity, job: str, run: int) -> Json:
        """Make the working folder of a run; gives {"disk_free_bytes"}. Raises ClusterFault if it cannot be written."""
        folder = self._layout.run_dir(_named(_NAME, job), _number(run))
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ClusterFault(f"node {self._spec['node']}: cannot make {folder}: {error.strerror}") from None
        return {"disk_free_bytes": shutil.disk_usage(folder).free}

    # ---- after a run

    def publish(
        self, caller: Identity, job: str, run: int, attempt: int, parts: list[str], delete_job_data: bool
    ) -> Json:
        """Give the parts of a committed run that lie on this node their place; remove those of earlier runs if asked.

        May be repeated, also after a crash in its middle. Raises ClusterFault when a part is in neither place.
        """
        source = self._layout.parts_dir(_named(_NAME, job), _number(run), _number(attempt))
        target = self._layout.reduce_dir(job)
        names = {_named(PART_NAME, part) for part in parts}
        if not names and not target.is_dir():
            return {"published": 0, "removed": 0}
        target.mkdir(parents=True, exist_ok=True)
        published = 0
        for name in sorted(names):
            if (source / name).exists():
                fsync_file(source / name)
                failpoints.point("part flushed")
                os.replace(source / name, target / name)
                failpoints.point("part renamed")
                published += 1
            elif not (target / name).exists():
                raise ClusterFault(
                    f"node {self._spec['node']}: part {name} of {job} is neither in {source} nor published"
                )
        for folder in (target, target.parent, self._layout.base_dir):
            fsync_dir(folder)
        failpoints.point("parts published")
        others = (path for path in target.iterdir() if delete_job_data and path.name not in names)
        old = [path for path in others if (found := PART_NAME.fullmatch(path.name)) and int(found[1]) <= run]
        for path in old:
            path.unlink(missing_ok=True)
            failpoints.point("old part removed")
        return {"published": published, "removed": len(old)}

    def end_run(self, caller: Identity, job: str, run: int) -> bool:
        """Remove everything temporary of a run; fine when there is nothing (left)."""
        folder = self._layout.run_dir(_named(_NAME, job), _number(run))
        self._remove(folder)
        failpoints.point("working folder removed")
        with contextlib.suppress(OSError):  # other runs of the job
            folder.parent.rmdir()
        return True

    def sweep(self, caller: Identity, keep: list[list[Any]]) -> Json:
        """Remove what dead runs and uploads left: working folders but those of `keep` ([job, run]…), old snapshots."""
        self.sweep_incoming()
        kept = {self._layout.run_dir(_named(_NAME, job), _number(run)) for job, run in keep}
        removed = [
            folder
            for job_folder in self._layout.working_dir.iterdir()
            for folder in (job_folder.iterdir() if job_folder.is_dir() else [job_folder])
            if folder not in kept
        ]
        for folder in removed:
            self._remove(folder)
        for job_folder in self._layout.working_dir.iterdir():
            with contextlib.suppress(OSError):
                job_folder.rmdir()
        counts = {"working": len(removed)}
        for folder, kept_newest in ((self._layout.projects_dir, KEPT_PROJECTS), (self._layout.venvs_dir, KEPT_VENVS)):
            snapshots = [path for path in folder.iterdir() if _HASH.fullmatch(path.name)]
            snapshots.sort(key=lambda path: path.stat().st_mtime, reverse=True)
            for old in snapshots[kept_newest:]:
                self._remove(old)
            counts[folder.name] = len(snapshots[kept_newest:])
        return counts

    def _remove(self, path: Path) -> None:
        try:
            path.unlink() if path.is_symlink() or path.is_file() else remove_tree(path)
        except OSError as error:
            raise ClusterFault(f"node {self._spec['node']}: cannot remove {path}: {error.strerror}") from None

    # ---- data requests

    def resolve(self, caller: Identity, request: Json) -> list[Range]:
        """Where the bytes lie that a GET asks for.

        {"run": {"job", "run", "attempt", "id", and "partition" or "low" and "high"}}: ranges of a spill run.
        {"part": {"job", "name"}}: a whole published part, which other nodes ask for to merge it.
        {"file": [listing, number, offset]}, the master: a listed file from a byte on. Raises Refused.
        """
        if isinstance(asked := request.get("run"), dict):
            ids = _named(_NAME, asked.get("job")), _number(asked.get("run")), _number(asked.get("attempt"))
            folder, name = self._layout.runs_dir(*ids), _named(_RUN_ID, asked.get("id"))
            if "partition" in asked or not {"low", "high"} <= asked.keys():
                _number(asked.get("partition"))
            try:
                ranges = spills.select(folder, name, asked)
            except FileNotFoundError:
                raise Refused(f"node {self._spec['node']} has no run {name} of {ids}") from None
            return [Range(folder / f"{name}.data", offset, length, "run") for offset, length in ranges]
        if isinstance(asked := request.get("part"), dict):
            path = self._layout.reduce_dir(_named(_NAME, asked.get("job"))) / _named(PART_NAME, asked.get("name"))
            if not path.is_file():
                raise Refused(f"node {self._spec['node']} has no part {path.name} of {asked['job']}")
            return [Range(path, 0, path.stat().st_size, "part")]
        if isinstance(asked := request.get("file"), list) and caller.role == "master" and len(asked) == 3:
            return self.give_file(*asked)
        raise Refused(f"not served to a {caller.role}: {', '.join(request)!r:.100}")

    def receive(self, caller: Identity, request: Json) -> Upload:
        """Where a PUT writes to, and what takes the file in.

        The master: {"project": hash}, a tar of that content; {"environment": hash}, the same of requirements and
        wheels, for `install_environment`; {"batch": [upload, number]}, announced files.
        """
        if isinstance(asked := request.get("batch"), list) and caller.role == "master" and len(asked) == 2:
            return self.take_batch(*asked)
        kinds = {"project": self._layout.projects_dir, "environment": self._layout.venvs_dir}
        kind = next(iter(request), "")
        if caller.role != "master" or kind not in kinds:
            raise Refused(f"not taken from a {caller.role}: {', '.join(request)!r:.100}")
        content = _named(_HASH, request[kind])
        partial = kinds[kind] / PARTIAL
        partial.mkdir(exist_ok=True)
        archive = partial / f"{content}.tar"
        take_in = self._take_in if kind == "project" else self._take_in_wheels
        return Upload(archive, lambda: take_in(archive, content))

    def _take_in_wheels(self, archive: Path, content: str) -> None:
        """Unpack requirements and wheels, and check them; `install_environment` makes of them what has a name."""
        folder = archive.with_suffix("")
        try:
            with self._installing:
                remove_tree(folder)
                unpack(archive, folder)
                if (found := packages.environment_hash(folder)) != content:
                    remove_tree(folder)
                    raise ClusterFault(f"the wheels of environment {content} arrived as {found}: send them again")
        except OSError as error:
            raise ClusterFault(f"node {self._spec['node']}: cannot unpack wheels: {error}") from None
        finally:
            archive.unlink(missing_ok=True)

    def _take_in(self, archive: Path, content: str) -> None:
        """Unpack a snapshot beside its place, check it, and give it its name; one that is here already stays."""
        folder, final = archive.with_suffix(""), self._layout.projects_dir / content
        try:
            unpack(archive, folder)
            if (found := snapshot.project_hash(folder)) != content:
                raise ClusterFault(f"the snapshot of project {content} arrived as {found}: send it again")
            with self._lock:
                if not final.is_dir():
                    os.replace(folder, final)
                    fsync_dir(final.parent)
        except OSError as error:
            raise ClusterFault(f"node {self._spec['node']}: cannot unpack a project: {error}") from None
        finally:
            archive.unlink(missing_ok=True)
            remove_tree(folder)


def _touched(folder: Path) -> bool:
    """Whether a folder is here; if it is, it counts as used just now."""
    with contextlib.suppress(FileNotFoundError):
        os.utime(folder)
        return True
    return False


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a tar of plain files with relative names into a new folder. Raises Refused for anything else in it."""
    folder.mkdir()
    try:
        with tarfile.open(archive, "r:") as members:
            for member in members:
                parts = member.name.split("/")
                if not member.isreg() or not all(parts) or {".", ".."} & set(parts) or "\0" in member.name:
                    raise Refused(f"a project archive holds {member.name!r:.200}, which is no plain file inside it")
                path = folder.joinpath(*parts)
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("xb") as stream:
                    shutil.copyfileobj(members.extractfile(member) or io.BytesIO(), stream)
                    stream.flush()
                    os.fsync(stream.fileno())
    except (tarfile.TarError, FileExistsError, NotADirectoryError) as error:
        raise Refused(f"a project archive cannot be unpacked: {error}") from None


def main(spec_file: str) -> int:
    """Run the agent that a spec file describes until SIGTERM; gives the exit status."""
    spec: Json = json.loads(Path(spec_file).read_text())
    ours = logs.TextLog(logs.take_over(spec.get("log_bytes", logs.LOG_BYTES)))
    log_to(ours)
    agent = NodeAgent(spec)
    pki = Pki(Path(spec["pki_dir"]), "node", Path(spec["members_file"]))
    stop = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    signal.pthread_sigmask(signal.SIG_BLOCK, stop)  # before any thread, so that only the wait below takes them
    who = watch_membership(Path(spec["members_file"]))
    server = Server(spec["address"], spec["port"], pki, who, agent.methods(), agent.data)
    server.start()
    procfs.announce_ready()
    # Python gives an empty answer when SIGSTOP has outlasted the time: hence the number.
    while not (got := signal.sigtimedwait(stop, logs.WINDOW_SECONDS)) or got.si_signo not in stop:
        ours.settle()
    server.close()
    ours.settle()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
