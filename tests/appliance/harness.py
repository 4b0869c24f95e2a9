"""What proofs need of a living cluster: machines to run commands on, the operator who types `make VERB`, the people
who submit jobs, and waiting for conditions.

    lab = Lab.of("cluster")
    operator = Operator(lab)                      # the controller: make, ansible, inventory
    w1 = Machine(lab, "w1")                       # w1.run("systemctl is-active ssh") as root
    anna = Person(operator.master, "anna")        # anna.mrcore("queue"), anna.submit({...}), over SSH
"""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from lab import BIN, PROJECT, Lab, podman

ADDRESSES = {"this": 11, "m1": 11, "w1": 21, "w2": 22, "w3": 23, "outsider": 99}  # last numbers
AGENT_PORT, SERVER_PORT = 45678, 23456
NOT_OURS = {"INVENTORY", "NODE", "DATA", "PURGE", "CONFIRM", "PROJECT", "CA", "ARGS"}  # of the make that runs the tests
RECAP = re.compile(r"^(\S+)\s+: ok=\d+\s+changed=(\d+)\s+unreachable=(\d+)\s+failed=(\d+)", re.MULTILINE)
COLOURS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>()][0-9A-Za-z]?")


class CommandFailed(AssertionError):
    """A command did not end as it should; the text has what it printed."""


@dataclass(frozen=True)
class Done:
    """How a command ended: `output` holds standard output and standard error."""

    status: int
    stdout: str
    stderr: str

    @property
    def output(self) -> str:
        """All that it printed."""
        return self.stdout + self.stderr


def wait_until(condition: Callable[[], Any], seconds: float = 60, message: str = "the condition") -> Any:
    """Call `condition` until it gives something true, and return that; an AssertionError at the deadline."""
    deadline, pause = time.monotonic() + seconds, 0.1
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < deadline, f"{message}: not within {seconds} s (last: {found!r})"
        time.sleep(pause)
        pause = min(pause * 1.5, 1.0)


def execute(
    command: Sequence[str], *, status: int | None = 0, timeout: float = 300, stdin: str | None = None, **options: Any
) -> Done:
    """Run a command of this machine. `status`: what it must end with, None for anything. Raises CommandFailed."""
    options = {"capture_output": True, "text": True, "errors": "replace", "check": False} | options
    if stdin is None:
        options |= {"stdin": subprocess.DEVNULL}
    try:
        done = subprocess.run(command, input=stdin, timeout=timeout, **options)
    except subprocess.TimeoutExpired as error:
        said = b"".join(part or b"" for part in (error.stdout, error.stderr)).decode(errors="replace")
        raise CommandFailed(f"{shlex.join(command)}: not done within {timeout} s:\n{said[-3000:]}") from None
    found = Done(done.returncode, done.stdout or "", done.stderr or "")
    if status is not None and found.status != status:
        tail = found.output[-4000:]
        raise CommandFailed(f"{shlex.join(command)}: ended with {found.status}, not {status}:\n{tail}")
    return found


