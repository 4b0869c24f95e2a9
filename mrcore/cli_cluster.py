"""The commands about the cluster's daemons: start and stop them, look at them, read what they print."""

from __future__ import annotations

import sys
from typing import Any

import click

from mrcore.cli_common import JSON, cluster_in_force, print_json, print_table, settings_in_force
from mrcore.errors import UsageError


@click.group()
def cluster() -> None:
    """Start, stop and look at the cluster's servers."""


@cluster.command()
@click.option("--nodes", type=click.IntRange(1, 250), help="Local nodes (127.0.0.1, 127.0.0.2, …).")
@click.option("--servers", type=click.IntRange(1, 256), help="Cluster servers on each local node.")
@click.option("--address", help="Address of the first local node.")
@click.option("--agent-port", type=click.IntRange(1, 65535), help="Port of the node agents.")
@click.option("--server-port", type=click.IntRange(1, 65535), help="Port of each node's first cluster server.")
def start(**shape: Any) -> None:
    """Start all servers; what runs already is left alone."""
    settings = settings_in_force()
    given = {key: value for key, value in shape.items() if value is not None}
    if given:
        if not settings.local:
            raise UsageError("the shape of a deployed cluster stands in its settings: leave the options out")
        from mrcore.launchers import local

        local.configure(settings.home, **given)
        settings = settings_in_force()
    cluster_in_force(settings).start_cluster()
    servers = settings.servers()
    click.echo(f"cluster {settings.cluster_name} is up: {len(settings.nodes)} nodes, {len(servers)} cluster servers")


@cluster.command()
def stop() -> None:
    """Stop all servers gracefully."""
    cluster_in_force().stop_cluster()
    click.echo("the cluster is stopped")


@cluster.command()
def kill() -> None:
    """End all servers and whatever they started, for certain."""
    cluster_in_force().kill_cluster()
    click.echo("the cluster is stopped")


@cluster.command()
@JSON
def status(as_json: bool) -> None:
    """Show every node agent and cluster server."""
    answer = cluster_in_force().status()
    if as_json:
        return print_json(answer)
    print_table(answer, {key: key.upper() for row in answer for key in row})
    return None


@click.command()
@click.argument("name", required=False, metavar="[SERVER|JOB]")
@click.option("--lines", type=click.IntRange(1), default=100, show_default=True, help="Last lines of each file.")
def logs(name: str | None, lines: int) -> None:
    """Print the end of a server's or a job's log; without a name, list the logs."""
    settings = settings_in_force()
    folders = [node.layout.logs_dir for node in settings.nodes] + [settings.logs_dir]
    files = [file for folder in folders for file in sorted(folder.rglob("*")) if file.is_file()]
    if name is None:
        for file in files:
            click.echo(f"{file.stat().st_size:>12} {file}")
        return
    chosen = [file for file in files if file.stem == name or file.name == name]
    of_script = [file for file in (settings.logs_dir / "scripts" / name).glob("*.log") if file.stem.isdecimal()]
    chosen += sorted(of_script, key=lambda file: int(file.stem))[-1:]  # of its newest run
    if not chosen:
        names = {file.parent.name if file.stem.isdecimal() else file.stem for file in files}
        known = ", ".join(sorted(names)) or "none yet: `mrcore cluster start` makes them"
        raise UsageError(f"there is no log of {name!r}; known: {known}")
    for file in chosen:
        if len(chosen) > 1:
            click.echo(f"==> {file} <==")
        with file.open("rb") as stream:
            stream.seek(max(0, file.stat().st_size - lines * 4096))
            sys.stdout.flush()
            sys.stdout.buffer.writelines(stream.read().splitlines(keepends=True)[-lines:])


COMMANDS = (cluster, logs)
