"""Packages of a project: resolved on the controller, pushed with it, installed on each node, gone for the next job."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import Machine, Operator, Person
from lab import PROJECT

NAME = "proof_packages"
MAP = """
def with_package(line, auxiliary_data):
    import iniconfig
    yield "sections", [section.name for section in iniconfig.IniConfig("x", "[one]\\na=1\\n[two]\\n")]

def without_package(line, auxiliary_data):
    import importlib.util
    yield "found", importlib.util.find_spec("iniconfig") is not None
"""


@pytest.fixture(scope="module")
def project() -> Iterator[Path]:
    """A project in the checkout, as an operator has them."""
    folder = PROJECT / "projects" / NAME
    folder.mkdir()
    (folder / "map_functions.py").write_text(MAP)
    (folder / "requirements.txt").write_text("iniconfig\n")
    yield folder
    shutil.rmtree(folder)


def job(name: str, function: str, project: str = NAME) -> dict[str, object]:
    keys = {"job_name": name, "project_name": project, "map_function_name": function, "run_once": True}
    return keys | {"input_dirs": ["/etc/debian_version"], "shared_input": False}


def test_without_wheels_a_job_is_refused_with_the_command_that_fetches_them(
    operator: Operator, anna: Person, project: Path, m1: Machine
) -> None:
    anna.run(f"ln -s /opt/mrcore/bin /srv/mrcore/projects/{NAME}")  # where the operator's push will come by
    operator.make("push-project", PROJECT=NAME)
    assert m1.text(f"stat -c %F:%U:%G:%a /srv/mrcore/projects/{NAME}") == "directory:mrcore:mrcore-users:2775"
    assert m1.text("stat -c %U:%a /opt/mrcore/bin; ls /opt/mrcore/bin") == "root:755\nbackup"
    again = operator.make("push-project", PROJECT=NAME)
    assert not any(again.changed.values()), again.output
    anna.write("job.yml", json.dumps(job("packages", "with_package")))
    refused = anna.mrcore("submit", "job.yml", status=2)
    assert f"make wheels PROJECT={NAME}" in refused.stderr


def test_packages_are_installed_on_the_nodes_for_the_job_that_wants_them_only(
    operator: Operator, anna: Person, project: Path, w1: Machine, w2: Machine
) -> None:
    operator.make("wheels", PROJECT=NAME)
    assert [path.name.split("-")[0] for path in (project / "wheels").iterdir()] == ["iniconfig"]
    operator.make("push-project", PROJECT=NAME)
    anna.submit(job("packages", "with_package"))
    anna.finished("packages")
    assert anna.items("packages") == [["sections", ["one", "two"]]] * 2, "both nodes"
    for node in (w1, w2):
        assert "mrcore" in node.text("stat -c %U /var/lib/mrcore/compute/venvs/*/iniconfig/__init__.py")
    anna.run(f"cd /srv/mrcore/projects && mkdir {NAME}_bare && cp {NAME}/map_functions.py {NAME}_bare")
    anna.submit(job("no_packages", "without_package", f"{NAME}_bare"))
    anna.finished("no_packages")
    assert anna.items("no_packages") == [["found", False]] * 2
