"""Wheels that tests make by themselves: a zip with a module and what PEP 427 wants beside it."""

from __future__ import annotations

import base64
import hashlib
import zipfile
from pathlib import Path


def make_wheel(
    folder: Path, name: str, version: str, files: dict[str, str], requires: str = "", tag: str = "py3-none-any"
) -> Path:
    """Write NAME-VERSION-TAG.whl with these files into a folder, and give its path."""
    folder.mkdir(parents=True, exist_ok=True)
    about = f"{name}-{version}.dist-info"
    more = f"Requires-Dist: {requires}\n" if requires else ""
    contents = files | {
        f"{about}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{more}",
        f"{about}/WHEEL": f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {tag}\n",
    }
    record = f"{about}/RECORD,,\n"
    for path, text in contents.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        record += f"{path},sha256={digest},{len(text.encode())}\n"
    wheel = folder / f"{name}-{version}-{tag}.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in (contents | {f"{about}/RECORD": record}).items():
            archive.writestr(path, text)
    return wheel
