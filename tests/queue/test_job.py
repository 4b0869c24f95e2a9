"""Templates and validation of the three kinds of job."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from mrcore.errors import UsageError
from mrcore.queue.job import MODELS, check_project, job_template_yaml, template, validate

GOOD = {"job_name": "wc", "project_name": "word_count", "input_dirs": ["inputs"], "map_function_name": "count_map"}
ORIGINAL_KEYS = (
    "job_submitter job_type force_run start_time end_time project_name job_name group_name job_priority input_dirs "
    "delete_job_data run_once exception current_phase map_function_name auxiliary_data_name_mapper hold_state "
    "downsample max_number_dumped_items_shuffler simultaneous_files_in_redis reduce_function_name "
    "auxiliary_data_name_reducer max_number_dumped_items_reducer disk_based_input disk_based_output compress"
)
NEW_KEYS = (
    "combine_function_name sort_values partitioner number_of_partitions merge_output shared_input sample_seed "
    "max_attempts timeout_seconds every not_before on_bad_text on_changed_input max_line_bytes "
    "on_failure retries retry_delay projects_dir profile"
)


def refusal(**keys: Any) -> str:
    with pytest.raises(UsageError) as caught:
        validate(GOOD | keys)
    assert caught.value.details["faults"]
    return str(caught.value)


def test_mapreduce_template_has_every_key_old_and_new() -> None:
    assert set(template("mapreduce")) == set((ORIGINAL_KEYS + " " + NEW_KEYS).split())
    transfer = "input_dir output_dir transfer_type reload_files delete_files compress input_file_name"
    assert {*transfer.split(), "auxiliary_data_name"} <= set(template("file_transfer"))
    assert {"script_location", "script_arguments"} <= set(template("script"))


@pytest.mark.parametrize("kind", list(MODELS))
def test_yaml_template_is_the_template(kind: str) -> None:
    values = yaml.safe_load(job_template_yaml(kind))
    filled = ("projects_dir", "start_time", "end_time", "exception", "current_phase")
    assert values == {key: value for key, value in template(kind).items() if key not in filled}


def test_normalised_job_has_every_key_and_is_json() -> None:
    job = validate({**GOOD, "input_dirs": "inputs", "job_priority": None, "every": "15m", "start_time": object()})
    assert set(job) == set(template("mapreduce"))
    assert json.loads(json.dumps(job)) == job
    assert validate(job) == job
    assert job["input_dirs"] == ["inputs"]
    assert (job["job_priority"], job["every"], job["job_type"], job["start_time"]) == (0, 900.0, "mapreduce", None)


def test_filled_template_is_a_valid_job() -> None:
    assert validate(template("mapreduce") | GOOD)["downsample"] == 1.0


def test_not_before_takes_text_and_yaml_dates() -> None:
    text = validate(GOOD | {"not_before": "2026-11-30T06:00"})["not_before"]
    assert text == validate(GOOD | {"not_before": datetime(2026, 11, 30, 6)})["not_before"]
    assert datetime.fromisoformat(text).tzinfo is not None
    assert "date and time" in refusal(not_before="tomorrow")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("downsample", 0, "greater than 0"),
        ("downsample", 1.5, "less than or equal to 1"),
        ("downsample", float("nan"), "finite"),
        ("number_of_partitions", 0, "greater than or equal to 1"),
        ("number_of_partitions", True, "integer"),
        ("job_priority", "high", "number"),
        ("job_name", "../x", "a name has letters"),
        ("job_name", "x\n", "a name has letters"),
        ("job_name", "x" * 101, "a name has letters"),
        ("job_name", 5, "string"),
        ("input_dirs", [], "at least 1"),
        ("input_dirs", ["a/../b"], "without '..'"),
        ("input_dirs", [""], "without '..'"),
        ("compress", 1, "boolean"),
        ("partitioner", "rnage", "'hash' or 'range'"),
        ("every", -1, "greater than 0"),
        ("combine_function_name", "c", "needs a reduce_function_name"),
        ("merge_output", True, "merge_output needs hold_state"),
        ("map_function_name", "a\0b", "pattern"),
    ],
)
def test_one_fault(key: str, value: Any, said: str) -> None:
    text = refusal(**{key: value})
    assert said in text
    assert key in text
    assert "\n" not in text


def test_all_faults_at_once_with_the_nearest_key() -> None:
    with pytest.raises(UsageError) as caught:
        validate({"job_nam": "a", "downsample": 2, "hold_state": True, "compress": 1, 7: 8, "input_dirs": {}})
    faults = caught.value.details["faults"]
    text = "\n".join(faults)
    assert len(faults) == 10, text
    for part in ("'job_name' is missing", "'project_name' is missing", "'map_function_name' is missing", "downsample:"):
        assert part in text
    for part in ("compress:", "input_dirs:", "unknown key 'job_nam' (did you mean 'job_name'?)", "unknown key '7'"):
        assert part in text
    assert "downsample with hold_state" in text
    assert "hold_state needs merge_output" in text


def test_hold_state_needs_somewhere_to_keep_its_output() -> None:
    assert "would lose" in refusal(hold_state=True)
    assert "downsample with hold_state" in refusal(hold_state=True, delete_job_data=False, downsample=0.5)
    assert validate(GOOD | {"hold_state": True, "delete_job_data": False})["hold_state"]
    assert validate(GOOD | {"hold_state": True, "merge_output": True, "reduce_function_name": "r"})["merge_output"]


def test_job_type_is_known_or_the_nearest_is_named() -> None:
    with pytest.raises(UsageError, match="did you mean 'file_transfer'"):
        validate({"job_type": "file_transfr"})
    with pytest.raises(UsageError, match="a mapping"):
        validate(["x"])  # type: ignore[arg-type]


def test_script_and_transfer_paths_on_the_master_become_absolute(home: Path) -> None:
    job = validate({"job_type": "script", "job_name": "s", "script_location": "a.sh", "script_arguments": [1, "x"]})
    assert job["script_location"] == str(Path.cwd() / "a.sh")
    assert check_project(job, "projects") == [f"script_location: there is no file {Path.cwd() / 'a.sh'}"]
    transfer = {"job_type": "file_transfer", "job_name": "t", "input_dir": "in", "output_dir": "out"}
    upload = validate(transfer | {"transfer_type": "upload_bulk"})
    download = validate(transfer | {"transfer_type": "download"})
    assert (upload["input_dir"], upload["output_dir"]) == (str(Path.cwd() / "in"), "out")
    assert (download["input_dir"], download["output_dir"]) == ("in", str(Path.cwd() / "out"))
    for kind, missing in (
        ("upload", "output_dir"),
        ("upload_auxiliary", "auxiliary_data_name"),
        ("delete", "output_dir"),
    ):
        with pytest.raises(UsageError, match=f"{kind} needs '{missing}'"):
            validate({"job_type": "file_transfer", "job_name": "t", "transfer_type": kind})
    with pytest.raises(UsageError, match="got 'uplod'"):
        validate(transfer | {"transfer_type": "uplod"})


def test_project_faults(projects_dir: Path) -> None:
    good = validate(GOOD | {"reduce_function_name": "count_reduce", "combine_function_name": "count_reduce"})
    assert check_project(good, projects_dir) == []
    (fault,) = check_project(good | {"project_name": "word_cout"}, projects_dir)
    assert "does not exist (did you mean 'word_count'?)" in fault
    faults = check_project(good | {"map_function_name": "cont_map", "reduce_function_name": "zzz"}, projects_dir)
    assert "no function 'cont_map'" in faults[0] and "did you mean 'count_map'?" in faults[0]
    assert "no function 'zzz'" in faults[1]
    module = projects_dir / "word_count" / "map_functions.py"
    module.write_text("def x(:\n")
    assert f"syntax error in {module}:1" in check_project(good, projects_dir)[0]
    module.unlink()
    assert f"cannot read {module}: No such file" in check_project(good, projects_dir)[0]


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("count_map = lambda line, aux: []", True),
        ("from helpers import other as count_map", True),
        ("class MapFunctions():\n    def count_map(self): ...", True),
        ("class MapFunctions():\n    def __init__(self, n):\n        if n == 'count_map': self.map_function = f", True),
        ("from helpers import *", True),
        ("import importlib\nf = importlib.import_module('x')", True),
        ("if 1:\n    async def count_map(): ...", True),
        ("print(count_map)", False),
        ("", False),
    ],
)
def test_where_a_function_may_come_from(projects_dir: Path, source: str, found: bool) -> None:
    (projects_dir / "word_count" / "map_functions.py").write_text(source + "\n")
    assert (check_project(validate(GOOD), projects_dir) == []) is found


def test_project_faults_join_the_others(projects_dir: Path) -> None:
    with pytest.raises(UsageError) as caught:
        validate(GOOD | {"map_function_name": "nope", "downsample": 5, "job_name": None}, projects_dir)
    assert len(caught.value.details["faults"]) == 3


def test_hostile_values_are_told_briefly() -> None:
    bomb: list[Any] = ["x"]
    for _ in range(60):
        bomb = [bomb, bomb]
    assert len(refusal(input_dirs=bomb)) < 1000
    assert len(refusal(job_name="x" * 10_000_000)) < 1000
