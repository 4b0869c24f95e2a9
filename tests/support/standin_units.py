"""Stands in for /opt/mrcore/bin/units on a node of the tests: `python standin_units.py start|stop|kill|status`.

It answers as that helper does and starts the real daemons from the specs that a deploy would have written, without
systemd.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from signals import kill

from mrcore.system import procfs


def main(verb: str) -> int:
    folder = Path(os.environ["NODE_FOLDER"])
    (folder / "asked").open("a").write(verb + "\n")
    specs = sorted((folder / "daemons").glob("*.json"))
    for spec in specs:
        name = spec.stem
        record = folder / f"{name}.unit"
        pid = int(record.read_text()) if record.exists() else 0
        alive = pid and procfs.state(pid) is not None
        if verb == "start" and not alive:
            pid = _spawn(folder, spec)
            record.write_text(str(pid))
        elif verb in ("stop", "kill") and alive:
            for each in (pid, *procfs.descendants(pid)) if verb == "kill" else (pid,):
                kill(each, signal.SIGKILL if verb == "kill" else signal.SIGTERM)
            deadline = time.monotonic() + 20
            while procfs.state(pid) is not None and time.monotonic() < deadline:
                time.sleep(0.005)
        elif verb == "status":
            unit = "mrcore-agent.service" if name == "agent" else f"mrcore-server@{name}.service"
            active, sub = ("active", "running") if alive else ("inactive", "dead")
            print(f"MainPID={pid if alive else 0}\nNRestarts=0\nId={unit}\nActiveState={active}\nSubState={sub}\n")
    return 0


def _spawn(folder: Path, spec: Path) -> int:
    module = "node.node_agent" if spec.stem == "agent" else "node.cluster_server"
    environment = os.environ | {"MRCORE_SERVER": f"{json.loads(spec.read_text())['cluster']}/{spec.stem}"}
    with (folder / f"compute/logs/{spec.stem}.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", f"mrcore.{module}", str(spec)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        ).pid


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
