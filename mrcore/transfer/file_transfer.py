"""Files between the master ("local") and the nodes: upload, download, auxiliary data, removal.

Files gather aside of their destination and get their names there all at once: whatever ends a transfer before that
leaves the destination as it was, and the next one goes on with what has gathered.
"""

from __future__ import annotations

import glob
import inspect
import json
import threading
from pathlib import Path

from mrcore.errors import JobFault
from mrcore.messages.methods import DELETE_FILES
from mrcore.settings.config import Settings, load_settings
from mrcore.state import outputs
from mrcore.transfer.batches import AT_ONCE, checked
from mrcore.transfer.download import download
from mrcore.transfer.session import Counts, Json, Progress, Session, no_progress
from mrcore.transfer.upload import Agree, upload, upload_auxiliary


class FileTransfer:
    """Moves files now. `progress(phase, **counts)` is called as it goes; setting `stop` ends it with an MrcoreError.
    `agree` gets what would go from the nodes (`outputs.going`) before anything does, and may raise.

    Folders of nodes are relative to each node's base_dir. All methods return counts: files, bytes, sent_bytes (over the
    wire), skipped, removed. They raise JobFault or UsageError (what was asked cannot be), ClusterFault (try again).
    """

    def __init__(
        self, settings: Settings | None = None, progress: Progress | None = None, stop: threading.Event | None = None,
        agree: Agree | None = None,
    ) -> None:  # fmt: skip
        self._settings, self._agree = settings or load_settings(), agree
        self._progress, self._stop = progress or no_progress, stop or threading.Event()

    def upload(self, input_dir: str, output_dir: str, reload_files: bool = True) -> Counts:
        """Send a local folder (or file) to the nodes, each file to one of them, one after the other.

        With `reload_files` the destination is replaced as a whole when all files are there; otherwise only files that
        are new, or of another size or time, are sent.
        """
        return self._upload(input_dir, output_dir, reload_files, False, 1)

    def upload_bulk(self, input_dir: str, output_dir: str, reload_files: bool = True, compress: bool = False) -> Counts:
        """`upload` with several files at once; with `compress` they arrive as NAME.gz."""
        return self._upload(input_dir, output_dir, reload_files, compress, AT_ONCE)

    def download(self, input_dir: str, output_dir: str, delete_files: bool = True) -> Counts:
        """Fetch a folder, a file or what a name with wildcards matches from all nodes into a local folder.

        Names that several nodes have land in a folder per node. With `delete_files` nothing else is left there.
        """
        with self._session() as session:
            return download(session, input_dir, output_dir, delete_files, 1)

    def download_bulk(self, input_dir: str, output_dir: str, delete_files: bool = True) -> Counts:
        """`download` with several files at once."""
        with self._session() as session:
            return download(session, input_dir, output_dir, delete_files, AT_ONCE)

    def upload_auxiliary(self, input_file_name: str, auxiliary_data_name: str) -> Counts:
        """Send a local JSON file to every node as auxiliary data of this name."""
        path = Path(input_file_name).expanduser().resolve()
        try:
            with path.open("rb") as stream:
                json.load(stream)
        except OSError as error:
            raise JobFault(f"cannot read {path}: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise JobFault(f"{path} is no JSON, which auxiliary data must be: {error}") from None
        with self._session() as session:
            return upload_auxiliary(session, path, auxiliary_data_name, AT_ONCE)

    def delete_files(
        self, output_dir: str, also_outputs: bool = False, *, by: str = "a program", dry_run: bool = False
    ) -> Json:
        """Remove a file, a folder or what wildcards match from all nodes; returns what `outputs.going` does.

        Output that manifests name is refused (JobFault), and a wildcard in the first part of the name, which may mean
        that, unless `also_outputs`, or the `agree` of this object lets it pass. Output that went is forgotten: see
        `outputs.forget`. With `dry_run` nothing happens.
        """
        path = checked(output_dir, "output_dir")
        with self._session() as session:
            order: Json = {"path": path, "wildcards": session.has_wildcards(path)}
            names = [node.name for node in self._settings.nodes]
            looks = session.on_all("LIST", lambda node: session.call(node, DELETE_FILES, dry_run=True, **order))
            going = outputs.going(self._settings, path, dict(zip(names, looks, strict=True)))
            going["everywhere"] = order["wildcards"] and glob.has_magic(path.partition("/")[0])
            if dry_run:
                return going
            if self._agree:
                self._agree(going)
            elif not also_outputs and (going["outputs"] or going["everywhere"]):
                jobs = going["outputs"]
                what = f"is output of {outputs.listed(jobs)}" if jobs else "may be output of jobs"
                raise JobFault(f"what {output_dir!r} names {what}: name other folders, or set also_outputs: true")
            outputs.forget(self._settings, going["outputs"], by)
            order["leave"] = going["leave"]
            session.on_all("DELETE", lambda node: session.call(node, DELETE_FILES, **order), may_stop=False)
            return going

    def _session(self) -> Session:
        return Session(self._settings, self._progress, self._stop)

    def _upload(self, input_dir: str, output_dir: str, replace: bool, compress: bool, at_once: int) -> Counts:
        with self._session() as session:
            agree = self._agree or (lambda going: None)
            return upload(session, input_dir, output_dir, replace, compress, at_once, agree)


def run(job: Json, settings: Settings, progress: Progress, stop: threading.Event) -> dict[str, Counts]:
    """Execute a validated file_transfer job; returns {"counts"}. May be repeated: it then moves what is missing."""
    transfer, kind = FileTransfer(settings, progress, stop), job["transfer_type"]
    if kind == "delete":
        going = transfer.delete_files(job["output_dir"], job["also_outputs"], by=f"the job {job['job_name']}")
        return {"counts": {key: going[key] for key in ("files", "bytes")}}
    method = getattr(transfer, kind)  # the job's keys are its parameters
    return {"counts": method(**{name: job[name] for name in inspect.signature(method).parameters})}
