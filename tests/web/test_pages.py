"""What each page shows of what is known, whatever it holds, and how quickly."""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from clusters import TestCluster
from dashboards import MARKUP, Dashboard, dashboard, fill, settings_of
from hypothesis import given
from hypothesis import strategies as st
from starlette.exceptions import HTTPException

from mrcore.cluster.manage_cluster import ManageCluster
from mrcore.queue.runner import Runner
from mrcore.queue.scheduler import Scheduler
from mrcore.state.progress import Phase, ServerShare
from mrcore.state.store import Store
from mrcore.web import pages, views

RUNS = 10_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pages")


@pytest.fixture(scope="module")
def store(folder: Path) -> Iterator[Store]:
    store = fill(settings_of(folder), RUNS)
    yield store
    store.check()
    store.close()


@pytest.fixture(scope="module")
def shown(folder: Path, store: Store) -> Iterator[Dashboard]:
    profiles = store.path.parent / "profiles/broken_dates"
    profiles.mkdir(parents=True)
    (profiles / "1.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>")
    with dashboard(folder, "--control") as running:
        yield running


def page(shown: Dashboard, path: str) -> str:
    answer = shown.ask(path)
    assert answer.status == 200, answer.text
    return answer.text


def names_in(text: str) -> list[tuple[str, int]]:
    """Jobs and runs that a history lists, in order."""
    return [(job, int(run)) for job, run in re.findall(r'href="/jobs/(\w+)/runs/(\d+)"', text)]


@pytest.mark.parametrize(
    "path", ["/", "/history?job=broken", "/jobs/broken_dates", "/jobs/report", "/jobs/broken_dates/runs/1", "/nodes"]
)
def test_markup_in_whatever_is_known_is_text(shown: Dashboard, path: str) -> None:
    text = page(shown, path)
    assert "<img src=x" not in text and "<script>alert" not in text
    if path != "/nodes":
        assert "&lt;img src=x onerror=alert(1)&gt;&lt;script&gt;alert(2)&lt;/script&gt;" in text


def test_what_is_asked_for_is_text_in_the_answer(shown: Dashboard) -> None:
    for path in ("/history?job=%3Cscript%3Ealert(1)%3C/script%3E&state=%22%3E", "/jobs/%3Cscript%3E", "/%3Cscript%3E"):
        assert "<script>" not in shown.ask(path).text.replace('<script src="/static/live.js" defer></script>', "")


def test_the_queue_tells_what_runs_waits_and_left(shown: Dashboard) -> None:
    text = page(shown, "/")
    for words in (
        "28 %",
        "about 5 min left",
        "MAP",
        "164,800,000",
        "51.5 GB",
        "1,165,820",
        "S_7",
        "day 2026-11-01",
    ):
        assert words in text, words
    assert text.index("clicks_per_user") < text.index("sessions") < text.index("top_pages") < text.index("broken_dates")
    assert "no Runner drains the queue" not in text
    assert 'aria-live="polite">clicks_per_user, run 1: MAP, 20 %<' in text


def test_a_run_that_failed_shows_why(shown: Dashboard) -> None:
    text = page(shown, "/jobs/broken_dates/runs/1")
    assert "Traceback (most recent call last):\n  File &#34;map_functions.py&#34;, line 7, in parse\n" in text
    for words in (
        "JobFault",
        "/data/clicks.log",
        "S_7",
        "killed by signal 9",
        "stragglers: 1",
        "4.4 times",
        "41,200,000",
    ):
        assert words in text, words
    assert 'src="/jobs/broken_dates/runs/1/profile.svg"' in text


def test_a_flame_graph_can_do_nothing(shown: Dashboard) -> None:
    answer = shown.ask("/jobs/broken_dates/runs/1/profile.svg")
    assert (answer.status, answer.headers["content-type"]) == (200, "image/svg+xml")
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("sandbox; default-src 'none'") and "script" not in policy


