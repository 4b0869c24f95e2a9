"""The lock files: every package has one version and checksums, and they hold all that pyproject.toml asks for. The
wheels of a deploy are chosen for the machines' Python and CPU, not the controller's."""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import sys
import tomllib
from importlib.metadata import distribution
from pathlib import Path

import pytest
from checkout import PROJECT, module
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from wheels import make_wheel

wheelhouse = module("scripts/wheelhouse.py")
FILES = ("base", "build", "dashboard", "notebook", "dev", "test", "docs", "appliance", "bench")
PINNED = re.compile(r"([a-z0-9-]+)==([^\s;]+)( ; [^\\]+)? \\")
CHECKSUM = re.compile(r"    --hash=sha256:[0-9a-f]{64}( \\)?")


def pins(name: str, python: str = "3.11") -> dict[str, str]:
    """Package → version, of what a lock file has for this Python."""
    node = {"python_version": python, "python_full_version": f"{python}.4", "platform_machine": "x86_64"}
    lines = (PROJECT / f"lock/{name}.txt").read_text().splitlines()
    listed = [Requirement(line.removesuffix("\\")) for line in lines if not line.startswith((" ", "#"))]
    chosen = [each for each in listed if each.marker is None or each.marker.evaluate(node)]
    found = {each.name: str(each.specifier).removeprefix("==") for each in chosen}
    assert len(found) == len(chosen), "one version of each"
    return found


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
        others = ("base", "dashboard", "notebook") if name in extras else ()
        there = pins(name, python) | {key: pin for other in others for key, pin in pins(other, python).items()}
        for requirement in map(Requirement, requirements):
            version = there.get(canonicalize_name(requirement.name))
            hint = f"{requirement} is not in lock/{name}.txt as asked for, which has {version}: run make update-lock"
            assert version and requirement.specifier.contains(version, prereleases=True), hint


def test_files_that_are_installed_together_agree() -> None:
    for extra in FILES:
        for other in FILES:
            first, second = pins(extra), pins(other)
            assert {name: first[name] for name in first.keys() & second.keys()} == {
                name: second[name] for name in first.keys() & second.keys()
            }


def test_what_is_installed_here_is_what_is_locked() -> None:
    python = "{}.{}".format(*sys.version_info[:2])
    for name in ("base", "build", "dev"):
        for package, version in pins(name, python).items():
            assert distribution(package).version == version, package


@pytest.mark.parametrize(
    ("python", "machine", "names"),
    [
        ("3.11", "x86_64", "older some_cpus top"),
        ("3.12", "x86_64", "some_cpus top"),
        ("3.13", "aarch64", "newer some_cpus top"),
        ("3.14", "riscv64", "newer top"),
    ],
)
def test_conditions_are_judged_for_the_nodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, python: str, machine: str, names: str
) -> None:
    offered = tmp_path / "offered"
    for name, requires in (("top", "middle"), ("middle", "older; python_full_version < '3.12'"), ("older", "")):
        make_wheel(offered, name, "1", {f"{name}.py": ""}, requires)
    make_wheel(offered, "newer", "1", {"newer.py": ""})
    make_wheel(offered, "some_cpus", "1", {"some_cpus.py": ""})
    asked = tmp_path / "requirements.txt"
    asked.write_text(
        "top\nnewer; python_version >= '3.13'\nsome-cpus; platform_machine in 'x86_64 aarch64' and os_name == 'posix'\n"
    )
    for name, value in {"CONFIG_FILE": os.devnull, "NO_INDEX": "1", "FIND_LINKS": str(offered)}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    target, wanted = argparse.Namespace(python=python, machine=machine, glibc="2.36"), [f"--requirement={asked}"]
    (tmp_path / "wheels").mkdir()
    wheelhouse.collect(target, tmp_path / "wheels", wanted, wanted)
    found = sorted(path.name.split("-")[0] for path in (tmp_path / "wheels").iterdir())
    assert found == sorted([*names.split(), "middle"])
    (offered / "middle-1-py3-none-any.whl").unlink()
    with pytest.raises(wheelhouse.Fault, match="middle"):
        wheelhouse.collect(target, tmp_path / "offered", wanted, wanted)


@pytest.mark.parametrize(("written", "good"), [("0" * 64, False), (None, True)])
def test_a_wheel_with_another_checksum_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str | None, good: bool
) -> None:
    wheel = make_wheel(tmp_path / "offered", "locked", "1", {"locked.py": ""})
    lock = tmp_path / "lock.txt"
    lock.write_text(f"locked==1 --hash=sha256:{written or hashlib.sha256(wheel.read_bytes()).hexdigest()}\n")
    for name, value in {"CONFIG_FILE": os.devnull, "NO_INDEX": "1", "FIND_LINKS": str(wheel.parent)}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    target, wanted = argparse.Namespace(python="3.13", machine="x86_64", glibc="2.41"), [f"--requirement={lock}"]
    (tmp_path / "wheels").mkdir()
    if good:
        wheelhouse.collect(target, tmp_path / "wheels", wanted, wanted)
        assert [path.name for path in (tmp_path / "wheels").iterdir()] == [wheel.name]
    else:
        with pytest.raises(wheelhouse.Fault, match=r"(?i)hash"):
            wheelhouse.collect(target, tmp_path / "wheels", wanted, wanted)
        assert not list((tmp_path / "wheels").iterdir())
