"""Every page of docs/runbooks on a living cluster: its fault, its check red, its steps, its check green.

The machines are bare, as INSTALL.md wants them.
"""

from __future__ import annotations

import os
import shutil
import subprocess

import keyboard
import pytest
import runbook
import yaml
from faults import AFTERWARDS, FAULTS
from harness import Machine, wait_until
from keyboard import Cluster
from lab import PROJECT, Lab
from runbook import Block, Failed

FOLDER = PROJECT / "docs/runbooks"
LEAVES_IT_DOWN = {"stop", "kill", "reset"}
DATA_BYTES = 1200 << 20  # of the file system for w1's data: small enough to be filled
SETTINGS = {
    "mrcore_memory_bytes": 512 << 20,
    "mrcore_min_free_bytes": 256 << 20,
    "mrcore_settings": {"cycle_interval_seconds": 2, "hold_backoff_max_seconds": 20, "node_timeout_seconds": 5},
}


def small_disk(lab: Lab, name: str) -> None:
    """Give a bare machine a file system of its own for the data."""
    machine = Machine(lab, name)
    machine.run("mkdir -p /var/lib/mrcore/compute")
    if machine.run("mountpoint -q /var/lib/mrcore/compute", status=None).status == 0:
        return
    pid = subprocess.run(
        ["podman", "inspect", "--format", "{{.State.Pid}}", machine.container],
        env=os.environ | lab.environment(), stdout=subprocess.PIPE, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DATA_BYTES}", "tmpfs", "/var/lib/mrcore/compute"]
    subprocess.run(["nsenter", "--target", pid, "--mount", *mount], check=True)


@pytest.fixture(scope="session")
def cluster(lab: Lab) -> Cluster:
    """The cluster, as INSTALL.md leads to it, its first job done."""
    checkout = lab.folder / "controller/mrcore"
    found = Cluster(lab, keyboard.places(lab), keyboard.names(lab), checkout)
    if checkout.is_dir() and found.well():  # kept
        found.places["controller"].folder = str(checkout)
        return found
    keyboard.publish(lab)
    shutil.rmtree(lab.folder / "controller", ignore_errors=True)
    (lab.folder / "controller").mkdir()
    small_disk(lab, "w1")
    for block in runbook.read(PROJECT / "INSTALL.md").blocks:
        found.execute(block)
        if block.file.endswith("hosts.yml"):  # shares and pauses for one small machine
            (checkout / "inventory/prod/lab.yml").write_text(yaml.safe_dump({"all": {"vars": SETTINGS}}))
    return found


def is_green(cluster: Cluster, check: Block) -> bool:
    """Whether the check says that all is well, tried once."""
    try:
        runbook.execute_block(runbook.once(check), cluster.places, cluster.names)
    except Failed:
        return False
    return True


def test_every_page_is_tried() -> None:
    assert {path.stem for path in FOLDER.glob("*.md")} == {*FAULTS, "README", "deploy"}


def test_install_leads_to_the_first_job(cluster: Cluster) -> None:
    """The fixture has executed INSTALL.md, whose first make verb is that of the page `deploy`."""
    page = runbook.read_runbook(FOLDER / "deploy.md")
    cluster.execute(*[block for block in page.blocks if block.section == "How you know that it worked"])


@pytest.mark.parametrize("name", FAULTS)
def test_page(cluster: Cluster, name: str) -> None:
    page = runbook.read_runbook(FOLDER / f"{name}.md")
    cluster.wait_until_well()
    FAULTS[name](cluster)
    wait_until(lambda: not is_green(cluster, page.check), 60, f"the check of {name}.md fails before")
    cluster.execute(*page.steps)
    cluster.execute(page.check)
    AFTERWARDS.get(name, lambda _: None)(cluster)
    if name in LEAVES_IT_DOWN - {"reset"}:
        cluster.type("controller", "make start INVENTORY=prod")
