"""Listings on terminals of several widths, as a terminal shows them, and in pipes."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyte
import pytest
from commands import MRCORE, mrcore
from screen import Terminal

from mrcore.cli.tables import state_style
from mrcore.queue.scheduler import Scheduler
from mrcore.settings.config import load_settings
from mrcore.state.store import Store

LONG = "the_visits_of_all_pages_by_country_and_hour"  # 43 characters
WHY = "the script /srv/projects/visits/popular.py ended with exit status 1: no such file: visits.tsv"
COLOURS = {"succeeded": "green", "failed": "red", "running": "cyan", "held": "brown"}  # pyte's brown is yellow


def screen_of(columns: int, *arguments: str, **env: str) -> pyte.Screen:
    """What the terminal shows once a command has ended."""
    terminal = Terminal([MRCORE, *arguments], columns=columns, env=env)
    try:
        terminal.wait()
    finally:
        terminal.kill()
    screen = pyte.Screen(columns, 60)
    pyte.Stream(screen).feed(terminal.output)
    return screen


def lines_of(columns: int, *arguments: str) -> list[str]:
    return [line.rstrip() for line in screen_of(columns, *arguments).display if line.strip()]


def colours_of(screen: pyte.Screen, word: str) -> set[str]:
    """The colours of the letters of a word, wherever it stands."""
    found = set()
    for number, line in enumerate(screen.display):
        start = line.find(word)
        if start >= 0:
            found |= {screen.buffer[number][column].fg for column in range(start, start + len(word))}
    return found


@pytest.fixture
def store(home: Path) -> Iterator[Store]:
    scheduler = Scheduler(load_settings())
    yield scheduler.store
    scheduler.store.close()


def submit(name: str, **keys: Any) -> None:
    script = Path("script.py")
    script.write_text("pass\n")
    scheduler = Scheduler(load_settings())
    with contextlib.closing(scheduler.store):
        scheduler.submit_job({"job_type": "script", "job_name": name, "script_location": str(script)} | keys)


def ran(store: Store, name: str, state: str, why: str | None = None) -> None:
    """Put a run into the history as a Runner would have."""
    exception = {"class": "JobFault", "message": why, "details": {}} if why else None
    now = time.time()
    with store.change() as db:
        db.execute("UPDATE jobs SET last_run = last_run + 1 WHERE job_name = ?", (name,))
        db.execute(
            "INSERT INTO runs (job_name, run, state, number, started, ended, exception, spec) "
            "SELECT job_name, last_run, ?, number, ?, ?, ?, spec FROM jobs WHERE job_name = ?",
            (state, now - 3, None if state == "running" else now, json.dumps(exception), name),
        )


@pytest.fixture
def history(store: Store) -> Store:
    submit(LONG, group_name="the_group_of_the_night", job_priority=2.5, force_run=True)
    submit("short")
    ran(store, "short", "succeeded")
    ran(store, LONG, "failed", WHY)
    return store


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_no_line_is_broken_by_the_terminal_and_no_name_is_cut_while_there_is_room(history: Store, columns: int) -> None:
    for command in ("history", "queue"):
        lines = lines_of(columns, command)
        assert [line for line in lines if len(line) > columns] == []
        if columns > len(LONG):
            assert any(line.startswith(LONG) for line in lines), lines


def test_at_80_columns_what_matters_less_goes_and_the_reason_stays_whole(history: Store) -> None:
    lines = lines_of(80, "history")
    assert lines[0].split() == ["JOB", "RUN", "STATE"]
    assert lines[2].split() == [LONG, "1", "failed"]
    assert " ".join(line.strip() for line in lines[3:5]) == WHY, "below its row, broken between words"
    title, first, *rest = lines_of(100, "history")
    assert title.split() == ["JOB", "RUN", "STATE", "START", "WHY"], "with a shorter START"
    where = title.index("WHY")
    assert "".join(line[where:] for line in (first, *rest)).replace(" ", "") == WHY.replace(" ", "")


def test_a_column_without_a_value_takes_no_room(store: Store) -> None:
    submit("short")
    ran(store, "short", "succeeded")
    assert lines_of(80, "history")[0].split() == ["JOB", "RUN", "STATE", "START", "TOOK"]
    assert "WHY" in mrcore("history")[1], "a pipe always gets the same columns"


def test_a_pipe_gets_whole_values_without_colours(history: Store) -> None:
    os.environ["FORCE_COLOR"] = "1"
    try:
        status, out, _ = mrcore("history")
    finally:
        del os.environ["FORCE_COLOR"]
    assert status == 0 and "\x1b" not in out
    (line,) = [line for line in out.splitlines() if line.startswith(LONG)]
    assert line.endswith(WHY)


def test_states_have_colours_on_a_terminal_and_stand_there_in_words(history: Store) -> None:
    ran(history, "short", "running")
    screen = screen_of(120, "history")
    for state in ("succeeded", "failed", "running"):
        assert colours_of(screen, state) == {COLOURS[state]}
    assert colours_of(screen_of(120, "show", LONG), "failed") == {"red"}
    plain = screen_of(120, "history", NO_COLOR="1")
    assert [line.split()[:4] for line in plain.display] == [line.split()[:4] for line in screen.display]
    assert colours_of(plain, "failed") == {"default"}


@pytest.mark.parametrize(
    ("state", "colour"),
    [("running REDUCE", "cyan"), ("held", "yellow"), ("waiting", "yellow"), ("failed", "red"), ("queued", "")],
)
def test_a_state_with_its_phase_has_the_colour_of_the_state(state: str, colour: str) -> None:
    assert state_style(state) == colour


def test_a_name_wider_than_the_terminal_is_broken_as_the_last_resort(store: Store) -> None:
    submit("n" * 90)
    ran(store, "n" * 90, "failed", WHY)
    lines = lines_of(60, "history")
    assert sum(line.count("n") for line in lines if set(line.split()[0]) == {"n"}) >= 90
    assert "failed" in " ".join(lines)


@pytest.mark.parametrize("arguments", [["queue"], ["history"], ["logs"], ["cluster", "status"]])
def test_an_empty_listing_says_where_it_looked_and_what_to_do(home: Path, arguments: list[str]) -> None:
    status, out, _ = mrcore(*arguments)
    assert status == 0
    assert str(home) in out and "`mrcore " in out.splitlines()[-1]


@pytest.mark.parametrize("arguments", [["show", "wc"], ["ledger", "show", "wc"]])
def test_what_is_asked_of_an_empty_queue_says_which_one_is_meant(home: Path, arguments: list[str]) -> None:
    status, _, err = mrcore(*arguments)
    assert status == 2 and f"nothing is in {home / 'state'}" in err