def test_a_jobs_page_tells_its_keys_and_why_it_waits(shown: Dashboard) -> None:
    text = page(shown, "/jobs/sessions")
    assert "&#34;nightly&#34;" in text and "job_priority" in text and "ada" in text
    assert "It has not run yet." in text and "It has no output." in text


def test_that_no_runner_drains_the_queue_is_told_of_every_job(tmp_path: Path) -> None:
    with contextlib.closing(fill(settings_of(tmp_path), 20)), dashboard(tmp_path, runner=False) as shown:
        assert page(shown, "/").count("no Runner drains the queue") == 3
        assert "<code>mrcore run</code>" in page(shown, "/jobs/sessions"), "commands are marked"


@pytest.mark.parametrize(("text", "state"), [("", ""), ("job_01", ""), ("", "failed"), ("job_0", "failed"), ("no", "")])
def test_the_history_is_that_of_the_queue_page_by_page(shown: Dashboard, store: Store, text: str, state: str) -> None:
    rows = store.rows("SELECT id, job_name, run, state FROM runs")
    wanted = [
        (row["job_name"], row["run"])
        for row in sorted(rows, key=lambda row: -row["id"])
        if text in row["job_name"] and state in ("", row["state"])
    ]
    for number in (1, 2, 7):
        found = page(shown, f"/history?job={text}&state={state}&page={number}")
        assert names_in(found) == wanted[100 * (number - 1) : 100 * number]
        assert f"{len(wanted):,} runs" in found


@pytest.mark.parametrize(
    "path", ["/history", "/history?page=90", "/history?job=job_0&state=failed&page=8", "/jobs/job_01"]
)
def test_a_page_of_ten_thousand_runs_takes_less_than_200_ms(shown: Dashboard, path: str) -> None:
    """Of a core: how long it waits for one says nothing of the page."""
    before = shown.cpu_seconds()
    for _ in range(5):
        page(shown, path)
    assert (shown.cpu_seconds() - before) / 5 < 0.2


@pytest.mark.parametrize(
    "query", ["page=0", "page=-1", "page=x", "page=99999999999", "page=1.5", "state=none", "job=" + "a" * 500]
)
def test_a_page_that_makes_no_sense_is_some_page(shown: Dashboard, query: str) -> None:
    page(shown, f"/history?{query}")


def test_an_empty_queue(tmp_path: Path) -> None:
    settings_of(tmp_path)
    with dashboard(tmp_path) as shown:
        assert "Nothing runs" in page(shown, "/") and "No job waits" in page(shown, "/")
        assert "No such run" in page(shown, "/history")
        assert "is not started" in page(shown, "/nodes")
        assert "it is not started" in page(shown, "/doctor?run=1")
        assert shown.ask("/jobs/a").status == shown.ask("/jobs/a/output").status == 404


@pytest.mark.slow
def test_a_cluster_that_runs(tmp_path: Path) -> None:
    """Nodes, servers, doctor, and the output of a job that has run."""
    with TestCluster(tmp_path, nodes=2, servers=2) as cluster:
        settings = cluster.settings
        config = tmp_path / "settings.yml"
        config.write_text(json.dumps({"home": str(settings.home), "projects_dir": str(settings.projects_dir)}))
        scheduler = Scheduler(settings)
        cluster.write_inputs({"one": "a b a\n" * 2_000, "two": "b c\n" * 2_000})
        scheduler.submit_job(cluster.job(job_name="shown", run_once=True))
        Runner(settings).run(once=True)
        with dashboard(tmp_path) as shown:
            nodes = page(shown, "/nodes")
            assert nodes.count("<td>up</td>") == 2 + 4 and "silent" not in nodes
            assert "GB" in nodes
            assert "Nothing is wrong" in page(shown, "/doctor?run=1") or "Runner" in page(shown, "/doctor?run=1")
            with (tmp_path / "cat").open("wb") as out:
                ManageCluster(settings).cat("shown", out)
            answer = shown.ask("/jobs/shown/output")
            assert answer.text == (tmp_path / "cat").read_text() != ""
            assert answer.headers["content-disposition"] == 'attachment; filename="shown.jsonl"'
            run = page(shown, "/jobs/shown/runs/1")
            for words in ("PREFLIGHT", "MAP", "REDUCE", "Slowest tasks", "MAP by server, slowest first", "S_0"):
                assert words in run, words
            parts = re.findall(r'href="(/jobs/shown/parts/[^"]+)"', page(shown, "/jobs/shown"))
            assert parts and "".join(page(shown, part) for part in parts) == answer.text
            assert shown.ask("/jobs/shown/parts/part-000001-00000-99999.data").status == 404
        scheduler.store.close()


