"""The operator's commands: settings, backup and restore, the ledger."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import click

from mrcore.cli_common import JSON, print_json, print_table, scheduler_in_force, settings_in_force, settings_of_caller


@click.command()
@JSON
def settings(as_json: bool) -> None:
    """Print the settings in force, with all defaults, as YAML; exit status 2 names every fault of a file."""
    import yaml

    found = settings_of_caller().model_dump(mode="json")
    if as_json:
        return print_json(found)
    click.echo(yaml.safe_dump(found, sort_keys=False, allow_unicode=True), nl=False)
    return None


@click.command()
@click.option("--deep", is_flag=True, help="Also read all output of all jobs, as `mrcore cat` does.")
@JSON
def doctor(deep: bool, as_json: bool) -> int:
    """Look for what is wrong or soon will be, and say what it means and what to do; exit status 1 if there is any."""
    from mrcore import doctor as examine

    facts = examine.gather(settings_in_force(), deep)
    findings = examine.judge(facts)
    if as_json:
        print_json({"findings": [each._asdict() for each in findings], "facts": facts})
        return int(bool(findings))
    for each in findings:
        click.echo(f"{each.where}: {each.what}\n  means: {each.means}\n  do: {each.do}")
    if not findings:
        click.echo(f"nothing is wrong: {len(facts['nodes'])} nodes, {len(facts['servers'])} cluster servers, the queue")
    return int(bool(findings))


@click.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--copy-to", "node", metavar="NODE", help="Keep a copy on this node, in backups/ of its compute_dir.")
@click.option("--keep", type=click.IntRange(1), metavar="N", help="Remove older ones of such a name, here and there.")
def backup(file: Path, node: str | None, keep: int | None) -> None:
    """Copy queue, history, ledger and manifests into one file; also while a Runner runs."""
    from mrcore import backup as backups

    settings = settings_in_force()
    if node is not None:
        settings.node(node)  # before anything is done
    counts = backups.backup(settings, file)
    click.echo(f"{file}: " + ", ".join(f"{number:,} {what}" for what, number in counts.items()))
    gone = backups.prune(settings, file, keep) if keep else 0
    if node is not None:
        click.echo(f"a copy is on {node}: {backups.copy_to_node(settings, file, node)}")
        gone += backups.prune(settings, file, keep, node) if keep else 0
    if gone:
        click.echo(f"older ones removed: {gone}")


@click.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--force", is_flag=True, help="Replace the jobs and the history that there are.")
def restore(file: Path, force: bool) -> None:
    """Bring back queue, history, ledger and manifests from a backup. No Runner may run."""
    from mrcore.backup import restore as read

    about = read(settings_in_force(), file, force)
    click.echo(f"restored as of {datetime.fromtimestamp(about['time']).astimezone().isoformat(timespec='seconds')}")


@click.group()
def ledger() -> None:
    """What a job with hold_state has read of its inputs."""


@ledger.command()
@click.argument("job")
@JSON
def show(job: str, as_json: bool) -> None:
    """List the files that a job has read, and how far."""
    rows = scheduler_in_force().ledger(job)
    if as_json:
        return print_json(rows)
    print_table(rows, {"path": "FILE", "holder": "NODE", "bytes": "READ", "modified": "MODIFIED"})
    return None


@ledger.command()
@click.argument("job")
def forget(job: str) -> None:
    """Have a job's next run read all its inputs anew and replace its whole output."""
    count = scheduler_in_force().forget_ledger(job)
    click.echo(f"{job}: {count} files forgotten; its next run reads all its inputs and replaces its output")


COMMANDS: list[click.Command] = [settings, doctor, backup, restore, ledger]
