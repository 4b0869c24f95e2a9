"""Whether daemons answer over TLS, and in the release of this very process."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from mrcore import RELEASE, WIRE_VERSION
from mrcore.errors import ClusterFault, MrcoreError, Unreachable
from mrcore.settings.config import NodeSettings, Settings
from mrcore.wire.client import Client
from mrcore.wire.tls import Pki, master_pki

NODES_AT_ONCE = 64  # they only wait
RETRY_SECONDS = 0.2


class Fault(NamedTuple):
    """What is wrong with one daemon ("agent", "S_3"), in words that name it."""

    daemon: str
    text: str


def check(settings: Settings, nodes: Iterable[NodeSettings], wait_seconds: float = 0) -> dict[str, list[Fault]]:
    """Ask each daemon of these nodes, again and again until it answers or `wait_seconds` are over for all together.

    Gives the faults by node's name. An answer that is wrong (another release, a refusal) is not waited for.
    """
    deadline, pki, nodes = time.monotonic() + wait_seconds, master_pki(settings), list(nodes)

    def one(node: NodeSettings) -> list[Fault]:
        asked = [("agent", node.agent_port, "health", node.name)]
        servers = (each for each in settings.servers() if each.node == node)
        asked += [(each.name, each.port, "hello", each.name) for each in servers]
        found = [(name, _ask(node, port, pki, method, wanted, deadline)) for name, port, method, wanted in asked]
        return [Fault(name, f"{name} {text}") for name, text in found if text]

    if not nodes:
        return {}
    with ThreadPoolExecutor(min(len(nodes), NODES_AT_ONCE)) as pool:
        return dict(zip((node.name for node in nodes), pool.map(one, nodes), strict=True))


def insist(settings: Settings, ask: Callable[[NodeSettings], object]) -> None:
    """Raise ClusterFault unless `ask` succeeds for every node; it says which does not, and what starts it."""

    def one(node: NodeSettings) -> MrcoreError | None:
        try:
            ask(node)
        except MrcoreError as error:
            return error
        return None

    with ThreadPoolExecutor(min(len(settings.nodes), NODES_AT_ONCE)) as pool:
        answers = zip(settings.nodes, pool.map(one, settings.nodes), strict=True)
        faults = {node.name: error for node, error in answers if error}
    if settings.local and faults:
        from mrcore.launchers import local

        rows = local.status(settings)
        if all(row["state"] == "absent" for row in rows):
            raise Unreachable(f"the local cluster of {settings.home} is not started: `mrcore cluster start`")
        absent = [row["node"] for row in rows if (row["name"], row["state"]) == ("agent", "absent")]
        if absent:
            raise Unreachable(
                f"the agent of {', '.join(absent)} does not run: `mrcore cluster start` starts what is missing"
            )
    for name, error in faults.items():
        if not isinstance(error, Unreachable) or settings.local:
            raise ClusterFault(f"node {name}: {error.message}")
    if faults:
        first = next(iter(faults.values())).message
        raise Unreachable(
            f"no answer from {', '.join(faults)} ({first}): `mrcore cluster start`, or `make start INVENTORY=…` on the "
            "controller, starts what does not run"
        )


def _ask(node: NodeSettings, port: int, pki: Pki, method: str, name: str, deadline: float) -> str:
    """What is wrong with one daemon; empty if nothing is."""
    with contextlib.closing(Client(node.address, port, pki, node.name)) as client:
        while True:
            try:
                answer = client.call(method)
                break
            except MrcoreError as error:
                if not isinstance(error, Unreachable) or time.monotonic() > deadline:
                    return f"does not answer: {error.message}"
                time.sleep(RETRY_SECONDS)
    if answer["name"] != name:
        return f"is another one, {answer['name']}: the settings here and there differ; deploy again"
    theirs, ours = (answer.get("release"), answer["wire_version"]), (RELEASE, WIRE_VERSION)
    if theirs != ours:
        return f"runs mrcore {theirs[0]} (wire {theirs[1]}), not {ours[0]} (wire {ours[1]}) as here: bring both to one"
    return ""
