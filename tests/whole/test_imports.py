"""The rules of imports between packages (pyproject.toml), the face `import mrcore`, and what is installed with it."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from checkout import PROJECT

import mrcore


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


def in_another_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_mrcore_alone_loads_nothing_else() -> None:
    """Daemons and tasks import it, too, and must stay small."""
    named = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["dependencies"]
    packages = {re.split("[^a-z]", name.lower())[0] for name in named} | {"yaml", "paramiko", "sqlite3", "asyncio"}
    assert {"pydantic", "click", "rpyc", "cryptography", "fabric"} <= packages
    code = "import sys; before = set(sys.modules); import mrcore, json; print(json.dumps([*{*sys.modules} - before]))"
    loaded = json.loads(in_another_process(code))
    assert "mrcore" in loaded
    assert [name for name in loaded if name.startswith("mrcore.") or name.split(".")[0] in packages] == []


def test_each_public_name_loads_first_of_all() -> None:
    """Each in a process where no other was loaded before it, so that none depends on another's imports."""
    in_another_process(
        "import os, mrcore\n"
        "for name in mrcore.__all__:\n"
        "    if not os.fork():\n"
        "        getattr(mrcore, name)\n"
        "        os._exit(0)\n"
        "    assert os.wait()[1] == 0, name\n"
    )


def test_type_checkers_see_the_same_public_names() -> None:
    (block,) = [node for node in ast.parse(Path(mrcore.__file__).read_text()).body if isinstance(node, ast.If)]
    seen = {alias.asname for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == set(mrcore.__all__) - {"__version__"}
    assert set(mrcore.__all__) <= set(dir(mrcore))


def test_an_unknown_name_is_no_public_name() -> None:
    with pytest.raises(AttributeError, match="module 'mrcore' has no attribute 'nothing'"):
        _ = mrcore.nothing
    with pytest.raises(ImportError, match="nothing"):
        from mrcore import nothing  # noqa: F401


def test_the_wheel_holds_every_module_and_says_that_it_has_types(copy: Path) -> None:
    for name in ("README.md", "LICENSE"):
        shutil.copy(PROJECT / name, copy)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        "out",
        ".",
    ]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    (wheel,) = (copy / "out").glob("mrcore-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert "mrcore/py.typed" in names
    assert {str(path.relative_to(PROJECT)) for path in (PROJECT / "mrcore").rglob("*.py")} <= names
    shown = [path for folder in ("static", "templates") for path in (PROJECT / "mrcore/web" / folder).iterdir()]
    assert shown and {str(path.relative_to(PROJECT)) for path in shown} <= names
