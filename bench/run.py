"""`make bench`: mrcore beside a script by hand, PySpark, mrjob and Dask, on the same inputs, results compared.

Every competitor lives in a process of its own (`host.py`), which keeps its warm session and measures. The repeats of a
work go round all competitors in turn, so that a machine that is busy for a while is so for all. Wall time and CPU are
medians over the repeats; the ratio is to the script by hand, taken within each round. Inputs, sessions and outputs lie
in `--folder`; everything that is started here is ended here.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import select
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from host import become_subreaper, stats, tree
from works import WORKS, Work, describe_inputs, digest, make_inputs

HERE = Path(__file__).resolve().parent
COMPETITORS = {  # name: the packages that it needs
    "by hand": (),
    "mrcore 1x2": (),
    "mrcore 2x1": (),
    "spark": ("pyspark",),
    "mrjob": ("mrjob",),
    "dask": ("dask", "distributed"),
}
EMPTY_REPEATS = 10
START_SECONDS = 120.0
END_SECONDS = 20.0


@dataclass
class Row:
    """What one competitor did on one work."""

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    cpu_ratios: list[float] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    told: list[Any] = field(default_factory=list)
    error: str | None = None


class Host:
    """One competitor's process."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder / name.replace(" ", "-")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log = folder.parent / f"{name.replace(' ', '-')}.log"
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(HERE / "host.py"), name, str(self.folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                bufsize=0,
            )
        self.alive = True
        try:
            self.session = self._answer(START_SECONDS)
        except RuntimeError:
            self.close()
            raise

    def run(self, work: Work, inputs: list[Path], limit_seconds: float) -> dict[str, Any]:
        """Do the work once. Raises RuntimeError when the competitor fails; one that takes too long is ended."""
        order = {"work": work.name, "inputs": [str(path) for path in inputs], "out": str(self.folder / "out")}
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
        return self._answer(limit_seconds)

    def _answer(self, limit_seconds: float) -> dict[str, Any]:
        deadline, line = time.monotonic() + limit_seconds, b""
        assert self._process.stdout is not None
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            fresh = os.read(self._process.stdout.fileno(), 1 << 16) if ready else b""
            line += fresh
            if not fresh:
                self.close()
                what = "ended" if ready else f"took more than {limit_seconds:.0f} s"
                raise RuntimeError(f"{self.name} {what}; see {self.log}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{answer['error']}; see {self.log}")
        return answer

    def close(self) -> None:
        """End the session politely, then everything that is left of it. May be repeated."""
        if not self.alive:
            return
        self.alive = False
        family = tree(self._process.pid, stats())
        with contextlib.suppress(BrokenPipeError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_SECONDS)
        # Whoever lost its parent is our child now (we are a subreaper).
        for pid in tree(self._process.pid, stats()) | (family & tree(os.getpid(), stats())):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare mrcore with a script by hand, PySpark, mrjob and Dask.")
    names = ",".join(WORKS)
    parser.add_argument("--only", default=names, help=f"works, with commas: {names} (wordcount means both)")
    parser.add_argument("--without", default="", help=f"competitors to leave out: {','.join(COMPETITORS)}")
    parser.add_argument("--scale", type=float, default=1.0, help="size of the inputs; 0.01 for a quick look")
    parser.add_argument("--repeats", type=int, default=3, help=f"rounds of each work (the empty job: {EMPTY_REPEATS})")
    parser.add_argument("--limit", type=float, default=900.0, help="seconds that one run may take")
    parser.add_argument("--folder", type=Path, default=HERE.parent / ".mrcore" / "bench", help="inputs and sessions")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder for the JSON table")
    options = parser.parse_args()
    chosen = set(options.only.split(","))
    options.works = [work for name, work in WORKS.items() if name in chosen or name.split("-")[0] in chosen]
    left_out = {word.strip() for word in options.without.split(",")}
    options.competitors = [name for name in COMPETITORS if not {name, name.split()[0]} & left_out]
    if not options.works:
        parser.error(f"--only names no work; there are {names}")
    return options


def machine() -> dict[str, Any]:
    """Where this was measured."""
    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    memory = int(Path("/proc/meminfo").read_text().split(maxsplit=2)[1]) // 1024
    return {
        "cores": len(os.sched_getaffinity(0)),
        "cpu": model.partition(": ")[2],
        "memory_mib": memory,
        "python": platform.python_version(),
        "system": platform.platform(),
        "load_before": os.getloadavg()[0],
    }


