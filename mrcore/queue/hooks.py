"""The operator's commands: on_success, on_failure, on_hold, on_findings. None can hold up or stop who calls it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import IO, Any

from mrcore.settings.config import Settings
from mrcore.text import plain

HOOK_SECONDS = 30.0
MAX_HOOKS = 8  # at the same time
LOG_SECONDS = 5.0  # for what a hook printed to be written; what it left running prints on


class Hooks:
    """Calls the commands, each in a thread of its own; `note(job_name, run, text)` is called for those that failed,
    with None for facts that are of no job or run.
    """

    def __init__(self, settings: Settings, note: Callable[[str | None, int | None, str], object]) -> None:
        self._note = note
        self._threads: list[threading.Thread] = []
        self._keepers: list[subprocess.Popen[bytes]] = []  # of what hooks left running
        self.configure(settings)

    def configure(self, settings: Settings) -> None:
        """Take the commands from these settings from now on."""
        self._commands = {"succeeded": settings.on_success, "failed": settings.on_failure}
        self._commands |= dict.fromkeys(("held", "released"), settings.on_hold) | {"findings": settings.on_findings}
        self._log, self._log_bytes = settings.logs_dir / "hooks.log", settings.log_bytes

    def call(self, **facts: Any) -> None:
        """Call the command for `facts["state"]`, if there is one, with the facts as a JSON object on standard input."""
        if command := self._commands.get(facts["state"]):
            self._keepers = [keeper for keeper in self._keepers if keeper.poll() is None]
            self._threads = [thread for thread in self._threads if thread.is_alive()]
            if len(self._threads) >= MAX_HOOKS:
                self._note(facts.get("job_name"), facts.get("run"), f"hook not called: {MAX_HOOKS} others still run")
                return
            self._threads.append(threading.Thread(target=self._call, args=(command, facts), daemon=True))
            self._threads[-1].start()

    def close(self) -> None:
        """Wait for those under way, each of which has its deadline."""
        deadline = time.monotonic() + HOOK_SECONDS + 1
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _call(self, command: list[str], facts: dict[str, Any]) -> None:
        with contextlib.suppress(Exception):  # a full disk, a closed queue: the run has ended all the same
            if problem := self._run(command, json.dumps(plain(facts)).encode()):
                self._note(facts.get("job_name"), facts.get("run"), f"hook {command[0]} {problem}; see {self._log}")

    def _run(self, command: list[str], facts: bytes) -> str | None:
        """Run it with `facts` on standard input; return what went wrong, or None."""
        with self._keeper() as output:
            try:
                process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=output, stderr=output, start_new_session=True
                )
            except OSError as error:
                return f"cannot be started: {error.strerror}"
            output.close()
            try:
                process.communicate(facts, HOOK_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(HOOK_SECONDS)
                return f"took longer than {HOOK_SECONDS:.0f} s and was ended"
            return f"ended with status {process.returncode}" if process.returncode else None

    @contextlib.contextmanager
    def _keeper(self) -> Iterator[IO[bytes]]:
        """Start what keeps the log, and yield where to print; at the end, wait until all is written.

        It is a process of its own, since a hook that outlives us, or leaves something running, must not fail because
        it prints.
        """
        self._log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        command = [sys.executable, "-P", "-m", "mrcore.system.logs", str(self._log), str(self._log_bytes)]
        keeper = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)
        assert keeper.stdin
        try:
            yield keeper.stdin
        finally:
            keeper.stdin.close()
            try:
                keeper.wait(LOG_SECONDS)
            except subprocess.TimeoutExpired:
                self._keepers.append(keeper)
