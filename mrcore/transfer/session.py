"""The connections and threads of one file transfer: calls and data channels to all nodes, ended together."""

from __future__ import annotations

import contextlib
import functools
import glob
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from mrcore.errors import ClusterFault, MrcoreError, Refused
from mrcore.messages.methods import DROP_UPLOAD, EXISTS, HEALTH, LIST_FILES, Method
from mrcore.messages.nodes import File, FilePage, HoldingsPage
from mrcore.settings.config import NodeSettings, Settings
from mrcore.system.parallel import Item, Result, on_nodes
from mrcore.wire.client import Client
from mrcore.wire.data import DataClient
from mrcore.wire.tls import master_pki

MAX_FILES = 10_000_000  # of one node's listing
SLOW_CALL_SECONDS = 600.0  # listing, committing and removing 100,000 files on a slow disk
NODES_AT_ONCE = 16

Json = dict[str, Any]
Counts = dict[str, int]  # files, bytes, and more
Progress = Callable[..., None]  # of the phase, and files, sent_bytes, total_bytes
Page = TypeVar("Page", FilePage, HoldingsPage)


def no_progress(phase: str, **counts: int) -> None:
    """Report nothing."""


def add(counts: Counts, size: int) -> None:
    """Count a file of so many bytes."""
    counts["files"], counts["bytes"] = counts["files"] + 1, counts["bytes"] + size


def pages(call: Callable[..., Page], **asked: object) -> Iterator[Page]:
    """Ask for a listing page by page, by a call of an agent's method. Raises Refused for one without an end."""
    page, count = call(**asked), 0
    while True:
        yield page
        if page.next is None:
            return
        count += len(page.files)
        if not page.files or count >= MAX_FILES:
            raise Refused(f"a listing of {asked.get('path', 'all files')!r} does not end: {count:,} files so far")
        page = call(**asked, listing=page.listing, start=page.next)


def every_file(call: Callable[..., FilePage], path: str, wildcards: bool) -> tuple[str, list[File]]:
    """Return a listing's token and all its files, by a call of an agent's `list_files`."""
    listed = [*pages(call, path=path, wildcards=wildcards)]
    return listed[0].listing, [file for page in listed for file in page.files]


class Session:
    """The connections and threads of one transfer, and what it has moved so far. Use as a context manager."""

    def __init__(
        self, settings: Settings, progress: Progress = no_progress, stop: threading.Event | None = None
    ) -> None:
        self.settings, self._progress, self._stop = settings, progress, stop or threading.Event()
        self._pki = master_pki(settings)
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._agents = {node.name: self._client(node) for node in settings.nodes}
        self._channels: dict[tuple[int, str], DataClient] = {}  # by thread and node
        self._files = self._bytes = self._sent_bytes = self.total_bytes = 0

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: object) -> None:
        for client in self._agents.values():
            client.close()
        for channel in list(self._channels.values()):
            channel.close()

    def _client(self, node: NodeSettings) -> Client:
        return Client(node.address, node.agent_port, self._pki, node.name)

    def call(self, node: NodeSettings, method: Method[Result], **arguments: object) -> Result:
        """Call a method of a node's agent."""
        return self._agents[node.name].call(method, timeout_seconds=SLOW_CALL_SECONDS, **arguments)

    @contextlib.contextmanager
    def data(self, node: NodeSettings) -> Iterator[DataClient]:
        """Use this thread's data connection to a node; what it raises names the node."""
        key = threading.get_ident(), node.name
        if key not in self._channels:
            self._channels[key] = DataClient(node.address, node.agent_port, self._pki, node.name)
        try:
            yield self._channels[key]
        except ClusterFault as error:
            raise type(error)(f"node {node.name}: {error.message}", **error.details) from error

    def has_wildcards(self, path: str) -> bool:
        """Return whether a path is to be matched: not if a file or folder of just this name is on any node."""
        return glob.has_magic(path) and not any(self.on_all("LIST", lambda node: self.call(node, EXISTS, path=path)))

    def list_nodes(self, path: str, wildcards: bool = False) -> list[tuple[NodeSettings, str, list[File]]]:
        """Return each node's listing of a path, with its token."""

        def listing(node: NodeSettings) -> tuple[NodeSettings, str, list[File]]:
            self._agents[node.name].call(HEALTH)  # one that hangs is noticed soon
            return node, *every_file(functools.partial(self.call, node, LIST_FILES), path, wildcards)

        return self.on_all("LIST", listing)

    def on_all(self, phase: str, work: Callable[[NodeSettings], Result], may_stop: bool = True) -> list[Result]:
        """Return `work(node)` of all nodes."""
        return self.work_on(phase, work, self.settings.nodes, NODES_AT_ONCE, may_stop)

    def work_on(
        self, phase: str, work: Callable[[Item], Result], items: Sequence[Item], at_once: int, may_stop: bool = True
    ) -> list[Result]:
        """Return `work(item)` of every item, `at_once` at a time; an error or a stop ends what is under way."""

        def tick() -> None:
            if may_stop:
                self.check_stop()
            self.report(phase)

        def abort() -> None:
            self._ended.set()
            for client in self._agents.values():
                client.close()
            for channel in list(self._channels.values()):
                channel.abort()

        return on_nodes(items, work, at_once, tick, abort)

    def check_stop(self) -> None:
        """Raise if the transfer is to end."""
        if self._stop.is_set() or self._ended.is_set():
            raise MrcoreError("the transfer was stopped; the next one goes on with what was sent")

    def moved(self, count: int) -> None:
        """Count bytes that went over the wire. Raises if the transfer is to end."""
        self.check_stop()
        with self._lock:
            self._sent_bytes += count

    def done(self, files: int, size: int) -> None:
        """Count files, and their bytes, that are there."""
        with self._lock:
            self._files, self._bytes = self._files + files, self._bytes + size

    def counts(self) -> Counts:
        """Return what the history keeps."""
        return {"files": self._files, "bytes": self._bytes, "sent_bytes": self._sent_bytes, "skipped": 0}

    def report(self, phase: str) -> None:
        """Report how it goes."""
        self._progress(phase, files=self._files, sent_bytes=self._sent_bytes, total_bytes=self.total_bytes)

    def drop(self, uploads: dict[str, str]) -> None:
        """Have the nodes forget what was sent, as far as they can be reached; with connections of its own."""
        for node in self.settings.nodes:
            if token := uploads.get(node.name):
                with contextlib.suppress(MrcoreError), contextlib.closing(self._client(node)) as client:
                    client.call(DROP_UPLOAD, upload=token)
