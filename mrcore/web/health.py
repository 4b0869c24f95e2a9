"""How the nodes are, asked in the background: who looks gets what is known, and never waits for a dead node."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from typing import Any, NamedTuple

from mrcore.errors import MrcoreError
from mrcore.messages.methods import HEALTH, HELLO, Method
from mrcore.messages.nodes import Health
from mrcore.settings.config import NodeSettings, Settings
from mrcore.system.parallel import on_nodes
from mrcore.text import one_line, type_name
from mrcore.wire.client import Client
from mrcore.wire.tls import Pki, master_pki

log = logging.getLogger(__name__)
FRESH_SECONDS = 5.0  # what is younger is not asked again
WAIT_SECONDS, FIRST_SECONDS = 0.2, 2.0  # for answers to who looks; when nothing is known yet
ASK_SECONDS = 5.0  # each of: to connect, to answer
AT_ONCE = 32
Daemon = tuple[NodeSettings, int, Method[Any]]


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


class NodeWatch:
    """Asks all daemons when somebody looks and what is known is old. One object for a process, for any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen, self._asked = Seen(0.0, ()), float("-inf")
        self._asking: threading.Thread | None = None
        self._clients: dict[tuple[Any, ...], Client] = {}  # kept, so that a look costs no handshakes

    def look(self, settings: Settings) -> Seen:
        """Return how the nodes are, or were when they were asked last."""
        with self._lock:
            asking = self._asking
            if asking is None or not asking.is_alive():
                if time.monotonic() - self._asked < FRESH_SECONDS:
                    return self._seen
                self._asked = time.monotonic()
                asking = self._asking = threading.Thread(target=self._ask, args=(settings,), name="nodes", daemon=True)
                asking.start()
        asking.join(WAIT_SECONDS if self._seen.time else FIRST_SECONDS)
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
        daemons: list[Daemon] = [(node, node.agent_port, HEALTH) for node in settings.nodes]
        daemons += [(server.node, server.port, HELLO) for server in settings.servers()]
        asked = on_nodes(daemons, lambda daemon: self._call(keys, *daemon), AT_ONCE)
        wanted = {_key(keys, node, port) for node, port, _ in daemons}
        for gone in self._clients.keys() - wanted:
            self._clients.pop(gone).close()
        found = []
        for node, answer in zip(settings.nodes, asked, strict=False):
            servers = [each for (of, _, _), each in zip(daemons, asked, strict=True) if of == node][1:]
            ends = self._clients[_key(keys, node, node.agent_port)].certificate_ends() if answer else None
            found.append(NodeSeen(node.name, answer, ends, len(servers), sum(each is not None for each in servers)))
        return Seen(time.time(), tuple(found))

    def _call(self, keys: Pki, node: NodeSettings, port: int, method: Method[Any]) -> Any:
        key = _key(keys, node, port)
        with contextlib.suppress(MrcoreError):  # a UsageError: a local cluster that was never started has no keys
            client = self._clients.get(key)
            if client is None:
                client = self._clients[key] = Client(node.address, port, keys, node.name, ASK_SECONDS, ASK_SECONDS)
            return client.call(method)
        return None


def _key(keys: Pki, node: NodeSettings, port: int) -> tuple[Any, ...]:
    return keys, node.name, node.address, port
