"""The commands about functions and what they produce: a job's output, a trial without a cluster."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from mrcore.cli import common
from mrcore.errors import UsageError
from mrcore.system import terminal
from mrcore.text import one_line

GROUP = "Output"


@click.command()
@click.argument("job")
@click.option("--head", type=click.IntRange(1), metavar="N", help="Only the first N items.")
@click.option("--run", type=click.IntRange(1), metavar="N", help="Only what that run added to the output.")
def cat(job: str, head: int | None, run: int | None) -> None:
    """Print a job's output, one JSON item a line.

    The items come in the order of the output's parts.
    """
    sys.stdout.flush()
    out: Any = terminal.JsonOutput() if sys.stdout.isatty() else sys.stdout.buffer
    common.cluster_in_force().cat(job, out, head=head, run=run)


@click.command(name="try")
@click.argument("project")
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT…")
@click.option("--map", "map_name", required=True, metavar="NAME", help="The map function.")
@click.option("--reduce", "reduce_name", metavar="NAME", help="The reduce function; without it, what map gives.")
@click.option("--combine", metavar="NAME", help="A reduce function applied before the sort.")
@click.option("--aux", "auxiliary", type=click.Path(path_type=Path), help="JSON for auxiliary_data.")
@click.option("--as-root", is_flag=True, help="As root, run also code that others may change.")
def try_project(
    project: str,
    inputs: tuple[str, ...],
    map_name: str,
    reduce_name: str | None,
    combine: str | None,
    auxiliary: Path | None,
    as_root: bool,
) -> None:
    """Try a project's functions over files, without a cluster.

    All runs in this one process: to develop them.
    """
    from mrcore.engine import trial
    from mrcore.project.packages import install_for_trial

    folder = project_folder(project)
    say_whose_code(folder, as_root)
    packages, auxiliary_file = install_for_trial(folder), str(auxiliary) if auxiliary else None
    request = trial.Request(
        str(folder), map_name, reduce_name, inputs, combine, auxiliary_file, str(packages) if packages else None
    )
    if packages:
        # A process of its own: this one has loaded click and others, of which the project may want other versions.
        text = json.dumps(dataclasses.asdict(request))
        os.execv(sys.executable, [sys.executable, "-P", "-m", "mrcore.engine.trial", text])
    trial.print_trial(request)


def project_folder(project: str) -> Path:
    """Return the folder of a project: one of projects_dir, or any. Raises UsageError."""
    folder = common.settings_of_caller().projects_dir / project
    if not folder.is_dir():
        folder = Path(project).absolute()
    if not folder.is_dir():
        raise UsageError(f"there is no project {project!r}: no folder of projects_dir, no folder here")
    return folder


def say_whose_code(folder: Path, as_root: bool, command: str = "try") -> None:
    """Say so when others decide what a trial does with the caller's rights. Raises UsageError when these are root's."""
    from mrcore.system import permissions

    if (found := permissions.foreign_code(folder)) is None:
        return
    path, who = found
    if os.geteuid() == 0 and not as_root:
        raise UsageError(
            f"{who} may change {path}, and `mrcore {command}` would run that code as root: try it as another user "
            f"(`runuser -u USER -- mrcore {command} …`), or say --as-root"
        )
    click.echo(f"mrcore: runs code of {one_line(folder)} with your rights; {who} may change {one_line(path)}", err=True)


COMMANDS = (cat, try_project)
