"""What lies where on a node and on the master, and how a file becomes visible all at once.

Publishing is always `.partial` → flush to disk → rename → flush of the folder: a reader sees the old
state or the new one, also after a power cut, and whatever ends in `.partial` may be deleted.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path

from mrcore.messages.kinds import PART_PATTERN
from mrcore.system import failpoints

PARTIAL = ".partial"
# The name of a published part under a node's base_dir: job, part, run.
PART = re.compile(r"([A-Za-z0-9_][A-Za-z0-9_.-]{0,99})/reduce/(part-(\d{1,12})-\d{1,9}-\d{1,9}\.data(?:\.gz)?)")
PART_NAME = re.compile(PART_PATTERN)
HOME_FOLDERS = ("state", "logs", "pki", "nodes")


class _Folder:
    """A folder of this name in the `compute_dir` of a Layout."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, layout: Layout, owner: type) -> Path:
        return layout.compute_dir / self._name


@dataclass(frozen=True)
class Layout:
    """The folders of one node, all under its `compute_dir`, so that renames between them are atomic."""

    compute_dir: Path

    base_dir = _Folder("cluster")  # inputs and outputs; relative `input_dirs` are resolved against it
    auxiliary_dir = _Folder("auxiliary")  # `NAME.data`: the JSON that user functions get as `auxiliary_data`
    working_dir = _Folder("working")  # spills and unpublished parts, by job and run; gone after each run
    incoming_dir = _Folder("incoming")  # files of uploads until they are whole; leftovers are swept after a day
    projects_dir = _Folder("projects")  # snapshots of projects by content hash
    venvs_dir = _Folder("venvs")  # packages of projects, installed, by a hash of what was asked for
    logs_dir = _Folder("logs")  # what daemons and user functions print
    pids_dir = _Folder("pids")  # one record of process id and start time for each daemon
    pki_dir = _Folder("pki")  # this node's certificate and key, and the cluster's CA certificate

    def run_dir(self, job: str, run: int) -> Path:
        """Return the folder of everything temporary of one run on this node."""
        return self.working_dir / job / str(run)

    def runs_dir(self, job: str, run: int) -> Path:
        """Return the folder of the spills that the data channel serves to reducing nodes."""
        return self.run_dir(job, run) / "runs"

    def parts_dir(self, job: str, run: int) -> Path:
        """Return the folder of finished parts that wait for the commit."""
        return self.run_dir(job, run) / "parts"

    def reduce_dir(self, job: str) -> Path:
        """Return the folder of a job's published output on this node."""
        return self.base_dir / job / "reduce"

    def make(self) -> None:
        """Create the folders that must exist before work starts."""
        own = (self.base_dir, self.auxiliary_dir, self.working_dir, self.incoming_dir, self.projects_dir)
        for folder in (*own, self.venvs_dir, self.logs_dir):
            folder.mkdir(parents=True, exist_ok=True)


def make_private(folder: Path) -> None:
    """Make a folder that its owner alone may enter, missing ones above it likewise; one of ours that is open is closed.

    A home folder of an account, and one that is everybody's (/tmp), stay as they are: they hold more than ours.
    """
    for missing in reversed([path for path in (folder, *folder.parents) if not path.exists()]):
        missing.mkdir(mode=0o700, exist_ok=True)
    status = folder.stat()
    shared = status.st_mode & stat.S_ISVTX or folder == Path.home()
    if status.st_mode & 0o077 and status.st_uid == os.geteuid() and not shared:
        folder.chmod(stat.S_IMODE(status.st_mode) & ~0o077)


def close_home(home: Path) -> None:
    """Make the home of a local cluster, and what lies in it already, its owner's alone."""
    for folder in (home, *(path for name in HOME_FOLDERS if (path := home / name).is_dir())):
        make_private(folder)


def fsync_dir(path: Path) -> None:
    """Flush a folder, so that renames inside it survive a power cut."""
    _fsync(path, os.O_DIRECTORY)


def fsync_file(path: Path) -> None:
    """Flush a file's content to disk."""
    _fsync(path)


def _fsync(path: Path, flags: int = 0) -> None:
    descriptor = os.open(path, os.O_RDONLY | flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish_file(partial: Path, final: Path) -> None:
    """Give a finished, flushed `.partial` file its final name."""
    failpoints.point("file flushed")
    os.replace(partial, final)
    failpoints.point("file renamed")
    fsync_dir(final.parent)
    failpoints.point("file published")


def write_atomic(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Write `content` so that `path` holds the old bytes or the new ones, never a mixture."""
    failpoints.point("file begun")
    partial = path.with_name(path.name + PARTIAL)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with open(descriptor, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(descriptor)
    publish_file(partial, path)


def remove_tree(path: Path) -> None:
    """Remove a folder and all in it; a folder that is not there is fine, one that stays raises OSError."""
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        if path.exists():  # another process removed something inside at the same time: once more
            shutil.rmtree(path)
