"""From the master to the nodes: list both sides, choose a node for each file, send in batches, commit on all nodes.

Until the commit what was sent is staged on the nodes, where another try goes on with it.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from mrcore.engine.listing import rendezvous
from mrcore.errors import JobFault
from mrcore.messages import methods
from mrcore.messages.nodes import File, HeldFile
from mrcore.settings.config import NodeSettings
from mrcore.state import outputs
from mrcore.system.readers import format_of
from mrcore.system.staging import inside, walk
from mrcore.transfer.batches import SMALL_BYTES, check_free, checked, for_nodes, resumable
from mrcore.transfer.session import Counts, Session, add

try:  # comes with xopen where it runs, and is four times as fast
    from isal.isal_zlib import compressobj
except ImportError:
    from zlib import compressobj  # type: ignore[assignment]

BLOCK_BYTES = 1 << 20

Agree = Callable[[dict[str, Any]], None]
Held = dict[str, dict[str, File]]  # files of a folder of the nodes: by name, then by node


class Pair(NamedTuple):
    """A file here, and what it is to be there."""

    source: File
    target: File
    packed: bool = False  # there it is NAME.gz, of which the size is not known


Plan = dict[str, list[Pair]]  # by node


def upload(
    session: Session, input_dir: str, output_dir: str, replace: bool, compress: bool, at_once: int, agree: Agree
) -> Counts:
    """Send a folder or a file; return the counts. See `FileTransfer.upload`."""
    folder, source = checked(output_dir, "output_dir"), Path(input_dir).expanduser().resolve()
    if not source.exists():
        raise JobFault(f"input_dir {source} does not exist on the master")
    top, name = (source, "") if source.is_dir() else (source.parent, source.name)
    session.report("LIST")
    pairs = [_pair(file, compress) for file in walk(top, name)]
    if not pairs:
        raise JobFault(f"input_dir {source} holds no file")
    names = {pair.target.name for pair in pairs}
    held = _look(session, folder, names, replace)
    agree(_lost(held, names, replace))
    plan, skipped = plan_upload([node.name for node in session.settings.nodes], pairs, held, replace)

    def look_again() -> None:  # a run may have published meanwhile
        if "/" not in folder.removesuffix("/reduce"):
            _look(session, folder, names, replace)

    return deliver(session, top, folder, plan, replace, at_once, look_again) | {"skipped": skipped}


def upload_auxiliary(session: Session, path: Path, name: str, at_once: int) -> Counts:
    """Send one file to every node's auxiliary data, under this name; return the counts."""
    pair = _pair(next(walk(path.parent, path.name)), False, checked(f"{name}.data", "auxiliary_data_name"))
    return deliver(session, path.parent, None, {node.name: [pair] for node in session.settings.nodes}, False, at_once)


def plan_upload(nodes: list[str], pairs: list[Pair], held: Held, replace: bool) -> tuple[Plan, int]:
    """Choose who gets which file, its holder before any other; return that, and how many need not be sent."""
    plan: Plan = {name: [] for name in nodes}
    names, skipped = {pair.target.name for pair in pairs}, 0
    if len(names) < len(pairs):
        raise JobFault("with compress two files would get one name: NAME and NAME.gz; leave one of them out")
    for pair in pairs:
        target, holders = pair.target, held.get(pair.target.name, {})
        other = pair.source.name if pair.packed else f"{target.name}.gz"
        if not replace and (len(holders) > 1 or (other in held and other not in names)):
            where = f"on {', '.join(holders)}" if len(holders) > 1 else f"there as {other!r} already"
            raise JobFault(f"{target.name!r} lies {where}: it would be read twice; remove one, or use reload_files")
        node = rendezvous(target.name, sorted(holders) or nodes)
        old = None if replace else holders.get(node)
        if old and old.mtime_ns == target.mtime_ns and (pair.packed or old.size == target.size):
            skipped += 1
        else:
            plan[node].append(pair)
    return plan, skipped


