"""Tables of the command line: fitted to a terminal, with states in colour there; whole and plain in a pipe."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mrcore.system.terminal import raw
from mrcore.text import escaped, one_line

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

Row = Mapping[str, Any]
Spare = Sequence[tuple[str, str | None]]

GAP = 2  # blanks between columns
MIN_TEXT_COLUMNS = 24  # characters; a last column that would get fewer stands below its row instead
MIN_COLUMNS = 8  # characters that any other column keeps, however narrow the terminal
INDENT = 4  # blanks before what stands below its row
_STYLES = {"succeeded": "green", "failed": "red", "running": "cyan", "absent": "red", "group failed": "red"}
_STYLES |= dict.fromkeys(("held", "waiting", "handed back", "cancelled", "stopped"), "yellow")


def state_style(state: str) -> str:
    """Return the colour of a state, as `rich` names it; empty for a state that has none."""
    return _STYLES.get(state) or _STYLES.get(state.split(" ")[0], "")


def terminal_console() -> Console:
    """Return what prints in colour to a terminal, and plain where NO_COLOR is set or there is no terminal."""
    from rich.console import Console

    return Console(file=raw(sys.stdout), force_terminal=sys.stdout.isatty(), highlight=False)


def print_states(*parts: str) -> None:
    """Print a line of parts, of which those that are states have their colours on a terminal."""
    from rich.text import Text

    line = Text.assemble(*((escaped(part), state_style(part)) for part in parts))
    terminal_console().print(line, soft_wrap=True)


def print_table(rows: Sequence[Row], columns: Mapping[str, str], spare: Spare = ()) -> None:
    """Print `{key: title}` of the rows: aligned and fitted on a terminal, whole in a pipe.

    A terminal gets no column without a value. What it has no room for goes in the order of `spare`: `(key, key of
    something shorter)` or `(key, None)`. The last column is broken between words; no other unless it must be.
    """
    from rich.cells import cell_len

    every = {*columns, *(shorter for _, shorter in spare if shorter)}
    shown = [{key: "" if row.get(key) is None else one_line(row[key]) for key in every} for row in rows]
    keys = {key: key for key in columns}  # of each column: whose values stand in it
    console = terminal_console()

    def widths() -> list[int]:
        return [max(map(cell_len, (columns[key], *(row[use] for row in shown)))) for key, use in keys.items()]

    if console.is_terminal:
        keys = {key: key for key in columns if not rows or any(row[key] for row in shown)}
        for key, shorter in spare:
            if key in keys and _needed(widths()) > console.width:
                keys[key] = shorter or ""
                keys = {each: use for each, use in keys.items() if use}
    table = [[(columns[key], "bold") for key in keys]]
    table += [
        [(row[use], state_style(row[use]) if key == "state" else "") for key, use in keys.items()] for row in shown
    ]
    for row in table:
        _print_row(console, row, _fitted(widths(), console.width) if console.is_terminal else widths())


def _needed(widths: list[int]) -> int:
    """Return how wide a table is at least, whose last column may be broken."""
    return sum(widths[:-1]) + GAP * (len(widths) - 1) + min(widths[-1], MIN_TEXT_COLUMNS)


def _fitted(widths: list[int], room: int) -> list[int]:
    """Return widths that fit a terminal; 0 for a last column that has to stand below its row."""
    *others, last = widths
    last = 0 if others and _needed(widths) > room else last
    free = room - sum(others) - GAP * (len(others) if last else len(others) - 1)
    while free < 0 and max(others, default=0) > MIN_COLUMNS:
        others[others.index(max(others))] -= 1
        free += 1
    return [*others, min(last, max(free, 1))]


def _print_row(console: Console, row: list[tuple[str, str]], widths: list[int]) -> None:
    """Print cells, `(text, style)`, in as many lines as the highest one takes."""
    from rich.text import Text

    def lines(text: str, style: str, width: int) -> list[Text]:
        return list(Text(text, style).wrap(console, max(width, 1), overflow="fold")) or [Text()]

    cells = [lines(*cell, width) for cell, width in zip(row, widths, strict=True) if width]
    below = [] if widths[-1] or not row[-1][0] else lines(*row[-1], console.width - INDENT)
    for line in itertools.zip_longest(*cells, fillvalue=Text()):
        whole = Text()
        for text, width in zip(line, widths, strict=False):
            text.rstrip()
            whole.append_text(text).append(" " * (width + GAP - text.cell_len))
        whole.rstrip()
        _print_line(console, whole)
    for text in below:
        _print_line(console, Text(" " * INDENT).append_text(text))


def _print_line(console: Console, line: Text) -> None:
    console.print(line, no_wrap=True, overflow="ignore", crop=False)
