"""Whether daemons answer over TLS, and in the release of this very process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import NamedTuple

from mrcore import RELEASE, WIRE_VERSION
from mrcore.errors import MrcoreError, Unreachable
from mrcore.launchers.launcher import NODES_AT_ONCE, Daemon, daemons, try_nodes
from mrcore.messages.nodes import Versions
from mrcore.settings.config import NodeSettings, Settings
from mrcore.system.deadline import Deadline
from mrcore.wire.client import Client
from mrcore.wire.tls import Pki, master_pki

RETRY_SECONDS = 0.2


class DaemonError(NamedTuple):
    """What is wrong with one daemon ("agent", "S_3"), in words that name it."""

    daemon: str
    text: str


def check(settings: Settings, nodes: Iterable[NodeSettings], wait_seconds: float = 0) -> dict[str, list[DaemonError]]:
    """Ask each daemon of these nodes, again and again until it answers or `wait_seconds` are over for all together.

    Return the errors by node's name. An answer that is wrong (another release, a refusal) is not waited for.
    """
    deadline, pki = Deadline(wait_seconds), master_pki(settings)

    def one(node: NodeSettings) -> list[DaemonError]:
        asked = [(daemon, _objection(daemon, pki, deadline)) for daemon in daemons(settings) if daemon.node == node]
        return [DaemonError(daemon.name, f"{daemon.name} {text}") for daemon, text in asked if text]

    results, errors = try_nodes(nodes, one, NODES_AT_ONCE)
    for error in errors.values():
        raise error
    return results


def _objection(daemon: Daemon, pki: Pki, deadline: Deadline) -> str:
    """Return what is wrong with one daemon; empty if nothing is."""
    node = daemon.node
    with contextlib.closing(Client(node.address, daemon.port, pki, node.name)) as client:
        for _ in deadline.tries(RETRY_SECONDS):
            try:
                answer: Versions = client.call(daemon.method)
                break
            except MrcoreError as error:
                message = error.message
                if not isinstance(error, Unreachable):
                    return f"does not answer: {message}"
        else:
            return f"does not answer: {message}"
    if answer.name != (node.name if daemon.is_agent else daemon.name):
        return f"is another one, {answer.name}: the settings here and there differ; deploy again"
    if (answer.release, answer.wire_version) != (RELEASE, WIRE_VERSION):
        theirs = f"{answer.release or answer.version} (wire {answer.wire_version})"
        return f"runs mrcore {theirs}, not {RELEASE} (wire {WIRE_VERSION}) as here: bring both to one"
    return ""
