"""The command line: parse, call, print. Listings take `--json`; an error is one line and a non-zero exit.

Heavy modules are imported inside the commands that need them, so that `mrcore --help` and completion stay quick.
"""

from __future__ import annotations

import sys

import click

from mrcore import __version__, text
from mrcore.cli import admin as cli_admin
from mrcore.cli import cluster as cli_cluster
from mrcore.cli import common
from mrcore.cli import completion as cli_completion
from mrcore.cli import files as cli_files
from mrcore.cli import first as cli_first
from mrcore.cli import jobs as cli_jobs
from mrcore.cli import logs as cli_logs
from mrcore.cli import output as cli_output
from mrcore.cli import plan as cli_plan
from mrcore.cli import queue as cli_queue
from mrcore.cli import watch as cli_watch
from mrcore.cli import web as cli_web
from mrcore.cli import why as cli_why
from mrcore.errors import UsageError
from mrcore.system import terminal
from mrcore.text import one_line


def main(arguments: list[str] | None = None) -> None:
    """Run one command and leave with its exit status: 0, 1 (it failed), 2 (asked wrongly), 130 (Ctrl-C)."""
    given = sys.argv[1:] if arguments is None else arguments
    sys.exit(terminal.run(lambda: _obey(given)))


def _obey(given: list[str]) -> int | None:
    for argument in given:
        if why := text.unfit(argument):
            raise UsageError(f"the argument {argument!r} {why}")
    try:
        status: int | None = cli.main(given, prog_name="mrcore", standalone_mode=False, obj=given)
    except click.ClickException as error:
        vars(error)["message"] = one_line(error.message)  # it holds what was typed
        error.show()
        return error.exit_code
    except click.Abort:
        return 130
    return status


class _Cli(common.Group):
    """The command itself: its help has the commands in groups, those that a newcomer wants first."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one list of commands for each group."""
        groups: dict[str, list[str]] = {FIRST: [name for name in FIRST_STEPS if name in self.commands]}
        for part in PARTS:
            names = [str(command.name) for command in part.COMMANDS if command.name not in FIRST_STEPS]
            groups.setdefault(getattr(part, "GROUP", "More"), []).extend(names)
        for title, names in groups.items():
            self.write_commands(formatter, title, names)


@click.group(cls=_Cli, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--config", metavar="FILE", help="Settings; else MRCORE_CONFIG, /etc/mrcore/cluster.yml, local cluster.")
@click.version_option(__version__)
@click.pass_context
def cli(context: click.Context, config: str | None) -> None:
    """A Python MapReduce cluster with a durable job queue.

    `mrcore COMMAND --help` tells what a command takes.
    """
    given = list(context.obj)
    while given and given[0].startswith("--config"):
        del given[: 1 if "=" in given[0] else 2]
    context.obj, context.meta[common.ARGUMENTS] = config, given


# A module's COMMANDS stand in the help under its GROUP, in this order; but for those that a newcomer types first.
PARTS = (
    cli_first,
    cli_jobs,
    cli_queue,
    cli_watch,
    cli_why,
    cli_plan,
    cli_output,
    cli_cluster,
    cli_logs,
    cli_files,
    cli_web,
    cli_admin,
    cli_completion,
)
FIRST, FIRST_STEPS = "First steps", ("demo", "new", "template", "try", "test")
for command in [command for part in PARTS for command in part.COMMANDS]:
    cli.add_command(command)
cli_completion.complete_parameters(cli)
