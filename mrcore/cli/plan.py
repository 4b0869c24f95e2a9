"""`mrcore plan FILE`: what jobs would do, before they are queued. Changes no byte on any disk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mrcore.cli import common, jobs
from mrcore.text import one_line, rough, size

if TYPE_CHECKING:
    from mrcore.cluster.plan import JobPlan


GROUP = jobs.GROUP


@click.command()
@jobs.FILES
@jobs.SET
@common.JSON
def plan(files: tuple[Path, ...], changes: tuple[str, ...], as_json: bool) -> None:
    """Tell what jobs would do, before they are queued.

    What they would read, how long that may take, what is missing. Nodes are asked, but nothing is sent to them, and no
    byte on any disk is changed. Status 1 if a job would fail.
    """
    from mrcore.queue.plan import plan_jobs

    batch = jobs.read_batch(files, changes)
    common.hand_over_jobs(batch, "plan", ["--json"] * as_json)
    plans = plan_jobs(common.settings_in_force(), batch)
    if as_json:
        import msgspec

        common.print_json([msgspec.to_builtins(each) for each in plans])
    else:
        for each in plans:
            _print(each)
    if any(each.faults for each in plans):
        click.get_current_context().exit(1)


def _print(made: JobPlan) -> None:
    """Print a plan for people."""

    click.echo(f"{made.job_name}: {'would fail' if made.faults else 'would run'}, {made.job_type}")
    for fault in made.faults:
        click.echo(f"  fault: {one_line(fault)}")
    if made.nothing_new:
        click.echo(f"  nothing new to read: {made.read_before:,} files were read before")
    elif made.files or made.nodes:
        parts = f", into {made.partitions:,} partitions" if made.partitions else ""
        click.echo(f"  input: {made.files:,} files, {size(made.bytes)}{parts}")
    if made.read_before and not made.nothing_new:
        click.echo(f"  read before: {made.read_before:,} files")
    if made.goes_on_from_run:
        click.echo(f"  merges the output of run {made.goes_on_from_run}")
    if made.skipped:
        click.echo("  skipped: " + ", ".join(f"{count:,} {one_line(why)}" for why, count in made.skipped.items()))
    if made.expected_seconds is not None:
        click.echo(f"  time: about {rough(made.expected_seconds)}, by {made.expected_from}")
    elif made.expected_from:
        click.echo(f"  time: not known, {made.expected_from}")
    for note in made.notes:
        click.echo(f"  note: {one_line(note)}")
    if made.nodes:
        rows = [
            {
                "node": node.node, "files": f"{node.files:,}", "bytes": size(node.bytes), "splits": node.splits,
                "servers": node.servers, "need": size(node.disk_needed_bytes),
                "free": size(node.disk_free_bytes),
            }
            for node in made.nodes
        ]  # fmt: skip
        columns = {"node": "NODE", "files": "FILES", "bytes": "BYTES", "splits": "SPLITS", "servers": "SERVERS"}
        common.print_table(rows, columns | {"need": "DISK NEEDED", "free": "DISK FREE"})
        click.echo(f"  disk needed, estimated: {made.disk_from}")


COMMANDS = (plan,)
