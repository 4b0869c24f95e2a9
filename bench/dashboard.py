"""What the dashboard costs: its share of a core while a run of 96 servers goes on, with and without viewers.

bench/dashboard.py [SECONDS]: measures for so long (60) each.
"""

from __future__ import annotations

import contextlib
import http.client
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests/support"))
import dashboards

SERVERS, RUNS = 96, 10_000


def main() -> None:
    """Measure and print."""
    seconds = float(sys.argv[1]) if sys.argv[1:] else 60.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = dashboards.fill(dashboards.settings_of(folder, SERVERS // 3), RUNS)
        end = threading.Event()

        def run() -> None:
            count = 0
            while not end.wait(1):
                count += 1
                store.set_progress(dashboards.progress(1, 0.2 + count / 1_000, SERVERS))

        writer = threading.Thread(target=run)
        writer.start()
        try:
            with dashboards.dashboard(folder) as shown:
                for viewers in (0, 1, 20):
                    measure(shown, viewers, seconds)
        finally:
            end.set()
            writer.join()


def measure(shown: dashboards.Dashboard, viewers: int, seconds: float) -> None:
    """Print what so many viewers cost."""
    streams: list[Any] = []
    received = [0] * viewers

    def view(number: int) -> None:
        asked = urllib.request.Request(f"{shown.url}live", headers={"authorization": f"Bearer {shown.token}"})
        with urllib.request.urlopen(asked) as stream:
            streams.append(stream)
            with contextlib.suppress(http.client.HTTPException):  # we end it in the middle
                while data := stream.read1(1 << 20):
                    received[number] += len(data)

    threads = [threading.Thread(target=view, args=(number,), daemon=True) for number in range(viewers)]
    for thread in threads:
        thread.start()
    time.sleep(5)  # all are connected, and what is only made once is made
    before, begun, bytes_before = shown.cpu_seconds(), time.monotonic(), sum(received)
    time.sleep(seconds)
    share = (shown.cpu_seconds() - before) / (time.monotonic() - begun)
    sent = (sum(received) - bytes_before) / max(1, viewers) / seconds
    print(f"{viewers:>3} viewers: {100 * share:.2f} % of a core, {sent / 1024:.1f} KiB/s to each")
    for stream in streams:
        stream.fp.raw._sock.shutdown(2)
    for thread in threads:
        thread.join(10)


if __name__ == "__main__":
    main()
