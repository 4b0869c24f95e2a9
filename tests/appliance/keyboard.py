"""Who types the blocks of a document, on the machines of a lab.

The controller is this machine: a folder with a clone of the checkout as it is now (also what is not committed), and an
ssh that knows the lab's key and host keys, as a person's own would. On the others it is podman that lets them in.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from harness import ADDRESSES, Machine, wait_until
from lab import BIN, HERE, PROJECT, Lab
from runbook import Block, Shell, execute

GIT = "https://git.example.org/mrcore.git"  # what the documents say
CLUSTER_NET = "10.0.0"
NOT_OURS = ("MAKE", "MFLAGS", "MOLECULE", "ANSIBLE_", "VIRTUAL_ENV", "PYTEST_", "PYTHON", "PY_COLORS")


@dataclass
class Cluster:
    """The machines of the lab and who types there."""

    lab: Lab
    places: dict[str, Shell]
    names: dict[str, str]
    checkout: Path

    def machine(self, name: str) -> Machine:
        """One of the machines, for what a test does behind the operator's back."""
        return Machine(self.lab, name)

    def type(self, place: str, script: str, status: int | None = 0) -> str:
        """Type something that stands in no page; gives what it printed."""
        found, output = self.places[place].run(script)
        assert status is None or found == status, f"{place}: status {found}, not {status}: {script}\n{output[-4000:]}"
        return output

    def well(self, *nodes: str) -> bool:
        """Whether agents and servers of these nodes (all) answer."""
        return self.places["anna@m1"].run(f"mrcore cluster check {' '.join(nodes)}")[0] == 0

    def wait_until_well(self, seconds: float = 60) -> None:
        """Wait for it."""
        wait_until(self.well, seconds, "the cluster is well")

    def execute(self, *blocks: Block) -> None:
        """Do what a document says."""
        execute(blocks, self.places, self.names)


def create(lab: Lab) -> None:
    """Start bare machines; those that run are left alone."""
    inventory = HERE / "molecule/cluster/inventory"
    command = [str(BIN / "ansible-playbook"), "-i", str(inventory), str(HERE / "containers/create.yml")]
    environment = os.environ | lab.environment()
    subprocess.run(command, cwd=PROJECT, env=environment, check=True, timeout=300)


def names(lab: Lab) -> dict[str, str]:
    """What the documents call by another name than this lab."""
    found = {f"{CLUSTER_NET}.{number}": f"{lab.net}.{number}" for number in ADDRESSES.values()}
    return found | {GIT: str(lab.folder / "upstream/mrcore"), "~/.ssh/known_hosts": str(lab.folder / "known_hosts")}


def places(lab: Lab) -> dict[str, Shell]:
    """The controller, root on every machine, and anna on the master."""
    environment, log = _environment(lab), lab.folder / "typed.log"
    (lab.folder / "controller").mkdir(parents=True, exist_ok=True)
    found = {"controller": Shell([], str(lab.folder / "controller"), environment=environment, log=log)}
    for user, machine in [("anna", "m1"), *(("root", each) for each in ADDRESSES)]:
        home = "/root" if user == "root" else f"/home/{user}"
        prefix = ["podman", "exec", "--user", user, f"{lab.prefix}{machine}"]
        found[f"{user}@{machine}"] = Shell(prefix, home, environment=environment, log=log)
    return found


def publish(lab: Lab) -> Path:
    """Make the repository that the documents clone: the checkout's files as they are now, as one commit."""
    target = lab.folder / "upstream/mrcore"
    shutil.rmtree(target, ignore_errors=True)
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=PROJECT, stdout=subprocess.PIPE, text=True, check=True,
    ).stdout  # fmt: skip
    for name in filter(None, listed.split("\0")):
        if (PROJECT / name).is_file() or (PROJECT / name).is_symlink():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(PROJECT / name, target / name, follow_symlinks=False)
    identity = ["-c", "user.name=lab", "-c", "user.email=lab@localhost"]
    for words in (["init", "-q"], ["add", "--all"], ["commit", "-q", "-m", "as it is"]):
        subprocess.run(["git", *identity, *words], cwd=target, check=True)
    return target


def _environment(lab: Lab) -> Mapping[str, str]:
    """A person's environment, whose ssh, scp and sftp use the lab's key and host keys."""
    config = lab.folder / "ssh_config"
    config.write_text(
        f"IdentityFile {lab.folder}/key\nIdentitiesOnly yes\nUserKnownHostsFile {lab.folder}/known_hosts\n"
        "StrictHostKeyChecking yes\nBatchMode yes\nLogLevel ERROR\n"
    )
    programs = lab.folder / "bin"
    programs.mkdir(exist_ok=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(NOT_OURS)}
    ours = lab.environment()
    kept |= {name: value for name, value in ours.items() if name not in ("PYTHONPATH", "PYTEST_PLUGINS")}
    kept["PATH"] = os.pathsep.join(each for each in kept["PATH"].split(os.pathsep) if ".venv" not in each)
    for name in ("ssh", "scp", "sftp"):
        real = shutil.which(name, path=kept["PATH"])
        (programs / name).write_text(f'#!/bin/sh\nexec {real} -F {config} "$@"\n')
        (programs / name).chmod(0o755)
    return kept | {"PATH": f"{programs}{os.pathsep}{kept['PATH']}", "ANSIBLE_NOCOLOR": "1"}