class Machine:
    """One container, as its administrator sees it."""

    def __init__(self, lab: Lab, name: str) -> None:
        self.lab, self.name = lab, name
        self.container = f"{lab.prefix}{name}"
        self.address = f"{lab.net}.{ADDRESSES[name]}"

    def run(
        self, script: str, *, user: str = "root", status: int | None = 0, timeout: float = 120, stdin: str | None = None
    ) -> Done:
        """Run a shell script on the machine. Raises CommandFailed."""
        settings = self.lab.environment()["CONTAINERS_CONF"]
        command = ["podman", "exec", "--interactive", "--user", user, self.container, "sh", "-c", script]
        environment = os.environ | {"CONTAINERS_CONF": settings}
        return execute(command, status=status, timeout=timeout, stdin=stdin or "", env=environment)

    def text(self, script: str) -> str:
        """What a script prints, without white space around it."""
        return self.run(script).stdout.strip()

    def read(self, path: str) -> str:
        """A file's text."""
        return self.run(f"cat {shlex.quote(path)}").stdout

    def write(self, path: str, text: str, mode: str = "0644") -> None:
        """Write a file, and the folders above it."""
        quoted = shlex.quote(path)
        self.run(f'mkdir -p "$(dirname {quoted})" && cat >{quoted} && chmod {mode} {quoted}', stdin=text)

    def exists(self, path: str) -> bool:
        """Whether there is such a file or folder."""
        return self.run(f"test -e {shlex.quote(path)}", status=None).status == 0

    def system(self) -> tuple[str, str]:
        """Debian's release and the minor version of its Python: ("debian12", "3.11")."""
        code = "import sys; print('%d.%d' % sys.version_info[:2])"
        return self.text(". /etc/os-release; echo $ID$VERSION_ID"), self.text(f'python3 -c "{code}"')

    def unit(self, name: str) -> dict[str, str]:
        """ActiveState, SubState, MainPID, NRestarts and UnitFileState of a unit."""
        wanted = "ActiveState,SubState,MainPID,NRestarts,UnitFileState"
        shown = self.run(f"systemctl show --property={wanted} {shlex.quote(name)}").stdout
        return dict(line.split("=", 1) for line in shown.splitlines())

    def servers(self) -> list[str]:
        """The names of this node's cluster servers, by their specs."""
        listed = self.run("ls /etc/mrcore/daemons 2>/dev/null", status=None).stdout.split()
        return sorted(name.removesuffix(".json") for name in listed if name.startswith("S_"))

    def units(self) -> list[str]:
        """This machine's daemons: the agent's unit and one for each server; none on a master that is no node."""
        agent = ["mrcore-agent.service"] if self.exists("/etc/mrcore/daemons/agent.json") else []
        return [*agent, *(f"mrcore-server@{name}.service" for name in self.servers())]

    def pids(self) -> dict[str, str]:
        """Main process of each unit of ours on this machine; 0: it does not run."""
        names = [*self.units(), *(["mrcore-runner.service"] if self.exists("/etc/mrcore/cluster.yml") else [])]
        return {name: self.unit(name)["MainPID"] for name in names}

    def daemons(self) -> list[str]:
        """What user mrcore runs here, but for sessions of SSH and systemd."""
        found = self.run("find /proc -maxdepth 1 -name '[0-9]*' -user mrcore -exec cat {}/comm ';'", status=None).stdout
        return [name for name in found.split("\n") if name and not name.startswith(("sshd", "systemd", "(sd-pam"))]

    def nft(self, *arguments: str, stdin: str | None = None) -> str:
        """What nft prints in the machine's network; nft itself is the controller's, a bare machine has none."""
        pid = podman("inspect", "--format", "{{.State.Pid}}", self.container).strip()
        return execute(["nsenter", "--target", pid, "--net", "nft", *arguments], stdin=stdin).stdout

    def reaches(self, address: str, port: int, seconds: float = 3) -> bool:
        """Whether a TCP connection from this machine comes about."""
        code = f"import socket; socket.create_connection(({address!r}, {port}), {seconds})"
        return self.run(f"python3 -c {shlex.quote(code)}", status=None).status == 0

    def restart(self) -> None:
        """Reboot it: everything ends, systemd starts what is enabled."""
        podman("restart", "--time", "20", self.container)
        self.wait_for_boot()

    def stop(self) -> None:
        """Switch it off."""
        podman("stop", "--time", "20", self.container)

    def start(self) -> None:
        """Switch it on again."""
        podman("start", self.container)
        self.wait_for_boot()

    def wait_for_boot(self) -> None:
        """Until systemd has come up and sshd listens."""
        wait_until(
            lambda: self.run("systemctl is-system-running", status=None).stdout.strip() in ("running", "degraded"),
            60, f"{self.name} boots",
        )  # fmt: skip
        wait_until(lambda: self.run("systemctl is-active ssh", status=None).status == 0, 30, f"sshd of {self.name}")


