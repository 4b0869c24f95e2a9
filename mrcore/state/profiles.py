"""Where the time of a run's user code went: `profiles/JOB/RUN.speedscope.json`, and a flame graph in `RUN.svg`.

The first is for https://www.speedscope.app (its file format: "sampled" profiles, one for each phase). The second is one
file with no script in it, which any browser shows: the root on top, a frame's width its share of the samples.
"""

from __future__ import annotations

import contextlib
import html
import re
import sys
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from mrcore import __version__
from mrcore.system.paths import PARTIAL, write_atomic
from mrcore.text import one_line

Profiles = Mapping[str, Mapping[str, int]]  # samples by phase and stack: frames from the root on, joined by ";"
FLAME_GRAPH, SPEEDSCOPE = ".svg", ".speedscope.json"
FRAME_CHARACTERS, MAX_DEPTH = 200, 100  # of a frame; frames of a stack, as tasks sample them
LEAST_SHARE, MAX_FRAMES = 0.001, 1_500  # of what is drawn of a phase: narrower frames, and then the narrowest, are not
WIDTH, ROW, MARGIN, CHARACTER = 1_200, 18, 12, 6.7  # pixels
# Colours by who wrote the code, packages with the user's; the second numbers: room for a hue of each frame's own.
HUES = {"user": (8, 40), "python": (200, 30), "mrcore": (120, 30)}


def paths(state_dir: Path, job: str, run: int) -> list[Path]:
    """Return the files that there are of a run: its flame graph, and what speedscope reads."""
    both = (path(state_dir, job, run, suffix) for suffix in (FLAME_GRAPH, SPEEDSCOPE))
    return [file for file in both if file.exists()]


def path(state_dir: Path, job: str, run: int, suffix: str) -> Path:
    """Return where one of a run's files is, if it is there."""
    return state_dir / "profiles" / job / f"{run}{suffix}"


def write(state_dir: Path, job: str, run: int, profiles: Profiles) -> bool:
    """Write both files of a run; return whether there was a sample to write. Raises OSError."""
    sampled = {phase: _frames(stacks) for phase, stacks in profiles.items()}
    sampled = {phase: stacks for phase, stacks in sampled.items() if stacks}
    if not sampled:
        return False
    folder = state_dir / "profiles" / job
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    name = f"{job} run {run}"
    write_atomic(folder / f"{run}{SPEEDSCOPE}", msgspec.json.encode(_speedscope(name, sampled)), 0o600)
    write_atomic(folder / f"{run}{FLAME_GRAPH}", _flame_graph(name, sampled).encode(), 0o600)
    return True


def prune(state_dir: Path, job: str, kept_runs: set[int]) -> None:
    """Forget the profiles of other runs than these, and what was being written when its writer died."""
    folder = state_dir / "profiles" / job
    for file in folder.glob("*"):
        number = file.name.partition(".")[0]
        if file.name.endswith(PARTIAL) or (number.isdecimal() and int(number) not in kept_runs):
            file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # there is none, or some are left
        folder.rmdir()


Stacks = dict[tuple[str, ...], int]


def _frames(stacks: Mapping[str, int]) -> Stacks:
    """Return the samples by frames, fit to be shown."""
    shown: Stacks = {}
    for stack, samples in stacks.items():
        if samples > 0:
            frames = tuple(one_line(frame, FRAME_CHARACTERS) for frame in stack.split(";", MAX_DEPTH)[:MAX_DEPTH])
            shown[frames] = shown.get(frames, 0) + samples
    return shown


def _speedscope(name: str, sampled: Mapping[str, Stacks]) -> dict[str, Any]:
    names = dict.fromkeys(frame for stacks in sampled.values() for frames in stacks for frame in frames)
    numbers = {frame: number for number, frame in enumerate(names)}
    return {
        "$schema": "https://www.speedscope.app/file-format-schema.json",
        "name": name,
        "exporter": f"mrcore {__version__}",
        "activeProfileIndex": 0,
        "shared": {"frames": [{"name": frame} for frame in names]},
        "profiles": [
            {
                "type": "sampled",
                "name": phase,
                "unit": "none",
                "startValue": 0,
                "endValue": sum(stacks.values()),
                "samples": [[numbers[frame] for frame in frames] for frames in stacks],
                "weights": list(stacks.values()),
            }
            for phase, stacks in sampled.items()
        ],
    }


