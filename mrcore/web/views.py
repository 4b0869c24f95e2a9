"""How values become text and pictures: the templates, their filters, and charts as inline SVG."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup
from starlette.responses import HTMLResponse

from mrcore import __version__
from mrcore import text as plain_text
from mrcore.state.progress import Phase, Progress, ServerShare
from mrcore.text import clean, one_line

STRAGGLER = 1.5  # times the median of the servers of a phase
LEAST_WIDTH = 160  # of a chart, where a column takes 10: few columns are no walls
STEP = 10  # per cent: how often the running job is told to who listens to the page


class Templates:
    """The pages of one dashboard."""

    def __init__(self, control: bool, form_token: str, cluster_name: str) -> None:
        loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
        self._jinja = jinja2.Environment(
            loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        self._jinja.globals |= {
            "control": control, "form_token": form_token, "cluster": cluster_name, "version": __version__
        }  # fmt: skip
        filters = (size, number, seconds, rough, moment, line, marked, text, as_json, share)
        self._jinja.filters |= {function.__name__: function for function in filters}

    def page(self, template: str, status: int = 200, **values: Any) -> HTMLResponse:
        """Return a whole page."""
        return HTMLResponse(self.part(template, **values), status)

    def part(self, template: str, **values: Any) -> str:
        """Return what a template makes of values."""
        return self._jinja.get_template(template).render(**values)


# --- Text ------------------------------------------------------------------------------------------------------------


def size(count: float | None) -> str:
    """Return bytes for people."""
    return "" if count is None else plain_text.size(count)


def number(count: int | None) -> str:
    """Return a count for people."""
    return "" if count is None else f"{count:,}"


def seconds(length: float | None) -> str:
    """Return a length of time for people."""
    return "" if length is None else plain_text.duration(length)


def rough(length: float) -> str:
    """Return a length of time that is estimated, for people."""
    return plain_text.rough(length)


def moment(at: float | str | None) -> Markup:
    """Return a moment (seconds since 1970, or ISO) in this machine's time."""
    if at is None:
        return Markup("")
    when = datetime.fromisoformat(at) if isinstance(at, str) else datetime.fromtimestamp(at).astimezone()
    return Markup('<time datetime="{}">{}</time>').format(
        when.isoformat(timespec="seconds"), f"{when:%Y-%m-%d %H:%M:%S}"
    )


def line(value: object) -> str:
    """Return anything as one line that is not too long."""
    return one_line(value, 500)


def marked(value: object) -> Markup:
    """Return a line in which what stands in backticks, a command, is code."""
    pieces = one_line(value, 1_000).split("`")
    code = Markup("<code>{}</code>").format
    return Markup("").join(code(piece) if place % 2 else piece for place, piece in enumerate(pieces))


def text(value: object) -> str:
    """Return anything as text of several lines."""
    return clean(value)


def as_json(value: object) -> str:
    """Return a value of a job's key as it could be typed."""
    return one_line(json.dumps(value, ensure_ascii=False, default=str), 1_000)


def share(part: float, whole: float) -> int:
    """Return per cent, 0 to 100; 0 when there is no whole."""
    return min(100, max(0, int(100 * part / whole + 1e-9))) if whole > 0 else 0


def spoken(progress: Progress | None) -> str:
    """Return how far a run is for who listens: another text every few per cent only."""
    if progress is None:
        return ""
    phase = progress.phases[-1].name if progress.phases else "starting"
    told = f", {share(progress.fraction, 1) // STEP * STEP} %" if progress.fraction is not None else ""
    return f"{progress.job_name}, run {progress.run}: {phase}{told}"


# --- Charts ----------------------------------------------------------------------------------------------------------


class Bar(NamedTuple):
    """A column of a chart; `kind` is its class in the style sheet: good, bad or slow."""

    height: float
    kind: str
    title: str


def columns(bars: list[Bar], label: str) -> Markup:
    """Return columns side by side as SVG that fills its place, with `label` for who does not see it."""
    top = max((bar.height for bar in bars), default=0) or 1
    rects = [
        Markup('<rect class="{}" x="{}" y="{:.2f}" width="8" height="{:.2f}"><title>{}</title></rect>').format(
            bar.kind, 10 * place + 1, 100 - tall, tall, line(bar.title)
        )
        for place, bar in enumerate(bars)
        for tall in [max(1.0, 100 * bar.height / top)]
    ]
    head = '<svg class="columns" role="img" aria-label="{}" viewBox="0 0 {} 100" preserveAspectRatio="none">{}</svg>'
    return Markup(head).format(line(label), max(LEAST_WIDTH, 10 * len(bars)), Markup("").join(rects))


def run_times(rows: Iterable[dict[str, Any]]) -> list[Bar]:
    """Return the columns of a job's runs, oldest first."""
    kinds = {"succeeded": "good", "handed back": "slow"}
    return [
        Bar(
            row["seconds"],
            kinds.get(row["state"], "bad"),
            f"run {row['run']}: {row['state']}, {seconds(row['seconds'])}",
        )
        for row in reversed([*rows])
    ]


class ServersOfPhase(NamedTuple):
    """What the servers did in a phase: a chart, and rows with whether each is a straggler, slowest first."""

    phase: str
    chart: Markup
    rows: list[tuple[ServerShare, bool]]
    median_seconds: float
    stragglers: int


def by_phase(shares: list[ServerShare]) -> list[ServersOfPhase]:
    """Return the servers' shares by phase. A straggler took much longer than the median."""
    answer = []
    for phase in dict.fromkeys(each.phase for each in shares):
        own = [each for each in shares if each.phase == phase]
        middle = median(each.seconds for each in own)
        slow = [each.seconds > STRAGGLER * middle and each.seconds > middle + 1 for each in own]
        bars = [
            Bar(each.seconds, "slow" if late else "good", f"{each.server} on {each.node}: {seconds(each.seconds)}")
            for each, late in zip(own, slow, strict=True)
        ]
        label = f"{phase}: seconds of {len(own)} servers, median {seconds(middle)}, {sum(slow)} stragglers"
        rows = sorted(zip(own, slow, strict=True), key=lambda pair: -pair[0].seconds)
        answer.append(ServersOfPhase(phase, columns(bars, label), rows, middle, sum(slow)))
    return answer


class Span(NamedTuple):
    """A phase on the time line of its run."""

    phase: Phase
    seconds: float
    picture: Markup


def spans(phases: list[Phase], now: float | None = None) -> list[Span]:
    """Return phases with their place on the time line from the first's start to the last's end."""
    if not phases:
        return []
    ends = [phase.ended or now or time.time() for phase in phases]
    start, whole = phases[0].started, max(1e-9, max(ends) - phases[0].started)
    picture = '<svg class="span" viewBox="0 0 100 1" preserveAspectRatio="none" aria-hidden="true">{}</svg>'
    rect = '<rect x="{:.2f}" y="0" width="{:.2f}" height="1"/>'
    return [
        Span(phase, end - phase.started, Markup(picture).format(Markup(rect).format(
            100 * (phase.started - start) / whole, max(0.4, 100 * (end - phase.started) / whole))))
        for phase, end in zip(phases, ends, strict=True)
    ]  # fmt: skip
