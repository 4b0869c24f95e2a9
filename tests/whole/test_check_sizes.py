"""`tools/check_sizes.py` finds what it is there to find."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools/check_sizes.py"


@pytest.fixture
def check(tmp_path: Path) -> ModuleType:
    """The tool, looking at a package of two packages in a folder of its own."""
    spec = importlib.util.spec_from_file_location("check_sizes", TOOL)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("engine", "cluster"):
        (tmp_path / "mrcore" / name).mkdir(parents=True)
        (tmp_path / "mrcore" / name / "README.md").write_text("")
    module.PACKAGE, module.BUDGETS = tmp_path / "mrcore", {"": 10, "engine": 10, "cluster": 100}  # type: ignore[attr-defined]
    return module


def errors(check: ModuleType, **modules: str) -> list[str]:
    for name, text in modules.items():
        (check.PACKAGE / f"{name.replace('__', '/')}.py").write_text(text)
    files = sorted(check.PACKAGE.rglob("*.py"))
    return [line for path in files for line in check.check_file(path)] + check.check_packages(files)


def test_packages_within_their_budgets_have_no_errors(check: ModuleType) -> None:
    assert errors(check, task="x = 1\n", engine__a="x = 1\n" * 10) == []


def test_a_package_past_its_budget_is_found(check: ModuleType) -> None:
    assert errors(check, engine__a="x = 1\n" * 6, engine__b="x = 1\n" * 5) == [
        "mrcore/engine has 11 lines of code, at most 10"
    ]


def test_the_reading_of_a_day_is_bounded_as_a_whole(check: ModuleType) -> None:
    check.MAX_DAY_LINES = 50  # type: ignore[attr-defined]
    assert errors(check, engine__a="x = 1\n" * 10, cluster__b="x = 1\n" * 41) == [
        "engine and cluster have 51 lines of code together, at most 50"
    ]


def test_a_package_without_budget_or_readme_is_found(check: ModuleType) -> None:
    (check.PACKAGE / "stray").mkdir()
    assert errors(check, stray__a="") == [
        "mrcore/stray has no budget: add it to BUDGETS in check_sizes.py",
        "mrcore/stray has no README.md",
    ]


def test_what_is_too_long_is_found(check: ModuleType) -> None:
    check.BUDGETS[""] = 1_000
    function = "def f():\n" + "    x = 1\n" * check.MAX_FUNCTION_LINES
    module = "x = 1\n" * (check.MAX_MODULE_LINES + 1)
    found = errors(check, low=function, other=module)
    assert [line.split(",")[0] for line in found] == ["low.py:1: f has 71 lines", "other.py: 501 lines"]


def test_docstrings_comments_and_blank_lines_cost_nothing(check: ModuleType) -> None:
    text = '"""Two\nlines."""\n\n# a comment\nx = 1\n\n\ndef f():\n    """One."""\n    return (\n        x\n    )\n'
    (check.PACKAGE / "low.py").write_text(text)
    assert check.code_lines(check.PACKAGE / "low.py") == 5
