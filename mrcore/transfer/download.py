"""From the nodes to the master: list, name each file here, fetch in batches into GATHERING, give all their names."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import msgspec

from mrcore.errors import ClusterFault, JobFault, Refused, UsageError
from mrcore.messages.methods import FILE_CHECKSUM
from mrcore.messages.nodes import File
from mrcore.settings.config import NodeSettings, Settings
from mrcore.state import manifest
from mrcore.system import procfs
from mrcore.system.paths import PARTIAL
from mrcore.system.staging import Staging
from mrcore.transfer.batches import SMALL_BYTES, check_free, checked, for_nodes, resumable
from mrcore.transfer.session import Counts, Session
from mrcore.wire.data import checksum

GATHERING = f".mrcore-download{PARTIAL}"


class Remote(NamedTuple):
    """A file on a node, by its number in the node's listing, and the name that it is to have here."""

    node: NodeSettings
    listing: str
    number: int
    local: File


def download(session: Session, input_dir: str, output_dir: str, delete_files: bool, at_once: int) -> Counts:
    """Fetch a folder, a file or what wildcards match; return the counts. See `FileTransfer.download`."""
    path, target, settings = checked(input_dir, "input_dir"), Path(output_dir).expanduser().resolve(), session.settings
    if delete_files:
        _check_may_be_cleared(settings, target)
    with contextlib.ExitStack() as stack:
        session.report("LIST")
        remotes = name_here(settings, path, session.list_nodes(path, session.has_wildcards(path)))
        if not remotes:
            raise JobFault(f"input_dir {path!r} matches no file under any node's base_dir")
        staging = Staging(target / GATHERING, target, 0o777 & ~procfs.umask())
        _lock(stack, staging.folder)
        session.total_bytes = sum(remote.local.size for remote in remotes)
        check_free("the master", shutil.disk_usage(target).free, session.total_bytes)
        by_node = {node.name: [remote for remote in remotes if remote.node is node] for node in settings.nodes}
        batches = [batch for _, batch in for_nodes(by_node, lambda remote: remote.local.size)]
        with resumable(staging.drop):
            session.work_on("TRANSFER", lambda batch: _fetch(session, staging, batch), batches, at_once)
            session.check_stop()
            session.report("PUBLISH")
            removed = staging.publish([remote.local for remote in remotes], delete_files)
        return session.counts() | {"removed": removed}


def name_here(settings: Settings, path: str, listings: Iterable[tuple[NodeSettings, str, list[File]]]) -> list[Remote]:
    """Return each listed file with its name here. Of a job's output only what is committed counts, and all of it."""
    remotes = [Remote(node, token, at, file) for node, token, files in listings for at, file in enumerate(files)]
    job, _, last = path.rpartition("/")
    if last == "reduce" and manifest.newest(settings.state_dir, job):
        wanted = {(part.node, part.name) for part in manifest.parts(settings.state_dir, job)}
        remotes = [remote for remote in remotes if (remote.node.name, remote.local.name) in wanted]
        if missing := wanted - {(remote.node.name, remote.local.name) for remote in remotes}:
            holder, name = min(missing)
            raise ClusterFault(f"part {name} of {job} is not on {holder}: its run has not ended, or it was removed")
    holders = Counter(remote.local.name for remote in remotes)
    for at, (node, *_, file) in enumerate(remotes):
        if holders[file.name] > 1:
            remotes[at] = remotes[at]._replace(local=msgspec.structs.replace(file, name=f"{node.name}/{file.name}"))
    names = {remote.local.name for remote in remotes}
    if len(names) < len(remotes):
        raise JobFault(f"{path!r} has files in a folder that is named like a node: fetch a part of it at a time")
    if any(name.partition("/")[0] == GATHERING for name in names):
        raise JobFault(f"{path!r} holds {GATHERING!r}, where downloads gather: give that another name")
    return remotes


def _fetch(session: Session, staging: Staging, batch: list[Remote]) -> None:
    if batch[0].local.size >= SMALL_BYTES:
        _fetch_large(session, staging, batch[0])
    else:
        contents = [bytearray() for _ in batch]

        def sink(index: int, chunk: memoryview) -> None:
            contents[index].extend(chunk)
            session.moved(len(chunk))

        with session.data(batch[0].node) as channel:
            channel.get([{"file": [remote.listing, remote.number, 0]} for remote in batch], sink)
        for remote, content in zip(batch, contents, strict=True):
            _check_length(remote, len(content))
            staging.put(remote.local, content)
    session.done(len(batch), sum(remote.local.size for remote in batch))


def _fetch_large(session: Session, staging: Staging, remote: Remote) -> None:
    if staging.has(remote.local):
        return
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    with open(os.open(staging.partial(remote.local), flags, 0o600), "r+b", buffering=0) as stream:
        fd, at = stream.fileno(), os.fstat(stream.fileno()).st_size
        known = {"listing": remote.listing, "number": remote.number, "length": at}
        if at and (at > remote.local.size or session.call(remote.node, FILE_CHECKSUM, **known) != checksum(fd, at)):
            at = 0
        os.ftruncate(fd, at)
        stream.seek(at)

        def sink(index: int, chunk: memoryview) -> None:
            session.moved(len(chunk))
            while chunk:
                chunk = chunk[stream.write(chunk) :]

        with session.data(remote.node) as channel:
            channel.get([{"file": [remote.listing, remote.number, at]}], sink)
        _check_length(remote, stream.tell())
        os.fsync(fd)
    staging.take(remote.local)


def _check_length(remote: Remote, length: int) -> None:
    file = remote.local
    if length != file.size:
        raise Refused(f"node {remote.node.name}: {file.name!r} came with {length} bytes, not {file.size}")


def _check_may_be_cleared(settings: Settings, target: Path) -> None:
    """Refuse by a UsageError what a slip of the finger would cost: the user's home, or the cluster's state."""
    folders = (settings.home, settings.state_dir, settings.pki_dir, settings.projects_dir)
    for kept in (Path.home(), Path.cwd(), *folders):
        if kept.resolve().is_relative_to(target):
            raise UsageError(
                f"output_dir {target} would be cleared, with {kept} in it: choose a folder of its own, or set "
                "delete_files: false"
            )


def _lock(stack: contextlib.ExitStack, folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    stack.callback(os.close, descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(f"another download into {folder.parent} is under way: wait for its end") from None
