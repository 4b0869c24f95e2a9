"""The commands about the cluster's daemons: start and stop them, look at them, read what they print."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import click

from mrcore.cli import common
from mrcore.errors import ClusterFault
from mrcore.text import one_line

if TYPE_CHECKING:
    pass

GROUP = "Cluster"


@click.group(cls=common.Group)
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
    settings = common.settings_in_force()
    if any(value is not None for value in shape.values()):
        common.launcher_in_force(settings).configure(settings.home, **shape)
        settings = common.settings_in_force()
    common.cluster_in_force(settings).start_cluster()
    common.scheduler_in_force(settings).end_hold()  # which may have waited for this
    servers = settings.servers()
    click.echo(f"cluster {settings.cluster_name} is up: {len(settings.nodes)} nodes, {len(servers)} cluster servers")


@cluster.command()
def stop() -> None:
    """Stop all servers gracefully."""
    common.cluster_in_force().stop_cluster()
    click.echo("the cluster is stopped")


@cluster.command()
def kill() -> None:
    """End all servers and whatever they started, for certain."""
    common.cluster_in_force().kill_cluster()
    click.echo("the cluster is stopped")


@cluster.command()
@common.JSON
def status(as_json: bool) -> None:
    """Show every node agent and cluster server.

    Exit status 1: a node gives no answer.
    """
    settings = common.settings_in_force()
    answer = common.cluster_in_force(settings).status()
    columns = {key: key.upper() for row in answer for key in row if key != "reason"}
    common.print_rows(answer, columns, as_json, (("pid", None), ("port", None), ("address", None)))
    if settings.local and not as_json and all(row["state"] == "absent" for row in answer):
        click.echo(f"the local cluster of {one_line(settings.home)} is not started: `mrcore cluster start` starts it")
    reasons = {row["node"]: row["reason"] for row in answer if "reason" in row}
    require_answers(reasons, len({row["node"] for row in answer}))


@cluster.command()
@click.argument("nodes", nargs=-1, metavar="[NODE…]")
@click.option("--wait", type=click.FloatRange(0), default=0, metavar="SECONDS", help="For answers, all together.")
@click.pass_context
def check(context: click.Context, nodes: tuple[str, ...], wait: float) -> None:
    """See whether all daemons (of these NODEs) answer over TLS.

    They must be of the release of this command; else exit status 1.
    """
    from mrcore.launchers import health

    settings = common.settings_in_force()
    errors = health.check(settings, [settings.node(name) for name in nodes] or settings.nodes, wait)
    for node, of_node in errors.items():
        for error in of_node:
            click.echo(f"{node}: {error.text}", err=True)
    if any(errors.values()):
        context.exit(1)
    click.echo(f"all daemons of {', '.join(errors)} answer")


@click.command()
@click.argument("server")
def attach(server: str) -> None:
    """Show the screen window of a cluster server, such as S_3.

    Ctrl-a d leaves it.
    """
    settings = common.settings_in_force()
    command = common.launcher_in_force(settings).attach_command(settings, server)
    os.execvp(command[0], command)


def require_answers(errors: dict[str, str], nodes: int) -> None:
    """Raise ClusterFault if nodes gave no answer; `errors` has the reasons by their names."""
    if errors:
        lines = "".join(f"\n  {node}: {reason}" for node, reason in errors.items())
        raise ClusterFault(f"no answer from {len(errors)} of {nodes} nodes:{lines}")


COMMANDS = (cluster, attach)
