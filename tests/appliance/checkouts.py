"""Other builds of mrcore: copies of this checkout with a version of their own."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

from lab import PROJECT, LabError

SKIPPED = {".git", ".venv", ".mrcore", "bench", "build", "__pycache__"}


def checkout(folder: Path, version: str, wire: int | None = None, broken: bool = False) -> Path:
    """A copy of what is in this checkout, as another version.

    `wire`: another wire version, which the present one does not speak. `broken`: its node agents end at once.
    """
    shutil.rmtree(folder, ignore_errors=True)
    listed = ["git", "-C", str(PROJECT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, capture_output=True, check=True).stdout.decode().split("\0"):
        if name and name.split("/")[0] not in SKIPPED and (PROJECT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(PROJECT / name, folder / name, follow_symlinks=False)
    package = folder / "mrcore/__init__.py"
    text = re.sub(r'__version__ = ".*"', f'__version__ = "{version}"', package.read_text())
    if wire is not None:
        text = re.sub(r"WIRE_VERSION = \d+", f"WIRE_VERSION = {wire}", text)
    package.write_text(text)
    project = folder / "pyproject.toml"
    project.write_text(re.sub(r'^version = ".*"', f'version = "{version}"', project.read_text(), flags=re.MULTILINE))
    if broken:  # where it says that it is ready: it can be imported, and does not run
        agent = folder / "mrcore/node/node_agent.py"
        text, count = re.subn(
            r"procfs\.announce_ready\(\)", "raise SystemExit('this build does not start')", agent.read_text()
        )
        assert count == 1, "the place to break is gone"
        agent.write_text(text)
    return folder


def committed(folder: Path, commit: str) -> Path:
    """The files of a commit of this repository, as somebody has them who cloned it then."""
    shutil.rmtree(folder, ignore_errors=True)
    done = subprocess.run(["git", "-C", str(PROJECT), "archive", commit], capture_output=True)
    if done.returncode:
        raise LabError(f"MRCORE_TEST_UPGRADE_FROM={commit}: {done.stderr.decode(errors='replace').strip()}")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as tar:
        tar.extractall(folder, filter="data")
    return folder
