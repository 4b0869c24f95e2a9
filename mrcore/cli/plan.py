"""`mrcore plan FILE`: what jobs would do, before they are queued. Changes no byte on any disk."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mrcore.cli import common, jobs
from mrcore.errors import MrcoreError, UsageError
from mrcore.text import one_line, rough, size

if TYPE_CHECKING:
    from mrcore.cluster.plan import JobPlan
    from mrcore.settings.config import Settings


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
    batch = jobs.read_batch(files, changes)
    common.hand_over_jobs(batch, "plan", ["--json"] * as_json)
    plans = _plans(common.settings_in_force(), batch)
    if as_json:
        import msgspec

        common.print_json([msgspec.to_builtins(each) for each in plans])
    else:
        for each in plans:
            _print(each)
    if any(each.faults for each in plans):
        click.get_current_context().exit(1)


def _plans(settings: Settings, batch: list[Any]) -> list[JobPlan]:
    from mrcore.cluster.plan import JobPlan, Planner
    from mrcore.queue.job import validate
    from mrcore.state.store import StoreToRead

    planner, plans = None, []
    with contextlib.closing(StoreToRead(settings.state_dir)) as store:
        for job in batch:
            try:
                valid = validate(job, settings.projects_dir)
            except UsageError as error:
                names = [
                    one_line(job.get(key) or default) for key, default in (("job_name", "?"), ("job_type", "mapreduce"))
                ]
                faults = error.details.get("faults") or [error.message]
                plans.append(JobPlan(job_name=names[0], job_type=names[1], faults=faults))
                continue
            if valid["job_type"] == "mapreduce":
                planner = planner or Planner(settings, store)
                plans.append(planner.plan(valid | {"projects_dir": str(settings.projects_dir)}))
            else:
                made = JobPlan(job_name=valid["job_name"], job_type=valid["job_type"])
                try:
                    (_script if valid["job_type"] == "script" else _transfer)(settings, valid, made)
                except MrcoreError as error:
                    made.faults.append(error.message)
                plans.append(made)
        if planner:
            planner.close()
    return plans


def _script(settings: Settings, job: dict[str, Any], made: JobPlan) -> None:
    from mrcore.queue.scripts import interpreter

    script = Path(job["script_location"])
    command = " ".join(map(str, [interpreter(job, settings), script, *job["script_arguments"]]))
    made.notes.append(f"runs on the master, in {script.parent}: {command}")


def _transfer(settings: Settings, job: dict[str, Any], made: JobPlan) -> None:
    """Tell what a transfer would move: what is read of this machine, or of the nodes, is looked at, not touched."""
    from mrcore.system.staging import walk
    from mrcore.transfer.batches import checked
    from mrcore.transfer.download import name_here
    from mrcore.transfer.file_transfer import FileTransfer
    from mrcore.transfer.session import Session

    kind = job["transfer_type"]
    if kind == "delete":
        going = FileTransfer(settings).delete_files(job["output_dir"], dry_run=True)
        made.files, made.bytes = going["files"], going["bytes"]
        outputs = [f"{each['job_name']} (run {each['run']})" for each in going["outputs"]]
        made.notes.append(f"removes {job['output_dir']} of the nodes")
        if outputs and not job["also_outputs"]:
            made.faults.append(f"that is output of {', '.join(outputs)}: name other folders, or set also_outputs: true")
    elif kind.startswith("upload"):
        source = Path(job["input_file_name"] if kind == "upload_auxiliary" else job["input_dir"]).expanduser().resolve()
        if not source.exists():
            raise MrcoreError(f"{source} does not exist on the master")
        found = list(walk(source, "") if source.is_dir() else walk(source.parent, source.name))
        made.files, made.bytes = len(found), sum(file.size for file in found)
        to = "every node, as auxiliary data" if kind == "upload_auxiliary" else f"the nodes, into {job['output_dir']}"
        made.notes.append(f"sends {source} to {to}")
        made.faults += [] if found else [f"{source} holds no file"]
    else:
        path = checked(job["input_dir"], "input_dir")
        with Session(settings) as session:
            listings = session.list_nodes(path, session.has_wildcards(path))
        sizes = [each.local.size for each in name_here(settings, path, listings)]
        made.files, made.bytes = len(sizes), sum(sizes)
        made.notes.append(f"fetches {path} from the nodes into {job['output_dir']}")
        made.faults += [] if sizes else [f"input_dir {path!r} matches no file under any node's base_dir"]


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
