"""The commands of the first ten minutes: a demonstration, a project of one's own, and its tests."""

from __future__ import annotations

from pathlib import Path

import click

from mrcore.cli import common, output
from mrcore.text import one_line

GROUP = "First steps"


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), default=Path("mrcore-demo"), show_default=True,
              help="Where the example projects and the cluster's home (.mrcore) go.")  # fmt: skip
@click.option("--home", type=click.Path(path_type=Path), help="Where the cluster's state goes instead.")
@click.option(
    "--source", type=click.Path(path_type=Path), help="Folder of .py files to read, else Python's own library."
)
@click.option("--address", help="Of the first node; by default the first of 127.0.0.1, 127.0.1.1, … free.")
def demo(folder: Path, home: Path | None, source: Path | None, address: str | None) -> int:
    """Show what mrcore does, on a cluster made here for it.

    Two nodes on loopback addresses count and index the names in Python's own library, then run a workflow of six jobs.
    Every command is printed, and what to type next. The cluster is stopped at the end; its output stays.
    """
    from mrcore.demo import demo as show

    return show.main(folder, home, source, address)


@click.command()
@click.argument("project")
def new(project: str) -> None:
    """Make a PROJECT that works as it is, to begin with.

    Functions, tests, a job file, a sample of input and a README.md. Nothing is overwritten.
    """
    from mrcore.demo import skeleton

    settings = common.settings_of_caller()
    commands = skeleton.make(settings.projects_dir, project, settings.local)
    click.echo(f"{one_line(settings.projects_dir / project)} is there; next:")
    for command in commands:
        click.echo(f"  {one_line(command)}")


@click.command()
@click.argument("project")
@click.option("--as-root", is_flag=True, help="As root, run also code that others may change.")
def test(project: str, as_root: bool) -> int:
    """Run a PROJECT's tests, or its job over its sample.

    By pytest if it has files test_*.py and pytest is there; else the job of its job.yml, in one process, over the files
    in sample/ or the absolute input_dirs. Exit status: 0, 1 (something fails), 2 (there is nothing to test).
    """
    from mrcore.demo import testing

    folder = output.project_folder(project)
    output.say_whose_code(folder, as_root, "test")
    return int(not testing.run(folder))


COMMANDS: list[click.Command] = [demo, new, test]
