"""`mrcore demo`: a local cluster of two nodes counts and indexes the names in Python's own standard library; then a
workflow of six jobs (projects/workflow) runs for two cycles, the second time on what is new.

Everything it does a user can do: it calls the `mrcore` command and prints each call. The cluster's state is in
`.mrcore` of its folder, the example projects in `projects`. Whatever happens, the cluster is stopped at the end.
"""

from __future__ import annotations

import contextlib
import glob
import heapq
import ipaddress
import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

EXAMPLES = Path(__file__).parent / "projects"  # in a checkout links to those of its own
NODES, SERVERS, AGENT_PORT, SERVER_PORT = 2, 1, 45678, 23456
TRIES = 20  # of addresses for the cluster
TOP = 12  # names that are shown
DEPLOYED = Path("/etc/mrcore/cluster.yml")
SECTIONS, VISITS = ("docs", "blog", "shop"), 20_000  # of a day, in the second act
# Names and folders of its own: who follows projects/workflow/README.md in the same home afterwards begins afresh.
OWN = re.compile(
    r"\b(page_visits|section_shares|workflow_\w+|workflow/inputs|(?<=group_name: )workflow|(?<=: )popular)\b"
)
END_SECONDS = 20.0  # for a command that is told to end
OUTSIDE = {"site-packages", "dist-packages", "__pycache__"}  # in the library's folder, but no part of it


class Failed(Exception):
    """A command failed; it has said why."""


