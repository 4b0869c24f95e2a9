"""The dashboard in a real browser: live, harmless, usable by keyboard and screen reader, in any light, at any width."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from browser import chromium, visitor
from dashboards import Dashboard, dashboard, fill, progress, settings_of
from playwright.sync_api import Browser, expect

from mrcore.state.store import Store

pytestmark = pytest.mark.slow
PAGES = [
    "", "history", "history?job=job_01", "nodes", "doctor", "doctor?run=1", "jobs/clicks_per_user", "jobs/broken_dates",
    "jobs/broken_dates/runs/1", "jobs/nothing",
]  # fmt: skip
OPEN_ALL = "document.querySelectorAll('details').forEach((each) => { each.open = true })"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("browser")


@pytest.fixture(scope="module")
def store(folder: Path) -> Iterator[Store]:
    store = fill(settings_of(folder), 10_000)
    yield store
    store.check()
    store.close()


@pytest.fixture(scope="module")
def shown(folder: Path, store: Store) -> Iterator[Dashboard]:
    with dashboard(folder, "--control") as running:
        yield running


@pytest.fixture(scope="module")
def browser(shown: Dashboard) -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture
def opened(browser: Browser, shown: Dashboard) -> Iterator[Any]:
    """A page with the queue; that nothing went wrong in it is seen at the end."""
    with visitor(browser, shown) as (page, faults):
        yield page
        assert not faults


def test_the_address_loses_the_token_and_every_page_opens(opened: Any, shown: Dashboard) -> None:
    assert opened.url == shown.url
    for path in [path for path in PAGES if path != "jobs/nothing"]:
        assert opened.goto(f"{shown.url}{path}").status == 200
        expect(opened.locator("h1")).to_have_count(1)
        expect(opened.locator("nav a")).to_have_count(4 + opened.locator(".pages a").count())


def test_a_wrong_token_opens_nothing(browser: Browser, shown: Dashboard) -> None:
    context = browser.new_context()
    page = context.new_page()
    answer = page.goto(f"{shown.url}?token={'x' * 43}")
    assert answer and answer.status == 403
    assert context.cookies() == []
    expect(page.locator("body")).to_contain_text("mrcore dashboard --show-url")
    context.close()


def test_a_run_moves_without_a_reload_and_keeps_focus_and_scroll(opened: Any, store: Store) -> None:
    store.set_progress(progress(1, 0.5))
    expect(opened.locator("#running .much b")).to_have_text("35 %", timeout=30_000)
    opened.evaluate("window.kept = 'since the page was opened'")
    opened.set_viewport_size({"width": 400, "height": 500})
    opened.locator("#running .wide").first.evaluate("element => { element.scrollLeft = 40 }")
    opened.locator("#running summary").click()
    opened.locator("#running summary").focus()
    opened.evaluate("window.scrollTo(0, 120)")
    store.set_progress(progress(1, 0.8, status="<b>bold?</b>"))
    expect(opened.locator("#running .much b")).to_have_text("56 %", timeout=30_000)
    expect(opened.locator("#running [aria-live=polite]")).to_have_text("clicks_per_user, run 1: MAP, 50 %")
    assert opened.evaluate("window.kept") == "since the page was opened"
    assert opened.evaluate("document.activeElement.nodeName") == "SUMMARY"
    assert opened.evaluate("window.scrollY") == 120
    assert opened.locator("#running .wide").first.evaluate("element => element.scrollLeft") == 40
    assert not opened.locator("#running details").evaluate("element => element.open"), "what was closed stays closed"
    assert opened.locator("#running td b").count() == 0, "a status is text"


def test_a_page_says_when_it_is_not_live(browser: Browser, tmp_path: Path) -> None:
    settings_of(tmp_path)
    with dashboard(tmp_path) as own, visitor(browser, own) as (page, _):
        expect(page.locator("#offline")).to_be_hidden()
        own.close()
        expect(page.locator("#offline")).to_be_visible(timeout=30_000)


def test_a_failed_job_leads_to_its_traceback(opened: Any) -> None:
    opened.locator("#fallen").get_by_role("link", name="broken_dates").click()
    opened.get_by_role("region", name="Runs").get_by_role("link", name="1", exact=True).click()
    expect(opened.get_by_label("Traceback")).to_contain_text('File "map_functions.py", line 7, in parse')
    expect(opened.locator("main")).to_contain_text("<script>alert(2)</script>")
    expect(opened.get_by_role("img", name="REDUCE: seconds of 12 servers")).to_be_visible()
    assert opened.locator("main img[src=x]").count() == 0


def test_ten_thousand_runs_are_gone_through_by_pages_and_filters(opened: Any) -> None:
    opened.get_by_role("link", name="History").click()
    expect(opened.locator("tbody tr")).to_have_count(100)
    expect(opened.locator(".pages")).to_contain_text("page 1 of 101")
    opened.get_by_role("link", name="Older").click()
    expect(opened.locator(".pages")).to_contain_text("page 2 of 101")
    opened.get_by_label("Job").fill("job_01")
    opened.get_by_label("State").select_option("failed")
    opened.get_by_role("button", name="Filter").click()
    expect(opened.locator("tbody tr .state")).to_have_text(["failed"] * 100)
    expect(opened.locator("svg.columns rect")).to_have_count(100)


def test_buttons_change_the_queue(opened: Any, store: Store) -> None:
    opened.get_by_role("button", name="Pause").click()
    expect(opened.locator("#status")).to_contain_text("paused")
    assert store.get("paused")
    opened.get_by_role("button", name="Resume").click()
    expect(opened.locator("#status")).not_to_contain_text("paused")
    opened.get_by_role("button", name="Delete report").click()
    expect(opened.locator("#waiting")).not_to_contain_text("report")
    assert (row := store.job("report")) and row.cause == "deleted"


def test_it_is_used_by_keyboard(opened: Any, shown: Dashboard) -> None:
    opened.goto(shown.url)
    opened.keyboard.press("Tab")
    skip = opened.get_by_role("link", name="Skip to content")
    expect(skip).to_be_focused()
    assert skip.evaluate("element => element.getBoundingClientRect().left") >= 0, "it shows when it has the focus"
    opened.keyboard.press("Enter")
    assert opened.evaluate("document.activeElement.id") == "main"
    wanted = {"Pause", "Cancel clicks_per_user", "clicks_per_user", "sessions", "Requeue broken_dates"}
    seen = set[str]()
    for _ in range(300):  # several rounds: the page changes meanwhile
        if wanted <= seen:
            break
        opened.keyboard.press("Tab")
        seen.add(
            opened.evaluate(
                "(document.activeElement.getAttribute('aria-label') || document.activeElement.innerText || '').trim()"
            )
        )
        width = opened.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert width != "none" or opened.evaluate("document.activeElement === document.body")
    assert wanted <= seen


@pytest.mark.parametrize("width", [320, 768, 2560])
def test_no_page_is_wider_than_the_window(browser: Browser, shown: Dashboard, width: int) -> None:
    with visitor(browser, shown, viewport={"width": width, "height": 800}) as (page, _):
        for path in PAGES:
            page.goto(f"{shown.url}{path}")
            page.evaluate(OPEN_ALL)
            assert page.evaluate("document.documentElement.scrollWidth") <= width, path


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("path", PAGES)
def test_nobody_is_shut_out(browser: Browser, shown: Dashboard, scheme: str, path: str) -> None:
    """No fault that axe calls serious or critical: contrast, names, headers, landmarks, order of headings."""
    with visitor(browser, shown, color_scheme=scheme) as (page, _):
        page.goto(f"{shown.url}{path}")
        page.evaluate(OPEN_ALL)
        found = Axe().run(page).response["violations"]
        wrong = [
            (fault["id"], fault["impact"], [node["html"][:200] for node in fault["nodes"]])
            for fault in found
            if fault["impact"] in ("serious", "critical") or fault["id"] in ("heading-order", "region")
        ]
        assert not wrong
