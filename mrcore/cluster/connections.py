"""The master's connections: `Agents` for single calls, `Links` to all that take part in one attempt.

Everything that links learn is an event of the attempt: a call of it, which their threads put into one queue and which
only the coordinator's thread makes.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from mrcore import WIRE_VERSION
from mrcore.cluster.attempt import Attempt, Give
from mrcore.errors import Malformed, MrcoreError, Refused, Unreachable
from mrcore.messages.methods import END_SERVER, GIVE, HEALTH, HELLO, ORDER, POLL
from mrcore.messages.tasks import Order
from mrcore.settings.config import NodeSettings, ServerSettings, Settings
from mrcore.system.deadline import Deadline
from mrcore.system.limited_log import RateLimit
from mrcore.system.parallel import on_nodes
from mrcore.text import one_line
from mrcore.wire.client import Client
from mrcore.wire.tls import Pki

POLL_SECONDS = 2.0  # a long poll's length: how long an idle server's thread sleeps at a time
ANSWER_SECONDS = 3.0  # beyond it, until a server counts as silent for now
RETRY_SECONDS = 0.2
CALL_SECONDS = 5.0  # any other call, or the timeout of a node if that is shorter
HEALTH_SECONDS = 1.0
# Of one server, whose tasks have two events for each bundle, of 1 MiB at least; it may have kept 10,000 meanwhile.
EVENTS_PER_SECOND, EVENTS_AT_ONCE = 2_000, 20_000
EVENTS_AHEAD = 1_000  # of all servers, before each waits for the coordinator to have taken them
MAX_ODD_ANSWERS = 5  # in a row, of another incarnation than the server's own
NODES_AT_ONCE = 16
CLEANUP_SECONDS = 5.0
END_SECONDS = 2.0  # for the threads of an attempt; one that connects just now may take longer, and is left

Result = TypeVar("Result")
Events = queue.SimpleQueue[Callable[[], None]]

log = logging.getLogger(__name__)


class Agents:
    """The connections to the agents of all nodes, which are kept between runs."""

    def __init__(self, nodes: Sequence[NodeSettings], pki: Pki) -> None:
        self._nodes, self._pki = nodes, pki
        self._clients: dict[str, Client] = {}

    def client(self, node: NodeSettings) -> Client:
        """Return the connection to a node's agent."""
        if node.name not in self._clients:
            self._clients[node.name] = Client(node.address, node.agent_port, self._pki, node.name)
        return self._clients[node.name]

    def on_all(self, work: Callable[[NodeSettings], Result]) -> list[Result]:
        """Return `work(node)` of every node, several at once, in their order, or raise the first error."""
        return on_nodes(self._nodes, work, NODES_AT_ONCE)

    def end_server(self, node: NodeSettings, server: str) -> None:
        """Have a server that does not answer ended by its agent, as far as that can be reached."""
        with contextlib.suppress(MrcoreError):  # the agent may be gone as well: then the node counts as lost
            self.client(node).call(END_SERVER, name=server, timeout_seconds=CLEANUP_SECONDS)

    def hang_up(self) -> None:
        """Break off all calls that are under way; the next ones connect again."""
        for name in list(self._clients):
            self._clients.pop(name).close()


