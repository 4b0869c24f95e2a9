"""What the modules of the command line share: options, the settings in force, and how values are printed."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from mrcore.config import Settings
    from mrcore.scheduler import Scheduler

JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def settings_in_force() -> Settings:
    """The settings that --config and the surroundings of this call name. Raises UsageError."""
    from mrcore.config import load_settings

    return load_settings(click.get_current_context().find_root().obj)


def scheduler_in_force() -> Scheduler:
    """The queue of the settings in force."""
    from mrcore.scheduler import Scheduler

    return Scheduler(settings_in_force())


def cluster_in_force(settings: Settings | None = None) -> Any:
    """The cluster of these settings, or of those in force."""
    from mrcore.manage_cluster import ManageCluster

    return ManageCluster(settings or settings_in_force())


def print_json(value: Any) -> None:
    """Print a value as JSON for people and programs."""
    click.echo(json.dumps(value, ensure_ascii=False, indent=2, default=str))


def print_table(rows: list[dict[str, Any]], columns: dict[str, str]) -> None:
    """Print `{key: title}` of the rows: aligned and fitted on a terminal, whole in a pipe."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in columns.values():
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(*(Text("" if row.get(key) is None else str(row[key])) for key in columns))
    Console(width=None if sys.stdout.isatty() else 1000, soft_wrap=False).print(table)


def told_seconds(value: float | None) -> str:
    """Give a length of time as people read it; an empty text for None."""
    if value is None:
        return ""
    return f"{value:.2f} s" if value < 60 else f"{int(value // 3600)}:{int(value // 60 % 60):02}:{int(value % 60):02}"
