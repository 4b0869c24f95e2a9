"""The node agent's share in projects: takes in snapshots of them and their packages, under names of their content."""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path

from mrcore.errors import ClusterFault, Refused
from mrcore.messages.kinds import Hash, JobName, convert
from mrcore.node.runs import remove
from mrcore.project import packages, snapshot
from mrcore.system import archives
from mrcore.system.paths import PARTIAL, Layout, fsync_dir, remove_tree
from mrcore.system.staging import flush
from mrcore.wire.data import Upload
from mrcore.wire.tls import Identity

KEPT_PROJECTS, KEPT_VENVS = 20, 5
HASH = re.compile(r"[0-9a-f]{32}")


class Snapshots:
    """The projects and environments of a node; all of it is for the master only."""

    RPC = "project_state environment_state install_environment"

    def __init__(self, layout: Layout, node: str) -> None:
        self._projects_dir, self._venvs_dir, self._node = layout.projects_dir, layout.venvs_dir, node
        self._lock, self._installing = threading.Lock(), threading.Lock()
        for folder in (self._projects_dir, self._venvs_dir):
            remove_tree(folder / PARTIAL)

    def project_state(self, caller: Identity, hash: Hash) -> bool:
        """Return whether this snapshot of a project is here; if it is, it counts as used just now."""
        return _touched(self._projects_dir / hash)

    def environment_state(self, caller: Identity, hash: Hash) -> bool:
        """Return whether these packages of a project are installed here; if they are, they count as used just now."""
        return _touched(self._venvs_dir / hash)

    def install_environment(self, caller: Identity, hash: Hash, project: JobName) -> bool:
        """Install the packages that a PUT brought; False: they are here. Raises JobFault (pip's complaint)."""
        final = self._venvs_dir / hash
        source = final.parent / PARTIAL / hash
        target = source.with_suffix(".installed")
        with self._installing:
            if final.is_dir():
                return False
            if not source.is_dir():
                raise Refused(f"the wheels of environment {hash} never came: send them again")
            try:
                packages.install(source, target, project, f"node {self._node}")
                flush(target)
                os.replace(target, final)
                fsync_dir(final.parent)
            except OSError as error:
                raise ClusterFault(f"node {self._node}: cannot install {final}: {error.strerror}") from None
            finally:
                remove_tree(source)
        return True

    def sweep(self) -> dict[str, int]:
        """Remove all but the snapshots and environments that were used last; return how many, by folder."""
        counts = {}
        for folder, kept_newest in ((self._projects_dir, KEPT_PROJECTS), (self._venvs_dir, KEPT_VENVS)):
            known = [path for path in folder.iterdir() if HASH.fullmatch(path.name)]
            old = sorted(known, key=lambda path: path.stat().st_mtime, reverse=True)[kept_newest:]
            for path in old:
                remove(path, self._node)
            counts[folder.name] = len(old)
        return counts

    # ---- data requests

    def receive_project(self, asked: object) -> Upload:
        """Return where the tar of a project of this hash goes; one that is here already stays."""
        return self._upload(asked, self._projects_dir, self._take_project)

    def receive_environment(self, asked: object) -> Upload:
        """Return where a tar of requirements and wheels goes; `install_environment` makes of them what has a name."""
        return self._upload(asked, self._venvs_dir, self._take_wheels)

    def _upload(self, asked: object, folder: Path, take_in: Callable[[Path, str], None]) -> Upload:
        try:
            content = convert(Hash, asked)
        except ValueError as error:
            raise Refused(f"not a valid name: {error}") from None
        partial = folder / PARTIAL
        partial.mkdir(exist_ok=True)
        archive = partial / f"{content}.tar"
        return Upload(archive, lambda: take_in(archive, content))

    def _take_wheels(self, archive: Path, content: str) -> None:
        folder = archive.with_suffix("")
        try:
            with self._installing:
                remove_tree(folder)
                unpack(archive, folder)
                if (arrived := packages.environment_hash(folder)) != content:
                    remove_tree(folder)
                    raise ClusterFault(f"the wheels of environment {content} arrived as {arrived}: send them again")
        except OSError as error:
            raise ClusterFault(f"node {self._node}: cannot unpack wheels: {error}") from None
        finally:
            archive.unlink(missing_ok=True)

    def _take_project(self, archive: Path, content: str) -> None:
        folder, final = archive.with_suffix(""), self._projects_dir / content
        try:
            unpack(archive, folder)
            if (arrived := snapshot.project_hash(folder)) != content:
                raise ClusterFault(f"the snapshot of project {content} arrived as {arrived}: send it again")
            with self._lock:
                if not final.is_dir():
                    os.replace(folder, final)
                    fsync_dir(final.parent)
        except OSError as error:
            raise ClusterFault(f"node {self._node}: cannot unpack a project: {error}") from None
        finally:
            archive.unlink(missing_ok=True)
            remove_tree(folder)


def _touched(folder: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        os.utime(folder)
        return True
    return False


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a tar of plain files with relative names into a new folder. Raises Refused for anything else in it."""
    folder.mkdir()
    try:
        with archive.open("rb") as stream:
            archives.unpack(stream, folder, most_bytes=archive.stat().st_size)
    except archives.BadArchive as error:
        raise Refused(f"a project archive {error}") from None
