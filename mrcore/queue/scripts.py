"""Script jobs: a Python script on the master, with a guard that ends whatever it started.

    Runner ── pipe ── guard (`python -m …scripts LOG BYTES MARK COMMAND…`; subreaper) ── script, and its children

The guard holds one end of a pipe on which nothing is ever written. Its end of file is the order to end the script: the
Runner closes its end to cancel, and the kernel does so when the Runner dies. A parent-death signal would not do: it
would kill the guard as well, and what had detached itself from the script would live on.

The guard reads what the script prints and writes it to the run's log: its first and its last part, when it is much.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from mrcore.errors import JobFault, MrcoreError
from mrcore.system import logs, procfs
from mrcore.system.subreaper import Ending, describe, sweep

if TYPE_CHECKING:
    from mrcore.settings.config import Settings

GRACE_SECONDS = 3.0  # from SIGTERM to SIGKILL
KILL_SECONDS = 5.0
TAIL_LINES, TAIL_BYTES = 20, 8192  # of its output, in the history of a script that failed
LOGS_OF_A_JOB = 4  # times `log_bytes`: what the logs of all runs of a job may take
MARK = "MRCORE_SCRIPT"


def run(
    job: dict[str, Any], run: int, settings: Settings, progress: Callable[..., None], stop: threading.Event
) -> dict[str, Any]:
    """Run a script job to its end and return its counts; setting `stop` ends the script and all it started.

    What it prints goes to `log_of` as it comes, `log_bytes` of it at most. Raises JobFault when the script cannot be
    run or does not succeed, with the last lines that it printed; MrcoreError when it was stopped.
    """
    script, name = Path(job["script_location"]), job["job_name"]
    if not script.is_file():
        text = f"there is no script {script}: put it back, then `mrcore requeue {job['group_name'] or name}`"
        raise JobFault(text, code="no_script")
    mark = f"{settings.state_dir} {name} {run}"
    command = [interpreter(job, settings), str(script), *map(str, job["script_arguments"])]
    log_file = log_of(settings, name, run)
    log_file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    _make_room(settings, name)
    progress("SCRIPT")
    arguments = [str(log_file), str(settings.log_bytes), mark, *command]
    with log_file.open("ab") as log:
        guard = subprocess.Popen(
            [sys.executable, "-P", "-m", "mrcore.queue.scripts", *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, cwd=script.parent,
            env=_environment(job, run, settings), start_new_session=True,
        )  # fmt: skip
    assert guard.stdin and guard.stdout
    threading.Thread(target=_close_when, args=(stop, guard.stdin), name="stop script", daemon=True).start()
    ending = json.loads(guard.stdout.read() or b"{}")  # ends when all that the script started has ended
    guard.stdout.close()
    guard.wait()
    details = {"output": _tail(log_file), "log": str(log_file)}
    if stop.is_set():
        raise MrcoreError(f"the script {script} was stopped", **details)
    if not ending:
        end_leftovers(settings)
        raise JobFault(f"the guard of the script {script} was killed, and the script with it", **details)
    if ending.get("status") != 0:
        last = details["output"].splitlines()[-1:]
        raise JobFault(f"the script {script} {ending['message']}" + (f": {last[0]:.200}" if last else ""), **details)
    return {"output_bytes": log_file.stat().st_size}


def interpreter(job: dict[str, Any], settings: Settings) -> str:
    """Return the Python that runs a script: of the project's `.venv` if it has one, else ours."""
    own = settings.projects_of(job) / (job["project_name"] or "") / ".venv/bin/python"
    return str(own) if job["project_name"] and own.exists() else sys.executable


def log_of(settings: Settings, job_name: str, run: int) -> Path:
    """Return where what a script prints is kept."""
    return settings.logs_dir / "scripts" / job_name / f"{run}.log"


def prune(settings: Settings, job_name: str, kept_runs: set[int]) -> None:
    """Forget what other runs of a script printed than these."""
    for path in _logs(settings, job_name):
        if int(path.stem) not in kept_runs:
            path.unlink(missing_ok=True)


def _logs(settings: Settings, job_name: str) -> list[Path]:
    """Return what is kept of a job's runs, newest first."""
    paths = [path for path in log_of(settings, job_name, 0).parent.glob("*.log") if path.stem.isdecimal()]
    return sorted(paths, key=lambda path: int(path.stem), reverse=True)


def _make_room(settings: Settings, job_name: str) -> None:
    """Forget what the oldest runs of a script printed, until all take LOGS_OF_A_JOB logs together with the next."""
    room = (LOGS_OF_A_JOB - 1) * settings.log_bytes
    for path in _logs(settings, job_name):
        room -= path.stat().st_size
        if room < 0:
            path.unlink(missing_ok=True)