class Demo:
    """One demonstration in `folder`, over the .py files below `source`."""

    def __init__(self, folder: Path, home: Path, source: Path, address: str | None = None) -> None:
        self.home, self.source, self.address, self.top, self.folder = home, source, address, folder, folder
        self.program = program()
        # Named by MRCORE_CONFIG, the local cluster comes before a deployed one that this machine may be the master of.
        self.settings = home / "cluster.json"
        self.environment = os.environ | {"MRCORE_HOME": str(home), "MRCORE_CONFIG": str(self.settings)}

    def run(self) -> None:
        """Do it all. Raises Failed."""
        for path in sorted(EXAMPLES.iterdir()):
            if not (self.top / "projects" / path.name).exists():
                shutil.copytree(path, self.top / "projects" / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        self.home.mkdir(parents=True, exist_ok=True)
        if self.settings.exists():  # a cluster may have been left running, perhaps in another shape
            self.mrcore("cluster", "stop", quiet=True)
        else:
            self.settings.write_text("{}\n")
        self.address = self.address or free_address()
        shape = ["--nodes", str(NODES), "--servers", str(SERVERS), "--address", self.address]
        try:
            self.mrcore("cluster", "start", *shape)
            job_file = self.home / "demo-jobs.json"
            job_file.write_text(json.dumps(self.jobs(), indent=2) + "\n")
            self.mrcore("submit", str(job_file))
            self.mrcore("run", "--once")
            self.show_results()
            self.second_act()
        finally:
            with at_peace():
                self.mrcore("cluster", "stop")
        self.show_next_steps(shape)

    def jobs(self) -> list[dict[str, Any]]:
        """Return the two jobs; the others of their keys keep their defaults (`mrcore template mapreduce`)."""
        inputs = [glob.escape(str(self.source)) + "/*.py"]
        for folder in sorted(self.source.iterdir()):
            if folder.is_dir() and folder.name not in OUTSIDE:
                inputs.append(glob.escape(str(folder)) + "/**/*.py")
        found = [pattern for pattern in inputs if next(glob.iglob(pattern, recursive=True), None)]
        if not found:
            raise Failed(f"there is no .py file in {self.source}")
        common = {"job_type": "mapreduce", "run_once": True, "input_dirs": found, "on_bad_text": "replace"}
        count = {"map_function_name": "names_used", "combine_function_name": "add_up", "reduce_function_name": "add_up"}
        index = {
            "map_function_name": "names_and_file",
            "combine_function_name": "each_file_once",
            "reduce_function_name": "list_files",
        }
        return [
            {"job_name": "identifiers", "project_name": "identifiers"} | common | count,
            {"job_name": "identifier_files", "project_name": "inverted_index"} | common | index,
        ]

    def show_results(self) -> None:
        """Print the names used most and where they stand, where the output lies, and how long each phase took."""
        runs = {row["job_name"]: row for row in json.loads(self.output("history", "--json", "--limit", "2"))}
        counts = runs["identifiers"]["counts"]
        lines, size = counts["lines"], counts["input_bytes"]
        items = counts["output_items"]
        print(
            f"\nRead {counts['input_files']:,} files, {size / 1e6:.1f} MB, {lines:,} lines: {items:,} different names."
        )
        top = heapq.nlargest(TOP, self.items("identifiers"), key=lambda item: item[1])
        wanted = {name for name, _ in top}
        files = {name: found for name, found in self.items("identifier_files") if name in wanted}
        print(f"\n{'name':<16}{'times used':>12}{'in files':>10}   for example")
        for name, count in top:
            where = sorted(Path(file).relative_to(self.source) for file in files[name])
            examples = ", ".join(map(str, where[:: max(1, len(where) // 3)][:3]))
            print(f"{name:<16}{count:>12,}{len(where):>10,}   {examples}")
        print("\nSeconds in each phase:")
        for job in ("identifiers", "identifier_files"):
            row = runs[job]
            phases = ", ".join(f"{phase} {times['seconds']:.2f}" for phase, times in row["phases"].items())
            crossed = row["counts"]["remote_bytes"] / 1e6
            print(f"  {job:<18}{phases}; in all {row['seconds']:.2f}; {crossed:.1f} MB crossed between the nodes")
        print("\nThe output, one JSON item a line, lies where it was reduced:")
        for node in addresses(str(self.address)):
            for folder in sorted(self.home.glob(f"nodes/{node}/cluster/identifier*/reduce")):
                parts = len(list(folder.iterdir()))
                print(f"  {self.display(folder)}: {parts} {'part' if parts == 1 else 'parts'}")
        print()

    def second_act(self) -> None:
        """Run the workflow of six jobs in a folder of its own: one cycle, then a new file, and a second one."""
        self.folder = self.home / "workflow-demo"
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(EXAMPLES / "workflow", self.folder / "projects/workflow")
        (self.folder / "workflow/incoming").mkdir(parents=True)
        file = self.folder / "projects/workflow/workflow.yml"
        file.write_text(OWN.sub(r"demo_\1", file.read_text()))
        for what in (["rm", "demo_workflow"], ["ledger", "forget", "demo_page_visits"]):  # of an earlier demo
            self.mrcore(*what, quiet=True, may_fail=True)
        print(
            "Second act: upload → mapreduce → download → script → upload its result → mapreduce, as one group of jobs."
        )
        print(f"In {self.display(self.folder)}: projects/workflow/workflow.yml, and log files in workflow/incoming.\n")
        chance, pages = random.Random(1), [f"/{section}/{n}" for section in SECTIONS for n in range(50)]
        weights = [1 / (1 + n) for _ in SECTIONS for n in range(50)]
        for days in ((1, 2, 3), (4,)):
            for day in days:
                lines = (f"2026-11-{day:02} user{chance.randrange(999)} {page}" for page in
                         chance.choices(pages, weights, k=VISITS))  # fmt: skip
                (self.folder / f"workflow/incoming/day-{day}").write_text("\n".join(lines) + "\n")
            self.mrcore("submit", "projects/workflow/workflow.yml", "--set", "run_once=true")
            self.mrcore("run", "--once")
            counts = json.loads(self.output("history", "demo_page_visits", "--json", "--limit", "1"))[0]["counts"]
            files, size = counts["input_files"], counts["input_bytes"] / 1e6
            new = f"{files} file{'s' * (files > 1)}, {size:.1f} MB"
            print(f"\nThe logs of {days[-1]} days; demo_page_visits read what was new: {new}.")
            for section, found in self.items("demo_section_shares"):
                print(f"  {section:<8}{found['share']:>7.1%}   popular: {', '.join(found['popular'][:3])}")
            print(flush=True)

    def items(self, job: str) -> Iterator[list[Any]]:
        """Yield the items of a job's output, from `mrcore cat`."""
        command = [self.program, "cat", job]
        print(f"$ {self.display(command)}", flush=True)
        with subprocess.Popen(command, env=self.environment, cwd=self.folder, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            for line in process.stdout:
                yield json.loads(line)
        if process.returncode:
            raise Failed(f"mrcore cat {job} failed")

    def output(self, *arguments: str) -> str:
        """Return what a command prints."""
        command = [self.program, *arguments]
        found = subprocess.run(command, env=self.environment, cwd=self.folder, stdout=subprocess.PIPE, text=True)
        if found.returncode:
            raise Failed(f"mrcore {' '.join(arguments)} failed")
        return found.stdout

    def mrcore(self, *arguments: str, quiet: bool = False, may_fail: bool = False) -> None:
        """Print and run one command of `mrcore`, and end it if we are to end. Raises Failed."""
        command = [self.program, *arguments]
        if not quiet:
            print(f"$ {self.display(command)}", flush=True)
        target = subprocess.DEVNULL if quiet else None
        errors = subprocess.DEVNULL if may_fail else None
        process = subprocess.Popen(command, env=self.environment, cwd=self.folder, stdout=target, stderr=errors)
        try:
            status = process.wait()
        except BaseException:
            process.terminate()  # the Runner hands back what it is at
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            raise
        if status and not may_fail:
            raise Failed(f"mrcore {' '.join(arguments[:2])} failed")

    def show_next_steps(self, shape: list[str]) -> None:
        """Print what to try next."""
        mrcore = self.display([self.program])
        home = '"$PWD/.mrcore"' if self.home == self.top / ".mrcore" else shlex.quote(str(self.home))
        print("\nTry next, in this folder:")
        deployed = (f"export MRCORE_CONFIG={home}/cluster.json", "not the deployed cluster")
        for command, meaning in (
            *([] if self.top == Path.cwd() else [(f"cd {shlex.quote(os.path.relpath(self.top))}", "")]),
            (f"export MRCORE_HOME={home}", ""),
            *([deployed] if DEPLOYED.exists() else []),
            (f"{mrcore} cluster start {' '.join(shape)}", "the same cluster again, with its queue and output"),
            (f"{mrcore} show identifiers", "the job, its runs, phases and counts"),
            (f"{mrcore} history demo_page_visits", "the second act; projects/workflow/README.md says more"),
            (f"{mrcore} cat identifiers --head 5", ""),
            (f"{mrcore} submit projects/word_count/job.yml", "another project; its README.md says more"),
            (f"{mrcore} run --once", ""),
            (f"{mrcore} cluster stop", ""),
        ):
            print(f"  {command}" + (f"   # {meaning}" if meaning else ""))

    def display(self, what: Path | list[str]) -> str:
        """Return a path or a command as one would type it in the demo's folder."""
        words = list(what) if isinstance(what, list) else [str(what)]
        if isinstance(what, list) and shutil.which("mrcore") == words[0]:
            words[0] = "mrcore"
        text = [word.removeprefix(f"{self.top}{os.sep}") for word in words]
        return shlex.join(text) if isinstance(what, list) else text[0]


def program() -> str:
    """Return the path of the command `mrcore` of this very installation."""
    beside = Path(sys.executable).with_name("mrcore")
    return str(beside) if beside.exists() else shutil.which("mrcore") or os.path.abspath(sys.argv[0])


def addresses(first: str) -> list[str]:
    """Return the addresses of the nodes, as the local cluster counts them from the first."""
    return [str(ipaddress.IPv4Address(first) + index) for index in range(NODES)]


def free_address() -> str:
    """Return the address for the first node, 127.0.0.1 unless another cluster has its ports; says so if it has."""
    for number in range(TRIES):
        first = f"127.0.{number}.1"
        with contextlib.ExitStack() as probes, contextlib.suppress(OSError):
            for address in addresses(first):
                for port in (AGENT_PORT, *range(SERVER_PORT, SERVER_PORT + SERVERS)):
                    probe = probes.enter_context(socket.socket())
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind((address, port))
            if number:
                print(f"The usual ports are in use on 127.0.0.1 or its neighbour: this cluster begins at {first}.\n")
            return first
    raise Failed(
        f"port {AGENT_PORT} or {SERVER_PORT} is in use on all loopback addresses that were tried: end what uses them, "
        "or choose an address: --address 127.1.1.1"
    )


@contextlib.contextmanager
def at_peace() -> Iterator[None]:
    """Let what is inside not be interrupted: a second Ctrl-C must not leave a cluster behind."""
    before = {
        number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def interrupt(number: int, frame: object) -> NoReturn:
    """End the demo on SIGTERM and SIGHUP as on Ctrl-C."""
    raise KeyboardInterrupt


def main(folder: Path, home: Path | None, source: Path | None, address: str | None) -> int:
    """Run the demo; return the exit status."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    started = time.monotonic()
    source = source or Path(sysconfig.get_paths()["stdlib"])
    try:
        folder = folder.absolute()
        Demo(folder, (home or folder / ".mrcore").absolute(), source.absolute(), address).run()
    except Failed as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: interrupted", file=sys.stderr)
        return 130
    print(f"\nThe demo took {time.monotonic() - started:.0f} s.")
    return 0