def deliver(
    session: Session, source: Path, folder: str | None, plan: Plan, replace: bool, at_once: int,
    look_again: Callable[[], object] = lambda: None,
) -> Counts:  # fmt: skip
    """Stage all files on their nodes, then commit on all nodes; an error leaves the nodes as they were."""
    uploads = dict[str, str]()

    def begin(node: NodeSettings) -> None:
        begun = session.call(node, methods.BEGIN_UPLOAD, folder=folder)
        uploads[node.name] = begun.upload
        needed = sum(pair.target.size for pair in plan[node.name] if not pair.packed)
        check_free(f"node {node.name}", begun.disk_free_bytes, needed)

    def send(batch: tuple[str, list[Pair]]) -> None:
        _send(session, source, session.settings.node(batch[0]), uploads[batch[0]], batch[1])

    def commit(node: NodeSettings) -> int:
        return session.call(node, methods.COMMIT_UPLOAD, upload=uploads[node.name], replace=replace)

    session.total_bytes = sum(pair.target.size for pairs in plan.values() for pair in pairs)
    with resumable(lambda: session.drop(uploads)):
        session.on_all("BEGIN", begin)
        session.work_on("TRANSFER", send, for_nodes(plan, lambda pair: pair.target.size), at_once)
        look_again()
        session.check_stop()
        session.report("PUBLISH")
        removed = session.on_all("PUBLISH", commit, may_stop=False)
    return session.counts() | {"removed": sum(removed)}


def _send(session: Session, source: Path, node: NodeSettings, upload: str, batch: list[Pair]) -> None:
    with contextlib.ExitStack() as stack:
        contents = [_content(stack, inside(source, pair.source.name), pair, session) for pair in batch]
        small = [content for content in contents if isinstance(content, bytes)]
        sizes = [len(content) if isinstance(content, bytes) else content[1] for content in contents]
        files = [msgspec.structs.replace(pair.target, size=size) for pair, size in zip(batch, sizes, strict=True)]
        number = session.call(node, methods.ANNOUNCE, upload=upload, files=files)
        if number is not None:
            with session.data(node) as channel:
                channel.put({"batch": [upload, number]}, b"".join(small) if small else contents[0], session.moved)
    session.done(len(batch), sum(pair.source.size for pair in batch))


def _content(stack: contextlib.ExitStack, path: Path, pair: Pair, session: Session) -> bytes | tuple[int, int]:
    """Return what is to be sent of a file: a small one's bytes, of a large one an open descriptor and the length."""
    size = pair.source.size
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    stack.callback(os.close, fd)
    content = os.pread(fd, size, 0) if size < SMALL_BYTES else b""
    if os.fstat(fd).st_size < size or (size < SMALL_BYTES and len(content) < size):
        raise JobFault(f"{path} shrank since it was listed: run the transfer again")
    if not pair.packed:
        return content if size < SMALL_BYTES else (fd, size)
    compressor = compressobj(wbits=31)
    if size < SMALL_BYTES:
        return compressor.compress(content) + compressor.flush()
    packed = stack.enter_context(tempfile.TemporaryFile())
    for at in range(0, size, BLOCK_BYTES):
        session.check_stop()
        packed.write(compressor.compress(os.pread(fd, min(BLOCK_BYTES, size - at), at)))
    packed.write(compressor.flush())
    packed.flush()
    return packed.fileno(), packed.tell()


def _pair(file: HeldFile, compress: bool, name: str = "") -> Pair:
    packed = compress and not format_of(file.name)
    name = name or f"{file.name}{'.gz' if packed else ''}"
    return Pair(file, msgspec.structs.replace(file.file, name=name), packed)


def _look(session: Session, folder: str, names: set[str], replace: bool) -> Held:
    """Return what a folder of the nodes holds. Raises JobFault if output of a job would go by the upload."""
    held: Held = {}
    for node, _, files in session.list_nodes(folder):
        for file in files:
            held.setdefault(file.name, {})[node.name] = file
    lost = held if replace else held.keys() & names
    parts = [(node, f"{folder}/{name}") for name in lost for node in held[name]]
    if jobs := outputs.among(session.settings, parts):
        raise JobFault(
            f"output_dir {folder!r} holds output of {outputs.listed(jobs)}, which this upload would replace: "
            "choose another folder, or remove the output first"
        )
    return held


def _lost(held: Held, names: set[str], replace: bool) -> dict[str, Any]:
    """Return what goes from a folder that is filled again, and does not come back: see `outputs.going`."""
    nodes: dict[str, Counts] = {}
    for name in held.keys() - names if replace else ():
        for node, file in held[name].items():
            add(nodes.setdefault(node, {"files": 0, "bytes": 0}), file.size)
    return {"files": sum(counts["files"] for counts in nodes.values()), "nodes": nodes, "outputs": []}
