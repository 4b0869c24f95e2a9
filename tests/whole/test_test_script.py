"""`scripts/test.sh` in a folder of its own: what it runs, what it says it did not run, and its exit status."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from checkout import PROJECT

# Played: what is missing and may not be installed, and tests that fail or were left out.
SETUP = """#!/bin/sh
case "$*" in *{missing}*) exit 3 ;; esac
"""
PYTHON = """#!/bin/sh
echo "$*" >>"$LOG"
case "$*" in
    *pytest*"not slow"*) exit 0 ;;
    *pytest*) [ -z "$LEFT_OUT" ] || echo "the tests marked needs_strace" >>"$MRCORE_NOT_RUN"; exit $UNIT ;;
    *run.py*) [ "$APPLIANCE" != 3 ] || echo "the scenarios: no rights" >>"$MRCORE_NOT_RUN"; exit $APPLIANCE ;;
esac
"""
UNIT, APPLIANCE = "-m pytest -n 2 --dist worksteal", "tests/appliance/run.py"
SLOW, QUICK = f"{UNIT} -m slow", f"{UNIT} -m not slow"


def run(
    folder: Path, *arguments: str, missing: str = "nothing", unit: int = 0, appliance: int = 0,
    left_out: bool = False, ci: bool = False,
) -> tuple[int, list[str], str]:  # fmt: skip
    """Exit status, what was called (sorted: some of it runs beside the rest), what was said."""
    for name, text in (("scripts/setup.sh", SETUP.format(missing=missing)), (".venv/bin/python", PYTHON)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    shutil.copy(PROJECT / "scripts/test.sh", folder / "scripts")
    (folder / "sudo").write_text("#!/bin/sh\nexit 1\n")
    (folder / "sudo").chmod(0o755)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "LOG": str(folder / "log"), "TMPDIR": str(folder)}
    environment |= {"UNIT": str(unit), "APPLIANCE": str(appliance), "LEFT_OUT": "yes" if left_out else ""}
    environment |= {"CI": "true"} if ci else {}
    command = ["/bin/sh", str(folder / "scripts/test.sh"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    log = folder / "log"
    return done.returncode, sorted(log.read_text().splitlines()) if log.exists() else [], done.stderr


def test_all_is_run(tmp_path: Path) -> None:
    status, called, said = run(tmp_path)
    assert (status, called, said) == (0, [SLOW, APPLIANCE], "")
    steps = (PROJECT / "tests/appliance/fresh.py").read_text()
    assert '("make test-quick", " passed")' in steps
    assert not list(tmp_path.glob("tmp*")), "nothing is left behind"


def test_arguments_choose_unit_tests_only(tmp_path: Path) -> None:
    assert run(tmp_path, "-k", "shuffle") == (0, [f"{UNIT} -k shuffle"], "")


def test_the_appliance_alone(tmp_path: Path) -> None:
    assert run(tmp_path, "--appliance", "cluster", "create") == (0, [f"{APPLIANCE} cluster create"], "")


@pytest.mark.parametrize("ci", [False, True])
def test_without_the_right_to_install_the_rest_is_run_and_told(tmp_path: Path, ci: bool) -> None:
    status, called, said = run(tmp_path, missing="podman", ci=ci)
    if ci:
        assert status == 1 and called == [SLOW]
    else:
        assert status == 3 and called == [QUICK, SLOW, f"{APPLIANCE} inventories"]
        assert said.startswith("NOT RUN:\n  the scenarios on containers: ")


@pytest.mark.parametrize(("ci", "expected"), [(False, 3), (True, 1)])
def test_what_tests_say_they_left_out_is_told_at_the_end(tmp_path: Path, ci: bool, expected: int) -> None:
    status, called, said = run(tmp_path, left_out=True, appliance=1 if ci else 3, ci=ci)
    assert status == expected and called == [*([] if ci else [QUICK]), SLOW, APPLIANCE]
    assert "NOT RUN:" in said and "needs_strace" in said
    assert ci or "the scenarios: no rights" in said


@pytest.mark.parametrize(("unit", "appliance"), [(1, 0), (0, 1), (1, 3)])
def test_a_failure_is_1_whatever_else_was_left_out_and_the_rest_is_run(
    tmp_path: Path, unit: int, appliance: int
) -> None:
    status, called, _ = run(tmp_path, unit=unit, appliance=appliance)
    assert status == 1 and called == [*([QUICK] if appliance == 3 else []), SLOW, APPLIANCE]


def test_interrupted_is_interrupted(tmp_path: Path) -> None:
    assert run(tmp_path, appliance=130)[0] == 130
    (tmp_path / "log").unlink()
    assert run(tmp_path, unit=2, appliance=3)[:2] == (130, [SLOW, APPLIANCE]), "nothing else begins after Ctrl-C"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ""),
        (["PART=engine"], "tests/engine"),
        (["PART=engine", "ARGS=-x -k shuffle"], "tests/engine -x -k shuffle"),
        (["ARGS=-k shuffle"], "-k shuffle"),
    ],
)
@pytest.mark.parametrize(("target", "first"), [("test", ""), ("test-quick", '-m "not slow"')])
def test_make_passes_a_part_and_arguments(target: str, first: str, arguments: list[str], expected: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # of `make test`
    command = ["make", "--dry-run", target, "PART=", "ARGS=", *arguments]
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == f"scripts/test.sh {first} {expected}".split()
