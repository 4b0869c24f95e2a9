"""What `--help` says fits a terminal of 80 columns, whole, and a newcomer finds where to begin."""

from __future__ import annotations

import re
from collections.abc import Iterator

import click
import pytest

from mrcore.cli.main import FIRST, FIRST_STEPS, PARTS, cli


def every(command: click.Command, words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The words of a command and of all below it."""
    yield words
    for name, below in command.commands.items() if isinstance(command, click.Group) else ():
        yield from every(below, (*words, name))


def help_of(words: tuple[str, ...]) -> str:
    command: click.Command = cli
    context = click.Context(cli, info_name="mrcore", terminal_width=80, **cli.context_settings)
    for word in words:
        assert isinstance(command, click.Group)
        command = command.commands[word]
        context = click.Context(command, parent=context, info_name=word, terminal_width=80)
    return command.get_help(context)


@pytest.mark.parametrize("words", list(every(cli)), ids=lambda words: " ".join(("mrcore", *words)))
def test_every_help_is_whole_and_fits_80_columns(words: tuple[str, ...]) -> None:
    shown = help_of(words)
    assert "..." not in shown
    assert [line for line in shown.splitlines() if len(line) > 80] == []


def test_every_command_stands_in_one_group_of_the_help() -> None:
    shown = help_of(())
    named = re.findall(r"^  ([a-z-]+) ", shown.split(f"\n{FIRST}:")[1], re.MULTILINE)
    assert sorted(named) == sorted(cli.commands)
    titles = re.findall(r"^(\w[\w ]*):$", shown, re.MULTILINE)
    assert titles[:2] == ["Options", FIRST] and titles[-1] == "Administration"
    assert set(titles[2:]) == {part.GROUP for part in PARTS if any(c.name not in FIRST_STEPS for c in part.COMMANDS)}


def test_each_line_of_the_help_is_one_short_sentence() -> None:
    lines = help_of(()).split(f"\n{FIRST}:")[1].splitlines()
    assert [line for line in lines if line.startswith(" " * 20)] == [], "too long for one line of 80 columns"
