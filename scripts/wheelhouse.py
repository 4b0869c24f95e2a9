#!/usr/bin/env python3
"""Collects on the controller all wheels that nodes need, so that they need no package index.

    scripts/wheelhouse.py release          which release this checkout is
    scripts/wheelhouse.py build …          mrcore and what it needs, into .mrcore/wheelhouse
    scripts/wheelhouse.py project FOLDER … FOLDER/requirements.txt into FOLDER/wheels

… is what the nodes are: --python 3.11 --machine x86_64 --glibc 2.36. This controller may have another Python: pip is
made to judge the conditions of requirements (`python_version < "3.13"`) for the nodes. mrcore's own are in
lock/base.txt, its dashboard's in lock/dashboard.txt, with their checksums. Where the wheels come from is pip's
configuration.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST_GLIBC_MINOR = 5  # manylinux_2_5 is the oldest tag
OLD_TAGS = {12: "manylinux2010", 5: "manylinux1", 17: "manylinux2014"}  # names that wheels had before manylinux_2_N
MARKER = ".complete"
LOCKS = ("lock/base.txt", "lock/dashboard.txt")  # what machines get; one release is the same on all of them
# pip takes the nodes' Python and platform for choosing files, and its own for conditions; there is no option for these.
# The pip is the one that lock/build.txt names.
PIP_FOR_NODES = """import json, sys
from pip._vendor.packaging import markers
ours, nodes = markers.default_environment, json.loads(sys.argv.pop(1))
markers.default_environment = lambda: ours() | nodes
from pip._internal.cli.main import main
sys.exit(main())
"""


class Fault(Exception):
    """What went wrong, for people."""


def release_of(root: Path) -> str:
    """The release of a checkout: its version and a checksum of what is installed (package, project table, lock)."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    locks = [(root / name).read_bytes() for name in LOCKS]
    digest = hashlib.sha256(json.dumps(project, sort_keys=True).encode() + b"".join(locks))
    shown = [path for name in ("static", "templates") for path in (root / "mrcore/web" / name).glob("*")]
    files = [*(root / "mrcore").rglob("*.py"), *shown]
    for file in sorted(files, key=lambda path: path.relative_to(root).as_posix()):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(root).as_posix()}\0{len(content)}\0".encode() + content)
    return f"{project['version']}-{digest.hexdigest()[:8]}"


def platform_tags(machine: str, glibc: str) -> list[str]:
    """The platforms whose wheels run on this CPU with this glibc or a newer one, best first."""
    major, minor = (int(part) for part in glibc.split(".")[:2])
    if major != 2:
        raise Fault(f"glibc {glibc} is not known here: 2.x is")
    tags = []
    for number in range(minor, OLDEST_GLIBC_MINOR - 1, -1):
        tags.append(f"manylinux_2_{number}_{machine}")
        if number in OLD_TAGS:
            tags.append(f"{OLD_TAGS[number]}_{machine}")
    return tags


