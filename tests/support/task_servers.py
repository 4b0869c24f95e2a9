"""A cluster server of its own, whose tasks are played by `standin_server`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from daemons import Daemon, Listener

from mrcore.system import procfs

STANDIN = str(Path(__file__).with_name("standin_server.py"))


def order(act: str, *, job: str = "j", run: int = 1, task: int = 0, tried: int = 1, **more: Any) -> Any:
    identity = {"job": job, "run": run, "phase": "MAP", "task": task, "try": tried}
    return {"identity": identity, "node": "n1", "project": "a" * 32, "partitions": 1, "job": {"act": act} | more}


class TaskServer(Daemon):
    def __init__(self, folder: Path, **spec: Any) -> None:
        super().__init__(folder, [STANDIN], "S_0", **spec)
        assert self.ready == b"ready\n", self.log.read_text()
        self.master = self.client()

    def start(self, act: str, **more: Any) -> tuple[Listener, Any]:
        listener = Listener(self.client())
        given = order(act, **more)
        assert self.master.call("order", timeout_seconds=60, order=given) == {"accepted": True}
        return listener, given["identity"]

    def child(self) -> int:
        """The server child's pid."""
        return int(json.loads((self.folder / "node/pids/S_0.server.json").read_text())["pid"])

    def held(self) -> int:
        """The number of events that the server held when it was last a whole thousand."""
        file = self.folder / "node/held"
        return int(file.read_text() or 0) if file.exists() else 0

    def only_server_left(self) -> bool:
        return procfs.descendants(self.process.pid) == {self.child()}
