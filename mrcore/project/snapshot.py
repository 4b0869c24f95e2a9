"""The files of a project as one snapshot: which belong to it, their hash, their archive."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator
from pathlib import Path

from mrcore.errors import JobFault
from mrcore.system.archives import pack
from mrcore.system.permissions import blocked
from mrcore.system.readers import open_regular
from mrcore.text import unfit

_IGNORED = {"__pycache__", "wheels"}  # compiled files differ by interpreter; wheels travel apart
MAX_PROJECT_BYTES = 512 << 20  # it travels in one piece, through the memory of the master and of each node


def project_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield `(relative name, path)` of every file that makes up a project, in order of name.

    Dotfiles, `__pycache__` and `wheels` are left out. Raises JobFault for a link that leads out of the folder, for what
    is no plain file (to open a FIFO would wait for ever), and when all together is larger than MAX_PROJECT_BYTES.
    """
    root, total = folder.resolve(), 0
    for base, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in _IGNORED and not name.startswith("."))
        for name in sorted(name for name in files if not name.startswith(".") and not name.endswith(".pyc")):
            path = Path(base, name)
            if why := unfit(str(path)):
                raise JobFault(f"the name of the project file {str(path)!r} {why}: rename it", code="project")
            if not path.resolve().is_relative_to(root):
                text = f"project file {path} is a link that leads out of the project: copy the file instead"
                raise JobFault(text, code="project")
            if reason := blocked(path):
                raise JobFault(f"project file: {reason}", code="project")
            try:
                with open(open_regular(path), "rb") as stream:
                    total += os.fstat(stream.fileno()).st_size
            except OSError as error:
                text = f"project file {path} cannot be read: {error.strerror}: remove it"
                raise JobFault(text, code="project") from None
            if total > MAX_PROJECT_BYTES:
                raise JobFault(
                    f"project folder {folder}: with {path} it is larger than {MAX_PROJECT_BYTES >> 20} MiB: put data "
                    "into input_dirs or auxiliary data",
                    code="project",
                )
            yield str(path.relative_to(folder)), path


def project_hash(folder: Path) -> str:
    """Return the content hash that names a snapshot of the project: 32 hexadecimal digits."""
    state = hashlib.sha256()
    for name, path in sorted(project_files(folder)):
        content = path.read_bytes()
        state.update(f"{len(name.encode())}:{name}:{len(content)}:".encode() + content)
    return state.hexdigest()[:32]


def pack_project(folder: Path) -> bytes:
    """Return the project's files as an uncompressed tar archive, the same bytes for the same content."""
    buffer = io.BytesIO()
    pack(sorted(project_files(folder)), buffer)
    return buffer.getvalue()