def end_leftovers(settings: Settings) -> None:
    """End the scripts of a Runner of this state folder that died, should guard and Runner have been killed at once."""
    deadline = time.monotonic() + KILL_SECONDS
    ours = f"{settings.state_dir} "
    while True:
        pids = [int(name) for name in os.listdir("/proc") if name.isdecimal()]
        left = [pid for pid in pids if procfs.environment_value(pid, MARK).startswith(ours) and procfs.state(pid)]
        for pid in left:
            procfs.send_signal(pid, procfs.start_ticks(pid) or 0, signal.SIGKILL)
        if not left or time.monotonic() > deadline:
            return
        time.sleep(0.005)


def _environment(job: dict[str, Any], run: int, settings: Settings) -> dict[str, str]:
    """Return a script's environment: ours, the job, its run, group and project, and where the cluster's folders lie."""
    base_dirs = dict.fromkeys(str(node.layout.base_dir) for node in settings.nodes)
    facts = {
        "JOB": job["job_name"],
        "RUN": run,
        "GROUP": job["group_name"] or "",
        "PROJECT": job["project_name"] or "",
        "PROJECT_DIR": settings.projects_of(job) / job["project_name"] if job["project_name"] else "",
        "PROJECTS_DIR": settings.projects_of(job),
        "HOME": settings.home,
        "BASE_DIRS": os.pathsep.join(base_dirs),
    }
    return os.environ | {"PYTHONUNBUFFERED": "1"} | {f"MRCORE_{key}": str(value) for key, value in facts.items()}


def _close_when(stop: threading.Event, pipe: BinaryIO) -> None:
    stop.wait()
    with contextlib.suppress(OSError):
        pipe.close()


def _tail(file: Path) -> str:
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - TAIL_BYTES))
        return b"\n".join(stream.read().splitlines()[-TAIL_LINES:]).decode(errors="replace")


class _Guard:
    """The guard's own process: single-threaded, starts one command, ends it when asked, sweeps what it left."""

    def __init__(self, log: logs.BoundedLog) -> None:
        self._log = log
        procfs.become_subreaper()
        self._wake, wake_in = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: None)  # only the pipe ends us; a handler does not pass to the script
        signal.set_wakeup_fd(wake_in, warn_on_full_buffer=False)

    def run(self, mark: str, command: list[str]) -> Ending:
        """Run the command until it ends or has to; return how it ended. Nothing of it is then left.

        `mark` is put into its environment, for `end_leftovers`.
        """

        def prepare() -> None:
            procfs.die_with_parent(guard)
            with contextlib.suppress(OSError):  # short of memory, the kernel is to choose user code
                Path("/proc/self/oom_score_adj").write_text("500")

        guard, environment = os.getpid(), os.environ | {MARK: mark}
        printed, print_to = logs.open_pipe()
        try:
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=print_to, stderr=print_to, env=environment,
                start_new_session=True, preexec_fn=prepare,
            )  # fmt: skip
        except OSError as error:
            return {"message": f"cannot be started by {command[0]}: {error.strerror}"}
        os.close(print_to)
        child.returncode = status = self._wait(child.pid, printed)
        sweep(set())
        logs.drain(printed, self._log)
        return describe(status)

    def _wait(self, child: int, printed: int) -> int:
        """Write what the script prints, end it when the pipe of the Runner does, and return its wait status."""
        deadline: float | None = None
        watched = {self._wake, 0, printed}
        while True:
            pause = logs.WINDOW_SECONDS if self._log.held else None
            if deadline is not None:
                pause = max(0.0, min(deadline - time.monotonic(), pause or KILL_SECONDS))
            readable, _, _ = select.select(watched, [], [], pause)
            if printed in readable:
                data = os.read(printed, logs.READ_BYTES)
                self._log.write(data)
                watched -= set() if data else {printed}
            elif not readable:
                self._log.settle()
            if 0 in readable:
                os.killpg(child, signal.SIGTERM)
                watched -= {0}
                deadline = time.monotonic() + GRACE_SECONDS
            elif deadline is not None and time.monotonic() >= deadline:
                os.killpg(child, signal.SIGKILL)
                deadline = time.monotonic() + KILL_SECONDS
            with contextlib.suppress(BlockingIOError):
                os.read(self._wake, 4096)
            if (status := self._reap(child)) is not None:
                return status

    def _reap(self, wanted: int) -> int | None:
        """Reap what has ended, orphans too; return the wait status of `wanted` once it has."""
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == wanted:
                    return ended[1]
        return None


if __name__ == "__main__":
    bounded = logs.BoundedLog(Path(sys.argv[1]), int(sys.argv[2]), keep_ends=True)
    result = _Guard(bounded).run(sys.argv[3], sys.argv[4:])
    with contextlib.suppress(BrokenPipeError):
        os.write(1, json.dumps(result).encode())
