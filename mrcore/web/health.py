"""How the nodes are, asked in the background: who looks gets what is known, and never waits for a dead node."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any, NamedTuple

from mrcore.errors import MrcoreError
from mrcore.launchers.launcher import Daemon, daemons
from mrcore.messages.nodes import Health
from mrcore.settings.config import Settings
from mrcore.system.parallel import on_nodes
from mrcore.text import one_line, type_name
from mrcore.wire.client import Client
from mrcore.wire.tls import Pki, master_pki

log = logging.getLogger(__name__)
FRESH_SECONDS = 5.0  # what is younger is not asked again
WAIT_SECONDS, FIRST_SECONDS = 0.2, 2.0  # for answers to who looks; when nothing is known yet
ASK_SECONDS = 5.0  # each of: to connect, to answer
AT_ONCE = 32


class NodeSeen(NamedTuple):
    """A node as it answered: `health` None: its agent did not."""

    name: str
    health: Health | None
    certificate_ends: float | None  # seconds since 1970
    servers: int
    servers_up: int


class Seen(NamedTuple):
    """All nodes of the settings, and when the last of them was asked (seconds since 1970); 0: none was yet."""

    time: float
    nodes: tuple[NodeSeen, ...]
    answers: dict[tuple[str, str], Any]  # of each daemon, by its node and name; a MrcoreError: why there is none


class NodeWatch:
    """Asks all daemons when somebody looks and what is known is old. One object for a process, for any thread."""

    def __init__(self, ask_seconds: float = ASK_SECONDS) -> None:
        self._ask_seconds, self._lock = ask_seconds, threading.Lock()
        self._seen, self._asked = Seen(0.0, (), {}), float("-inf")
        self._asking: threading.Thread | None = None
        self._clients: dict[tuple[Any, ...], Client] = {}  # kept, so that a look costs no handshakes

    def look(self, settings: Settings, wait_seconds: float | None = None) -> Seen:
        """Return how the nodes are, or were when they were asked last if they do not all answer within this time.

        Without it who looks hardly waits, but for the first answers.
        """
        with self._lock:
            asking = self._asking
            if asking is None or not asking.is_alive():
                if time.monotonic() - self._asked < FRESH_SECONDS:
                    return self._seen
                self._asked = time.monotonic()
                asking = self._asking = threading.Thread(target=self._ask, args=(settings,), name="nodes", daemon=True)
                asking.start()
        asking.join(wait_seconds or (WAIT_SECONDS if self._seen.time else FIRST_SECONDS))
        return self._seen

    def close(self) -> None:
        """End all connections; a look that is under way ends by itself."""
        for client in list(self._clients.values()):
            client.close()

    def _ask(self, settings: Settings) -> None:
        """Ask all daemons of these settings, and replace what is known. Never raises."""
        try:
            self._seen = self._answers(settings)
        except Exception as error:  # noqa: BLE001  the thread is nobody's; the next look tries again
            log.warning("nodes cannot be asked: %s: %s", type_name(error), one_line(error))

    def _answers(self, settings: Settings) -> Seen:
        keys = master_pki(settings)
        asked = daemons(settings)
        answers = on_nodes(asked, lambda daemon: self._call(keys, daemon), AT_ONCE)
        for gone in self._clients.keys() - {_key(keys, daemon) for daemon in asked}:
            self._clients.pop(gone).close()
        found = []
        for agent, answer in zip(asked[: len(settings.nodes)], answers, strict=False):
            node, up = agent.node, not isinstance(answer, MrcoreError)
            servers = [each for daemon, each in zip(asked, answers, strict=True) if daemon.node == node][1:]
            ends = self._clients[_key(keys, agent)].certificate_ends() if up else None
            servers_up = sum(not isinstance(each, MrcoreError) for each in servers)
            found.append(NodeSeen(node.name, answer if up else None, ends, len(servers), servers_up))
        names = [(daemon.node.name, daemon.name) for daemon in asked]
        return Seen(time.time(), tuple(found), dict(zip(names, answers, strict=True)))

    def _call(self, keys: Pki, daemon: Daemon) -> Any:
        key, node, seconds = _key(keys, daemon), daemon.node, self._ask_seconds
        try:
            client = self._clients.get(key)
            if client is None:
                client = self._clients[key] = Client(node.address, daemon.port, keys, node.name, seconds, seconds)
            return client.call(daemon.method)
        except MrcoreError as error:  # a UsageError: a local cluster that was never started has no keys
            return error


def _key(keys: Pki, daemon: Daemon) -> tuple[Any, ...]:
    return keys, daemon.node.name, daemon.node.address, daemon.port
