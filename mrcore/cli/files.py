"""The commands that move files now, outside the queue: with progress on a terminal, one line in a pipe."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

from mrcore.cli import common
from mrcore.errors import ClusterFault, UsageError
from mrcore.system.permissions import blocked
from mrcore.system.terminal import raw
from mrcore.text import one_line

if TYPE_CHECKING:
    from rich.progress import Progress

    from mrcore.admin.holdings import Holdings
    from mrcore.transfer.file_transfer import FileTransfer

GROUP = "Files on the nodes"


@contextlib.contextmanager
def _bar() -> Iterator[tuple[Callable[..., None], Progress]]:
    """Yield what shows how a transfer goes, if there is a terminal to show it on."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    console = Console(file=raw(sys.stderr))
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        shown = bar.add_task("LIST", total=None)

        def report(phase: str, files: int, sent_bytes: int, total_bytes: int) -> None:
            what = f"{phase} {files:,} files" if files else phase
            bar.update(shown, description=what, completed=sent_bytes, total=total_bytes or None)

        yield report, bar


@contextlib.contextmanager
def _transfer(
    local: str = "/", write: bool = False, agree: Callable[[dict[str, Any]], None] = lambda going: None
) -> Iterator[FileTransfer]:
    """Yield a FileTransfer of the settings in force that shows how it goes; `agree` has the terminal for itself.

    Raises UsageError if the user who runs it may not read, or fill, the local side, or while a drain goes on.
    """
    from mrcore.state.store import Store
    from mrcore.transfer.file_transfer import FileTransfer

    settings = common.settings_in_force()
    if reason := blocked(local, write):
        raise UsageError(reason)
    with contextlib.closing(Store(settings.state_dir)) as store:
        if reason := store.held_by_drain():
            raise UsageError(f"{reason}; transfers have to wait for that")
    with _bar() as (report, bar):

        def agreed(answer: dict[str, Any]) -> None:
            bar.stop()
            agree(answer)
            bar.start()

        yield FileTransfer(settings, report, agree=agreed)


def _print_counts(verb: str, counts: dict[str, Any]) -> None:
    more = "".join(f", {counts[key]:,} {text}" for key, text in _MORE.items() if counts.get(key))
    click.echo(f"{verb} {counts['files']:,} files, {counts['bytes']:,} bytes{more}")


def _print_going(answer: dict[str, Any], what: str) -> None:
    click.echo(f"{what}:" if answer["files"] else f"{what}: nothing", err=True)
    for node, count in answer["nodes"].items():
        if count["files"]:
            click.echo(f"  {node}: {count['files']:,} files, {count['bytes']:,} bytes", err=True)
    for output in answer["outputs"]:
        click.echo(
            f"  among them output of {output['job_name']} (run {output['run']}): {output['files']:,} parts, "
            f"{output['bytes']:,} bytes",
            err=True,
        )


_MORE = {"skipped": "unchanged", "removed": "others removed"}
DRY_RUN = click.option("--dry-run", is_flag=True, help="Only tell what would go.")
ONE_BY_ONE = click.option("--one-by-one", is_flag=True, help="Not several files at once.")


@click.command()
@click.argument("local")
@click.argument("folder")
@click.option("--changed", is_flag=True, help="Send what is new or changed, instead of replacing FOLDER as a whole.")
@click.option("--compress", is_flag=True, help="Let the files arrive as NAME.gz.")
@ONE_BY_ONE
@common.YES
@DRY_RUN
def upload(local: str, folder: str, changed: bool, compress: bool, one_by_one: bool, yes: bool, dry_run: bool) -> None:
    """Spread a LOCAL folder's files over the nodes' FOLDER.

    FOLDER is one under their base_dir, such as inputs/logs. Without --changed it is replaced: files that
    it has and LOCAL has not go, which is asked for first.
    """

    def agree(answer: dict[str, Any]) -> None:
        if answer["files"] or dry_run:
            _print_going(answer, f"files of {folder} that {local} does not have, and that would go")
        if dry_run:
            raise click.exceptions.Exit(0)
        if answer["files"]:
            common.require_consent(yes, "Replace the folder?")

    if one_by_one and compress:
        raise click.UsageError("--compress goes with several files at once only: leave --one-by-one out")
    with _transfer(local, agree=agree) as transfer:
        if one_by_one:
            counts = transfer.upload(local, folder, not changed)
        else:
            counts = transfer.upload_bulk(local, folder, not changed, compress)
    _print_counts("uploaded", counts)


