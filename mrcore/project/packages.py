"""Packages of a project: `requirements.txt`, the wheels that satisfy it, and the folder on a node that they become.

Such an environment is named by a hash of requirements and wheels, installed once on each node, and shared by all runs
that want just that. It is a folder for `sys.path`, not an interpreter of its own: tasks are forked from the daemon's.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
import site
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from mrcore.errors import ClusterFault, JobFault
from mrcore.messages.methods import ENVIRONMENT_STATE, INSTALL_ENVIRONMENT
from mrcore.system.archives import pack
from mrcore.system.paths import remove_tree

REQUIREMENTS, WHEELS = "requirements.txt", "wheels"
INSTALL_SECONDS = 540.0
# What a task process has loaded before the project's first import, so that the project gets these and no others.
OURS = ("mrcore", "rpyc", "plumbum", "msgspec", "ujson", "xopen", "isal", "zlib-ng", "backports-zstd")

Json = dict[str, Any]


def is_wanted(project: Path) -> bool:
    """Return whether a project asks for packages: it has a requirements.txt that is not only comments."""
    file = project / REQUIREMENTS
    if not file.is_file():  # reading a FIFO would wait for ever; `snapshot.project_files` refuses it by name
        return False
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    return any(line.strip() and not line.strip().startswith("#") for line in lines)


def missing(project: Path) -> str | None:
    """Return what is wrong when a project asks for packages and has no wheels."""
    if not is_wanted(project) or any((project / WHEELS).glob("*.whl")):
        return None
    return f"project {project.name} has a {REQUIREMENTS} and no wheels: {_how_to_fetch(project.name)}"


def _how_to_fetch(project: str) -> str:
    return (
        f"`make wheels PROJECT={project} INVENTORY=…` on the controller fetches them, or for a local cluster, in the "
        f"project's folder, `pip download --only-binary=:all: -r {REQUIREMENTS} -d {WHEELS}`"
    )


def environment_hash(project: Path) -> str | None:
    """Return the name of the environment that a project asks for, 32 hexadecimal digits, or None if it asks for none.

    Raises JobFault when there are no wheels.
    """
    if error := missing(project):
        raise JobFault(error, code="packages")
    if not is_wanted(project):
        return None
    state = hashlib.sha256("{}.{}\n".format(*sys.version_info).encode())
    for name, path in _files(project):
        status = path.stat()
        state.update(f"{name} {_digest(path, status.st_size, status.st_mtime_ns, status.st_ino)}\n".encode())
    return state.hexdigest()[:32]


def _files(project: Path) -> list[tuple[str, Path]]:
    wheels = sorted(path for path in (project / WHEELS).glob("*.whl") if path.is_file())
    return [(REQUIREMENTS, project / REQUIREMENTS), *((f"{WHEELS}/{path.name}", path) for path in wheels)]


@functools.lru_cache(maxsize=1000)
def _digest(path: Path, size: int, mtime_ns: int, inode: int) -> str:
    """Return a file's checksum; a Runner that starts a job again does not read gigabytes of wheels again."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class Shipment:
    """A project's environment on its way to the nodes. Use as a context manager; `hash` None: there is none."""

    def __init__(self, project: Path, state_dir: Path) -> None:
        self._project, self._state_dir, self.hash = project, state_dir, environment_hash(project)
        self._lock = threading.Lock()
        self._archive: IO[bytes] | None = None

    def __enter__(self) -> Shipment:
        return self

    def __exit__(self, *error: object) -> None:
        if self._archive is not None:
            self._archive.close()

    def bring(self, call: Callable[..., bool], put: Callable[[Json, tuple[int, int]], object]) -> None:
        """Install the environment on a node that lacks it, by the two ways to its agent. Raises what these raise."""
        if self.hash and not call(ENVIRONMENT_STATE, hash=self.hash):
            put({"environment": self.hash}, self._packed())
            call(INSTALL_ENVIRONMENT, hash=self.hash, project=self._project.name, timeout_seconds=600)

    def _packed(self) -> tuple[int, int]:
        """Return an open tar of requirements and wheels, made for the first node that needs it, and its length."""
        with self._lock:
            if self._archive is None:
                self._state_dir.mkdir(parents=True, exist_ok=True)
                self._archive = tempfile.TemporaryFile(dir=self._state_dir)
                pack(_files(self._project), self._archive)
                self._archive.flush()
        return self._archive.fileno(), os.fstat(self._archive.fileno()).st_size


