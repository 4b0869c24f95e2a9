"""What jobs would do, before they are queued: `cluster.plan` for mapreduce, here for scripts and transfers.

Changes no byte on any disk.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from mrcore.cluster.plan import JobPlan, Planner
from mrcore.errors import MrcoreError, UsageError
from mrcore.queue.job import validate
from mrcore.queue.scripts import interpreter
from mrcore.settings.config import Settings
from mrcore.state.store import StoreToRead
from mrcore.system.staging import walk
from mrcore.text import one_line
from mrcore.transfer.batches import checked
from mrcore.transfer.download import name_here
from mrcore.transfer.file_transfer import FileTransfer
from mrcore.transfer.session import Session


def plan_jobs(settings: Settings, batch: list[Any]) -> list[JobPlan]:
    """Return what each of these jobs, not yet validated, would do; what is wrong with one is among its faults."""
    planner, plans = None, []
    with contextlib.closing(StoreToRead(settings.state_dir)) as store:
        for job in batch:
            try:
                valid = validate(job, settings.projects_dir)
            except UsageError as error:
                names = [
                    one_line(job.get(key) or default) for key, default in (("job_name", "?"), ("job_type", "mapreduce"))
                ]
                faults = error.details.get("faults") or [error.message]
                plans.append(JobPlan(job_name=names[0], job_type=names[1], faults=faults))
                continue
            if valid["job_type"] == "mapreduce":
                planner = planner or Planner(settings, store)
                plans.append(planner.plan(valid | {"projects_dir": str(settings.projects_dir)}))
            else:
                made = JobPlan(job_name=valid["job_name"], job_type=valid["job_type"])
                try:
                    (_script if valid["job_type"] == "script" else _transfer)(settings, valid, made)
                except MrcoreError as error:
                    made.faults.append(error.message)
                plans.append(made)
        if planner:
            planner.close()
    return plans


def _script(settings: Settings, job: dict[str, Any], made: JobPlan) -> None:
    script = Path(job["script_location"])
    command = " ".join(map(str, [interpreter(job, settings), script, *job["script_arguments"]]))
    made.notes.append(f"runs on the master, in {script.parent}: {command}")


def _transfer(settings: Settings, job: dict[str, Any], made: JobPlan) -> None:
    """Tell what a transfer would move: what is read of this machine, or of the nodes, is looked at, not touched."""
    kind = job["transfer_type"]
    if kind == "delete":
        going = FileTransfer(settings).delete_files(job["output_dir"], dry_run=True)
        made.files, made.bytes = going["files"], going["bytes"]
        outputs = [f"{each['job_name']} (run {each['run']})" for each in going["outputs"]]
        made.notes.append(f"removes {job['output_dir']} of the nodes")
        if outputs and not job["also_outputs"]:
            made.faults.append(f"that is output of {', '.join(outputs)}: name other folders, or set also_outputs: true")
    elif kind.startswith("upload"):
        source = Path(job["input_file_name"] if kind == "upload_auxiliary" else job["input_dir"]).expanduser().resolve()
        if not source.exists():
            raise MrcoreError(f"{source} does not exist on the master")
        found = list(walk(source, "") if source.is_dir() else walk(source.parent, source.name))
        made.files, made.bytes = len(found), sum(file.size for file in found)
        to = "every node, as auxiliary data" if kind == "upload_auxiliary" else f"the nodes, into {job['output_dir']}"
        made.notes.append(f"sends {source} to {to}")
        made.faults += [] if found else [f"{source} holds no file"]
    else:
        path = checked(job["input_dir"], "input_dir")
        with Session(settings) as session:
            listings = session.list_nodes(path, session.has_wildcards(path))
        sizes = [each.local.size for each in name_here(settings, path, listings)]
        made.files, made.bytes = len(sizes), sum(sizes)
        made.notes.append(f"fetches {path} from the nodes into {job['output_dir']}")
        made.faults += [] if sizes else [f"input_dir {path!r} matches no file under any node's base_dir"]
