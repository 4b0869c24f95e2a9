"""The commands that move files now, outside the queue: with progress on a terminal, one line in a pipe."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from mrcore.access import blocked
from mrcore.cli_common import settings_in_force
from mrcore.errors import UsageError

if TYPE_CHECKING:
    from mrcore.file_transfer import FileTransfer


@contextlib.contextmanager
def _transfer(local: str = "/", write: bool = False) -> Iterator[FileTransfer]:
    """A FileTransfer of the settings in force that shows how it goes, if there is a terminal to show it on.

    Raises UsageError if the user who runs it may not read, or fill, the local side.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    from mrcore.file_transfer import FileTransfer

    settings = settings_in_force()
    if reason := blocked(local, write):
        raise UsageError(reason)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        shown = bar.add_task("LIST", total=None)

        def report(phase: str, files: int, sent_bytes: int, total_bytes: int) -> None:
            what = f"{phase} {files:,} files" if files else phase
            bar.update(shown, description=what, completed=sent_bytes, total=total_bytes or None)

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


COMMANDS: list[click.Command] = [upload, download, upload_auxiliary, rm]