# --- Pure ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"), (999, "999 B"), (1024, "1.0 kB"), (150_000, "150 kB"), (48 * 10**9, "48.0 GB"), (None, ""),
    ],
)  # fmt: skip
def test_bytes_for_people(count: int | None, text: str) -> None:
    assert views.size(count) == text


@pytest.mark.parametrize(
    ("length", "text"),
    [
        (0.04, "0.04 s"),
        (59, "59.0 s"),
        (60, "1 min 00 s"),
        (3_599.6, "1 h 00 min"),
        (90_000, "25 h 00 min"),
    ],
)
def test_times_for_people(length: float, text: str) -> None:
    assert views.seconds(length) == text


@given(st.text(), st.text())
def test_commands_in_lines_are_marked_and_all_else_is_text(before: str, command: str) -> None:
    marked = views.marked(f"{before}`{command}`")
    assert re.sub("</?code>", "", marked).count("<") == 0
    assert marked.count("<code>") == marked.count("</code>")


def share(server: int, seconds: float) -> ServerShare:
    return ServerShare(phase="MAP", server=f"S_{server}", node="n", tasks=1, seconds=seconds, bytes=1, records=1)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50))
def test_stragglers_are_those_that_took_much_longer(times: list[float]) -> None:
    (phase,) = views.by_phase([share(number, seconds) for number, seconds in enumerate(times)])
    middle = sorted(times)
    median = (middle[len(times) // 2] + middle[(len(times) - 1) // 2]) / 2
    assert [row.seconds for row, _ in phase.rows] == sorted(times, reverse=True)
    assert sum(late for _, late in phase.rows) == sum(t > 1.5 * median and t > median + 1 for t in times)
    assert phase.chart.count("<rect") == len(times)


def test_phases_lie_side_by_side_on_their_time_line() -> None:
    phases = [Phase(name="MAP", started=100, ended=150), Phase(name="REDUCE", started=150, ended=200)]
    first, second = (re.search(r'x="([\d.]+)" y="0" width="([\d.]+)"', span.picture) for span in views.spans(phases))
    assert first and second and first.groups() == ("0.00", "50.00") and second.groups() == ("50.00", "50.00")


def test_a_chart_says_in_words_what_it_shows() -> None:
    chart = views.columns(views.run_times([{"run": 2, "state": "failed", "seconds": 2.0}]), f"times of {MARKUP}")
    assert "<title>run 2: failed, 2.0 s</title>" in chart and 'role="img" aria-label="times of &lt;img' in chart


def test_who_waits_for_slow_nodes_keeps_no_thread_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages that are loaded again and again while a node hangs would leave none for the others, nor for metrics."""
    monkeypatch.setattr(pages, "TURN_SECONDS", 0.05)
    asked, begun, hangs = pages.Kept(5.0), threading.Event(), threading.Event()

    def ask() -> str:
        begun.set()
        hangs.wait(60)
        return "answer"

    first = threading.Thread(target=asked.get, args=(ask,))
    first.start()
    try:
        assert begun.wait(60)
        with pytest.raises(HTTPException, match="some node is slow") as refused:
            asked.get(ask)
        assert refused.value.status_code == 503
    finally:
        hangs.set()
        first.join(60)
    assert asked.get(ask)[1] == "answer"
