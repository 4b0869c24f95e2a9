#!/usr/bin/env python3
"""Chooses anew the versions of all packages that make installs, within the bounds of pyproject.toml.

    scripts/update_lock.py         writes lock/*.txt, one for each set of packages, with versions and checksums

`lock/base.txt` is what mrcore itself needs, and all that a cluster's machines get; `lock/build.txt` what builds and
installs packages. Each extra of pyproject.toml has a file with what it adds to base, and to dev. The versions fit one
another, whatever is combined, and are valid for every Python that pyproject.toml allows: an entry for some of them ends
in the condition for it.

uv does the work, in a virtual environment of its own. From where it takes packages is its configuration
(UV_DEFAULT_INDEX, SSL_CERT_FILE); the files name no place.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SYSTEM = "sys_platform == 'linux'"  # the only one: what others need is left out
ADDED_TO = {
    "dashboard": ("base",),
    "notebook": ("base",),
    "dev": ("base",),
    "appliance": ("base", "dev"),
    "test": ("base", "dashboard", "notebook", "dev"),
    "docs": ("base", "dashboard", "notebook", "dev", "test"),
    "bench": ("base", "dev"),
}


def resolve(uv: Path, work: Path, source: Path, extras: tuple[str, ...]) -> list[str]:
    """The entries, each with its checksums, that `source` with these extras needs. Raises CalledProcessError."""
    result = work / "resolved.txt"
    command = [str(uv), "pip", "compile", "--quiet", "--universal", "--python-version", oldest_python()]
    command += ["--generate-hashes", "--no-annotate", "--no-header", "--upgrade", f"--output-file={result}"]
    command += [f"--extra={extra}" for extra in extras]
    if (work / "all.txt").exists():
        command.append(f"--constraint={work / 'all.txt'}")
    subprocess.run([*command, str(source)], cwd=work, check=True)
    entries: list[str] = []
    for line in result.read_text().splitlines(keepends=True):
        if line.startswith(" "):
            entries[-1] += line
        else:
            entries.append(line.replace(f" ; {SYSTEM}", "").replace(f" and {SYSTEM}", ""))
    return entries


def oldest_python() -> str:
    """The lower bound that pyproject.toml gives, as 3.11."""
    return str(project()["project"]["requires-python"]).removeprefix(">=")


def project() -> dict[str, Any]:
    """What pyproject.toml says."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def write(name: str, what: str, entries: list[str]) -> None:
    """Write one lock file, whole."""
    file = ROOT / f"lock/{name}.txt"
    partial = file.with_suffix(".partial")
    partial.write_text(f"# {what}. Written by `make update-lock`.\n" + "".join(entries))
    partial.replace(file)
    print(f"{file.relative_to(ROOT)}: {len(entries)} packages")


def main() -> int:
    """Write all lock files."""
    with tempfile.TemporaryDirectory(prefix="mrcore-lock-") as name:
        work = Path(name)
        subprocess.run([sys.executable, "-m", "venv", str(work / "venv")], check=True)
        subprocess.run([str(work / "venv/bin/python"), "-m", "pip", "install", "--quiet", "uv"], check=True)
        uv, source, builders = work / "venv/bin/uv", work / "pyproject.toml", work / "build.in"
        text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        source.write_text(f'{text}\n[tool.uv]\nenvironments = ["{SYSTEM}"]\n', encoding="utf-8")
        builders.write_text("\n".join(["pip", *project()["build-system"]["requires"]]) + "\n")
        (work / "all.txt").write_text("".join(resolve(uv, work, source, tuple(ADDED_TO))))
        found = {"base": resolve(uv, work, source, ())}
        write("base", "What mrcore needs", found["base"])
        for extra, others in ADDED_TO.items():
            needed = resolve(uv, work, source, (*others, extra)[1:])
            there = {entry for each in others for entry in found[each]}
            found[extra] = [entry for entry in needed if entry not in there]
            write(extra, f"What the extra {extra} adds to {' and '.join(others)}", found[extra])
        write("build", "What builds and installs packages", resolve(uv, work, builders, ()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
