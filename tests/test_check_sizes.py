"""`tools/check_sizes.py` finds what it is there to find."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

TOOL = Path(__file__).parent.parent / "tools/check_sizes.py"


@pytest.fixture
def check(tmp_path: Path) -> ModuleType:
    """The tool, looking at a package of three floors in a folder of its own."""
    spec = importlib.util.spec_from_file_location("check_sizes", TOOL)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    package = tmp_path / "mrcore"
    (package / "rpc").mkdir(parents=True)
    module.PACKAGE, module.FLOORS = package, [{"low", "other"}, {"rpc"}, {"daemon"}]  # type: ignore[attr-defined]
    module.DAEMONS = ("daemon",)  # type: ignore[attr-defined]
    return module


def faults(check: ModuleType, **modules: str) -> list[str]:
    for name, text in modules.items():
        (check.PACKAGE / f"{name.replace('__', '/')}.py").write_text(text)
    files = sorted(check.PACKAGE.rglob("*.py"))
    return [*check.check_sizes(files), *check.check_floors(files), *check.check_daemons()]


def test_a_clean_package_has_no_faults(check: ModuleType) -> None:
    low = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import pydantic\n\ndef late():\n    import yaml\n"
    assert (
        faults(check, low=low, rpc__wire="import rpyc\n", daemon="from mrcore import low\nimport mrcore.rpc.wire\n")
        == []
    )


def test_an_import_that_goes_up_is_found(check: ModuleType) -> None:
    assert faults(check, low="from mrcore.daemon import x\n", daemon="") == [
        "low.py:1: floor 0 imports daemon of floor 2"
    ]


def test_an_import_that_goes_up_inside_a_function_is_found(check: ModuleType) -> None:
    found = faults(check, low="def f():\n    from mrcore import daemon\n", daemon="")
    assert found == ["low.py:2: floor 0 imports daemon of floor 2"]


def test_a_circle_on_one_floor_is_found(check: ModuleType) -> None:
    found = faults(check, low="from mrcore import other\n", other="from mrcore.low import y\n", daemon="")
    assert found == ["low: imports itself in a circle", "other: imports itself in a circle"]


def test_a_module_on_no_floor_is_found(check: ModuleType) -> None:
    assert any("stray.py: on no floor" in fault for fault in faults(check, stray="", daemon=""))


def test_a_library_in_the_wrong_place_is_found(check: ModuleType) -> None:
    assert faults(check, low="import rpyc.core\n", daemon="") == ["low.py:1: rpyc may be imported by rpc only"]


def test_a_heavy_library_in_a_daemon_is_found_with_the_way_there(check: ModuleType) -> None:
    found = faults(check, low="try:\n    import yaml\nfinally:\n    pass\n", rpc__wire="from mrcore import low\n",
                   daemon="from mrcore.rpc import wire\n")  # fmt: skip
    assert found == ["daemon loads yaml: daemon → rpc.wire → low → yaml"]


def test_what_is_too_long_is_found(check: ModuleType) -> None:
    function = "def f():\n" + "    x = 1\n" * check.MAX_FUNCTION_LINES
    module = "x = 1\n" * (check.MAX_MODULE_LINES + 1)
    found = faults(check, low=function, other=module, daemon="")
    assert [fault.split(",")[0] for fault in found] == ["low.py:1: f has 71 lines", "other.py: 501 lines"]


def test_docstrings_comments_and_blank_lines_cost_nothing(check: ModuleType) -> None:
    text = '"""Two\nlines."""\n\n# a comment\nx = 1\n\n\ndef f():\n    """One."""\n    return (\n        x\n    )\n'
    (check.PACKAGE / "low.py").write_text(text)
    assert check.code_lines(check.PACKAGE / "low.py") == 5
