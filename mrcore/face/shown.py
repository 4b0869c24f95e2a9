"""How far a job is, as a text, as HTML for a notebook, and live on whichever of the two there is."""

from __future__ import annotations

import html
import sys
from importlib import import_module
from typing import Any, Protocol

import msgspec

from mrcore.face.places import shell
from mrcore.state.progress import Phase
from mrcore.text import duration, one_line, percent, rough

TEXT_LIMIT = 200  # characters of a reason or a status
MAX_COUNTERS = 20  # that are shown
_BAR = "<progress max='1' {value} style='width:100%;max-width:40em;accent-color:{colour}'></progress><br>"
_COLOURS = {"succeeded": "#2a8a4a", "failed": "#b3372f", "group failed": "#b3372f", "cancelled": "#888888"}


class JobProgress(msgspec.Struct, frozen=True, kw_only=True):
    """How far a job is. `fraction` (0 to 1) and `eta_seconds` are None where they cannot be estimated."""

    name: str
    state: str  # see JobHandle.state
    run: int | None = None  # the run under way, or the last one
    phases: list[Phase] = []
    fraction: float | None = None
    eta_seconds: float | None = None
    counters: dict[str, int] = {}
    why: str = ""  # what it waits for, or why it failed

    def __str__(self) -> str:
        phase = self.phases[-1] if self.phases else None
        words = [f"{self.name}: {self.state}"]
        if self.state == "running" and phase is not None:
            words.append(phase.name + (f", {phase.records:,} records" if phase.records else ""))
        if self.state == "running" and self.fraction is not None:
            words.append(percent(self.fraction))
        if self.eta_seconds is not None:
            words.append(f"about {rough(self.eta_seconds)} left")
        return one_line(", ".join(words) + (f": {self.why}" if self.why else ""), TEXT_LIMIT + 100)

    def __repr__(self) -> str:
        return f"<{self}>"

    def _repr_html_(self) -> str:
        fraction = 1.0 if self.state == "succeeded" else self.fraction
        unknown = fraction is None and self.state == "running"  # without a value the bar only shows that it goes on
        value = "" if unknown else f"value='{min(1.0, max(0.0, fraction or 0.0)):.3f}'"
        bar = _BAR.format(value=value, colour=_COLOURS.get(self.state, "#3567b3"))
        phases = " → ".join(
            f"{escape(phase.name)} {duration(phase.ended - phase.started)}" if phase.ended else escape(phase.name)
            for phase in self.phases
        )
        counters = ", ".join(f"{escape(name)}: {n:,}" for name, n in sorted(self.counters.items())[:MAX_COUNTERS])
        lines = [escape(str(self)), *(f"<small>{line}</small>" for line in (phases, counters) if line)]
        return f"<div>{bar}{'<br>'.join(lines)}</div>"


class Why(msgspec.Struct, frozen=True, kw_only=True):
    """Why a job is where it is: `lines` for people, `code` for programs (docs/operations.md), `next_step` to type."""

    code: str
    lines: tuple[str, ...]
    next_step: str

    def __str__(self) -> str:
        return "\n".join(map(one_line, self.lines))

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        first, *others = map(escape, self.lines)
        return "<br>".join([f"<b>{first}</b>", *others])


def escape(text: object) -> str:
    """Return a text as HTML shows it, on one line, cleaned and bounded."""
    return html.escape(one_line(text, TEXT_LIMIT + 100))


class Live(Protocol):
    """What shows progress while a job is waited for."""

    def show(self, progress: JobProgress) -> None:
        """Show this in place of what was shown before."""

    def close(self) -> None:
        """Leave what was shown last."""


class Silent:
    """Shows nothing: output is neither a terminal nor a notebook, or the caller wants it so."""

    def show(self, progress: JobProgress) -> None:
        """Show nothing."""

    def close(self) -> None:
        """Leave nothing."""


class OnTerminal:
    """One line of standard error, written over again and again."""

    def __init__(self) -> None:
        self._shown = ""

    def show(self, progress: JobProgress) -> None:
        """Write the line if it has changed."""
        text = str(progress)[:TEXT_LIMIT]
        if text != self._shown:
            self._shown = text
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        """End the line."""
        if self._shown:
            print(file=sys.stderr, flush=True)


class InNotebook:
    """One output of the cell, which IPython replaces."""

    def __init__(self) -> None:
        self._shown: JobProgress | None = None
        self._handle: Any = None

    def show(self, progress: JobProgress) -> None:
        """Send the output if it has changed."""
        if progress == self._shown:
            return
        self._shown = progress
        if self._handle is None:
            self._handle = import_module("IPython.display").display(progress, display_id=True)
        else:
            self._handle.update(progress)

    def close(self) -> None:
        """Leave what was shown last."""


def live(wanted: bool) -> Live:
    """Return what shows progress in this process."""
    if not wanted:
        return Silent()
    if getattr(shell(), "kernel", None) is not None:
        return InNotebook()
    return OnTerminal() if sys.stderr.isatty() else Silent()
