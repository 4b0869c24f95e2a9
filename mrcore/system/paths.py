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

from mrcore.system import failpoints

PARTIAL = ".partial"
# The name of a published part under a node's base_dir: job, part, run.
PART = re.compile(r"([A-Za-z0-9_][A-Za-z0-9_.-]{0,99})/reduce/(part-(\d{1,12})-\d{1,9}-\d{1,9}\.data(?:\.gz)?)")
PART_NAME = re.compile(r"part-([0-9]{1,12})-[0-9]{1,9}-[0-9]{1,9}\.data(\.gz)?")  # of every part; group 1: run
HOME_FOLDERS = ("state", "logs", "pki", "nodes")


@dataclass(frozen=True)
class Layout:
    """The folders of one node, all under its `compute_dir`, so that renames between them are atomic."""

    compute_dir: Path

    @property
    def base_dir(self) -> Path:
        """Inputs and outputs: `cluster/`, against which relative `input_dirs` are resolved."""
        return self.compute_dir / "cluster"

    @property
    def auxiliary_dir(self) -> Path:
        """`NAME.data`: the JSON that user functions get as `auxiliary_data`."""
        return self.compute_dir / "auxiliary"

    @property
    def working_dir(self) -> Path:
        """Spill runs and unpublished parts, by job and run; gone after each run."""
        return self.compute_dir / "working"

    @property
    def incoming_dir(self) -> Path:
        """Files of uploads until they are whole; what an upload that was cut off left is swept after a day."""
        return self.compute_dir / "incoming"

    @property
    def projects_dir(self) -> Path:
        """Snapshots of projects by content hash."""
        return self.compute_dir / "projects"

    @property
    def venvs_dir(self) -> Path:
        """Packages of projects, installed, by a hash of what was asked for (`environments`)."""
        return self.compute_dir / "venvs"

    @property
    def logs_dir(self) -> Path:
        """What daemons and user functions print."""
        return self.compute_dir / "logs"

    @property
    def pids_dir(self) -> Path:
        """One record of process id and start time for each daemon."""
        return self.compute_dir / "pids"

    @property
    def pki_dir(self) -> Path:
        """This node's certificate and key, and the cluster's CA certificate."""
        return self.compute_dir / "pki"

    def run_dir(self, job: str, run: int) -> Path:
        """Everything temporary of one run on this node, where no other run writes, not even a dead one."""
        return self.working_dir / job / str(run)

    def runs_dir(self, job: str, run: int) -> Path:
        """Spill runs: what the data channel serves to reducing nodes."""
        return self.run_dir(job, run) / "runs"

    def parts_dir(self, job: str, run: int) -> Path:
        """Finished parts that wait for the commit."""
        return self.run_dir(job, run) / "parts"

    def reduce_dir(self, job: str) -> Path:
        """A job's published output on this node."""
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
    for each in reversed([each for each in (folder, *folder.parents) if not each.exists()]):
        each.mkdir(mode=0o700, exist_ok=True)
    status = folder.stat()
    shared = status.st_mode & stat.S_ISVTX or folder == Path.home()
    if status.st_mode & 0o077 and status.st_uid == os.geteuid() and not shared:
        folder.chmod(stat.S_IMODE(status.st_mode) & ~0o077)


def close_home(home: Path) -> None:
    """Make the home of a local cluster, and what lies in it already, its owner's alone."""
    for folder in (home, *(each for name in HOME_FOLDERS if (each := home / name).is_dir())):
        make_private(folder)


def fsync_dir(path: Path) -> None:
    """Flush a folder, so that renames inside it survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_file(path: Path) -> None:
    """Flush a file's content to disk."""
    descriptor = os.open(path, os.O_RDONLY)
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
