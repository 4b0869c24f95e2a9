"""A Runner inside of a program that waits for a job, where no other runs the queue."""

from __future__ import annotations

import threading

from mrcore.errors import UsageError
from mrcore.queue.runner import Runner
from mrcore.settings.config import Settings

STOP_SECONDS = 30.0  # for a Runner to hand back what it is at


class Draining:
    """Runs the queue in a thread from `ensure` on until the end of the block. What is under way then is handed back."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
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
            self._runner = Runner(self._settings)
            self._thread = threading.Thread(target=self._work, args=[self._runner], name="mrcore-runner", daemon=True)
            self._thread.start()

    def _work(self, runner: Runner) -> None:
        try:
            runner.run()
        except UsageError:  # another one has just begun: that will do
            pass
        except BaseException as error:  # noqa: BLE001  told to who waits
            self._error = error
        finally:
            runner.store.close()

    def __exit__(self, *exc: object) -> None:
        if self._runner is not None and self._thread is not None:
            self._runner.stop()
            self._thread.join(STOP_SECONDS)