def run(command: list[str]) -> None:
    """Run pip. Raises Fault with the end of what it said."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = "\n".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-8:])
        raise Fault(f"pip failed, is there a network or a package index configured for pip?\n{said}")


def choice(args: argparse.Namespace) -> list[str]:
    """The options by which pip chooses wheels for the nodes instead of for this machine."""
    options = ["--only-binary=:all:", f"--python-version={args.python}", "--implementation=cp"]
    options.append(f"--abi=cp{args.python.replace('.', '')}")
    return options + [f"--platform={tag}" for tag in platform_tags(args.machine, args.glibc)]


def collect(args: argparse.Namespace, folder: Path, wanted: list[str], proof: list[str]) -> None:
    """Fill `folder` with the wheels of `wanted` and all they need, and prove that they suffice for `proof`."""
    node = {"python_version": args.python, "python_full_version": f"{args.python}.0", "platform_machine": args.machine}
    pip = [sys.executable, "-c", PIP_FOR_NODES, json.dumps(node)]
    options = ["--quiet", f"--find-links={folder}", *choice(args)]
    run([*pip, "download", *options, f"--dest={folder}", *wanted])
    options += ["--dry-run", "--no-index", "--ignore-installed", f"--target={folder / 'nowhere'}"]
    run([*pip, "install", *options, *proof])


def is_whole(folder: Path, glibc: str) -> bool:
    """Whether a wheelhouse was finished, and for a glibc that is not newer than this one."""
    try:
        made_for = (folder / MARKER).read_text().strip()
    except OSError:
        return False
    return [int(part) for part in made_for.split(".")] <= [int(part) for part in glibc.split(".")]


def build(args: argparse.Namespace) -> dict[str, object]:
    """Make the wheelhouse of this checkout unless it is there; a half-made one is made anew."""
    release = release_of(ROOT)
    house = ROOT / ".mrcore/wheelhouse" / f"{release}-cp{args.python.replace('.', '')}-{args.machine}"
    archive = house.with_name(house.name + ".tar")
    answer: dict[str, object] = {"release": release, "folder": str(house), "archive": str(archive), "changed": False}
    house.parent.mkdir(parents=True, exist_ok=True)
    with (house.parent / ".lock").open("w") as lock:  # one checkout may deploy two clusters at once
        fcntl.flock(lock, fcntl.LOCK_EX)
        if is_whole(house, args.glibc) and archive.exists():
            return answer
        make(args, house, archive)
    return answer | {"changed": True}


def make(args: argparse.Namespace, house: Path, archive: Path) -> None:
    """Make it anew; it is there all at once, its archive first."""
    with tempfile.TemporaryDirectory(dir=house.parent, prefix="making-") as name:
        work = Path(name)
        source, wheels = work / "source", work / "wheels"
        shutil.copytree(ROOT / "mrcore", source / "mrcore", ignore=shutil.ignore_patterns("__pycache__"))
        for file in ("pyproject.toml", "README.md"):
            shutil.copy(ROOT / file, source)
        own = ["--quiet", "--no-deps", "--no-build-isolation", f"--wheel-dir={wheels}", str(source)]
        run([sys.executable, "-m", "pip", "wheel", *own])  # by the locked setuptools, which is beside us
        locked = ["--require-hashes", *(f"--requirement={ROOT / name}" for name in LOCKS)]
        collect(args, wheels, locked, [f"{file}[dashboard]" for file in wheels.glob("mrcore-*.whl")])
        (wheels / MARKER).write_text(args.glibc + "\n")
        partial = work / "archive"
        with tarfile.open(partial, "w") as tar:
            for file in sorted(wheels.glob("*.whl")):
                tar.add(file, file.name)
        os.replace(partial, archive)
        shutil.rmtree(house, ignore_errors=True)
        os.replace(wheels, house)


def project(args: argparse.Namespace) -> dict[str, object]:
    """Resolve FOLDER/requirements.txt into FOLDER/wheels, which takes its place all at once."""
    requirements, final = args.folder / "requirements.txt", args.folder / "wheels"
    if not requirements.is_file():
        raise Fault(f"{requirements} is not there: a project without it needs no wheels")
    with tempfile.TemporaryDirectory(dir=args.folder, prefix=".wheels-") as name:
        work = Path(name)
        (work / "wheels").mkdir()
        asked = [f"--requirement={requirements}"]
        collect(args, work / "wheels", asked, asked)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(work / "wheels", final)
    return {"folder": str(final), "wheels": sorted(file.name for file in final.glob("*.whl")), "changed": True}


def version(text: str) -> str:
    """A version of two numbers, as an option."""
    if not re.fullmatch(r"\d+\.\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form 3.11")
    return text


def main() -> int:
    """Do what is asked; prints JSON (`release`: the bare name). Exit status 1 with one line of why it failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("release")
    for name in ("build", "project"):
        command = commands.add_parser(name)
        if name == "project":
            command.add_argument("folder", type=Path)
        command.add_argument(
            "--python", type=version, required=True, help="minor version of the nodes' Python, as 3.11"
        )
        command.add_argument("--machine", required=True, help="CPU of the nodes as uname -m says it")
        command.add_argument("--glibc", type=version, required=True, help="oldest glibc among the nodes")
    args = parser.parse_args()
    if args.command == "release":
        print(release_of(ROOT))
        return 0
    try:
        print(json.dumps(build(args) if args.command == "build" else project(args)))
    except Fault as fault:
        print(f"wheelhouse: {fault}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
