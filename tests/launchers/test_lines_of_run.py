"""What a run printed is found on all nodes; one that is away is named, and hides nothing of the others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from mrcore.errors import ClusterFault
from mrcore.launchers.launcher import lines_of_run

LINE = b"2026-11-27T20:16:%02d j/1 map-0-1 | %d\n"


class Logs:
    """Three nodes with two lines of the run each, of which the last is away."""

    def find_in_logs(self, settings: Any, node_name: str, words: str, lines: int) -> list[bytes]:
        assert words == " j/1 "
        if node_name == "n2":
            raise ClusterFault("n2 is away")
        return [LINE % (second, second) for second in {"n0": (1, 4), "n1": (2, 3)}[node_name]]


def test_the_last_lines_of_all_nodes_in_order_and_who_is_away() -> None:
    settings: Any = SimpleNamespace(nodes=[SimpleNamespace(name=f"n{number}") for number in range(3)])
    logs: Any = Logs()
    found, errors = lines_of_run(logs, settings, "j", 1, 3)
    assert found == [LINE % (second, second) for second in (2, 3, 4)]
    assert {node: error.message for node, error in errors.items()} == {"n2": "n2 is away"}
