"""The operator's commands: settings, backup and restore, the ledger."""

from __future__ import annotations

import os
import sys
import tempfile
from datetime import datetime
from pathlib import Path

import click

from mrcore.cli import common
from mrcore.text import one_line

GROUP = "Administration"
JOBS_SHOWN = 100


@click.command()
@common.JSON
def settings(as_json: bool) -> None:
    """Print the settings in force, with all defaults, as YAML.

    Exit status 2: a file has faults; every one is named.
    """
    from mrcore.settings.validation import dump_yaml

    values = common.settings_of_caller().model_dump(mode="json")
    common.print_json(values) if as_json else click.echo(dump_yaml(values), nl=False)


@click.command()
@click.option("--deep", is_flag=True, help="Also read all output of all jobs, as `mrcore cat` does.")
@click.option("--keep", is_flag=True, help="Keep it for metrics and dashboard; call on_findings when it is new.")
@common.JSON
def doctor(deep: bool, keep: bool, as_json: bool) -> int:
    """Look for what is wrong or soon will be, and what to do.

    Exit status 1: there is something; with --keep always 0.
    """
    from mrcore.admin import doctor as examine
    from mrcore.admin import findings as kept

    settings = common.settings_in_force()
    facts = examine.gather(settings, deep)
    findings = examine.judge(facts)
    if keep:
        kept.keep(settings, findings, facts["master"]["time"])
    if as_json:
        common.print_json({"findings": [finding._asdict() for finding in findings], "facts": facts})
        return int(bool(findings) and not keep)
    for finding in findings:
        click.echo(f"{finding.where}: {finding.what}\n  means: {finding.means}\n  do: {finding.do}")
    if not findings:
        click.echo(f"nothing is wrong: {len(facts['nodes'])} nodes, {len(facts['servers'])} cluster servers, the queue")
    return int(bool(findings) and not keep)


@click.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False, allow_dash=True))
@click.option("--copy-to", "node", metavar="NODE", help="Keep a copy on this node, in backups/ of its compute_dir.")
@click.option("--keep", type=click.IntRange(1), metavar="N", help="Remove older ones of such a name, here and there.")
@click.option("--signed", is_flag=True, help="What standard input holds is the backup: keep that.")
def backup(file: Path, node: str | None, keep: int | None, signed: bool) -> None:
    """Copy queue, history, ledger and manifests into one FILE.

    Also while a Runner runs; -: standard output. A FILE is signed: on a deployed master that takes root, and it is
    user mrcore's all the same.
    """
    from mrcore.admin import copies
    from mrcore.state import backup as backups

    to_output = str(file) == "-"
    if not signed and not to_output:
        _signed_by_root()
    settings = common.settings_in_force()
    if node is not None:
        settings.node(node)  # before anything is done
    if to_output:
        counts = backups.write(settings, sys.stdout.buffer)
    else:
        counts = backups.backup(settings, file, sys.stdin.buffer if signed else None)
    click.echo(
        f"{one_line(file)}: " + ", ".join(f"{number:,} {what}" for what, number in counts.items()), err=to_output
    )
    if not signed and not to_output and not backups.may_sign(settings):
        click.echo("it is not signed, since only root can here: a restore will want --unverified", err=True)
    gone = copies.prune(settings, file, keep) if keep else 0
    if node is not None:
        click.echo(f"a copy is on {node}: {one_line(copies.copy_to_node(settings, file, node))}")
        gone += copies.prune(settings, file, keep, node) if keep else 0
    if gone:
        click.echo(f"older ones removed: {gone}")


def _signed_by_root() -> None:
    """If the caller has the key and the settings' user has not: have that user make the backup, sign it, and become
    that user with it as standard input, to keep it. Else return."""
    from mrcore.settings import sudo
    from mrcore.state import backup as backups

    settings = common.settings_of_caller()
    if not sudo.needs_sudo(settings) or not backups.may_sign(settings):
        return
    with tempfile.TemporaryFile() as content, tempfile.TemporaryFile() as signed:
        sudo.call(settings, [*common.chosen_settings(), "backup", "-"], content)
        backups.sign(settings, content, signed)
        signed.flush()
        os.lseek(signed.fileno(), 0, os.SEEK_SET)
        os.dup2(signed.fileno(), 0)
    arguments = click.get_current_context().meta[common.ARGUMENTS]
    sudo.reexec_with_sudo(settings, [*common.chosen_settings(), *arguments, "--signed"])


@click.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--force", is_flag=True, help="Replace the jobs and the history that there are.")
@click.option("--unverified", is_flag=True, help="Also one whose signature is wrong or missing: see below.")
@common.YES
def restore(file: Path, force: bool, unverified: bool, yes: bool) -> None:
    """Bring back queue, history and ledger from a backup.

    Manifests, too. No Runner may run. Says which jobs would run, and asks. With --unverified whoever could write to
    FILE, such as every job on the node that had it, decides what runs on the master.
    """
    from mrcore.state.backup import Restored
    from mrcore.state.backup import restore as read

    def agree(about: Restored) -> None:
        moment = datetime.fromtimestamp(about["time"]).astimezone().isoformat(timespec="seconds")
        click.echo(f"{one_line(file)} is of {moment}; the jobs that wait in it: {len(about['jobs'])}", err=True)
        for job in about["jobs"][:JOBS_SHOWN]:
            script = f", {one_line(job['script'])}" if job["script"] else ""
            what = f"{one_line(job['job_name'])}: {one_line(job['job_type'])}{script}"
            click.echo(f"  {what}, submitted by {one_line(job['submitter'])}", err=True)
        if len(about["jobs"]) > JOBS_SHOWN:
            click.echo(f"  and {len(about['jobs']) - JOBS_SHOWN} more", err=True)
        common.require_consent(yes, "Restore this? They run once a Runner does.")

    about = read(common.settings_in_force(), file, force, not unverified, agree)
    click.echo(f"restored as of {datetime.fromtimestamp(about['time']).astimezone().isoformat(timespec='seconds')}")


@click.group(cls=common.Group)
def ledger() -> None:
    """What a job with hold_state has read of its inputs."""


@ledger.command()
@click.argument("job")
@common.JSON
def show(job: str, as_json: bool) -> None:
    """List the files that a job has read, and how far."""
    columns = {"path": "FILE", "holder": "NODE", "bytes": "READ", "modified": "MODIFIED"}
    common.print_rows(common.scheduler_in_force().ledger(job), columns, as_json)


@ledger.command()
@click.argument("job")
def forget(job: str) -> None:
    """Have a job's next run read all its inputs again and replace its whole output."""
    count = common.scheduler_in_force().forget_ledger(job)
    click.echo(f"{job}: {count} files forgotten; its next run reads all its inputs and replaces its output")


COMMANDS: list[click.Command] = [settings, doctor, backup, restore, ledger]
