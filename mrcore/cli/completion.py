"""Completion in shells: what a command's arguments may be, found quickly, without sudo, and without a trace.

A shell calls `mrcore` with `_MRCORE_COMPLETE` set at every TAB (click's protocol). Whatever goes wrong then, such as
settings with a fault, or a queue that the caller may not read, only means that there is nothing to offer.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem, ShellComplete, get_completion_class

if TYPE_CHECKING:
    from mrcore.settings.config import Settings

GROUP = "Administration"
# What a shell would obey, were it typed: names of folders are others' to choose, and bash inserts what it is given.
_HARMLESS = re.compile(r"(?!-)[\w.@%+=:,/-]+")
# Where a new word must not follow the "=" of KEY=VALUE at once.
_NO_BLANK = "    [[ ${COMPREPLY[0]-} == *= ]] && compopt -o nospace\n\n    return 0\n"


def _settings(context: click.Context) -> Settings:
    from mrcore.settings.config import load_settings

    return load_settings(context.find_root().params.get("config"))


def _jobs(context: click.Context) -> Iterable[str]:
    from mrcore.state.database import peek

    return (row[0] for row in peek(_settings(context).state_dir, "SELECT job_name FROM jobs ORDER BY number DESC"))


def _groups(context: click.Context) -> Iterable[str]:
    from mrcore.state.database import peek

    query = "SELECT DISTINCT group_name FROM jobs WHERE group_name IS NOT NULL"
    return [*(row[0] for row in peek(_settings(context).state_dir, query)), *_jobs(context)]


def _nodes(context: click.Context) -> Iterable[str]:
    return (node.name for node in _settings(context).nodes)


def _servers(context: click.Context) -> Iterable[str]:
    return (server.name for server in _settings(context).servers())


def _logs(context: click.Context) -> Iterable[str]:
    return [*_servers(context), *(f"agent@{name}" for name in _nodes(context)), *_jobs(context)]


def _projects(context: click.Context) -> Iterable[str]:
    return sorted(folder.name for folder in _settings(context).projects_dir.iterdir() if folder.is_dir())


def _keys(context: click.Context) -> Iterable[str]:
    from mrcore.queue import job

    kinds = ("mapreduce", "script", "file_transfer")
    return sorted({f"{key}=" for kind in kinds for key in job.template(kind)})


# By the names of the commands' parameters: one that is called so is completed so.
_SOURCES: dict[str, Callable[[click.Context], Iterable[str]]] = {
    "changes": _keys, "group": _groups, "job": _jobs, "name": _logs, "node": _nodes, "nodes": _nodes,
    "project": _projects, "server": _servers,
}  # fmt: skip
_FILES = {"config", "file", "inputs", "local"}


class _Completed(click.types.StringParamType):
    """A text for which a shell offers what a source finds; without one, files."""

    def __init__(self, source: Callable[[click.Context], Iterable[str]] | None) -> None:
        self._source = source

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem[Any]]:
        """Return what begins as the word does that was typed so far; nothing when that cannot be found out."""
        if self._source is None:
            return [CompletionItem(incomplete, type="file")]
        with contextlib.suppress(Exception):
            words = (word for word in self._source(ctx) if _HARMLESS.fullmatch(word))
            return [CompletionItem(word) for word in words if word.startswith(incomplete)]
        return []


def complete_parameters(command: click.Command) -> None:
    """Have a shell complete all parameters of a command, and of those below it, whose names say what they are."""
    for parameter in command.params:
        name = str(parameter.name)
        if parameter.type is click.STRING and (name in _SOURCES or name in _FILES):
            parameter.type = _Completed(_SOURCES.get(name))
    for below in command.commands.values() if isinstance(command, click.Group) else ():
        complete_parameters(below)


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print what makes a shell complete mrcore's words.

    For bash, put `eval "$(mrcore completion bash)"` into ~/.bashrc; for zsh the same with zsh into ~/.zshrc; for fish,
    `mrcore completion fish > ~/.config/fish/completions/mrcore.fish`.
    """
    kind = get_completion_class(shell)
    assert kind is not None, "click knows all three"
    made = kind(click.get_current_context().find_root().command, {}, "mrcore", "_MRCORE_COMPLETE")
    script = ShellComplete.source(made)  # that of its class would start a bash to see its version
    click.echo(script.replace("    return 0\n", _NO_BLANK) if shell == "bash" else script)


COMMANDS = (completion,)
