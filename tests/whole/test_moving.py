"""docs/moving.md: what it says of the original's jobs is so, and its script makes a job file of their queue."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from checkout import text_of
from commands import mrcore

from mrcore.errors import UsageError
from mrcore.queue import job as jobs
from mrcore.settings.config import NodeSettings, Settings

# A job as the original's template makes it, in the version that its README shows.
ORIGINAL: dict[str, Any] = {
    "job_submitter": "user_name", "job_type": "mapreduce", "force_run": False, "start_time": None, "end_time": None,
    "project_name": "word_count", "job_name": "tests", "group_name": "tests", "job_priority": 1,
    "input_dirs": ["inputs"], "delete_job_data": True, "run_once": True, "exception": None,
    "current_phase": None,
    "map_function_name": "count_map", "auxiliary_data_name_mapper": None, "hold_state": False, "downsample": 1.0,
    "max_number_dumped_items_shuffler": 1_000_000, "simultaneous_files_in_redis": None,
    "reduce_function_name": "count_reduce", "auxiliary_data_name_reducer": None,
    "max_number_dumped_items_reducer": 1_000_000, "disk_based_input": False, "disk_based_output": False,
    "compress": True,
}  # fmt: skip
LAST = {"max_cache_size": 5000, "number_simultaneous_tranfers": 12}  # what its last version has besides


def test_a_job_of_the_original_is_a_job(projects_dir: Path) -> None:
    assert jobs.validate(ORIGINAL, projects_dir)["job_name"] == "tests"
    with pytest.raises(UsageError) as refused:
        jobs.validate(ORIGINAL | LAST, projects_dir)
    assert all(key in refused.value.message for key in LAST)


def test_hold_state_alone_is_refused_and_what_is_missing_is_named(projects_dir: Path) -> None:
    with pytest.raises(UsageError, match="merge_output: true or delete_job_data: false"):
        jobs.validate(ORIGINAL | {"hold_state": True}, projects_dir)


def test_the_script_makes_a_job_file_of_the_originals_queue(projects_dir: Path) -> None:
    name, code = re.findall(r"```python\n# (\S+)\n(.*?)```", text_of("docs/moving.md"), re.DOTALL)[0]
    Path(name).write_text(code)
    queue = [ORIGINAL | LAST, ORIGINAL | LAST | {"job_name": "others", "job_priority": 2}]
    Path("JOBS.data").write_text("".join(json.dumps(job) + "\n" for job in queue))
    typed = re.search(r"^    python3 (.*)$", text_of("docs/moving.md"), re.MULTILINE)
    assert typed and name in typed[1]
    subprocess.run(["sh", "-c", f"{sys.executable} {typed[1]}"], check=True)
    assert mrcore("submit", "jobs.json")[0] == 0
    waiting = json.loads(mrcore("queue", "--json")[1])["jobs"]
    assert [job["job_name"] for job in waiting] == ["others", "tests"]


def test_settings_that_are_named_exist() -> None:
    known = {*Settings.model_fields, *NodeSettings.model_fields}
    table = text_of("docs/moving.md").split("## Settings")[1].split("##")[0]
    named = {
        word
        for row in re.findall(r"^\|[^|]*\|([^|]*)\|$", table, re.MULTILINE)
        for word in re.findall(r"`([a-z_]+)`", row)
    }
    assert named - {"mrcore"} <= known and len(named) > 8
