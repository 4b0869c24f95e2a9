"""The commands that move files now, outside the queue: with progress on a terminal, one line in a pipe."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

from mrcore.access import blocked
from mrcore.cli_common import JSON, print_json, settings_in_force
from mrcore.errors import UsageError

if TYPE_CHECKING:
    from mrcore.file_transfer import FileTransfer


@contextlib.contextmanager
def _bar() -> Iterator[Callable[..., None]]:
    """What shows how a transfer goes, if there is a terminal to show it on."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        shown = bar.add_task("LIST", total=None)

        def report(phase: str, files: int, sent_bytes: int, total_bytes: int) -> None:
            what = f"{phase} {files:,} files" if files else phase
            bar.update(shown, description=what, completed=sent_bytes, total=total_bytes or None)

        yield report


@contextlib.contextmanager
def _transfer(local: str = "/", write: bool = False) -> Iterator[FileTransfer]:
    """A FileTransfer of the settings in force that shows how it goes.

    Raises UsageError if the user who runs it may not read, or fill, the local side, or while a drain goes on.
    """
    from mrcore.file_transfer import FileTransfer
    from mrcore.store import Store

    settings = settings_in_force()
    if reason := blocked(local, write):
        raise UsageError(reason)
    with contextlib.closing(Store(settings.state_dir)) as store:
        if reason := store.held_by_drain():
            raise UsageError(f"{reason}; transfers have to wait for that")
    with _bar() as report:
        yield FileTransfer(settings, report)


def _say(verb: str, counts: dict[str, Any]) -> None:
    more = "".join(f", {counts[key]:,} {text}" for key, text in _MORE.items() if counts.get(key))
    click.echo(f"{verb} {counts['files']:,} files, {counts['bytes']:,} bytes{more}")


_MORE = {"skipped": "unchanged", "removed": "others removed"}
ONE_BY_ONE = click.option("--one-by-one", is_flag=True, help="Not several files at once.")


@click.command()
@click.argument("local")
@click.argument("folder")
@click.option("--changed", is_flag=True, help="Send what is new or changed, instead of replacing FOLDER as a whole.")
@click.option("--compress", is_flag=True, help="Let the files arrive as NAME.gz.")
@ONE_BY_ONE
def upload(local: str, folder: str, changed: bool, compress: bool, one_by_one: bool) -> None:
    """Spread a LOCAL folder's files over the nodes' FOLDER, such as inputs/logs."""
    if one_by_one and compress:
        raise click.UsageError("--compress goes with several files at once only: leave --one-by-one out")
    with _transfer(local) as transfer:
        if one_by_one:
            counts = transfer.upload(local, folder, not changed)
        else:
            counts = transfer.upload_bulk(local, folder, not changed, compress)
    _say("uploaded", counts)


@click.command()
@click.argument("folder")
@click.argument("local")
@click.option("--keep", is_flag=True, help="Keep what else lies in the LOCAL folder.")
@ONE_BY_ONE
def download(folder: str, local: str, keep: bool, one_by_one: bool) -> None:
    """Fetch the nodes' FOLDER (such as JOB/reduce; wildcards count) into a LOCAL folder, which is cleared."""
    with _transfer(local, write=True) as transfer:
        counts = (transfer.download if one_by_one else transfer.download_bulk)(folder, local, not keep)
    _say("downloaded", counts)


@click.command(name="upload-auxiliary")
@click.argument("file")
@click.argument("name")
def upload_auxiliary(file: str, name: str) -> None:
    """Give every node a local JSON FILE as the auxiliary data NAME."""
    with _transfer(file) as transfer:
        _say("uploaded", transfer.upload_auxiliary(file, name))


@click.command()
@click.argument("path")
def rm(path: str) -> None:
    """Remove a file or folder under the nodes' base_dir; wildcards count."""
    with _transfer() as transfer:
        _say("removed", transfer.delete_files(path))


@click.command()
@click.argument("node")
@click.option("--list", "only_list", is_flag=True, help="Only tell what the node holds; exit status 0: nothing.")
@click.option(
    "--wait", type=click.FloatRange(0), default=3600, show_default=True, help="Seconds for the run under way to end."
)
@JSON
def drain(node: str, only_list: bool, wait: float, as_json: bool) -> None:
    """Move all that a NODE holds to the others; may be repeated. Exit status 1: something is left."""
    from mrcore import drain as work

    settings, said = settings_in_force(), [""]
    if only_list:
        told = work.look(settings, node)
    else:
        with _bar() as report:

            def progress(phase: str, **facts: int) -> None:
                if phase.startswith("waiting") and phase != said[0]:
                    click.echo(f"{phase} to end", err=True)
                said[0] = phase
                report(phase, **facts)

            told = work.drain(settings, node, progress, wait)
    if as_json:
        print_json(told)
    else:
        _tell_drained(told)
    if not told["empty"]:
        sys.exit(1)


def _tell_drained(told: dict[str, Any]) -> None:
    for target, count in sorted(told.get("moved", {}).items()):
        _say(f"to {target}:", count)
    for old, target, new in told.get("renamed", ()):
        click.echo(f"{target} had a file {old} already: that of {told['node']} is {new} there now")
    for kind, count in told.get("kinds", {}).items():
        if count["files"]:
            _say(f"{told['node']} holds {kind}:", count)
    for job in told.get("jobs", ()):
        _say(f"  output of {job['job_name']}:", job)
    for why in [*told.get("left", ()), *told.get("cannot_move", ())]:
        click.echo(f"not moved: {why}")
    for each in told.get("elsewhere", ()):
        click.echo(
            f"job {each['job_name']} reads {each['input_dir']} on {told['node']}, outside of base_dir: what lies there "
            "is not moved; copy it yourself, or change the job"
        )
    if told["empty"]:
        click.echo(f"{told['node']} holds nothing that would be lost with it")


COMMANDS: list[click.Command] = [upload, download, upload_auxiliary, rm, drain]
