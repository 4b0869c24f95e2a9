"""What the modules of the command line share: options, the settings in force, and how values are printed."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from mrcore import text
from mrcore.cli.tables import Row, Spare
from mrcore.cli.tables import print_table as print_table
from mrcore.errors import MrcoreError, UsageError
from mrcore.system.terminal import speaks_unicode
from mrcore.text import json_text

if TYPE_CHECKING:
    from mrcore.cluster.manage_cluster import ManageCluster
    from mrcore.launchers.launcher import Launcher
    from mrcore.queue.scheduler import Scheduler
    from mrcore.settings.config import Settings

MAX_SHORT_HELP = 1_000  # characters
ARGUMENTS = "mrcore.arguments"  # of the call, without the options that come before the command
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
YES = click.option("--yes", is_flag=True, help="Do not ask.")


class Group(click.Group):
    """Commands whose lines in the help are whole, however long: click cuts them."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{"subcommand_metavar": "COMMAND …"} | options)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of all commands."""
        self.write_commands(formatter, "Commands", self.list_commands(ctx))

    def write_commands(self, formatter: click.HelpFormatter, title: str, names: Iterable[str]) -> None:
        """Write a list of these commands, each with the first sentence of what its help says."""
        known = [self.commands[name] for name in names if not self.commands[name].hidden]
        if known:
            widest = max(map(len, self.commands))  # so that all lists of one help are aligned
            with formatter.section(title):
                rows = [(str(each.name).ljust(widest), each.get_short_help_str(MAX_SHORT_HELP)) for each in known]
                formatter.write_dl(rows)


def settings_in_force() -> Settings:
    """Return the settings that --config and the surroundings of this call name. Raises UsageError.

    If they name a user and the caller is another one, this does not return: the command is called again as that user.
    """
    from mrcore.settings import sudo

    settings = settings_of_caller()
    if sudo.needs_sudo(settings):
        sudo.reexec_with_sudo(settings, [*chosen_settings(), *click.get_current_context().meta[ARGUMENTS]])
    return settings


def settings_of_caller() -> Settings:
    """Return the same for what runs with the caller's own rights."""
    from mrcore.settings.config import load_settings

    return load_settings(click.get_current_context().find_root().obj)


def hand_over_jobs(batch: list[Any], command: str, options: list[str]) -> None:
    """Give jobs to a command as the settings' user, with paths as the caller meant them; returns if the caller is that
    user.
    """
    from mrcore.queue import job
    from mrcore.settings import sudo

    settings = settings_of_caller()
    if sudo.needs_sudo(settings):
        try:
            content = json.dumps([job.with_absolute_paths(spec) for spec in batch], default=str).encode()
        except (ValueError, TypeError, RecursionError) as error:  # YAML knows what JSON does not
            raise UsageError(f"a job cannot be handed on to user {settings.user}: {error}") from None
        sudo.reexec_with_sudo(settings, [*chosen_settings(), command, "-", *options], content)


def chosen_settings() -> list[str]:
    """Return the option that names the caller's settings, since sudo keeps no MRCORE_CONFIG."""
    chosen = click.get_current_context().find_root().obj or os.environ.get("MRCORE_CONFIG")
    return ["--config", os.path.abspath(chosen)] if chosen else []


def scheduler_in_force(settings: Settings | None = None) -> Scheduler:
    """Return the queue of these settings, or of those in force."""
    from mrcore.queue.scheduler import Scheduler

    return Scheduler(settings or settings_in_force())


def cluster_in_force(settings: Settings | None = None) -> ManageCluster:
    """Return the cluster of these settings, or of those in force."""
    from mrcore.cluster.manage_cluster import ManageCluster

    return ManageCluster(settings or settings_in_force())


def launcher_in_force(settings: Settings) -> Launcher:
    """Return what starts and stops the daemons of these settings."""
    from mrcore.launchers import launcher_of

    return launcher_of(settings)


def require_consent(yes: bool, question: str) -> None:
    """Have the user agree to what was just printed: on a terminal by asking, elsewhere by --yes. Raises without."""
    if not yes and not sys.stdin.isatty():
        raise UsageError("nothing was done: there is no terminal to ask on; --yes says that it may be done")
    if not yes and not click.confirm(question, err=True):
        raise MrcoreError("nothing was done")


def print_json(value: Any) -> None:
    """Print a value as JSON for people and programs."""
    click.echo(json_text(json.dumps(value, ensure_ascii=not speaks_unicode(sys.stdout), indent=2, default=str)))


def print_rows(rows: Sequence[Row], columns: Mapping[str, str], as_json: bool, spare: Spare = ()) -> None:
    """Print rows whole as JSON, or `{key: title}` of them as a table (see `print_table`)."""
    print_json(rows) if as_json else print_table(rows, columns, spare)


def duration(value: float | None) -> str:
    """Return a length of time as people read it; an empty text for None."""
    return "" if value is None else text.duration(value)
