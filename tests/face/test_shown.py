"""What progress looks like as text, as HTML and on a terminal; what comes from outside is text there, too."""

from __future__ import annotations

import pytest

from mrcore.face import shown
from mrcore.face.shown import InNotebook, JobProgress, OnTerminal, Silent, Why
from mrcore.state.progress import Phase

RUNNING = JobProgress(
    name="words",
    state="running",
    run=3,
    phases=[Phase(name="PREFLIGHT", started=1.0, ended=1.5), Phase(name="MAP", started=1.5, records=12345)],
    fraction=0.42,
    eta_seconds=75.0,
    counters={"bad date": 7},
)


def test_progress_is_told_in_one_line() -> None:
    assert str(RUNNING) == "words: running, MAP, 12,345 records, 42 %, about 75 s left"
    assert str(JobProgress(name="words", state="queued", why="not before\nnoon")) == r"words: queued: not before\nnoon"


def test_progress_is_a_bar_with_phases_and_counters() -> None:
    page = RUNNING._repr_html_()
    assert "<progress max='1' value='0.420'" in page and "PREFLIGHT 0.50 s → MAP" in page and "bad date: 7" in page
    assert "value='1.000'" in JobProgress(name="words", state="succeeded")._repr_html_()
    assert "value='0.000'" in JobProgress(name="words", state="queued")._repr_html_()
    assert "value=" not in JobProgress(name="words", state="running")._repr_html_(), "not known"


def test_what_comes_from_outside_is_no_markup() -> None:
    evil = "<script>alert(1)</script>\x1b[2J&"
    progress = JobProgress(
        name=evil, state="running", phases=[Phase(name=evil, started=0.0)], counters={evil: 1}, why=evil
    )
    for page in (progress._repr_html_(), Why(code="x", lines=(evil, evil), next_step="")._repr_html_()):
        assert "<script" not in page and "\x1b" not in page and "&lt;script&gt;" in page
    assert "\x1b" not in str(progress)


def test_a_terminal_gets_one_line_that_is_written_over(capsys: pytest.CaptureFixture[str]) -> None:
    view = OnTerminal()
    view.show(RUNNING)
    view.show(RUNNING)
    view.close()
    err = capsys.readouterr().err
    assert err == f"\r\x1b[K{RUNNING}\n"


def test_who_shows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(shown.live(False), Silent) and isinstance(shown.live(True), Silent)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert isinstance(shown.live(True), OnTerminal)

    class Shell:
        kernel = object()

    monkeypatch.setattr(shown, "shell", Shell)
    assert isinstance(shown.live(True), InNotebook)
