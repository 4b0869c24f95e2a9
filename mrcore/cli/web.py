"""The dashboard's command."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from mrcore.cli import common
from mrcore.errors import UsageError

GROUP = "Administration"


@click.command()
@click.option("--port", type=click.IntRange(0, 65535), default=8643, show_default=True, help="0: any that is free.")
@click.option("--address", default="127.0.0.1", show_default=True, metavar="IP", help="Where to listen.")
@click.option("--control", is_flag=True, help="With buttons: pause, resume, cancel, requeue, delete.")
@click.option("--token-file", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Else state_dir's.")
@click.option("--host-name", "names", multiple=True, metavar="NAME", help="By which browsers may call it, too.")
@click.option("--show-url", is_flag=True, help="Only print the address, with the token, of the one that runs.")
def dashboard(
    port: int, address: str, control: bool, token_file: Path | None, names: tuple[str, ...], show_url: bool
) -> None:
    """Show queue, runs and nodes in the browser, live. Prints its address once; who has that may look."""
    try:
        from mrcore.web import app
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "mrcore":
            raise
        raise UsageError(
            f"the dashboard's packages are not installed ({error.name}): `pip install 'mrcore[dashboard]'`"
        ) from None
    from mrcore.settings.config import watch_settings

    settings = common.settings_in_force()
    if show_url:
        return click.echo(app.url_with_token(settings.state_dir, token_file))
    watched = watch_settings(click.get_current_context().find_root().obj)
    server = app.Server(watched, address, port, control, token_file, names)
    # The journal of a service is read by others than the queue's owner.
    url = f"{server.url}?token={server.token}" if sys.stdout.isatty() else server.url
    click.echo(f"the dashboard is at {url}")
    if not sys.stdout.isatty():
        click.echo("`mrcore dashboard --show-url` prints the address with the token")
    sys.stdout.flush()
    server.run()
    return None


COMMANDS = (dashboard,)