class ServerLink:
    """One cluster server: a thread polls its events, another sends it orders, each over its own connection.

    A server that is away for `timeout_seconds` is "down" until it answers again; one that comes back as another
    incarnation is "up" again. An order is repeated until it is answered, since repeating one changes nothing. What
    cannot be an answer, and whatever else goes wrong here, is a "lost" node: no attempt waits for a thread that died.
    """

    def __init__(self, server: ServerSettings, pki: Pki, attempt: Attempt, events: Events) -> None:
        self._server, self._attempt, self._events = server, attempt, events
        address, seconds = (server.node.address, server.port), min(CALL_SECONDS, attempt.node_timeout_seconds)
        self._polls, self._orders = (Client(*address, pki, server.node.name, seconds) for _ in range(2))
        self._outbox: queue.SimpleQueue[Order | Give | None] = queue.SimpleQueue()
        self._incarnation = ""
        self._up = False
        self._ended = threading.Event()
        self._pace = RateLimit(EVENTS_PER_SECOND, EVENTS_AT_ONCE)
        self.threads = [
            threading.Thread(target=self._guarded, args=(target,), name=f"link {server.name}", daemon=True)
            for target in (self._watch, self._send)
        ]
        for thread in self.threads:
            thread.start()

    def put(self, message: Order | Give) -> None:
        """Send an order, or more bundles; an error in answer comes as an event."""
        self._outbox.put(message)

    def close(self) -> None:
        """Have both threads end; returns at once."""
        self._ended.set()
        self._outbox.put(None)
        self._polls.close()
        self._orders.close()

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Malformed as error:
            self._events.put(partial(self._attempt.node_lost, self._server.node.name, error.message))
        except Exception as error:
            log.exception("the link to %s broke", self._server.name)
            why = f"the link to {self._server.name} broke: {one_line(repr(error), 300)}; the log has the traceback"
            self._events.put(partial(self._attempt.node_lost, self._server.node.name, why))

    def _watch(self) -> None:
        after, answered, odd = 0, time.monotonic(), 0
        while not self._ended.is_set():
            try:
                if not self._up:
                    after = self._mark_up()
                asked = time.monotonic()
                seconds = {"wait_seconds": POLL_SECONDS, "timeout_seconds": POLL_SECONDS + ANSWER_SECONDS}
                answer = self._polls.call(POLL, incarnation=self._incarnation, after=after, **seconds)
                answered = time.monotonic()
                if answer.incarnation != self._incarnation:
                    odd += 1
                    if odd > MAX_ODD_ANSWERS:
                        raise self._malformed("is never the one that it says it is")
                    after = self._mark_up()
                    continue
                odd = 0
                while self._events.qsize() > EVENTS_AHEAD and not self._ended.wait(RETRY_SECONDS):
                    pass
                for number, event in answer.events:
                    if number <= after or not self._pace.allow():
                        what = "events in no order" if number <= after else "more events than a task can have"
                        raise self._malformed(f"tells {what}")
                    after = number
                    self._events.put(partial(self._attempt.task_event, self._server.name, event))
                if not answer.events:  # a server that does not wait must not keep us busy
                    self._ended.wait(RETRY_SECONDS - (answered - asked))
            except Malformed:
                raise
            except MrcoreError:
                if self._up and (now := time.monotonic()) - answered > self._attempt.node_timeout_seconds:
                    self._up = False
                    self._events.put(partial(self._attempt.server_down, self._server.name, now))
                self._ended.wait(RETRY_SECONDS)

    def _mark_up(self) -> int:
        """Ask who is there: the server that is meant, in a new life; return the number of its last event, 0."""
        hello = self._polls.call(HELLO)
        if hello.wire_version != WIRE_VERSION or hello.name != self._server.name:
            raise Refused(f"{self._server.name}: the server there is {hello.name}, {hello.version}")
        self._incarnation, self._up = hello.incarnation, True
        self._events.put(partial(self._attempt.server_up, self._server.name))
        return 0

    def _malformed(self, what: str) -> Malformed:
        node = self._server.node.name
        return Malformed(f"node {node} gave no answer to poll: {self._server.name} {what}", node=node)

    def _send(self) -> None:
        while (message := self._outbox.get()) is not None:
            incarnation = self._incarnation
            # What was meant for an earlier incarnation, or one that is down, is void: the attempt gets "up" or "down".
            while not self._ended.is_set() and self._up and incarnation == self._incarnation:
                try:
                    if isinstance(message, Order):
                        self._orders.call(ORDER, order=message)
                    else:
                        identity, bundles = message.identity, message.bundles
                        self._orders.call(GIVE, identity=identity, bundles=bundles, no_more=message.no_more)
                    break
                except Unreachable:
                    self._ended.wait(RETRY_SECONDS)
                except Malformed:
                    raise
                except MrcoreError as error:
                    self._events.put(partial(self._attempt.refused, self._server.name, message.identity, error))
                    break


class Links:
    """All servers' links and one health check per node, for the length of one attempt. Use as a context manager."""

    def __init__(self, settings: Settings, pki: Pki, attempt: Attempt) -> None:
        self._events: Events = queue.SimpleQueue()
        self._pki, self._attempt, self._ended = pki, attempt, threading.Event()
        self.servers = {server.name: ServerLink(server, pki, attempt, self._events) for server in settings.servers()}
        self._threads = [
            threading.Thread(target=self._check_health, args=(node,), name=f"health {node.name}", daemon=True)
            for node in settings.nodes
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Links:
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        for link in self.servers.values():
            link.close()
            self._threads += link.threads
        deadline = Deadline(END_SECONDS)  # a process that ends while a thread is inside of OpenSSL may crash
        for thread in self._threads:
            thread.join(deadline.left_seconds)

    def take_events(self, seconds: float) -> None:
        """Wait for events, and let the attempt have all that have arrived."""
        with contextlib.suppress(queue.Empty):
            self._events.get(timeout=seconds)()
            for _ in range(self._events.qsize()):
                self._events.get_nowait()()

    def _check_health(self, node: NodeSettings) -> None:
        timeout_seconds = self._attempt.node_timeout_seconds
        seconds, answered = min(CALL_SECONDS, timeout_seconds), time.monotonic()
        with contextlib.closing(Client(node.address, node.agent_port, self._pki, node.name, seconds, seconds)) as agent:
            while not self._ended.wait(min(HEALTH_SECONDS, timeout_seconds / 4)):
                try:
                    agent.call(HEALTH)
                    answered = time.monotonic()
                except MrcoreError as error:
                    if isinstance(error, Malformed) or time.monotonic() - answered > timeout_seconds:
                        self._events.put(partial(self._attempt.node_lost, node.name, error.message))
                        return
