"""Nodes of a deployed cluster on this machine: a real sshd on a loopback address each; `standin_units` for systemd."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

from conditions import wait_until
from daemons import free_port, own_address
from signals import kill

from mrcore.settings.config import Settings, load_settings
from mrcore.system import procfs
from mrcore.wire import pki
from mrcore.wire.members import members_content

CLUSTER = f"ssh{os.getpid()}"
SSHD = shutil.which("sshd") or "/usr/sbin/sshd"
SSHD_CONFIG = """
ListenAddress {address}:{port}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/authorized_keys
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
MaxStartups 100
Subsystem sftp internal-sftp
SetEnv NODE_FOLDER={folder}
"""


def keygen(file: Path) -> str:
    """Make an SSH key; give its public half."""
    file.unlink(missing_ok=True)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(file)], check=True)
    return file.with_suffix(".pub").read_text()


class Node:
    """One machine: `folder` holds its sshd's files and /etc/mrcore, `ssh` what its master reaches."""

    def __init__(self, folder: Path, name: str, master_key: str) -> None:
        self.folder, self.name, self.address = folder, name, own_address()
        folder.mkdir()
        self.ssh_port, self.agent_port = free_port(self.address), free_port(self.address)
        self.server_port = free_port(self.address)
        (folder / "authorized_keys").write_text(f"restrict,pty {master_key}")
        self.host_key = keygen(folder / "host_key")
        self.compute_dir = folder / "compute"
        for each in ("working", "logs", "pids"):
            (self.compute_dir / each).mkdir(parents=True)
        self.process: subprocess.Popen[bytes] | None = None
        self.start_sshd()

    def start_sshd(self) -> None:
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # where no sshd was ever started by the system
        (self.folder / "sshd_config").write_text(
            SSHD_CONFIG.format(address=self.address, port=self.ssh_port, folder=self.folder)
        )
        with (self.folder / "sshd.log").open("ab") as log:
            command = [SSHD, "-D", "-e", "-f", str(self.folder / "sshd_config")]
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        wait_until(self._listens, 10, f"sshd of {self.name}: {(self.folder / 'sshd.log').read_text()}")

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex((self.address, self.ssh_port)) == 0

    def stop_sshd(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def daemons(self) -> list[int]:
        """Pids of the node's daemons that live, and of what they started."""
        marks = (f"{CLUSTER}/", str(self.folder))
        return [
            pid
            for pid in (int(name) for name in os.listdir("/proc") if name.isdecimal())
            if procfs.environment_value(pid, "MRCORE_SERVER").startswith(marks[0])
            and procfs.environment_value(pid, "NODE_FOLDER") == marks[1]
            and procfs.state(pid)
        ]

    def close(self) -> None:
        self.stop_sshd()
        for pid in self.daemons():
            kill(pid)
        wait_until(lambda: not self.daemons(), 60, f"daemons of {self.name} ended")


class DeployedCluster:
    """A master's home and `count` nodes, as a deploy leaves them; `close` leaves nothing."""

    def __init__(self, folder: Path, count: int, servers: int = 2) -> None:
        self.folder, self.home = folder, folder / "master"
        (self.home / ".ssh").mkdir(parents=True)
        key = keygen(self.home / ".ssh/id_ed25519")
        self.nodes = [Node(folder / f"w{number}", f"w{number}", key) for number in range(1, count + 1)]
        self.write_known_hosts()
        pki.make_authority(folder / "ca", CLUSTER)
        master = pki.issue(folder / "ca", self.home / "pki", "master", "master", "master", [])
        serials = {("master", "master"): [master]}
        self.config = folder / "cluster.yml"
        entries = []
        for number, node in enumerate(self.nodes):
            serial = pki.issue(folder / "ca", node.folder / "pki", "node", node.name, "node", [node.address])
            serials["node", node.name] = [serial]
            entries.append({"name": node.name, "address": node.address, "servers": servers, "first_server": 10 * number,
                            "agent_port": node.agent_port, "server_port": node.server_port, "ssh_port": node.ssh_port,
                            "compute_dir": str(node.compute_dir)})  # fmt: skip
        keys: dict[str, Any] = {"cluster_name": CLUSTER, "home": str(self.home), "nodes": entries}
        self.config.write_text(json.dumps(keys))
        self.settings: Settings = load_settings(self.config)
        self.settings.members_file.write_bytes(members_content(CLUSTER, serials))
        for node in self.nodes:
            self._write_specs(node)

    def write_known_hosts(self) -> None:
        lines = (f"[{node.address}]:{node.ssh_port} {node.host_key}" for node in self.nodes)
        (self.home / ".ssh/known_hosts").write_text("".join(lines))

    def _write_specs(self, node: Node) -> None:
        members = node.folder / "members.json"
        members.write_bytes(self.settings.members_file.read_bytes())
        common = {
            "node": node.name,
            "address": node.address,
            "cluster": CLUSTER,
            "compute_dir": str(node.compute_dir),
            "pki_dir": str(node.folder / "pki"),
            "members_file": str(members),
            "memory_bytes": 256 << 20,
            "servers": 2,
        }
        (node.folder / "daemons").mkdir()
        servers = [each for each in self.settings.servers() if each.node.name == node.name]
        for name, port in [("agent", node.agent_port), *((each.name, each.port) for each in servers)]:
            (node.folder / f"daemons/{name}.json").write_text(json.dumps(common | {"name": name, "port": port}))

    def close(self) -> None:
        for node in self.nodes:
            node.close()
