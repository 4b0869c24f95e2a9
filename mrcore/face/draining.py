"""A Runner inside of a program that waits for a job, where no other runs the queue."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from mrcore.errors import UsageError
from mrcore.queue.runner import Runner
from mrcore.settings.config import Settings

STOP_SECONDS = 30.0  # for a Runner to hand back what it is at


class Draining:
    """Runs the queue in a thread from `ensure` on until, after a run, `enough`, or until the end of the block.

    What is under way at the end of the block is handed back to the queue.
    """

    def __init__(self, settings: Settings, enough: Callable[[], bool]) -> None:
        self._settings, self._enough = settings, enough
        self._runner: Runner | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> Draining:
        return self

    def ensure(self) -> None:
        """Start a Runner unless ours runs; another process's is left alone. Raises what ended ours."""
        if self._error is not None:
            raise self._error
        if self._thread is None or not self._thread.is_alive():
            self._runner = Runner(self._settings, report=self._report)
            self._thread = threading.Thread(target=self._work, args=[self._runner], name="mrcore-runner", daemon=True)
            self._thread.start()

    def _report(self, event: str, **facts: Any) -> None:
        """Let no other run begin that would have to be handed back at once."""
        if event == "ended" and self._runner is not None and self._enough():
            self._runner.stop()

    def _work(self, runner: Runner) -> None:
        try:
            runner.run()
        except UsageError as error:
            if "runner" not in error.details:  # else another one has just begun: that will do
                self._error = error
        except BaseException as error:  # noqa: BLE001  told to who waits
            self._error = error
        finally:
            runner.store.close()

    def __exit__(self, *exc: object) -> None:
        if self._runner is not None and self._thread is not None:
            self._runner.stop()
            self._thread.join(STOP_SECONDS)
