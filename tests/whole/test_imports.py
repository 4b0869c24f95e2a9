"""The rules of imports between packages (pyproject.toml): kept, and a change that breaks one is found."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    environment = os.environ | {"PYTHONPATH": str(folder)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(PROJECT / "mrcore", tmp_path / "mrcore", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(PROJECT / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_rules_are_kept() -> None:
    done = lint(PROJECT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("module", "line", "rule"),
    [
        ("engine/records", "from mrcore.queue import job", "A package imports only those below it"),
        ("engine/records", "def f():\n    from mrcore.queue import job", "A package imports only those below it"),
        ("settings/config", "from mrcore.project import packages", "A package imports only those below it"),
        ("node/files", "from mrcore.settings import config", "A node knows nothing of settings and queue"),
        ("engine/output", "from mrcore.wire import tls", "The engine knows no network"),
        ("node/files", "import rpyc", "Only wire imports rpyc"),
        ("cluster/attempt", "import fabric", "Only launchers import fabric and paramiko"),
        ("system/paths", "import yaml", "Daemons load nothing heavy"),
    ],
)
def test_an_import_against_a_rule_is_found(copy: Path, module: str, line: str, rule: str) -> None:
    path = copy / f"mrcore/{module}.py"
    path.write_text(path.read_text() + f"\n{line}\n")
    done = lint(copy)
    broken = [line for line in done.stdout.splitlines() if "BROKEN" in line]
    assert done.returncode and any(rule in line for line in broken), done.stdout + done.stderr


def test_a_package_without_a_place_is_found(copy: Path) -> None:
    (copy / "mrcore/stray").mkdir()
    (copy / "mrcore/stray/__init__.py").write_text("")
    done = lint(copy)
    assert done.returncode and "mrcore.stray" in done.stdout, done.stdout
