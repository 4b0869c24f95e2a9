"""The lock files: every package has one version and checksums, they hold all that pyproject.toml asks for, and what a
machine gets of them is chosen by its Python and CPU."""

from __future__ import annotations

import re
import sys
import tomllib
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_ansible_plugins import wheelhouse

PROJECT = Path(__file__).parent.parent
FILES = ("base", "build", "dev", "appliance", "bench")
PINNED = re.compile(r"([a-z0-9-]+)==([^\s;]+)( ; [^\\]+)? \\")
CHECKSUM = re.compile(r"    --hash=sha256:[0-9a-f]{64}( \\)?")


def pins(name: str, python: str = "3.11", machine: str = "x86_64") -> dict[str, str]:
    """Package → version, of what such a machine gets of a lock file."""
    lines = wheelhouse.locked((PROJECT / f"lock/{name}.txt").read_text(), python, machine).splitlines()
    found = [line.split()[0].split("==") for line in lines if not line.startswith((" ", "#"))]
    assert len({package for package, _ in found}) == len(found), "one version of each"
    return dict(found)


@pytest.mark.parametrize("name", FILES)
def test_every_line_is_a_version_or_a_checksum(name: str) -> None:
    comment, *lines = (PROJECT / f"lock/{name}.txt").read_text().splitlines()
    assert comment.startswith("# ")
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        assert PINNED.fullmatch(line) or CHECKSUM.fullmatch(line), line
        assert line.endswith("\\") == following.startswith(" "), "a version has checksums, and the last one ends it"


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_all_that_is_asked_for_is_there_within_its_bounds(python: str) -> None:
    asked = tomllib.loads((PROJECT / "pyproject.toml").read_text())
    extras = asked["project"]["optional-dependencies"]
    assert set(extras) == set(FILES) - {"base", "build"}
    wanted = {"base": asked["project"]["dependencies"], "build": asked["build-system"]["requires"]} | extras
    for name, requirements in wanted.items():
        there = pins(name, python) | (pins("base", python) if name in extras else {})
        for requirement in map(Requirement, requirements):
            version = there.get(canonicalize_name(requirement.name))
            hint = f"{requirement} is not in lock/{name}.txt as asked for, which has {version}: run make update-lock"
            assert version and requirement.specifier.contains(version, prereleases=True), hint


def test_files_that_are_installed_together_agree() -> None:
    for extra in ("dev", "appliance", "bench"):
        for other in ("base", "dev", "build"):
            first, second = pins(extra), pins(other)
            assert {name: first[name] for name in first.keys() & second.keys()} == {
                name: second[name] for name in first.keys() & second.keys()
            }


def test_what_is_installed_here_is_what_is_locked() -> None:
    python = "{}.{}".format(*sys.version_info[:2])
    for name in ("base", "build", "dev"):
        for package, version in pins(name, python).items():
            assert distribution(package).version == version, package


LOCK = """# a comment
always==1 \\
    --hash=sha256:aa \\
    --hash=sha256:bb
older==2 ; python_full_version < '3.12' \\
    --hash=sha256:cc
newer==3 ; python_full_version >= '3.12' \\
    --hash=sha256:dd
cpu==4 ; platform_machine == 'aarch64' or platform_machine == 'x86_64' \\
    --hash=sha256:ee
pypy==5 ; platform_python_implementation == 'PyPy' \\
    --hash=sha256:ff
"""


@pytest.mark.parametrize(
    ("python", "machine", "names"),
    [
        ("3.11", "x86_64", "always older cpu"),
        ("3.12", "x86_64", "always newer cpu"),
        ("3.13", "aarch64", "always newer cpu"),
        ("3.11", "riscv64", "always older"),
    ],
)
def test_conditions_are_judged_for_the_node_not_for_the_controller(python: str, machine: str, names: str) -> None:
    chosen = wheelhouse.locked(LOCK, python, machine)
    assert re.findall(r"^(\w+)==\d \\$", chosen, re.MULTILINE) == names.split()
    assert ";" not in chosen, "pip would judge it once more, by its own Python"
    assert chosen.count("--hash") == len(names.split()) + 1
