"""The node agent's share in file transfers: lists, takes, gives and removes files of the node's own folders.

Names come by RPC, are checked there, and get numbers; data requests carry nothing but these numbers.
"""

from __future__ import annotations

import glob
import hashlib
import os
import secrets
import shutil
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from mrcore.errors import ClusterFault, JobFault, Refused
from mrcore.messages.kinds import PAGE_FILES, Count, Token
from mrcore.messages.nodes import File, FilePage, HeldFile, KeptRun, Output, Removal, UploadBegun
from mrcore.system.paths import PART, PARTIAL, Layout
from mrcore.system.staging import ON_NODES, Staging, inside, newest, remove, walk
from mrcore.wire.data import Range, Upload, checksum
from mrcore.wire.tls import Identity

MAX_HELD = 8  # listings, and uploads, begun and not ended: one more drops the one that was used the longest ago
INCOMING_SECONDS = 86_400.0  # how long what an upload left when it was cut off can be resumed


class Listing(NamedTuple):
    """Files by their names below a folder."""

    root: Path
    files: list[HeldFile]


@dataclass
class Incoming:
    """An upload under way: the batches announced, and the files that came."""

    staging: Staging
    announced: int = 0
    batches: dict[int, list[File]] = field(default_factory=dict)
    files: list[File] = field(default_factory=list)