class Box(NamedTuple):
    """A frame as it is drawn: where in its phase, and how wide, in samples."""

    frame: str
    depth: int
    start: int
    samples: int


def _boxes(stacks: Stacks) -> list[Box]:
    """Return a box for each call path that is wide enough; those of equal paths are one."""
    boxes: list[Box] = []
    open_: list[tuple[str, int]] = []  # the path to the last stack: frames, and where they begin
    position, least = 0, LEAST_SHARE * sum(stacks.values())

    def close(depth: int) -> None:
        while len(open_) > depth:
            frame, start = open_.pop()
            if position - start >= least:
                boxes.append(Box(frame, len(open_), start, position - start))

    for frames, samples in sorted(stacks.items()):
        common = 0
        while common < min(len(frames), len(open_)) and frames[common] == open_[common][0]:
            common += 1
        close(common)
        open_ += [(frame, position) for frame in frames[common:]]
        position += samples
    close(0)
    return sorted(boxes, key=lambda box: (-box.samples, box.depth))[:MAX_FRAMES]


def _flame_graph(name: str, sampled: Mapping[str, Stacks]) -> str:
    lines, top = list[str](), 2 * ROW + MARGIN
    for phase, stacks in sampled.items():
        total, boxes = sum(stacks.values()), _boxes(stacks)
        lines.append(f'<text x="{MARGIN}" y="{top + 13}" class="head">{_xml(phase)}: {total:,} samples</text>')
        top += ROW + 4
        lines += [line for box in boxes for line in _drawn(box, total, top)]
        top += ROW * (max((box.depth for box in boxes), default=0) + 1) + MARGIN
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{top}" viewBox="0 0 {WIDTH} {top}">\n'
        f"<title>{_xml(name)}</title>\n"
        "<style>text{font:11px monospace;fill:#111;pointer-events:none}.head{font-size:13px;font-weight:bold}"
        "rect{stroke:#fff;stroke-width:.5}rect:hover{stroke:#111}</style>\n"
        f'<rect width="{WIDTH}" height="{top}" style="fill:#fff;stroke:none"/>\n'
        f'<text x="{MARGIN}" y="24" class="head">{_xml(name)}</text>\n'
    )
    legend = "".join(
        f'<rect x="{WIDTH - 330 + 110 * number}" y="12" width="14" height="14" fill="hsl({hue},70%,70%)"/>'
        f'<text x="{WIDTH - 310 + 110 * number}" y="23">{who}</text>\n'
        for number, (who, (hue, _)) in enumerate(HUES.items())
    )
    return head + legend + "\n".join(lines) + "\n</svg>\n"


def _drawn(box: Box, total: int, top: int) -> Iterator[str]:
    scale = (WIDTH - 2 * MARGIN) / total
    x, y, width = MARGIN + box.start * scale, top + box.depth * ROW, box.samples * scale
    hue, room = HUES[owner(box.frame)]
    hue += zlib.crc32(box.frame.encode()) % room
    title = f"{box.frame}: {box.samples:,} samples, {box.samples / total:.1%}"
    yield f'<g><title>{_xml(title)}</title><rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{ROW - 1}" '
    yield f'fill="hsl({hue},70%,70%)"/>'
    fits = int((width - 6) / CHARACTER)
    if fits >= 3:
        text = box.frame if len(box.frame) <= fits else f"{box.frame[: fits - 1]}…"
        yield f'<text x="{x + 3:.1f}" y="{y + 12}">{_xml(text)}</text>'
    yield "</g>"


def owner(frame: str) -> str:
    """Return who wrote a frame's code, by its file, which is told from a folder of `sys.path` on: see HUES."""
    file = frame.rpartition(" (")[2]
    top = re.split(r"[/.:]", file.rpartition("lib/python3")[2])[0]
    if top == "mrcore":
        return "mrcore"
    return "python" if top in sys.stdlib_module_names or file.startswith("<") else "user"


def _xml(text: str) -> str:
    return html.escape(re.sub("[\ufffe\uffff]", "?", text))