def install(source: Path, target: Path, project: str, node: str) -> None:
    """Install what `source`/requirements.txt asks for from `source`/wheels into the folder `target`, or leave nothing.

    pip finds all wheels before it installs the first, so this is its own dry run: no index, no building. Raises
    JobFault (a wheel is missing, does not fit, or is another version of what mrcore runs on), ClusterFault.
    """
    command = ["install", "--no-index", "--only-binary=:all:", "--no-cache-dir", "--quiet", "--target", str(target)]
    command += ["--find-links", str(source / WHEELS), "--requirement", str(source / REQUIREMENTS)]
    try:
        target.mkdir(parents=True, exist_ok=True)  # also when all that is asked for is not for this machine
        done = json.loads(_pip([*command, "--report", "-"], project, node))
        if errors := conflicts({item["metadata"]["name"]: item["metadata"]["version"] for item in done["install"]}):
            raise JobFault(f"project {project}: {'; '.join(errors)}", code="packages")
    except BaseException:
        remove_tree(target)
        raise


def conflicts(wanted: dict[str, str]) -> list[str]:
    """Return which packages (name: version) a task process cannot have, since mrcore has loaded another version."""
    from importlib import metadata  # here: an agent needs it hardly ever

    errors = []
    for name, version in wanted.items():
        plain = re.sub(r"[-_.]+", "-", name).lower()
        if plain not in OURS:
            continue
        try:
            ours = metadata.version(plain)
        except metadata.PackageNotFoundError:  # not on this CPU: then mrcore does not load it either
            continue
        if ours != version:
            errors.append(
                f"it asks for {plain} {version}, and mrcore itself runs on {plain} {ours}, which a task has loaded "
                f"before: write {plain}=={ours} into {REQUIREMENTS}, or leave it out"
            )
    return errors


def _pip(arguments: list[str], project: str, node: str) -> str:
    surroundings = {key: value for key, value in os.environ.items() if not key.startswith("PIP_")}
    surroundings |= {"PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    command = [sys.executable, "-I", "-m", "pip", *arguments]
    try:
        done = subprocess.run(
            command, env=surroundings, cwd="/", stdin=subprocess.DEVNULL, capture_output=True, text=True,
            errors="replace", timeout=INSTALL_SECONDS, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ClusterFault(f"{node}: cannot install the packages of project {project}: {error}") from None
    if done.returncode == 0:
        return done.stdout
    if "No module named pip" in done.stderr:
        raise ClusterFault(f"{node}: {sys.prefix} has no pip to install the packages of project {project} with: add it")
    if "No space left on device" in done.stderr:
        raise ClusterFault(
            f"the disk of {node} is full while the packages of project {project} are installed: make room there; the "
            "job goes on by itself",
            hold=True,
        )
    lines = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
    raise JobFault(
        f"the packages of project {project} cannot be installed on {node}: {' '.join(lines) or done.stderr[-500:]}; "
        f"wheels are missing or made for another Python: {_how_to_fetch(project)}",
        code="packages",
    )


def install_for_trial(project: Path) -> Path | None:
    """Return the environment that a project asks for, from the caller's cache; None if it asks for none."""
    name = environment_hash(project)
    if name is None:
        return None
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mrcore" / "environments"
    if not (cache / name).is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            install(project, Path(folder) / name, project.name, "this machine")
            if not (cache / name).is_dir():
                shutil.move(Path(folder) / name, cache / name)
    return cache / name


def use_packages(environment: Path) -> None:
    """Let this process import from a folder of installed packages: after the standard library, before all others."""
    # msgspec has loaded it and holds what it needs: a project may bring its own.
    sys.modules.pop("typing_extensions", None)
    before = len(sys.path)
    site.addsitedir(str(environment))  # unlike a mere entry, this reads .pth files
    entries = sys.path[before:]
    del sys.path[before:]
    others = [number for number, entry in enumerate(sys.path) if entry.endswith(("site-packages", "dist-packages"))]
    at = min(others, default=len(sys.path))
    sys.path[at:at] = entries