class FileMethods:
    """The part of a node agent that moves files; all of it is for the master only. Names are relative to base_dir."""

    RPC = "exists list_files file_checksum begin_upload announce commit_upload drop_upload delete_files"

    def __init__(self, layout: Layout, node: str) -> None:
        self._layout, self._node = layout, node
        self._held: dict[str, Listing] = {}
        self._uploads: dict[str, Incoming] = {}
        self._files_lock = threading.Lock()  # the two above
        self._publishing = threading.Lock()
        self.sweep_incoming()

    def sweep_incoming(self) -> int:
        """Remove what uploads left that were cut off more than INCOMING_SECONDS ago; return how many."""
        with self._files_lock:
            active = {upload.staging.folder for upload in self._uploads.values()}
            folders = [path for path in self._layout.incoming_dir.iterdir() if path not in active]
            old = [path for path in folders if time.time() - newest(path) > INCOMING_SECONDS]
            for path in old:
                remove(path)
        return len(old)

    # ---- RPC

    def list_files(
        self, caller: Identity, path: str, wildcards: bool = False, listing: Token | None = None, start: Count = 0
    ) -> FilePage:
        """List the files below a folder, or what a name with wildcards matches, at most PAGE_FILES a call.

        Their names are relative to the folder, or to where the wildcards begin. Raises JobFault, Refused.
        """
        if listing is None:
            base, names = self._layout.base_dir, self._matching(path, wildcards)
            top = root_of(path) if wildcards else path if names and (base / path).is_dir() else path.rpartition("/")[0]
            files = {file.name: file for name in names for file in self._below(top, name)}
            listing = self._hold(self._held, Listing(base / top, [*files.values()]))
        page, following = self._page(listing, start)
        return FilePage(listing=listing, files=[file.file for file in page], next=following)

    def exists(self, caller: Identity, path: str) -> bool:
        """Return whether something has exactly this name: if so on one node, wildcards in it are none on any."""
        return os.path.lexists(inside(self._layout.base_dir, path))

    def file_checksum(self, caller: Identity, listing: Token, number: Count, length: Count) -> int:
        """Return the crc32 of the first bytes of a listed file: whether what the master has of it is the same."""
        path = self._listed(listing, number, length)[0]
        with path.open("rb") as stream:
            return checksum(stream.fileno(), length)

    def begin_upload(self, caller: Identity, folder: str | None, source: str | None = None) -> UploadBegun:
        """Begin an upload into a folder (None: auxiliary data), or, for a drain, of files of the node `source`.

        An earlier one of the kind is void, but what came then counts. Raises JobFault when a symbolic link is on the
        way, Refused.
        """
        self.sweep_incoming()
        staging = self._staging(folder, source)
        with self._files_lock:
            for token in [key for key, upload in self._uploads.items() if upload.staging.folder == staging.folder]:
                del self._uploads[token]
        token = self._hold(self._uploads, Incoming(staging))
        return UploadBegun(upload=token, disk_free_bytes=shutil.disk_usage(staging.folder).free)

    def announce(self, caller: Identity, upload: Token, files: list[File]) -> int | None:
        """Announce files of which the next PUT will hold the contents one after the other.

        Return the batch's number for {"batch": [upload, number]}, or None for a single file that is here already.
        """
        incoming = self._get(self._uploads, upload)
        with self._files_lock:
            if len(files) == 1 and incoming.staging.has(files[0]):
                incoming.files += files
                return None
            incoming.announced += 1
            incoming.batches[incoming.announced] = files
            number: int = incoming.announced
        return number

    def commit_upload(self, caller: Identity, upload: Token, replace: bool) -> int:
        """Give all files their names; with `replace` everything else in the folder goes then. Return how many."""
        incoming = self._get(self._uploads, upload)
        with self._publishing:
            removed: int = self._on_disk(incoming.staging.publish, incoming.files, replace)
        self._uploads.pop(upload, None)
        return removed

    def drop_upload(self, caller: Identity, upload: Token) -> None:
        """Forget an upload with all that came."""
        if incoming := self._uploads.pop(upload, None):
            self._on_disk(incoming.staging.drop)

    def delete_files(
        self, caller: Identity, path: str, wildcards: bool = False, dry_run: bool = False, leave: Sequence[KeptRun] = ()
    ) -> Removal:
        """Remove a file, a folder with all in it, or what a name with wildcards matches; links are not followed.

        Return what it was, with what are published parts by their names; with `dry_run` that is all. Parts of other
        runs than those of `leave` refuse it. Raises JobFault, Refused; nothing is removed then.
        """
        root = self._layout.base_dir
        tops = [inside(root, name) for name in self._matching(path, wildcards)]
        going = {name: size for top in tops for name, size in self._on_disk(_sizes, top)}
        outputs: dict[tuple[str, int], list[int]] = {}
        for name, size in going.items():
            if part := PART.fullmatch(os.path.relpath(name, root)):
                outputs.setdefault((part[1], int(part[3])), []).append(size)
        if not dry_run:
            if new := outputs.keys() - {(kept.job, kept.run) for kept in leave}:
                job, run = min(new)
                raise Refused(f"node {self._node}: {path!r} holds output of {job} (run {run}) by now: look again")
            for top in tops:
                if os.path.lexists(top):  # else it went with its folder
                    self._on_disk(remove, top)
        parts = [Output(job, run, len(sizes), sum(sizes)) for (job, run), sizes in sorted(outputs.items())]
        return Removal(files=len(going), bytes=sum(going.values()), outputs=parts)

    # ---- data requests

    def give_file(self, listing: str, number: int, offset: int) -> list[Range]:
        """Return what a GET of {"file": [listing, number, offset]} asks for: a listed file from a byte on."""
        path, size = self._listed(listing, number, offset)
        return [Range(path, offset, size - offset, "file")]

    def take_batch(self, upload: str, number: int) -> Upload:
        """Return where a PUT of {"batch": [upload, number]} goes: of a single file, resumed, or of several."""
        incoming = self._get(self._uploads, upload)
        files, staging = incoming.batches.get(number), incoming.staging
        if not files:
            raise Refused(f"node {self._node}: batch {number!r:.20} was not announced, or is here already")
        single = len(files) == 1
        partial = staging.partial(files[0]) if single else staging.folder / f"{upload}-{number}{PARTIAL}"

        def finish() -> None:
            if partial.stat().st_size != sum(file.size for file in files):
                raise Refused(f"a batch of {partial.stat().st_size} bytes is not what was announced")
            if single:
                staging.take(files[0])
            else:
                self._on_disk(_unpack, partial, staging, files)
            with self._files_lock:
                incoming.files += incoming.batches.pop(number)

        return Upload(partial, finish, resume=single, flush=single)

    # ---- inside

    def _matching(self, path: str, wildcards: bool) -> list[str]:
        """Return the names that exist of one that may have wildcards; what is hidden is matched by its own dot only."""
        full = inside(self._layout.base_dir, path)
        if wildcards:
            if "**" in path.split("/"):  # which glob lets follow links: without an end, should they lead back
                for folder, folders, _ in os.walk(self._layout.base_dir / root_of(path)):
                    if links := [name for name in folders if os.path.islink(f"{folder}/{name}")]:
                        raise JobFault(
                            f"{folder}/{links[0]} is a symbolic link, in which `**` might not end: remove it"
                        )
            matches = glob.glob(path, root_dir=self._layout.base_dir, recursive=True)
            names = {name.rstrip("/") for name in matches} - {""}  # `x/**` gives x/ whether there is one or not
            return sorted(name for name in names if os.path.lexists(self._layout.base_dir / name))
        return [path] if os.path.lexists(full) else []

    def _below(self, top: str, name: str) -> list[HeldFile]:
        """Return the files of a name, or below it, by their names below its folder `top`."""
        inside(self._layout.base_dir, name)
        listed: list[HeldFile] = []
        for file in self._on_disk(list, walk(self._layout.base_dir / top, name[len(top) :].lstrip("/"))):
            # The mode of a part is what the daemons' umask left of a new file's: its copy is a new file, too.
            is_part = PART.fullmatch(os.path.join(top, file.name))
            listed.append(msgspec.structs.replace(file, mode=0o666) if is_part else file)
        return listed

    def _listed(self, listing: str, number: int, length: int) -> tuple[Path, int]:
        """Return a listed file's path and size, if it is the same still and `length` is in it."""
        held = self._get(self._held, listing)
        if type(number) is not int or not 0 <= number < len(held.files):
            raise Refused(f"node {self._node}: the listing has no file {number!r:.20}")
        file = held.files[number]
        path, size = held.root / file.name, file.size
        status = self._on_disk(os.lstat, path)
        if status.st_ino != file.inode or status.st_size < size:
            raise ClusterFault(f"node {self._node}: {path} was replaced or cut since it was listed: try again")
        if type(length) is not int or not 0 <= length <= size:
            raise Refused(f"node {self._node}: {path} has no byte {length!r:.20}")
        return path, size

    def _staging(self, folder: str | None, source: str | None = None) -> Staging:
        """Return where an upload into a folder gathers, or that of files of another node, which keep their modes."""
        target, key, mask = self._layout.base_dir, f"moved from {source}".encode(), 0o777
        if source is None:
            target = self._layout.auxiliary_dir if folder is None else inside(target, f"{folder}/x").parent
            key, mask = os.fsencode(target), ON_NODES
        gathering = self._layout.incoming_dir / hashlib.blake2b(key, digest_size=16).hexdigest()
        made: Staging = self._on_disk(Staging, gathering, target, mask)
        return made

    def _page(self, listing: str, start: int) -> tuple[list[HeldFile], int | None]:
        """Return a page of a listing, and where the next begins."""
        files, end = self._get(self._held, listing).files, start + PAGE_FILES
        return files[start:end], end if end < len(files) else None

    def _hold(self, kept: dict[str, Any], value: Any) -> str:
        """Keep a listing or an upload; return its token."""
        token = secrets.token_hex(8)
        with self._files_lock:
            kept[token] = value
            while len(kept) > MAX_HELD:
                del kept[next(iter(kept))]
        return token

    def _get(self, kept: dict[str, Any], token: Any) -> Any:
        with self._files_lock:
            if not isinstance(token, str) or token not in kept:
                raise Refused(f"node {self._node}: this transfer is not known any more: begin again, it resumes")
            kept[token] = kept.pop(token)  # used now
            return kept[token]

    def _on_disk(self, function: Any, *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except OSError as error:
            raise ClusterFault(f"node {self._node}: {error.filename or 'disk'}: {error.strerror or error}") from None


def root_of(path: str) -> str:
    """Return the folders of a name before the first with a wildcard."""
    parts = path.split("/")
    return "/".join(parts[: next((at for at, part in enumerate(parts) if glob.has_magic(part)), len(parts))])


def _sizes(path: Path) -> list[tuple[str, int]]:
    """Return every file of a folder, or the one file, with its bytes; of a link its own."""
    if path.is_symlink() or not path.is_dir():
        return [(str(path), path.lstat().st_size)] if os.path.lexists(path) else []
    files = (f"{folder}/{name}" for folder, _, names in os.walk(path) for name in names)
    return [(file, os.lstat(file).st_size) for file in files]


def _unpack(partial: Path, staging: Staging, files: list[File]) -> None:
    with partial.open("rb") as stream:
        for file in files:
            staging.put(file, stream.read(file.size))
    partial.unlink()