class Person:
    """Somebody with an account on a machine who comes in over SSH, with the lab's key."""

    def __init__(self, machine: Machine, name: str) -> None:
        self.machine, self.name = machine, name

    def make(self) -> None:
        """Give the person an account and let the key in."""
        key, name = (self.machine.lab.folder / "key.pub").read_text().strip(), self.name
        self.machine.run(
            f"id {name} >/dev/null 2>&1 || useradd --create-home --shell /bin/bash {name}; "
            f"install -d -m 0700 -o {name} -g {name} /home/{name}/.ssh; "
            f"echo '{key}' >/home/{name}/.ssh/authorized_keys; chown {name}: /home/{name}/.ssh/authorized_keys"
        )

    def ssh_command(self, script: str, tty: bool = False) -> list[str]:
        """The ssh command line for a script."""
        folder = self.machine.lab.folder
        options = ["-o", f"UserKnownHostsFile={folder}/known_hosts", "-o", "StrictHostKeyChecking=yes"]
        options += ["-o", "BatchMode=yes", "-o", "LogLevel=ERROR", "-i", str(folder / "key")]
        return ["ssh", *(["-tt"] if tty else []), *options, f"{self.name}@{self.machine.address}", script]

    def run(self, script: str, *, status: int | None = 0, timeout: float = 120, stdin: str | None = None) -> Done:
        """Run a shell script in the person's home folder. Raises CommandFailed."""
        return execute(self.ssh_command(script), status=status, timeout=timeout, stdin=stdin)

    def write(self, path: str, text: str) -> None:
        """Write a file of the person's own."""
        self.run(f'mkdir -p "$(dirname {shlex.quote(path)})" && cat >{shlex.quote(path)}', stdin=text)

    def bring(self, folder: Path, target: str) -> None:
        """Copy a folder from this machine into `target` there; files get into the target folder's group."""
        packed = subprocess.run(
            ["tar", "-C", str(folder.parent), "--exclude=__pycache__", "-cz", folder.name],
            capture_output=True,
            check=True,
        ).stdout
        command = self.ssh_command(f"umask 0002 && mkdir -p {target} && tar -C {target} --no-same-owner -xz")
        done = subprocess.run(command, input=packed, capture_output=True, timeout=60)
        if done.returncode:
            raise CommandFailed(f"{folder.name} does not get into {target}: {done.stderr.decode()}")

    def mrcore(self, *arguments: str, status: int | None = 0, timeout: float = 180) -> Done:
        """Call `mrcore` as this person."""
        return self.run(f"mrcore {shlex.join(arguments)}", status=status, timeout=timeout)

    def submit(self, *jobs: dict[str, Any]) -> None:
        """Submit jobs with one file."""
        name = f"jobs/{jobs[0]['job_name']}.json"
        self.write(name, json.dumps(list(jobs)))
        self.mrcore("submit", name)

    def runs(self, job: str) -> list[dict[str, Any]]:
        """The runs of a job, newest first."""
        rows: list[dict[str, Any]] = json.loads(self.mrcore("history", job, "--json", status=None).stdout or "[]")
        return rows

    def finished(self, job: str, more_than: int = 0, seconds: float = 120) -> dict[str, Any]:
        """Wait until the job has more ended runs than that; give the newest, which must have succeeded."""

        def newest() -> dict[str, Any] | None:
            ended = [row for row in self.runs(job) if row["state"] not in ("running", "handed back")]
            return ended[0] if len(ended) > more_than else None

        row: dict[str, Any] = wait_until(newest, seconds, f"a run of {job} ends")
        assert row["state"] == "succeeded", row
        return row

    def items(self, job: str) -> list[Any]:
        """The items of a job's output."""
        return [json.loads(line) for line in self.mrcore("cat", job).stdout.splitlines()]

    @contextlib.contextmanager
    def terminal(self, script: str) -> Iterator[Terminal]:
        """A command on a terminal of its own, ended when left."""
        terminal = Terminal(self.ssh_command(script, tty=True))
        try:
            yield terminal
        finally:
            terminal.close()


