"""A job that is under way for as long as a proof wants: its map function waits for a file on each node."""

from __future__ import annotations

from typing import Any

from harness import Operator, Person
from lab import HERE

NODES = ("w1", "w2")
LINES = 40


def bring(operator: Operator, anna: Person) -> None:
    """The project and its input."""
    anna.bring(HERE / "projects/slow", "/srv/mrcore/projects")
    for name in NODES:
        lines = "".join(f"{name} {number}\n" for number in range(LINES))
        operator.machine(name).write("/var/tmp/slow/text", lines)


def job(name: str) -> dict[str, Any]:
    """The job, to be submitted."""
    found: dict[str, Any] = {"job_name": name, "job_type": "mapreduce", "project_name": "slow", "run_once": True}
    return found | {"input_dirs": ["/var/tmp/slow"], "map_function_name": "slowly"}


def expected() -> list[list[Any]]:
    """Its output, sorted."""
    return sorted([f"{name} {number}", 1] for name in NODES for number in range(LINES))


def hold(operator: Operator) -> None:
    """From now on the function waits."""
    for name in NODES:
        operator.machine(name).run("rm -f /var/tmp/go")


def let_go(operator: Operator) -> None:
    """It goes on."""
    for name in NODES:
        operator.machine(name).run("touch /var/tmp/go")
