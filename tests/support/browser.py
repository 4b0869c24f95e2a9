"""Debian's Chromium, driven by Playwright."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dashboards import Dashboard
from playwright.sync_api import Browser, Dialog, Page, sync_playwright

CHROMIUM = Path("/usr/bin/chromium")
QUIET = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--no-first-run",
]  # fmt: skip


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """A browser without a window."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


def _agree(dialog: Dialog, faults: list[str]) -> None:
    """Say yes to what a button of ours asks; anything else is a fault."""
    if dialog.type != "confirm" or not dialog.message.startswith(("Delete ", "Cancel ")):
        faults.append(f"dialog {dialog.message}")
    dialog.accept()


@contextlib.contextmanager
def visitor(browser: Browser, shown: Dashboard, **options: Any) -> Iterator[tuple[Page, list[str]]]:
    """A page of a browser that has opened the address with the token, and a list of what goes wrong in it."""
    context = browser.new_context(**options)
    page, faults = context.new_page(), list[str]()
    page.on("console", lambda message: faults.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("dialog", lambda dialog: _agree(dialog, faults))
    page.on("request", lambda request: None if request.url.startswith(shown.url) else faults.append(request.url))
    page.goto(f"{shown.url}?token={shown.token}")
    yield page, faults
    context.close()
