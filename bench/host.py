"""One competitor in a process of its own: `python host.py NAME FOLDER`, orders in and results out as JSON lines.

It keeps the competitor's warm session, if there is one, and measures wall time and CPU. CPU is user + system time of
this process and everything below it in the tree of processes, from /proc: what they used so far and what those used
that ended and were waited for. Being a subreaper keeps whatever detaches itself in the tree.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import shutil
import sys
import time
import traceback
from pathlib import Path
from typing import Any

TICKS = os.sysconf("SC_CLK_TCK")
MODULES = {
    "by hand": "by_hand",
    "mrcore 1x2": "ours",
    "mrcore 2x1": "ours",
    "spark": "peer_spark",
    "mrjob": "peer_mrjob",
    "dask": "peer_dask",
}


def become_subreaper() -> None:
    """Adopt orphans of this process's descendants (PR_SET_CHILD_SUBREAPER)."""
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)


def stats() -> dict[int, tuple[int, int]]:
    """Parent and used clock ticks (children's that ended included) of every process."""
    found = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                fields = Path(f"/proc/{name}/stat").read_text(errors="replace").rpartition(")")[2].split()
            except OSError:
                continue
            found[int(name)] = (int(fields[1]), sum(map(int, fields[11:15])))
    return found


def tree(root: int, known: dict[int, tuple[int, int]]) -> set[int]:
    """`root` and all below it."""
    found, front = set(), {root}
    while front:
        found |= front
        front = {pid for pid, (parent, _) in known.items() if parent in front} - found
    return found


def cpu_seconds() -> float:
    """CPU that this process and all below it used so far."""
    known = stats()
    return sum(known[pid][1] for pid in tree(os.getpid(), known) if pid in known) / TICKS


def describe(error: Exception) -> str:
    """One line about an exception; the log has the rest."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


def measured(competitor: Any, work: str, inputs: list[Path], out: Path) -> dict[str, Any]:
    """Let the competitor do the work once; `files` tells where its output lies."""
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    cpu, start = cpu_seconds(), time.perf_counter()
    told = competitor.run(work, inputs, out)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "cpu_seconds": cpu_seconds() - cpu, "told": told}


def main(name: str, folder: Path) -> None:
    become_subreaper()
    answers = os.fdopen(os.dup(1), "w")  # what a competitor prints must not get between the answers
    os.dup2(2, 1)
    competitor = None

    def tell(**answer: Any) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    try:
        competitor = importlib.import_module(MODULES[name]).Competitor(name, folder)
        tell(ready=True, versions=competitor.versions, how=competitor.how)
        for line in sys.stdin:
            order = json.loads(line)
            try:
                out = Path(order["out"])
                result = measured(competitor, order["work"], [Path(path) for path in order["inputs"]], out)
                files = [str(path) for path in competitor.output(order["work"], out)]
                tell(**result, files=files, separator=competitor.separator)
            except Exception as error:  # noqa: BLE001  whatever it is, the other works can still be done
                traceback.print_exc()
                tell(error=describe(error))
    except Exception as error:  # noqa: BLE001  the bench goes on without this competitor
        traceback.print_exc()
        tell(error=describe(error))
    finally:
        if competitor is not None:
            competitor.close()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
