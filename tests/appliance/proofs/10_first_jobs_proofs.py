"""From a deployed cluster to finished jobs: a real text, counted as coreutils count it; and the whole workflow."""

from __future__ import annotations

import random
import time
from collections import Counter
from typing import Any

from harness import Machine, Operator, Person
from lab import PROJECT, PYTHONS

# Bytes, not a language's letters; the white space that ASCII has.
SORTED = r"tr -s ' \t\n\r\f\v' '\n' | grep -v '^$' | sort | uniq -c"
COUNT = f"export LC_ALL=C; cat /var/tmp/texts/* | {SORTED}"
PAGES = [f"/{section}/{page}" for section in ("docs", "blog", "shop") for page in range(40)]


def test_the_machines_are_of_the_system_that_the_scenario_is_for(m1: Machine, w1: Machine) -> None:
    system = m1.lab.system
    assert m1.system() == w1.system() == (system, PYTHONS[system])


def test_a_member_brings_projects(anna: Person) -> None:
    for name in ("word_count", "workflow"):
        anna.bring(PROJECT / "projects" / name, "/srv/mrcore/projects")


def test_a_real_text_is_counted_as_coreutils_count_it(operator: Operator, anna: Person, m1: Machine) -> None:
    """The licences that every Debian has, without those that are links to others."""
    anna.run("mkdir -p /var/tmp/texts && find /usr/share/common-licenses -type f -exec cp -t /var/tmp/texts {} +")
    started = time.monotonic()
    upload: dict[str, Any] = {"job_name": "texts", "job_type": "file_transfer", "transfer_type": "upload_bulk"}
    upload |= {"project_name": "word_count", "input_dir": "/var/tmp/texts", "output_dir": "texts", "run_once": True}
    count: dict[str, Any] = {"job_name": "licence_words", "job_type": "mapreduce", "project_name": "word_count"}
    count |= {"input_dirs": ["texts"], "map_function_name": "count_words", "reduce_function_name": "add_up"}
    anna.submit(upload | {"group_name": "first"}, count | {"group_name": "first", "run_once": True})
    run = anna.finished("licence_words")
    operator.note_time("first two jobs, an upload and a word count", time.monotonic() - started)
    times = operator.times()
    whole = times["deploy from bare machines"] + times["first two jobs, an upload and a word count"]
    operator.note_time("bare machines to the first finished job (sum of both)", whole)
    lines = [line.split() for line in m1.run(COUNT).stdout.splitlines()]
    expected = {word: int(number) for number, word in lines}
    assert dict(anna.items("licence_words")) == expected and len(expected) > 1000
    assert run["state"] == "succeeded" and "anna" in anna.mrcore("show", "licence_words").stdout
    nodes = [
        operator.machine(name).run("ls /var/lib/mrcore/compute/cluster/texts", status=None) for name in ("w1", "w2")
    ]
    assert all(listed.stdout.split() for listed in nodes), "both nodes hold some of the texts"


def visits(day: int, count: int) -> str:
    chance = random.Random(day)
    pages = chance.choices(PAGES, weights=[1 / (1 + n % 40) for n in range(len(PAGES))], k=count)
    return "".join(f"2026-11-{day:02}T06:00 user{chance.randrange(50)} {page}\n" for page in pages)


def sections(text: str) -> dict[str, dict[str, Any]]:
    """What the workflow finds out, computed in one go."""
    counted = Counter(line.split()[2] for line in text.splitlines())
    popular = [page for page, _ in sorted(counted.items(), key=lambda item: (-item[1], item[0]))[:10]]
    found: dict[str, dict[str, Any]] = {}
    for page, number in counted.items():
        section = found.setdefault(page.split("/")[1], {"visits": 0, "popular": []})
        section["visits"] += number
        section["popular"] += [page] if page in popular else []
    for section in found.values():
        section |= {"share": round(section["visits"] / counted.total(), 4), "popular": sorted(section["popular"])}
    return found


def test_the_whole_workflow(anna: Person) -> None:
    """Upload, mapreduce, download, script, upload of auxiliary data, mapreduce; then once more with a new file."""
    anna.run("mkdir -p /var/tmp/anna && chmod 0777 /var/tmp/anna && mkdir -p -m 0777 /var/tmp/anna/workflow")
    anna.bring(PROJECT / "projects" / "workflow", "/var/tmp/anna/projects")
    text = ""
    for day in (1, 2):
        text += visits(day, 2000)
        anna.write(f"/var/tmp/anna/workflow/incoming/day-{day}", visits(day, 2000))
        before = len(anna.runs("section_shares"))
        anna.run("cd /var/tmp/anna && mrcore submit projects/workflow/workflow.yml --set run_once=true")
        anna.finished("section_shares", more_than=before)
        assert dict(anna.items("section_shares")) == sections(text)
    second = anna.runs("page_visits")[0]
    assert second["counts"]["input_files"] == 1, "the second time it read the new file only"
