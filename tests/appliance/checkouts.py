"""Other builds of mrcore: copies of this checkout with a version of their own."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from lab import PROJECT

SKIPPED = {".git", ".venv", ".mrcore", "bench", "build", "__pycache__"}


def checkout(folder: Path, version: str, wire: int | None = None, broken: bool = False) -> Path:
    """A copy of what is in this checkout, as another version.

    `wire`: another wire version, which the present one does not speak. `broken`: its cluster servers end at once.
    """
    shutil.rmtree(folder, ignore_errors=True)
    listed = ["git", "-C", str(PROJECT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, capture_output=True, check=True).stdout.decode().split("\0"):
        if name and name.split("/")[0] not in SKIPPED and (PROJECT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(PROJECT / name, folder / name)
    package = folder / "mrcore/__init__.py"
    text = re.sub(r'__version__ = ".*"', f'__version__ = "{version}"', package.read_text())
    if wire is not None:
        text = re.sub(r"WIRE_VERSION = \d+", f"WIRE_VERSION = {wire}", text)
    package.write_text(text)
    project = folder / "pyproject.toml"
    project.write_text(re.sub(r'^version = ".*"', f'version = "{version}"', project.read_text(), flags=re.MULTILINE))
    if broken:
        server = folder / "mrcore/cluster_server.py"
        server.write_text(server.read_text() + '\nraise SystemExit("this build does not start")\n')
    return folder
