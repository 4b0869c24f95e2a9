"""The three kinds of job: templates with every key, and validation that reports all errors at once.

A job is a plain dict. None means the working default wherever there is one. Keys that the system fills
(`start_time`, `exception`, …) are accepted and emptied, so that a job read from the history can be submitted again.
"""

from __future__ import annotations

import ast
import json
import os
import re
from datetime import date, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from mrcore.errors import UsageError
from mrcore.project import packages
from mrcore.settings.validation import brief, explain, nearest, unfit_texts
from mrcore.system.permissions import blocked
from mrcore.text import clean, listed

NAME = r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}$"  # it becomes a folder: no separator, no leading dot
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
MAX_RETRY_SECONDS = 3600.0  # a delay that doubles stops there
FILLED = ("projects_dir", "start_time", "end_time", "exception", "current_phase")


def _duration(value: Any) -> Any:
    """`"90s"`, `"15m"`, `"6h"`, `"1d"`, `"1w"` as seconds; what is no text is left to the type's check."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhdw])", value)
    if not match:
        raise ValueError("should be seconds, or a number with s, m, h, d or w such as 15m")
    return float(match[1]) * _SECONDS[match[2]]


def _moment(value: Any) -> Any:
    """A date or ISO text (the master's time zone unless it names one) as ISO text with its zone."""
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            raise ValueError("should be a date and time such as 2026-11-30T06:00") from None
    if isinstance(value, date):
        value = value if isinstance(value, datetime) else datetime(value.year, value.month, value.day)
        return value.astimezone().isoformat()
    return value


def _absolute(value: Any) -> Any:
    """A path on the master, made absolute where the job is submitted."""
    return str(Path(value).expanduser().absolute()) if isinstance(value, str) and value else value


def _entries(value: Any) -> Any:
    value = [value] if isinstance(value, str) else value
    for entry in value if isinstance(value, list) else ():
        if isinstance(entry, str) and (not entry or "\0" in entry or ".." in entry.split("/")):
            raise ValueError(f"the entry {entry!r} must be a path without '..'")
    return value


def _name(value: str) -> str:
    if not re.fullmatch(NAME, value) or value.endswith("\n"):
        raise ValueError("a name has letters, digits, _, - and ., 100 at most, and begins with a letter, a digit or _")
    return value


Duration = Annotated[float, BeforeValidator(_duration), Field(gt=0)]
Moment = Annotated[str, BeforeValidator(_moment)]
Name = Annotated[str, AfterValidator(_name)]
Text = Annotated[str, Field(min_length=1, max_length=4096, pattern=r"^[^\x00]+$")]
Count = Annotated[int, Field(ge=1, lt=1 << 63)]
TransferType = Literal["upload", "upload_bulk", "download", "download_bulk", "upload_auxiliary", "delete"]


class Job(BaseModel):
    """What every job has, whatever its type."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    job_type: str
    job_name: Name = Field(description="its name in the queue and of its output folder (required)")
    job_submitter: str | None = Field(None, description="filled at submit: the user")
    project_name: Name | None = Field(None, description="the folder under projects_dir")
    group_name: Text | None = Field(None, description="jobs that leave the queue together when one of them fails")
    job_priority: float = Field(0, ge=-1e9, le=1e9, description="highest first; ties by order of submission")
    force_run: bool = Field(False, description="run before all others, once")
    run_once: bool = Field(False, description="leave the queue after success; otherwise the job recurs each cycle")
    on_failure: Literal["keep", "leave"] | None = Field(
        None, description="keep: stay, run at the next time; none: leave with run_once, else keep"
    )
    retries: int = Field(0, ge=0, le=1000, description="further runs after one that failed, before on_failure counts")
    retry_delay: Duration = Field(30.0, description="before the first retry; doubles for each further one, up to 1h")
    every: Duration | None = Field(None, description="at least this long between starts: seconds, or 15m, 6h, 1d")
    not_before: Moment | None = Field(None, description="not to start before this date and time")
    timeout_seconds: Annotated[float, Field(gt=0)] | None = Field(None, description="the run fails after this long")
    max_attempts: Count | None = Field(None, description="tries of a task that dies; default: the setting")
    projects_dir: Any = Field(None, description="filled at submit: where project_name is; deployed: the setting counts")
    start_time: Any = Field(None, description="filled by the system")
    end_time: Any = Field(None, description="filled by the system")
    exception: Any = Field(None, description="filled by the system")
    current_phase: Any = Field(None, description="filled by the system")

    @model_validator(mode="before")
    @classmethod
    def _none_is_default(cls, values: Any) -> Any:
        return {key: value for key, value in values.items() if value is not None or key not in cls.model_fields}


class MapreduceJob(Job):
    """Reads `input_dirs` on every node, maps, shuffles, sorts and reduces into `base_dir/JOB_NAME/reduce`."""

    job_type: Literal["mapreduce"]
    project_name: Name = Field(description="the folder under projects_dir (required)")
    input_dirs: Annotated[list[str], BeforeValidator(_entries), Field(min_length=1)] = Field(
        description="folders, files, globs; relative: to each node's base_dir (required)"
    )
    map_function_name: Text = Field(description="in map_functions.py of the project (required)")
    auxiliary_data_name_mapper: Name | None = Field(None, description="auxiliary_dir/NAME.data for the map function")
    combine_function_name: Text | None = Field(None, description="a reduce function for spills; associative")
    reduce_function_name: Text | None = Field(None, description="in reduce_functions.py; none: map-only, unsorted")
    auxiliary_data_name_reducer: Name | None = Field(None, description="auxiliary_dir/NAME.data for reduce, combine")
    delete_job_data: bool = Field(True, description="remove the output of earlier runs when this one commits")
    hold_state: bool = Field(False, description="read only files that earlier runs did not read")
    merge_output: bool = Field(False, description="with hold_state: reduce the earlier output together with the new")
    on_changed_input: Literal["fail", "reprocess_all", "ignore"] = Field("fail", description="with hold_state")
    downsample: float = Field(1.0, gt=0, le=1, description="keep each line with this probability")
    sample_seed: int = Field(0, ge=0, lt=1 << 63, description="the same seed keeps the same lines")
    shared_input: bool | None = Field(None, description="true: all nodes see the same files; none: detected")
    on_bad_text: Literal["fail", "replace"] = Field("fail", description="what to do about text that is not UTF-8")
    max_line_bytes: Count = Field(64 << 20, description="a longer line fails the job")
    partitioner: Literal["hash", "range"] = Field("hash", description="range: the parts in order are a total order")
    number_of_partitions: Annotated[int, Field(ge=1, le=65536)] | None = Field(None, description="none: by servers")
    sort_values: bool = Field(False, description="values inside a group ascend")
    max_number_dumped_items_shuffler: Count | None = Field(None, description="items held before a spill")
    max_number_dumped_items_reducer: Count | None = Field(None, description="items in a part before the next begins")
    simultaneous_files_in_redis: Count | None = Field(None, description="ranges in flight per node (no Redis here)")
    disk_based_input: bool = Field(False, description="the reduce function's group is a DiskList")
    disk_based_output: bool = Field(False, description="the reduce function fills and returns a DiskList")
    compress: bool = Field(False, description="gzip the output")
    profile: bool = Field(False, description="sample where the tasks spend their time: a flame graph of the run")


class ScriptJob(Job):
    """Runs a script on the master."""

    job_type: Literal["script"]
    script_location: Annotated[Text, BeforeValidator(_absolute)] = Field(description="path on the master (required)")
    script_arguments: list[str | int | float] = Field([], description="passed as they are")


class FileTransferJob(Job):
    """Moves files between the master ("local") and the nodes, or removes them from the nodes."""

    job_type: Literal["file_transfer"]
    transfer_type: TransferType = Field(description="upload, download: one by one; _bulk: in parallel (required)")
    input_dir: Text | None = Field(None, description="upload: folder on the master; download: folder under base_dir")
    output_dir: Text | None = Field(None, description="upload, delete: folder under base_dir; download: on the master")
    reload_files: bool = Field(True, description="upload: replace the destination; false: send new and changed files")
    delete_files: bool = Field(True, description="download: clear the local folder first")
    compress: bool = Field(False, description="upload_bulk: gzip at the destination")
    also_outputs: bool = Field(False, description="delete: also output that jobs have published")
    input_file_name: Annotated[Text, BeforeValidator(_absolute)] | None = Field(None, description="upload_auxiliary")
    auxiliary_data_name: Name | None = Field(None, description="upload_auxiliary: NAME of auxiliary_dir/NAME.data")


MODELS: dict[str, type[Job]] = {"mapreduce": MapreduceJob, "script": ScriptJob, "file_transfer": FileTransferJob}
_TRANSFER_NEEDS = {"upload_auxiliary": ("input_file_name", "auxiliary_data_name"), "delete": ("output_dir",)}


def template(kind: str) -> dict[str, Any]:
    """Return a job of this kind with every key at its working default and None where the user must say."""
    model = _model(kind)
    defaults = {
        key: field.get_default() if not field.is_required() else None for key, field in model.model_fields.items()
    }
    return defaults | {"job_type": kind}


def job_template_yaml(kind: str) -> str:
    """Return the template as YAML, each key explained; what the system fills by itself is left out."""
    values = template(kind)
    lines = [f"# A {kind} job. {' '.join((_model(kind).__doc__ or '').split())}"]
    for key, field in _model(kind).model_fields.items():
        if key not in FILLED:
            note = f"  # {field.description}" if field.description else ""
            lines.append(f"{key}: {json.dumps(values[key])}".ljust(44) + note)
    return "\n".join(lines) + "\n"


def validate(job: dict[str, Any], projects_dir: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """Return the job with every key present, JSON-able, None replaced by defaults. UsageError names all errors.

    With `projects_dir` what the job names on the master is looked for too (`check_project`).
    """
    if not isinstance(job, dict):
        raise UsageError(f"a job is a mapping of keys to values, got {type(job).__name__}; see `mrcore template`")
    plain = {clean(key): value for key, value in job.items() if key not in FILLED}
    plain["job_type"] = model_type = clean(plain.get("job_type") or "mapreduce")
    model = _model(model_type)
    errors: list[str] = []
    values: dict[str, Any] = {}
    try:
        values = model.model_validate(plain).model_dump(mode="json")
    except ValidationError as error:
        errors = explain(error, model)
    errors += [text for key, value in values.items() for text in unfit_texts(value, key)]
    errors += _contradictions(template(model_type) | {k: v for k, v in plain.items() if v is not None})
    if projects_dir is not None:
        texts = {key: value if isinstance(value, str) else None for key, value in plain.items()}
        errors += check_project(template(model_type) | texts, projects_dir)
    if errors:
        name = brief(plain["job_name"]) if plain.get("job_name") else "without a name"
        lines = errors if len(errors) == 1 else [f"({n}) {text}" for n, text in enumerate(errors, 1)]
        raise UsageError(f"job {name} refused: {listed(lines)}", faults=errors)
    return with_absolute_paths(values) | dict.fromkeys(FILLED)


def with_absolute_paths(job: dict[str, Any]) -> dict[str, Any]:
    """Return a job, valid or not, with absolute paths on the master, by the current folder and the caller's home."""
    return job | {key: _absolute(job[key]) for key in local_paths(job)}


def keeps(job: dict[str, Any]) -> bool:
    """Return whether a job whose run failed, without a retry left, stays in the queue."""
    return (job.get("on_failure") or ("leave" if job["run_once"] else "keep")) == "keep"


def retry_seconds(job: dict[str, Any], tries: int) -> float | None:
    """Return how long to wait before the next retry after `tries` of them; None: there is none left."""
    first = job.get("retry_delay", 30.0)
    return min(first * 2.0**tries, max(first, MAX_RETRY_SECONDS)) if tries < job.get("retries", 0) else None


def local_paths(job: dict[str, Any]) -> dict[str, bool]:
    """Return the keys of a job that name a path on the master; True: a folder that is written."""
    kind = str(job.get("transfer_type") or "").removesuffix("_bulk")
    keys = {"upload": {"input_dir": False}, "download": {"output_dir": True}}.get(kind, {})
    keys |= {"script_location": False, "input_file_name": False}
    return {key: write for key, write in keys.items() if isinstance(job.get(key), str)}


def _model(kind: str) -> type[Job]:
    if kind not in MODELS:
        raise UsageError(f"job_type {kind!r} is not one of {', '.join(MODELS)}{nearest(kind, MODELS)}")
    return MODELS[kind]


def _contradictions(job: dict[str, Any]) -> list[str]:
    """Return errors between keys, of values not yet validated: they are reported with those of single keys."""
    errors = []
    if job["job_type"] == "mapreduce":
        held, kept = job["hold_state"] is True, job["delete_job_data"] is False
        if held and job["downsample"] not in (1, 1.0):
            errors.append("downsample with hold_state would mark lines as read that were not: leave one of them out")
        if held and job["merge_output"] is not True and not kept:
            errors.append(
                "hold_state needs merge_output: true or delete_job_data: false, or it would lose what it made"
            )
        if job["merge_output"] is True and not held:
            errors.append("merge_output needs hold_state: true, or each run would count its inputs again")
        for key in ("merge_output", "combine_function_name"):
            if job[key] and not job["reduce_function_name"]:
                errors.append(f"{key} needs a reduce_function_name")
    if job["job_type"] == "file_transfer" and job["transfer_type"] in get_args(TransferType):
        needs = _TRANSFER_NEEDS.get(job["transfer_type"], ("input_dir", "output_dir"))
        errors += [f"{job['transfer_type']} needs {key!r}" for key in needs if not job[key]]
        remote = "input_dir" if job["transfer_type"].startswith("download") else "output_dir"
        path = job[remote] if remote in needs and isinstance(job[remote], str) else ""
        if path.startswith("/") or ".." in path.split("/"):
            errors.append(f"{remote} lies under each node's base_dir: it must be relative, without '..', got {path!r}")
    return errors


def check_project(job: dict[str, Any], projects_dir: str | os.PathLike[str]) -> list[str]:
    """Look for what a job names on the master: project, modules, functions, script, folders. Return the errors.

    It is called as the user who will run the job: what this user may not read, or not fill, is an error.
    """
    reasons = {key: blocked(_absolute(job[key]), write) for key, write in local_paths(job).items()}
    errors = [f"{key}: {reason}" for key, reason in reasons.items() if reason]
    script = job["script_location"] if job["job_type"] == "script" else None
    if script and not errors and not Path(_absolute(script)).is_file():
        errors.append(f"script_location: there is no file {script}")
    if job["job_type"] != "mapreduce" or not re.match(NAME, job["project_name"] or ""):
        return errors
    folder = Path(projects_dir).absolute() / job["project_name"]
    if reason := blocked(folder):
        return [*errors, f"project_name: {reason}"]
    if not folder.is_dir():
        others = sorted(path.name for path in folder.parent.glob("*/")) if folder.parent.is_dir() else []
        return [f"project folder {folder} does not exist{nearest(folder.name, others)}: make it or set projects_dir"]
    errors += [reason] if (reason := packages.missing(folder)) else []
    mappers = [job["map_function_name"]] if job["map_function_name"] else []
    errors += _check_module(folder / "map_functions.py", mappers)
    reducers = [job[key] for key in ("reduce_function_name", "combine_function_name") if job[key]]
    return errors + (_check_module(folder / "reduce_functions.py", reducers) if reducers else [])


def _check_module(file: Path, functions: list[str]) -> list[str]:
    try:
        tree = ast.parse(file.read_bytes(), str(file))
    except OSError as error:
        return [f"cannot read {file}: {error.strerror}"]
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None) or 1
        return [f"syntax error in {file}:{line}: {getattr(error, 'msg', error)}"]
    names = _names(tree)
    missing = [name for name in dict.fromkeys(functions) if names is not None and name not in names]
    return [f"no function {name!r} in {file}{nearest(name, names or ())}" for name in missing]


def _names(tree: ast.AST) -> set[str] | None:
    """Return every name that the module gives to something, and its strings (the class may compare with or look up by
    them); None where names come from elsewhere (`import *`, exec), so that nothing can be said."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name):
            if node.id in ("exec", "eval", "__import__", "import_module"):
                return None
            if isinstance(node.ctx, ast.Store):
                names.add(node.id)
        elif isinstance(node, ast.Attribute):
            if node.attr == "import_module":
                return None
            names |= {node.attr} if isinstance(node.ctx, ast.Store) else set()
        elif isinstance(node, ast.alias):
            if node.name == "*":
                return None
            names.add(node.asname or node.name)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names.add(node.value)
    return names
