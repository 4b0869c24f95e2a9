"""What node agents answer: health, listings of inputs and files, what became of a run's output."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from mrcore.messages.kinds import (
    MAX_INPUT_BYTES,
    PAGE_FILES,
    AbsolutePath,
    Count,
    Crc32,
    Inode,
    JobName,
    Line,
    Message,
    Mode,
    Name,
    Positive,
    Row,
    Seconds,
    ServerName,
    TimeNs,
    Token,
    Word,
)


class Spec(Message, frozen=True, kw_only=True):
    """What a daemon of a node is told of itself when it starts.

    `memory_bytes`: the budget of task, supervisor and server together, counted as anonymous memory; None: a share of
    the machine that the daemon runs on, of which it is one of `servers`. `log_bytes` 0: the default.
    """

    name: ServerName
    node: Word
    address: Word
    port: Count
    cluster: Word
    compute_dir: AbsolutePath
    pki_dir: AbsolutePath
    members_file: AbsolutePath
    memory_bytes: Count | None = None
    servers: Positive = 1
    log_bytes: Count = 0
    sibling_dirs: AbsolutePath | None = None  # of a local cluster: the folder that holds all nodes' own


class Versions(Message, frozen=True, kw_only=True):
    """Who answers, and what it runs. `release`: the folder of a deployed one; `python`: "3.11.2"."""

    name: Word
    version: Word
    release: Word = ""
    wire_version: Count
    python: Word


class Health(Versions, frozen=True, kw_only=True):
    """A node agent's state: its clock in seconds since 1970, disk, bytes served by kind, load (over the last minute).

    Agents of releases before do not say those that have a default.
    """

    time: Seconds
    disk_free_bytes: Count
    disk_total_bytes: Count = 0
    served_bytes: dict[Word, Count]
    load: Seconds | None = None
    cpus: Count = 0


class Space(Message, frozen=True, kw_only=True):
    """Free bytes of the disk that holds a run's working folder."""

    disk_free_bytes: Count


class InputFile(Row, frozen=True):
    """A file that a job reads, as it was listed."""

    path: AbsolutePath
    size: Annotated[int, Meta(ge=0, le=MAX_INPUT_BYTES)]
    mtime_ns: TimeNs
    inode: Inode


class ReadFile(InputFile, frozen=True):
    """A listed file, and up to which byte it was read before (0: never)."""

    read: Count


class InputPage(Message, frozen=True, kw_only=True):
    """A page of a node's input files; all but `files` and `next` tell of the whole, when its walk has ended.

    `matched`: files by entry of `input_dirs`; `skipped`: files by reason; `fingerprint`: of what absolute entries
    match; `faults`: what is wrong with inputs; `next`: the cursor of the next page.
    """

    files: Annotated[list[InputFile], Meta(max_length=PAGE_FILES)]
    matched: dict[Annotated[str, Meta(max_length=4_096)], Count]
    skipped: dict[Word, Count]
    fingerprint: Word
    faults: list[Line]
    next: Token | None


class Tail(Row, frozen=True):
    """Where to end reading a file; the crc32 of the block before that; the same where it was left, or None."""

    end: Count
    checksum: Crc32
    before: Crc32 | None


class Published(Message, frozen=True, kw_only=True):
    """Parts of a run that got their place, and earlier ones that were removed."""

    published: Count
    removed: Count


class File(Row, frozen=True):
    """A file of a transfer: its name relative to a folder, size in bytes, time, mode."""

    name: Name
    size: Count
    mtime_ns: TimeNs
    mode: Mode


class HeldFile(File, frozen=True):
    """A file that a node holds, with its inode."""

    inode: Inode

    @property
    def file(self) -> File:
        """The same without its inode."""
        return File(self.name, self.size, self.mtime_ns, self.mode)


class FilePage(Message, frozen=True, kw_only=True):
    """A page of a listing. Data requests name files by `listing` and number; `next`: the number to go on with."""

    listing: Token
    files: Annotated[list[File], Meta(max_length=PAGE_FILES)]
    next: Count | None


class HoldingsPage(Message, frozen=True, kw_only=True):
    """A page of all that a node holds; the first one also says how many files and bytes, and what cannot be moved."""

    listing: Token
    files: Annotated[list[HeldFile], Meta(max_length=PAGE_FILES)]
    next: Count | None
    count: Count | None = None
    bytes: Count | None = None
    faults: list[Line] = []


class UploadBegun(Space, frozen=True, kw_only=True):
    """The token of an upload, and the free bytes of the disk that takes it."""

    upload: Token


class Output(Row, frozen=True):
    """Published parts of one run among files that are to go."""

    job: JobName
    run: Positive
    files: Count
    bytes: Count


class Removal(Message, frozen=True, kw_only=True):
    """What was removed, or would be: files, bytes, and the output of jobs among them."""

    files: Count
    bytes: Count
    outputs: list[Output]


class Staged(Row, frozen=True):
    """The inode that a staged file has for good, and its time there."""

    inode: Inode
    mtime_ns: TimeNs


class KeptRun(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A run whose working folder, or output, is to stay."""

    job: JobName
    run: Positive
