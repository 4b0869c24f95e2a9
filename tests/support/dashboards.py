"""Dashboards for tests: a queue with a story in it, and the process that shows it."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from commands import CODE
from conditions import wait_until
from queues import listening

from mrcore.queue.job import template
from mrcore.settings.config import Settings, load_settings
from mrcore.state.progress import HeavyKey, Phase, Progress, RunDetail, ServerNow, ServerShare, TaskRow
from mrcore.state.store import Store

MARKUP = "<img src=x onerror=alert(1)><script>alert(2)</script>&amp;\"'"
FRAMES = [
    "Traceback (most recent call last):\n",
    '  File "map_functions.py", line 7, in parse\n',
    "ValueError: no date\n",
]


def settings_of(folder: Path, servers: int = 4) -> Settings:
    """The settings of a local cluster in a folder, which does not run."""
    (folder / "home").mkdir(parents=True, exist_ok=True)
    (folder / "home/cluster.json").write_text(f'{{"nodes": 3, "servers": {servers}}}')
    config = folder / "settings.yml"
    config.write_text(f"home: {folder / 'home'}\nprojects_dir: {folder}\n")
    return load_settings(config)


def spec(name: str, kind: str = "mapreduce", **keys: Any) -> dict[str, Any]:
    """A job as the queue has it."""
    return template(kind) | {"job_name": name, "job_submitter": "ada", "projects_dir": "/srv/projects"} | keys


def add_runs(store: Store, count: int, jobs: int = 20) -> None:
    """Runs in the history: the last is the newest; every tenth has failed."""
    start = time.time() - 60.0 * count - 3_600
    for number in range(jobs):
        store.submit(spec(f"job_{number:02}"), start)
        store.move_job(f"job_{number:02}", "out", "succeeded", start, "succeeded")
    error = {"class": "JobFault", "message": "map function parse raised ValueError", "details": {"traceback": FRAMES}}
    texts = {
        name: store.rows("SELECT spec FROM jobs WHERE job_name = ?", name)[0]["spec"] for name in store.last_runs()
    }
    with store.change() as db:
        for number in range(count):
            name, begun = f"job_{number % jobs:02}", start + 60.0 * number
            failed = number % 10 == 3
            db.execute(
                "INSERT INTO runs (job_name, run, state, number, started, ended, exception, spec) "
                "VALUES (?, ?, ?, 1, ?, ?, ?, ?)",
                (name, number // jobs + 1, "failed" if failed else "succeeded", begun, begun + 20 + number % 37,
                 json.dumps(error if failed else None), texts[name]),
            )  # fmt: skip
        db.execute("UPDATE jobs SET last_run = ?", (-(-count // jobs),))


def progress(run: int, share: float, servers: int = 12, job: str = "clicks_per_user", status: str = "") -> Progress:
    """A run of which `share` (0 to 1) of the map phase is done."""
    now = time.time()
    total = 48 << 30
    return Progress(
        job_name=job, run=run, job_type="mapreduce", started=now - 300 * share - 8, updated=now,
        phases=[
            Phase(name="PREFLIGHT", started=now - 300 * share - 8, ended=now - 300 * share - 2, unit=""),
            Phase(name="MAP", started=now - 300 * share - 2, done=int(total * share), total=total,
                  records=int(412_000_000 * share)),
        ],
        servers=[
            ServerNow(
                server=f"S_{number}", node=f"node-{number // 4}", up=number != 7, phase="" if number == 7 else "MAP",
                task=number, since=now - 40 - number, bytes=int((900 + 13 * number) * (1 << 20) * share),
                records=int((7_000_000 + 91_000 * number) * share), spills=number % 5,
                status=status or f"day 2026-11-{1 + number % 28:02}",
            )
            for number in range(servers)
        ],
        counters={"lines without a user": int(18_230 * share), "bots": int(2_914_551 * share)},
        spills=37, deaths=1, fraction=0.7 * share, eta_seconds=420 * (1 - share) + 30,
    )  # fmt: skip


def detail(servers: int = 12, text: str = MARKUP) -> RunDetail:
    """What is known of a run in which one server was slow and one key heavy."""
    now = time.time() - 4_000
    shares = [
        ServerShare(phase=phase, server=f"S_{number}", node=f"node-{number // 4}", tasks=6,
                    seconds=base + (number * 7) % 11 + (140 if number == slow else 0), bytes=(4 << 30) + number,
                    records=31_000_000 + number)
        for phase, base, slow in (("MAP", 180, 5), ("REDUCE", 60, 9)) for number in range(servers)
    ]  # fmt: skip
    tasks = [
        TaskRow(phase="MAP", task=number, try_=1, server=f"S_{number}", node=f"node-{number // 4}", started=now,
                seconds=280.0 - 9 * number, bytes=4 << 30, records=31_000_000, spills=9, peak_bytes=900 << 20)
        for number in range(servers)
    ]  # fmt: skip
    dead = TaskRow(
        phase="MAP", task=3, try_=1, server="S_7", node="node-1", started=now, seconds=31, outcome="died",
        why="killed by signal 9: out of memory",
    )  # fmt: skip
    return RunDetail(
        phases=[
            Phase(name="PREFLIGHT", started=now, ended=now + 4, unit=""),
            Phase(name="MAP", started=now + 4, ended=now + 290, done=48 << 30, total=48 << 30, records=412_000_000),
            Phase(name="SORT", started=now + 290, ended=now + 335, done=9 << 30, total=9 << 30),
            Phase(name="REDUCE", started=now + 320, ended=now + 420, done=9 << 30, total=9 << 30, records=88_000_000),
            Phase(name="COMMIT", started=now + 420, ended=now + 421, unit=""),
        ],
        servers=shares, slowest=tasks, deaths=[dead],
        heavy_keys=[
            HeavyKey(key='"anonymous"', values=41_200_000, partition=3),
            HeavyKey(key=f'"{text}"', values=902_000, partition=7),
        ],
        largest_partition_bytes=3 << 30, median_partition_bytes=700 << 20, profile=True,
        counters={"lines without a user": 18_230, text[:40]: 7},
    )  # fmt: skip


def fill(settings: Settings, runs: int = 240, text: str = MARKUP) -> Store:
    """A queue in the middle of its day: a run under way, jobs that wait, one that failed, a history. `text`: in it."""
    store, now = Store(settings.state_dir), time.time()
    add_runs(store, runs, 6)
    for name, keys in {
        "clicks_per_user": {"group_name": "nightly", "job_priority": 5.0, "run_once": True},
        "sessions": {"group_name": "nightly", "job_priority": 5.0},
        "top_pages": {"group_name": "nightly"},
        "report": {"job_type": "script", "group_name": text},
    }.items():
        store.submit(spec(name, keys.pop("job_type", "mapreduce"), **keys), now)
    store.submit(spec("broken_dates"), now - 900)
    run = store.start_run("broken_dates", now - 800)
    message = f"map function parse raised ValueError: no date in {text}"
    error = {"class": "JobFault", "message": message, "details": {"traceback": FRAMES, "file": "/data/clicks.log"}}
    store.end_run("broken_dates", run, "failed", now - 700, {"lines": 1_204_331, "skipped": {"binary": 2}}, error)
    store.set_detail("broken_dates", run, detail(text=text))
    store.move_job("broken_dates", "out", f"failed: {message}", now - 700, "failed")
    number = store.start_run("clicks_per_user", now - 120)
    store.set_progress(progress(number, 0.4))
    return store


_numbers = itertools.count()


class Answer(NamedTuple):
    """What a request got."""

    status: int
    headers: dict[str, str]
    text: str


class Dashboard:
    """A dashboard that runs. `folder` is what `settings_of` got."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.state_dir = load_settings(folder / "settings.yml").state_dir
        command = [sys.executable, "-c", CODE, "--config", str(folder / "settings.yml"), "dashboard", "--port", "0"]
        self.log = folder / f"dashboard-{next(_numbers)}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen([*command, *options], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            told = wait_until(lambda: self._told() or self.process.poll() is not None, 60, "the dashboard listens")
            assert isinstance(told, str), self.log.read_text()
            self.url = told
        except BaseException:
            self.process.kill()
            raise
        file = Path(
            options[options.index("--token-file") + 1]
            if "--token-file" in options
            else self.state_dir / "dashboard.token"
        )
        self.token = file.read_text().strip()

    def _told(self) -> str | None:
        found = re.match(r"the dashboard is at (http://\S+/)\n", self.log.read_text())
        return found[1] if found else None

    def ask(
        self, path: str, method: str = "GET", body: str | None = None, token: bool = True, **headers: str
    ) -> Answer:
        """Answer of one request, with the token unless it is not wanted; `_` in names of headers is `-`."""
        place = urllib.parse.urlsplit(self.url)
        connection = http.client.HTTPConnection(place.hostname or "", place.port or 0, timeout=60)
        sent = {"authorization": f"Bearer {self.token}"} if token else {}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        with contextlib.closing(connection):
            connection.request(method, path, body, sent)
            response = connection.getresponse()
            return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read().decode())

    def cpu_seconds(self) -> float:
        """What the process has used of a core until now."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """End it as systemd would."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)


@contextlib.contextmanager
def dashboard(folder: Path, *options: str, runner: bool = True) -> Iterator[Dashboard]:
    """A dashboard of the cluster whose settings lie in `folder`.

    Without a `runner` the progress of more than some seconds ago is a dead one's, and not shown.
    """
    with contextlib.ExitStack() as stack:
        running = stack.enter_context(contextlib.closing(Dashboard(folder, *options)))
        if runner:
            stack.enter_context(listening(running.state_dir))
        yield running