@contextlib.contextmanager
def sessions(names: list[str], folder: Path) -> Iterator[dict[str, Host]]:
    """The competitors that can be had, started; ended afterwards."""
    hosts: dict[str, Host] = {}
    try:
        for name in names:
            missing = [package for package in COMPETITORS[name] if importlib.util.find_spec(package) is None]
            if missing:
                print(f"without {name}: {', '.join(missing)} not installed (the extra `bench`)", flush=True)
                continue
            try:
                hosts[name] = Host(name, folder)
            except RuntimeError as error:
                print(f"without {name}: {error}", flush=True)
                continue
            versions = ", ".join(f"{key} {value}" for key, value in hosts[name].session["versions"].items())
            print(f"{name}: {versions}; {hosts[name].session['how']}", flush=True)
        yield hosts
    finally:
        for host in hosts.values():
            host.close()


def measure(work: Work, inputs: list[Path], hosts: dict[str, Host], options: argparse.Namespace) -> dict[str, Row]:
    """Let all competitors do the work, round by round; one that fails does no further round of it."""
    rows = {name: Row() for name in hosts}
    for _ in range(EMPTY_REPEATS if work.name == "empty" else options.repeats):
        for name, row in rows.items():
            if row.error or not hosts[name].alive:
                row.error = row.error or "its session has ended"
                continue
            try:
                answer = hosts[name].run(work, inputs, options.limit)
            except RuntimeError as error:
                row.error = str(error)
                continue
            row.seconds.append(answer["seconds"])
            row.cpu_seconds.append(answer["cpu_seconds"])
            row.told.append(answer["told"])
            row.digests.append(digest([Path(path) for path in answer["files"]], work.ordered, answer["separator"]))
            script = rows.get("by hand", Row())
            if len(script.seconds) == len(row.seconds):
                row.ratios.append(row.seconds[-1] / script.seconds[-1])
                row.cpu_ratios.append(row.cpu_seconds[-1] / max(script.cpu_seconds[-1], 0.01))
        print(".", end="", flush=True)
    print()
    return rows


def table(work: Work, rows: dict[str, Row]) -> bool:
    """Print a work's table; gives whether all results are equal."""
    print(f"\n{work.title}")
    print(f"  {'':12}{'wall s':>9}{'(range)':>16}{'CPU s':>9}{'ratio':>8}{'of CPU':>8}  result")
    reference = next((row.digests[0] for row in rows.values() if row.digests), "")
    equal = True
    for name, row in rows.items():
        if not row.seconds:
            print(f"  {name:12}{row.error}")
            continue
        wall, cpu = statistics.median(row.seconds), statistics.median(row.cpu_seconds)
        spread = f"{min(row.seconds):.2f}–{max(row.seconds):.2f}"
        ratio, of_cpu = (f"{statistics.median(each):.2f}" if each else "" for each in (row.ratios, row.cpu_ratios))
        same = set(row.digests) == {reference}
        equal = equal and same
        told = "equal" if same else f"DIFFERENT: {sorted(set(row.digests))} is not {reference}"
        told += f"  {row.error}" if row.error else ""
        print(f"  {name:12}{wall:9.2f}{spread:>16}{cpu:9.2f}{ratio:>8}{of_cpu:>8}  {told}")
    return equal


def main() -> int:
    options = arguments()
    become_subreaper()
    options.folder.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"time": datetime.now().astimezone().isoformat(timespec="seconds"), "machine": machine()}
    print(", ".join(f"{key} {value}" for key, value in report["machine"].items()))
    prepared = {work.name: make_inputs(options.folder / "inputs", work.data, options.scale) for work in options.works}
    runs = options.folder / f"run-{os.getpid()}"
    equal = True
    try:
        with sessions(options.competitors, runs) as hosts:
            report |= {"scale": options.scale, "sessions": {name: host.session for name, host in hosts.items()}}
            report["works"] = {}
            for work in options.works:
                inputs = prepared[work.name]
                size = describe_inputs(inputs)
                print(
                    f"\n{work.title}: {size['files']} files, {size['bytes']:,} bytes, {size['lines']:,} lines ", end=""
                )
                rows = measure(work, inputs, hosts, options)
                equal = table(work, rows) and equal
                told = {name: vars(row) for name, row in rows.items()}
                report["works"][work.name] = {"input": size, "competitors": told}
    finally:
        shutil.rmtree(runs, ignore_errors=True)
    report["machine"]["load_after"] = os.getloadavg()[0]
    options.results.mkdir(parents=True, exist_ok=True)
    file = options.results / f"{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}.json"
    file.write_text(json.dumps(report | {"equal": equal}, indent=1))
    print(f"\nall results equal: {equal}; details: {file}")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
