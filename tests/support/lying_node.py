"""A node that answers as a test says: its agent or cluster server, `-m lying_node SPEC`, with its own certificate.

What it lies about stands in lie.json of the node's folder, read anew at each call; without the file it is honest.
"""

from __future__ import annotations

import functools
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import msgspec

from mrcore.node import cluster_server, node_agent
from mrcore.wire import service
from mrcore.wire.data import Range
from mrcore.wire.service import Method

FOLDER = Path(json.loads(Path(sys.argv[1]).read_text())["compute_dir"])
numbers = itertools.count(1)


def lie() -> dict[str, Any]:
    file = FOLDER / "lie.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return found


def lying(methods: dict[str, Method]) -> dict[str, Method]:
    """`answers`: {method: what it answers}; `results`: what stands in a task's result instead; others by name.

    Of `results`, "parts" and "runs" hold what stands in each of these instead.
    """

    def wrap(name: str, method: Method) -> Method:
        @functools.wraps(method.function)  # the arguments come as its signature says
        def function(caller: Any, **given: Any) -> Any:
            told = lie()
            if name in told.get("answers", {}):
                return told["answers"][name]
            if name == "list_inputs" and told.get("pages"):
                return page(told["pages"], given)
            if name == "poll" and told.get("events"):
                return events(told["events"], given)
            answer = method.function(caller, **given)
            if name == "poll" and "results" in told:
                answer = msgspec.to_builtins(answer)
                for _, event in answer["events"]:
                    if event["event"] == "done":
                        event["result"] = changed(event["result"], told["results"])
            return answer

        return method._replace(function=function)

    return {name: wrap(name, method) for name, method in methods.items()}


def changed(result: dict[str, Any], lies: Any) -> Any:
    if not isinstance(lies, dict):
        return lies
    made = result | lies
    for key in lies.keys() & {"parts", "runs"}:
        made[key] = [each | lies[key] for each in result[key]] if isinstance(lies[key], dict) else lies[key]
    return made


def page(kind: str, given: dict[str, Any]) -> dict[str, Any]:
    """Listings without an end."""
    files = [[f"/nowhere/{next(numbers):09d}", 1, 1, 1] for _ in range(5_000)]
    cursor = "same" if kind == "same cursor" else f"c{next(numbers)}"
    listing = {"matched": dict.fromkeys(given["job"]["input_dirs"], 1), "skipped": {}, "fingerprint": "", "faults": []}
    return listing | {"files": files if kind != "empty" else [], "next": cursor}


def events(kind: str, given: dict[str, Any]) -> dict[str, Any]:
    """Events without an end, or of lives that change."""
    if kind == "lives":
        return {"incarnation": f"life{next(numbers)}", "events": []}
    if kind == "silence":
        return {"incarnation": given["incarnation"], "events": []}
    first = given["after"] + 1
    flood = [
        [first + at, {"event": "phase", "phase": "REDUCE", "identity": None, "more": "x" * 1000}] for at in range(1_000)
    ]
    return {"incarnation": given["incarnation"], "events": flood}


class LyingAgent(node_agent.NodeAgent):
    def methods(self) -> dict[str, Method]:
        return lying(super().methods())

    def resolve(self, caller: Any, request: dict[str, Any]) -> list[Range]:
        return (
            [Range("/dev/zero", 0, 1 << 40, "run")] if lie().get("endless bytes") else super().resolve(caller, request)
        )


class LyingServer(cluster_server.ClusterServer):
    def methods(self) -> dict[str, Method]:
        return lying(super().methods())


honest_answer = service.Server._answer


def answer(self: service.Server, identity: Any, method: str, arguments: str) -> str:
    """The text itself may be a lie: `raw`, and `times` it is repeated between `before` and `after`."""
    raw = lie().get("raw", {}).get(method)
    if raw is not None:
        before, text, times, after = raw
        return str(before + text * times + after)
    return honest_answer(self, identity, method, arguments)


if __name__ == "__main__":
    service.Server._answer = answer  # type: ignore[method-assign]
    node_agent.NodeAgent = LyingAgent  # type: ignore[misc]
    cluster_server.ClusterServer = LyingServer  # type: ignore[misc]
    name = json.loads(Path(sys.argv[1]).read_text())["name"]
    sys.exit(node_agent.main(sys.argv[1]) if name == "agent" else cluster_server.main(sys.argv[1]))
