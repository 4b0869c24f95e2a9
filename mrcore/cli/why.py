"""The command that explains: why a job waits, is slow or failed."""

from __future__ import annotations

import click

from mrcore.cli import common

GROUP = "Queue"


@click.command()
@click.argument("job")
@common.JSON
def why(job: str, as_json: bool) -> None:
    """Say why a job waits, is slow or failed, and what to do.

    The first line has the cause, the second the next step; what is behind it follows.
    """
    import msgspec

    found = common.scheduler_in_force().why(job, printed=True)
    common.print_json(msgspec.to_builtins(found)) if as_json else click.echo("\n".join(found.lines))


COMMANDS: list[click.Command] = [why]