class Terminal:
    """A command on a pseudo-terminal: what it shows, and typing to it."""

    def __init__(self, command: Sequence[str]) -> None:
        self.shown = ""
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            os.environ["TERM"] = "xterm"
            os.execvp(command[0], list(command))

    def type(self, text: str) -> None:
        """Send keys."""
        os.write(self._fd, text.encode())

    def wait_for(self, text: str, seconds: float = 30) -> str:
        """Read until `text` was shown; give all that was shown so far, without colours."""
        deadline = time.monotonic() + seconds
        while text not in COLOURS.sub("", self.shown):
            left = deadline - time.monotonic()
            assert left > 0 and self.read(left), f"{text!r} is not shown:\n{COLOURS.sub('', self.shown)[-3000:]}"
        return COLOURS.sub("", self.shown)

    def wait_for_end(self, seconds: float = 30) -> int:
        """Read until the command ends; give its exit status."""
        deadline = time.monotonic() + seconds
        while self.read(max(0.0, deadline - time.monotonic())):
            assert time.monotonic() < deadline, f"it does not end:\n{self.shown[-2000:]}"
        _, status = os.waitpid(self.pid, 0)
        self.pid = 0
        return os.waitstatus_to_exitcode(status)

    def read(self, seconds: float) -> bool:
        """Take in what comes within this time; False: nothing came, or the command has ended."""
        if not select.select([self._fd], [], [], seconds)[0]:
            return False
        try:
            data = os.read(self._fd, 65536)
        except OSError:  # so a terminal tells that its other end is closed
            return False
        self.shown += data.decode(errors="replace")
        return bool(data)

    def close(self) -> None:
        """End the command."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = 0
        with contextlib.suppress(OSError):
            os.close(self._fd)


@dataclass(frozen=True)
class Played:
    """How a `make VERB` went: `changed`, `unreachable` and `failed` by host, as Ansible counted them."""

    done: Done
    seconds: float

    @property
    def output(self) -> str:
        """All that it printed."""
        return self.done.output

    @property
    def changed(self) -> dict[str, int]:
        """Number of changes on each host."""
        return {host: int(changed) for host, changed, _, _ in RECAP.findall(COLOURS.sub("", self.output))}


class Operator:
    """Who deploys: the checkout, an inventory folder, and `make`."""

    def __init__(self, lab: Lab, name: str = "prod", project: Path = PROJECT) -> None:
        self.lab, self.project = lab, project
        self.folder = lab.folder / "inventory" / name
        self.logs = lab.folder / "logs"
        self.master = Machine(lab, "m1")

    def machine(self, name: str) -> Machine:
        """A machine of the lab."""
        return Machine(self.lab, name)

    def hosts(self, *names: str) -> dict[str, Any]:
        """Hosts of an inventory, with their addresses."""
        return {name: {"ansible_host": f"{self.lab.net}.{ADDRESSES[name]}"} for name in names}

    def usual_inventory(self, *nodes: str) -> dict[str, Any]:
        """What the operator would write: m1 is the master, `nodes` are the nodes (w1 and w2)."""
        keys = self.lab.folder
        ssh = f"-o UserKnownHostsFile={keys}/known_hosts -o StrictHostKeyChecking=yes -o BatchMode=yes"
        variables = {
            "ansible_user": "admin", "ansible_become": True, "ansible_python_interpreter": "/usr/bin/python3",
            "ansible_ssh_private_key_file": str(keys / "key"), "ansible_ssh_common_args": ssh,
            "mrcore_users": ["anna"],
            # Shares of one small machine: the containers see all of its memory. Short pauses of a queue that waits.
            "mrcore_memory_bytes": 512 << 20, "mrcore_min_free_bytes": 512 << 20,
            "mrcore_settings": {"cycle_interval_seconds": 2, "hold_backoff_max_seconds": 5},
        }  # fmt: skip
        if self.lab.scenario == "cluster":  # the release before has none
            variables["mrcore_dashboard"] = True
        groups = {"master": {"hosts": self.hosts("m1")}, "nodes": {"hosts": self.hosts(*(nodes or ("w1", "w2")))}}
        return {"all": {"children": groups, "vars": variables}}

    def write_inventory(self, inventory: dict[str, Any]) -> Path:
        """Write hosts.yml of this inventory's folder; give the folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "hosts.yml").write_text(yaml.safe_dump(inventory, sort_keys=False))
        return self.folder

    def inventory(self) -> dict[str, Any]:
        """What hosts.yml says now."""
        found: dict[str, Any] = yaml.safe_load((self.folder / "hosts.yml").read_text())
        return found

    def make(self, verb: str, *, status: int | None = 0, timeout: float = 2400, **variables: str) -> Played:
        """Type `make VERB INVENTORY=… NAME=value …`; what it prints goes to a log as well. Raises CommandFailed.

        `status` is 0, or 2 for a run that has to fail: make knows no other.
        """
        words = [f"{name}={value}" for name, value in variables.items()]
        command = ["make", "--no-print-directory", verb, f"INVENTORY={self.folder}", *words]
        return self._play(verb, command, status, timeout)

    def playbook(self, verb: str, *arguments: str, status: int | None = 0, timeout: float = 2400) -> Played:
        """The same by `ansible-playbook` typed by hand; `verb` as the file is called."""
        return self._play(verb, self._by_hand(verb, arguments), status, timeout)

    def cut_off(self, verb: str, moment: str, *arguments: str, timeout: float = 300) -> None:
        """Play by hand, and kill Ansible when it prints `moment`, the name of a play or task."""
        log = self._log(verb)
        with open(log, "w") as stream:
            process = subprocess.Popen(
                self._by_hand(verb, arguments), cwd=self.project, env=self._environment(),
                stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        try:
            wait_until(lambda: process.poll() is not None or f"[{moment}]" in log.read_text(), timeout, moment)
            assert process.poll() is None, f"it ended before {moment}:\n{log.read_text()[-3000:]}"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _by_hand(self, verb: str, arguments: Sequence[str]) -> list[str]:
        return [str(BIN / "ansible-playbook"), "-i", str(self.folder), f"ansible/{verb}.yml", *arguments]

    def _log(self, verb: str) -> Path:
        self.logs.mkdir(parents=True, exist_ok=True)
        return self.logs / f"{len(list(self.logs.glob('*.log'))):03}-{verb}.log"

    def _environment(self) -> dict[str, str]:
        others = ("MAKE", "MFLAGS", "MOLECULE")
        kept = {name: text for name, text in os.environ.items() if not name.startswith(others) and name not in NOT_OURS}
        environment = kept | self.lab.environment() | {"ANSIBLE_NOCOLOR": "1", "TZ": "Asia/Kolkata"}
        for name in ("ANSIBLE_CONFIG", "ANSIBLE_ROLES_PATH", "ANSIBLE_FORCE_COLOR", "PYTHONPATH", "PYTEST_PLUGINS"):
            environment.pop(name, None)  # Molecule's and ours: the operator has the checkout's
        return environment

    def _play(self, verb: str, command: Sequence[str], status: int | None, timeout: float) -> Played:
        log, started = self._log(verb), time.monotonic()
        with open(log, "w") as stream:
            stream.write(f"$ {shlex.join(command)}\n")
            stream.flush()
            options = {"capture_output": False, "stdout": stream, "stderr": subprocess.STDOUT}
            done = execute(command, status=None, timeout=timeout, cwd=self.project, env=self._environment(), **options)
            seconds = time.monotonic() - started
            stream.write(f"status {done.status} after {seconds:.1f} s\n")
        said = log.read_text(errors="replace")
        if status is not None and done.status != status:
            raise CommandFailed(f"{shlex.join(command)}: ended with {done.status}, not {status}:\n{said[-4000:]}")
        return Played(Done(done.status, said, ""), seconds)

    def times(self) -> dict[str, float]:
        """The times that were measured so far."""
        file = self.lab.folder / "times.json"
        found: dict[str, float] = json.loads(file.read_text()) if file.exists() else {}
        return found

    def note_time(self, what: str, seconds: float) -> None:
        """Keep a measured time; the scenario prints all of them at its end."""
        (self.lab.folder / "times.json").write_text(json.dumps(self.times() | {what: round(seconds, 1)}, indent=1))
