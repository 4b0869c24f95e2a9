"""The connections and threads of one file transfer: calls and data channels to all nodes, ended together."""

from __future__ import annotations

import contextlib
import glob
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any

from mrcore.errors import MrcoreError, Refused
from mrcore.settings.config import NodeSettings, Settings
from mrcore.system.staging import File, checked_file
from mrcore.wire.client import Client
from mrcore.wire.data import DataClient
from mrcore.wire.tls import master_pki

TICK_SECONDS = 0.2
MAX_FILES = 10_000_000  # of one node's listing
SLOW_CALL_SECONDS = 600.0  # listing, committing and removing 100,000 files on a slow disk

Json = dict[str, Any]
Progress = Callable[..., None]


def every_file(call: Callable[..., Any], path: str, wildcards: bool) -> tuple[str, list[File]]:
    """Ask for a listing page by page, by `call(path=, …)` of an agent's `list_files`; return its token and files."""
    page = call(path=path, wildcards=wildcards)
    token, files = page["listing"], [checked_file([*file]) for file in page["files"]]
    while page["next"] is not None:
        if not page["files"] or len(files) >= MAX_FILES:
            raise Refused(f"a listing of {path!r} does not end: {len(files):,} files so far")
        page = call(path=path, listing=token, start=page["next"])
        files += [checked_file([*file]) for file in page["files"]]
    return token, files


class Crew:
    """The connections and threads of one transfer, and what it has moved so far. Use as a context manager."""

    def __init__(self, settings: Settings, progress: Progress, stop: threading.Event) -> None:
        self._settings, self._progress, self._stop = settings, progress, stop
        self._pki = master_pki(settings)
        self._lock, self._local, self._ended = threading.Lock(), threading.local(), threading.Event()
        self._agents = {each.name: self._client(each) for each in settings.nodes}
        self._channels: list[DataClient] = []
        self._files = self._bytes = self._sent_bytes = self.total = 0

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *error: object) -> None:
        for client in self._agents.values():
            client.close()
        for channel in self._channels:
            channel.close()

    def _client(self, node: NodeSettings) -> Client:
        return Client(node.address, node.agent_port, self._pki, node.name)

    def call(self, node: NodeSettings, method: str, **arguments: Any) -> Any:
        """Call a method of a node's agent."""
        return self._agents[node.name].call(method, timeout_seconds=SLOW_CALL_SECONDS, **arguments)

    def data(self, node: NodeSettings) -> DataClient:
        """This thread's data connection to a node."""
        if (found := self._local.__dict__.get(node.name)) is None:
            found = self._local.__dict__[node.name] = DataClient(node.address, node.agent_port, self._pki, node.name)
            with self._lock:
                self._channels.append(found)
        return found

    def has_wildcards(self, path: str) -> bool:
        """Whether a path is to be matched: not if a file or folder of just this name is on any node."""
        if not glob.has_magic(path):
            return False
        return not any(self.each("LIST", lambda node: self.call(node, "exists", path=path), self._settings.nodes))

    def list_nodes(self, path: str, wildcards: bool = False) -> list[tuple[NodeSettings, str, list[File]]]:
        """Give each node's listing of a path, with its token."""

        def listing(node: NodeSettings) -> tuple[NodeSettings, str, list[File]]:
            self._agents[node.name].call("health")  # one that hangs is noticed soon
            return node, *every_file(lambda **asked: self.call(node, "list_files", **asked), path, wildcards)

        return self.each("LIST", listing, self._settings.nodes)

    def each(
        self, phase: str, function: Callable[[Any], Any], items: Sequence[Any], at_once: int = 16, may_stop: bool = True
    ) -> list[Any]:
        """Call `function` for every item, `at_once` at a time; a fault or a stop ends what is under way."""
        pool = ThreadPoolExecutor(at_once, "transfer")
        futures = [pool.submit(function, item) for item in items]
        try:
            waiting = set(futures)
            while waiting:
                done, waiting = wait(waiting, TICK_SECONDS, FIRST_EXCEPTION)
                for future in done:
                    future.result()
                if may_stop:
                    self.stop_here()
                self.tell(phase)
        except BaseException:
            self._ended.set()
            pool.shutdown(wait=False, cancel_futures=True)
            for client in self._agents.values():
                client.close()
            for channel in self._channels:
                channel.abort()
            wait(futures, TICK_SECONDS)
            raise
        finally:
            pool.shutdown(wait=False)
        return [future.result() for future in futures]

    def stop_here(self) -> None:
        """Raise if the transfer is to end."""
        if self._stop.is_set() or self._ended.is_set():
            raise MrcoreError("the transfer was stopped; the next one goes on with what was sent")

    def moved(self, count: int) -> None:
        """So many bytes went over the wire. Raises if the transfer is to end."""
        self.stop_here()
        with self._lock:
            self._sent_bytes += count

    def count(self, files: int, total: int) -> None:
        """So many files are done."""
        with self._lock:
            self._files, self._bytes = self._files + files, self._bytes + total

    def counts(self) -> Json:
        """What the history keeps."""
        return {"files": self._files, "bytes": self._bytes, "sent_bytes": self._sent_bytes, "skipped": 0}

    def tell(self, phase: str) -> None:
        """Report how it goes."""
        self._progress(phase, files=self._files, sent_bytes=self._sent_bytes, total_bytes=self.total)

    def drop(self, uploads: dict[str, str]) -> None:
        """Have the nodes forget what was sent, as far as they can be reached; with connections of its own."""
        for node in self._settings.nodes:
            if token := uploads.get(node.name):
                with contextlib.suppress(MrcoreError), contextlib.closing(self._client(node)) as client:
                    client.call("drop_upload", upload=token)
