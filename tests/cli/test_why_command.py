"""`mrcore why`, as it is typed."""

from __future__ import annotations

import json
from pathlib import Path

from commands import mrcore

from mrcore.queue.scheduler import Scheduler
from mrcore.settings.config import load_settings


def test_it_says_why_a_job_waits_as_text_and_as_json_and_refuses_what_it_does_not_know(projects_dir: Path) -> None:
    scheduler = Scheduler(load_settings())
    names = {"project_name": "word_count", "map_function_name": "count_map"}
    scheduler.submit_job({"job_name": "waits", "input_dirs": ["x"]} | names)
    scheduler.store.close()
    status, output, _ = mrcore("why", "waits")
    cause, step = output.splitlines()
    assert (status, cause) == (0, "waits waits: no Runner runs the queue")
    assert step.startswith("next: `mrcore run`")
    status, output, _ = mrcore("why", "waits", "--json")
    told = json.loads(output)
    assert (status, told["code"], told["cause"], told["lines"]) == (0, "no_runner", None, [cause, step])
    assert told["next_step"] == step.removeprefix("next: ") and told["facts"]["state"] == "queued"
    status, output, errors = mrcore("why", "wait")
    assert (status, output) == (2, "")
    assert errors == "mrcore: job 'wait' is not known (did you mean 'waits'?)\n"
