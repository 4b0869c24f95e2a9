"""The master's connections to the cluster servers and agents during one attempt.

Everything they learn goes as a tuple into one queue, which the attempt's loop reads:
  ("up", server) · ("down", server) · ("event", server, event) · ("refused", server, identity, error)
  ("lost", node, reason)
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from mrcore import WIRE_VERSION
from mrcore.errors import Malformed, MrcoreError, Refused, Unreachable
from mrcore.settings.config import NodeSettings, ServerSettings
from mrcore.system.limited_log import RateLimit
from mrcore.text import one_line
from mrcore.wire.client import Client
from mrcore.wire.tls import Pki

POLL_SECONDS = 2.0  # a long poll's length: how long an idle server's thread sleeps at a time
ANSWER_SECONDS = 3.0  # beyond it, until a server counts as silent for now
RETRY_SECONDS = 0.2
HEALTH_SECONDS = 1.0
# Of one server, whose tasks have two events for each bundle, of 1 MiB at least; it may have kept 10,000 meanwhile.
EVENTS_PER_SECOND, EVENTS_AT_ONCE = 2_000, 20_000
EVENTS_AHEAD = 1_000  # of all servers, before each waits for the attempt to have heard them
MAX_ODD_ANSWERS = 5  # in a row, of another incarnation than the server's own

log = logging.getLogger(__name__)
Json = dict[str, Any]
Events = queue.SimpleQueue[tuple[Any, ...]]


class ServerLink:
    """One cluster server: a thread polls its events, another sends it orders, each over its own connection.

    A server that is away for `timeout_seconds` is "down" until it answers again; one that comes back as another
    incarnation is "up" anew. An order is repeated until it is answered, since repeating one changes nothing. What
    cannot be an answer, and whatever else goes wrong here, is a "lost" node: no attempt waits for a thread that died.
    """

    def __init__(self, server: ServerSettings, pki: Pki, events: Events, timeout_seconds: float) -> None:
        self.server, self._events, self._timeout_seconds = server, events, timeout_seconds
        address, port, name = server.node.address, server.port, server.node.name
        self._polls = Client(address, port, pki, name, min(5.0, timeout_seconds))
        self._orders = Client(address, port, pki, name, min(5.0, timeout_seconds))
        self._outbox: queue.SimpleQueue[tuple[str, Json] | None] = queue.SimpleQueue()
        self._incarnation = ""
        self._up = False
        self._ended = threading.Event()
        self._pace = RateLimit(EVENTS_PER_SECOND, EVENTS_AT_ONCE)
        for target in (self._watch, self._send):
            threading.Thread(target=self._guarded, args=(target,), name=f"link {server.name}", daemon=True).start()

    def put(self, method: str, **arguments: Any) -> None:
        """Send an order (`order` or `give`); a no comes back as a "refused" event."""
        self._outbox.put((method, arguments))

    def close(self) -> None:
        """End both threads; returns at once."""
        self._ended.set()
        self._outbox.put(None)
        self._polls.close()
        self._orders.close()

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Malformed as error:
            self._events.put(("lost", self.server.node.name, error.message))
        except Exception as error:
            log.exception("the link to %s broke", self.server.name)
            why = f"the link to {self.server.name} broke: {one_line(repr(error), 300)}; the log has the traceback"
            self._events.put(("lost", self.server.node.name, why))

    def _watch(self) -> None:
        after, answered, odd = 0, time.monotonic(), 0
        while not self._ended.is_set():
            try:
                if not self._up:
                    self._greet()
                    after = 0
                asked = time.monotonic()
                told = self._polls.call(
                    "poll",
                    incarnation=self._incarnation,
                    after=after,
                    wait_seconds=POLL_SECONDS,
                    timeout_seconds=POLL_SECONDS + ANSWER_SECONDS,
                )
                answered = time.monotonic()
                if told["incarnation"] != self._incarnation:
                    odd += 1
                    if odd > MAX_ODD_ANSWERS:
                        raise self._malformed("is never the one that it says it is")
                    self._greet()
                    after = 0
                    continue
                odd = 0
                while self._events.qsize() > EVENTS_AHEAD and not self._ended.wait(RETRY_SECONDS):
                    pass
                for number, event in told["events"]:
                    if number <= after or not self._pace.allow():
                        what = "events in no order" if number <= after else "more events than a task can have"
                        raise self._malformed(f"tells {what}")
                    after = number
                    self._events.put(("event", self.server.name, event))
                if not told["events"]:
                    self._ended.wait(RETRY_SECONDS - (answered - asked))  # one that does not wait must not keep us busy
            except Malformed:
                raise
            except MrcoreError:
                if self._up and time.monotonic() - answered > self._timeout_seconds:
                    self._up = False
                    self._events.put(("down", self.server.name))
                self._ended.wait(RETRY_SECONDS)

    def _greet(self) -> None:
        """Ask who is there: the server that is meant, in a life of which nothing is known yet."""
        hello = self._polls.call("hello")
        if hello["wire_version"] != WIRE_VERSION or hello["name"] != self.server.name:
            raise Refused(f"{self.server.name}: the server there is {hello['name']}, {hello['version']}")
        self._incarnation, self._up = hello["incarnation"], True
        self._events.put(("up", self.server.name))

    def _malformed(self, what: str) -> Malformed:
        node = self.server.node.name
        return Malformed(f"node {node} gave no answer to poll: {self.server.name} {what}", node=node)

    def _send(self) -> None:
        while (message := self._outbox.get()) is not None:
            method, arguments = message
            incarnation = self._incarnation
            # What was meant for an earlier incarnation, or one that is down, is void: the attempt hears "up" or "down".
            while not self._ended.is_set() and self._up and incarnation == self._incarnation:
                try:
                    self._orders.call(method, **arguments)
                    break
                except Unreachable:
                    self._ended.wait(RETRY_SECONDS)
                except Malformed:
                    raise
                except MrcoreError as error:
                    identity = arguments["order"]["identity"] if method == "order" else arguments["identity"]
                    self._events.put(("refused", self.server.name, identity, error))
                    break


class Links:
    """All servers' links and one health check per node, for the length of one attempt. Use as a context manager."""

    def __init__(
        self, nodes: list[NodeSettings], servers: list[ServerSettings], pki: Pki, node_timeout_seconds: float
    ) -> None:
        self.events: Events = queue.SimpleQueue()
        self._timeout_seconds, self._pki = node_timeout_seconds, pki
        self._ended = threading.Event()
        self.servers = {each.name: ServerLink(each, pki, self.events, node_timeout_seconds) for each in servers}
        for node in nodes:
            threading.Thread(target=self._check_health, args=(node,), name=f"health {node.name}", daemon=True).start()

    def __enter__(self) -> Links:
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        for link in self.servers.values():
            link.close()

    def next_events(self, seconds: float) -> list[tuple[Any, ...]]:
        """Wait for events, and give all that have arrived."""
        found: list[tuple[Any, ...]] = []
        with contextlib.suppress(queue.Empty):
            found.append(self.events.get(timeout=seconds))
            while True:
                found.append(self.events.get_nowait())
        return found

    def _check_health(self, node: NodeSettings) -> None:
        seconds = min(5.0, self._timeout_seconds)
        answered = time.monotonic()
        client = Client(node.address, node.agent_port, self._pki, node.name, seconds, seconds)
        with contextlib.closing(client):
            while not self._ended.wait(min(HEALTH_SECONDS, self._timeout_seconds / 4)):
                try:
                    client.call("health")
                    answered = time.monotonic()
                except MrcoreError as error:
                    if isinstance(error, Malformed) or time.monotonic() - answered > self._timeout_seconds:
                        self.events.put(("lost", node.name, error.message))
                        return