@click.command()
@click.argument("folder")
@click.argument("local")
@click.option("--keep", is_flag=True, help="Keep what else lies in the LOCAL folder.")
@ONE_BY_ONE
def download(folder: str, local: str, keep: bool, one_by_one: bool) -> None:
    """Fetch the nodes' FOLDER into a LOCAL one.

    FOLDER is such as JOB/reduce; wildcards count. What else is in LOCAL goes, but with --keep.
    """
    with _transfer(local, write=True) as transfer:
        counts = (transfer.download if one_by_one else transfer.download_bulk)(folder, local, not keep)
    _print_counts("downloaded", counts)


@click.command(name="upload-auxiliary")
@click.argument("file")
@click.argument("name")
def upload_auxiliary(file: str, name: str) -> None:
    """Give every node a JSON FILE as the auxiliary data NAME."""
    with _transfer(file) as transfer:
        _print_counts("uploaded", transfer.upload_auxiliary(file, name))


@click.command()
@click.argument("path")
@common.YES
@DRY_RUN
def rm(path: str, yes: bool, dry_run: bool) -> None:
    """Remove a file or folder under the nodes' base_dir.

    Wildcards count. Asks before output that jobs have published goes, and before what a wildcard in the first part of
    PATH matches does.
    """

    def agree(answer: dict[str, Any]) -> None:
        if answer["outputs"] or (answer["everywhere"] and answer["files"]):
            _print_going(answer, f"{path} would remove")
            common.require_consent(yes, "Remove all of this?")

    with _transfer(agree=agree) as transfer:
        answer = transfer.delete_files(path, by=f"`mrcore rm {one_line(path, 200)}`", dry_run=dry_run)
    if dry_run:
        return _print_going(answer, f"{path} would remove")
    return _print_counts("removed", answer)


@click.command()
@click.argument("node")
@click.option(
    "--list", "--dry-run", "only_list", is_flag=True, help="Only tell what the node holds; exit status 0: nothing."
)
@click.option(
    "--wait", type=click.FloatRange(0), default=3600, show_default=True, help="Seconds for the run under way to end."
)
@common.YES
@common.JSON
def drain(node: str, only_list: bool, wait: float, yes: bool, as_json: bool) -> None:
    """Move all that a NODE holds to the others.

    Published output, too. Asks first; may be repeated. Exit status 1: something is left.
    """
    from mrcore.admin import drain as work

    settings, shown = common.settings_in_force(), [""]
    if only_list:
        answer = work.look(settings, node)
    else:
        if not (yes or as_json) and sys.stdin.isatty():
            with contextlib.suppress(ClusterFault):  # it is gone: what was begun with it is ended all the same
                _print_drained(work.look(settings, node))
        common.require_consent(yes, f"Move all of this from {one_line(node, 100)} to the other nodes?")
        with _bar() as (report, _):

            def progress(phase: str, **facts: int) -> None:
                if phase.startswith("waiting") and phase != shown[0]:
                    click.echo(f"{phase} to end", err=True)
                shown[0] = phase
                report(phase, **facts)

            answer = work.drain(settings, node, progress, wait)
    if as_json:
        common.print_json(answer)
    else:
        _print_drained(answer)
    if not answer["empty"]:
        sys.exit(1)


def _print_drained(answer: Holdings) -> None:
    for target, count in sorted(answer.get("moved", {}).items()):
        _print_counts(f"to {target}:", count)
    for old, target, new in answer.get("renamed", ()):
        click.echo(one_line(f"{target} had a file {old} already: that of {answer['node']} is {new} there now"))
    for kind, count in answer.get("kinds", {}).items():
        if count["files"]:
            _print_counts(f"{answer['node']} holds {kind}:", count)
    for job in answer.get("jobs", ()):
        _print_counts(f"  output of {job['job_name']}:", job)
    for why in [*answer.get("left", ()), *answer.get("cannot_move", ())]:
        click.echo(one_line(f"not moved: {why}"))
    for error in answer.get("faults", ()):
        click.echo(f"output of {error['job']} on {answer['node']} is {error['kind']}: {len(error['names'])} parts")
    for job in answer.get("elsewhere", ()):
        click.echo(
            f"job {job['job_name']} reads {one_line(job['input_dir'])} on {answer['node']}, outside of base_dir: what "
            "lies there is not moved; copy it yourself, or change the job"
        )
    if answer["empty"]:
        click.echo(f"{answer['node']} holds nothing that would be lost with it")


COMMANDS: list[click.Command] = [upload, download, upload_auxiliary, rm, drain]
