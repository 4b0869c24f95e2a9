"""The six-step workflow of projects/workflow: cycles with new and grown files, one without, on a real cluster."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from daemons import own_address

from mrcore.cluster.manage_cluster import ManageCluster
from mrcore.launchers import local
from mrcore.queue.runner import Runner
from mrcore.queue.scheduler import Scheduler
from mrcore.settings.config import Settings
from mrcore.settings.validation import parse_yaml
from mrcore.state import manifest

SOURCE = Path(__file__).resolve().parents[2] / "projects" / "workflow"
JOBS = "workflow_upload", "page_visits", "workflow_download", "workflow_script", "workflow_auxiliary", "section_shares"
PAGES = [f"/{section}/{page}" for section in ("docs", "blog", "shop", "über-uns") for page in range(40)]


def visits(day: int, count: int) -> str:
    chance = random.Random(day)
    pages = chance.choices(PAGES, weights=[1 / (1 + n % 40) for n in range(len(PAGES))], k=count)
    return "".join(f"2026-11-{day:02}T06:00 user{chance.randrange(50)} {page}\n" for page in pages)


def oracle(text: str) -> dict[str, dict[str, Any]]:
    """The shares of the sections, computed in one go."""
    counted = Counter(line.split()[2] for line in text.splitlines())
    popular = [page for page, _ in sorted(counted.items(), key=lambda item: (-item[1], item[0]))[:10]]
    sections: dict[str, dict[str, Any]] = {}
    for page, number in counted.items():
        found = sections.setdefault(page.split("/")[1], {"visits": 0, "popular": []})
        found["visits"] += number
        found["popular"] += [page] if page in popular else []
    for found in sections.values():
        found |= {"share": round(found["visits"] / counted.total(), 4), "popular": sorted(found["popular"])}
    return sections


@pytest.fixture
def settings(home: Path) -> Iterator[Settings]:
    first = own_address()
    own_address()
    configured = local.configure(home, nodes=2, servers=1, address=first, memory_bytes=512 << 20)
    work = home.parent / "work"
    shutil.copytree(SOURCE, work / "projects/workflow")
    made = configured.model_copy(update={"projects_dir": work / "projects"})
    local.start_cluster(made)
    yield made
    local.kill_cluster(made)


def items(settings: Settings, job: str) -> dict[str, Any]:
    path = settings.home / "items"
    with path.open("wb") as out:
        ManageCluster(settings).cat(job, out)
    return dict(map(json.loads, path.read_text().splitlines()))


@pytest.mark.slow
def test_three_cycles(settings: Settings) -> None:
    incoming = Path("workflow/incoming")
    incoming.mkdir(parents=True)
    scheduler = Scheduler(settings)
    texts = {name: visits(day, 2000) for day, name in enumerate(("day-1", "day 2"), 1)}
    for name, text in texts.items():
        (incoming / name).write_text(text)
    grown = settings.nodes[1].layout.base_dir / "workflow/inputs/grows.log"
    grown.parent.mkdir(parents=True)
    texts["grows.log"] = visits(9, 500)
    grown.write_text(texts["grows.log"])
    jobs = parse_yaml(Path("projects/workflow/workflow.yml").read_bytes(), "workflow.yml")
    assert [job["job_name"] for job in jobs] == list(JOBS)
    scheduler.submit_jobs(jobs)

    def cycle() -> dict[str, dict[str, Any]]:
        assert Runner(settings).run(once=True) == {"succeeded": 6}, [
            row["exception"]["message"] for row in scheduler.history(limit=6) if row["exception"]
        ]
        rows = scheduler.history(limit=6)
        assert [row["job_name"] for row in reversed(rows)] == list(JOBS)
        text = "".join(texts.values())
        assert items(settings, "page_visits") == dict(Counter(line.split()[2] for line in text.splitlines()))
        assert items(settings, "section_shares") == oracle(text)
        return {row["job_name"]: row["counts"] for row in rows}

    def written() -> dict[str, int]:
        """Bytes, counted as they lie on disk."""
        return {name: len(text.encode()) for name, text in texts.items()}

    first = cycle()
    assert first["page_visits"]["input_bytes"] == sum(written().values())
    assert first["workflow_upload"]["files"] == 2

    before = sum(written().values())
    texts["day-3"] = visits(3, 1500)
    (incoming / "day-3").write_text(texts["day-3"])
    more = visits(10, 300)
    with grown.open("a") as stream:
        stream.write(more)
    texts["grows.log"] += more
    second = cycle()
    assert second["workflow_upload"]["files"] == 1
    assert second["page_visits"]["input_bytes"] == sum(written().values()) - before

    newest = next(manifest.committed(settings.state_dir, "page_visits")).run
    output = items(settings, "page_visits"), items(settings, "section_shares")
    third = cycle()
    assert third["workflow_upload"]["files"] == 0
    assert third["page_visits"]["input_bytes"] == 0
    assert next(manifest.committed(settings.state_dir, "page_visits")).run == newest
    assert (items(settings, "page_visits"), items(settings, "section_shares")) == output

    # From scratch, by the same code: all at once under another name.
    again = jobs[1] | {"job_name": "from_scratch", "hold_state": False, "merge_output": False, "run_once": True}
    for job in JOBS:
        scheduler.delete_job(job)
    scheduler.submit_job(again)
    assert Runner(settings).run(once=True) == {"succeeded": 1}
    assert items(settings, "from_scratch") == items(settings, "page_visits")


@pytest.mark.slow
@pytest.mark.parametrize("on_failure", [None, "leave"])
def test_a_step_that_fails_ends_the_cycle_or_takes_the_group_out(settings: Settings, on_failure: str | None) -> None:
    incoming = Path("workflow/incoming")
    incoming.mkdir(parents=True)
    (incoming / "day-1").write_text(visits(1, 200))
    script = Path("projects/workflow/popular.py")
    good = script.read_text()
    script.write_text("raise SystemExit('no good')\n")
    scheduler = Scheduler(settings)
    jobs = parse_yaml(Path("projects/workflow/workflow.yml").read_bytes(), "workflow.yml")
    scheduler.submit_jobs([job | {"on_failure": on_failure} for job in jobs])
    assert Runner(settings).run(once=True) == {"succeeded": 3, "failed": 1}
    assert "no good" in scheduler.show("section_shares")["reason"]
    script.write_text(good)
    if on_failure:
        assert scheduler.queue() == []
        assert sorted(scheduler.requeue("workflow")) == sorted(JOBS)
    assert [row["job_name"] for row in scheduler.queue()] == list(JOBS)
    assert Runner(settings).run(once=True) == {"succeeded": 6}
    assert items(settings, "section_shares") == oracle(visits(1, 200))
