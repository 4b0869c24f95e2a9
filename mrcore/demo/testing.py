"""`mrcore test`: a project's own tests, or, if it has none, its job over its sample, in one process."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mrcore.engine.trial import Request
from mrcore.errors import MrcoreError, UsageError
from mrcore.project.packages import install_for_trial
from mrcore.queue import job as jobs
from mrcore.settings.validation import parse_yaml

ITEMS_SHOWN = 5
_NONE_COLLECTED = 5  # pytest's exit status


def test_files(project: Path) -> list[Path]:
    """Return a project's test files, as pytest names them."""
    patterns = ("test_*.py", "*_test.py", "tests/**/test_*.py", "tests/**/*_test.py")
    return sorted({path for pattern in patterns for path in project.glob(pattern)})


def run(project: Path) -> bool:
    """Test a project; print what there is to say, and return whether all is well. Raises UsageError, MrcoreError."""
    packages = install_for_trial(project)
    files = test_files(project)
    if files and find_spec("pytest") is not None:
        return _pytest(project, files, packages)
    if files:
        print("pytest is not installed, so the tests of the project are left out: pip install pytest", file=sys.stderr)
    return _trial(project, packages)


def _pytest(project: Path, files: list[Path], packages: Path | None) -> bool:
    places = [str(project), *([str(packages)] if packages else [])]
    path = os.pathsep.join([*places, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={project}", *map(str, files)]
    status = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, check=False).returncode
    if status == _NONE_COLLECTED:
        raise MrcoreError(f"the test files of {project} hold no test")
    if status not in (0, 1):
        raise MrcoreError(f"pytest could not run the tests of {project}: exit status {status}")
    return status == 0


def _trial(project: Path, packages: Path | None) -> bool:
    job = _job(project)
    sample = project / "sample"
    inputs = [str(sample)] if sample.is_dir() else [entry for entry in job["input_dirs"] if entry.startswith("/")]
    if not inputs:
        raise UsageError(f"{project / 'job.yml'} reads from the nodes: put some input into {sample} to test with")
    request = Request(
        str(project), job["map_function_name"], job["reduce_function_name"], inputs, job["combine_function_name"], None,
        str(packages) if packages else None,
    )  # fmt: skip
    command = [sys.executable, "-P", "-m", "mrcore.engine.trial", json.dumps(dataclasses.asdict(request))]
    count = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for count, line in enumerate(process.stdout, 1):
            if count <= ITEMS_SHOWN:
                print(line.decode(errors="replace"), end="")
    if process.returncode:
        return False
    print(f"{count:,} items from {', '.join(inputs)}")
    return True


def _job(project: Path) -> dict[str, Any]:
    """Return the project's job, validated. Raises UsageError."""
    file = project / "job.yml"
    if not file.is_file():
        raise UsageError(f"project {project} has neither tests (test_*.py) nor a job.yml: there is nothing to test")
    job = parse_yaml(file.read_bytes(), str(file))
    if not isinstance(job, dict) or job.get("job_type", "mapreduce") != "mapreduce":
        raise UsageError(f"{file} holds no single mapreduce job")
    return jobs.validate(job | {"project_name": project.name}, project.parent)
