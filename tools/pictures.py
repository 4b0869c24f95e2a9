"""Makes docs/pictures/dashboard-*.png: the dashboard of a made-up queue, as Debian's Chromium shows it; run by hand.

It needs what the tests need: `scripts/setup.sh dev,dashboard,test chromium`.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from pathlib import Path

from mrcore.state.doorbell import Doorbell

PROJECT = Path(__file__).parent.parent
sys.path.insert(0, str(PROJECT / "tests/support"))
import browser  # noqa: E402
import dashboards  # noqa: E402

MAX_BYTES = 200_000  # of each picture
SIZE = {"width": 1180, "height": 760}


def main() -> None:
    """Make both."""
    target = PROJECT / "docs/pictures"
    target.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = dashboards.settings_of(folder)
        store = dashboards.fill(settings, text="the 14th field")
        (settings.state_dir / "profiles").mkdir()
        with (
            contextlib.closing(Doorbell(settings.state_dir)) as bell,
            dashboards.dashboard(folder, "--control") as shown,
        ):
            bell.wait(0)  # as a Runner does
            with browser.chromium() as started:
                for scheme, path, file in (
                    ("light", "", "dashboard-queue.png"),
                    ("dark", "jobs/broken_dates/runs/1", "dashboard-run.png"),
                ):
                    with browser.visitor(started, shown, viewport=SIZE, color_scheme=scheme) as (page, faults):
                        page.goto(f"{shown.url}{path}")
                        page.screenshot(path=target / file)
                        assert not faults and (target / file).stat().st_size < MAX_BYTES, (file, faults)
        store.close()


if __name__ == "__main__":
    main()
