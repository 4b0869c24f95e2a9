"""The machines of the appliance's tests: names, networks, podman's settings, the image, and taking it all away again.

A lab is a set of containers on one network that look like bare Debian machines. It is known by environment variables
(`Lab.environment`), so that Molecule, Ansible and pytest, each started on its own, mean the same one. All names begin
with `mrcoretest-` and a number that stands for the checkout, so that two checkouts do not meet.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import os
import shutil
import subprocess
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent.parent
BIN = Path(sys.executable).parent  # of the virtual environment: ansible-playbook, molecule, pytest
PREFIX = "mrcoretest-"
SUITES = {"debian12": "bookworm", "debian13": "trixie"}
PYTHONS = {"debian12": "3.11", "debian13": "3.13"}
NEW = {"roles", "fresh"}  # the scenarios on Debian 13; the others are on Debian 12; MRCORE_TEST_SWAP=yes swaps the two
# What a bare machine has: an init, a way in, and Python. Whatever else is needed the roles have to install themselves.
PACKAGES = ["systemd", "systemd-sysv", "dbus", "openssh-server", "python3", "sudo", "iproute2", "ca-certificates"]
# What a fresh machine has, which is to run the tests themselves: what the README asks for, and certificates for pip.
FRESH_PACKAGES = ["git", "make", "ca-certificates"]
# Machines made from one image must not have one identity: keys and machine-id are made at the first start.
KEYS = "[Service]\nExecStartPre=\nExecStartPre=/usr/bin/ssh-keygen -A\nExecStartPre=/usr/sbin/sshd -t\n"
HOOKS = [
    'rm -f "$1"/etc/ssh/ssh_host_* "$1"/etc/resolv.conf "$1"/etc/hostname && : >"$1"/etc/machine-id',
    'mkdir -p "$1"/etc/systemd/system/ssh.service.d',
    f'printf {KEYS!r} >"$1"/etc/systemd/system/ssh.service.d/keys.conf',
]
# runc: crun refuses control groups of version 1. Both limits: without CAP_SYS_RESOURCE the defaults cannot be set.
PODMAN_SETTINGS = """[containers]
default_ulimits = ["nofile=16384:16384", "nproc=4096:4096"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
"""
CACHED_BYTES = 1 << 30  # of downloaded packages; beyond it the cache begins anew


class LabError(Exception):
    """What the lab needs cannot be had here; the text says what and why."""


class Failed(Exception):
    """A scenario failed; the text says where."""


@dataclass(frozen=True)
class Lab:
    """One scenario's containers. `folder`: of keys, inventories and logs; `net`: what all addresses begin with."""

    scenario: str
    folder: Path
    prefix: str
    net: str

    @classmethod
    def of(cls, scenario: str) -> Lab:
        """The lab that the environment names, else a new one for this checkout, on a network that nobody uses."""
        number = zlib.crc32(str(PROJECT).encode()) & 0xFFFF
        prefix = os.environ.get("MRCORE_LAB_PREFIX") or f"{PREFIX}{number:04x}-{scenario}-"
        if not prefix.startswith(PREFIX):
            raise LabError(f"MRCORE_LAB_PREFIX={prefix} must begin with {PREFIX}: what has that prefix is removed")
        folder = Path(os.environ.get("MRCORE_LAB") or PROJECT / ".mrcore/appliance" / scenario)
        net = os.environ.get("MRCORE_LAB_NET") or _own_net(f"{prefix}net") or _free_net(zlib.crc32(prefix.encode()))
        return cls(scenario, folder.absolute(), prefix, net)

    @property
    def system(self) -> str:
        """What its machines run: debian12 or debian13."""
        swapped = os.environ.get("MRCORE_TEST_SWAP") == "yes"
        return "debian13" if (self.scenario in NEW) != swapped else "debian12"

    def environment(self) -> dict[str, str]:
        """The variables by which this lab is known, and what podman and Ansible need."""
        path = os.pathsep.join([str(BIN), os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
        return {
            "PATH": path,
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": str(HERE),
            "PYTEST_PLUGINS": "living_cluster",
            "MRCORE_LAB": str(self.folder),
            "MOLECULE_EPHEMERAL_DIRECTORY": str(self.folder / "molecule"),  # what it remembers of these machines
            "MRCORE_LAB_PREFIX": self.prefix,
            "MRCORE_LAB_NET": self.net,
            "MRCORE_LAB_SCENARIO": self.scenario,
            "MRCORE_LAB_IMAGE": image_name(self.system),
            "MRCORE_LAB_PACKAGES": str(packages_folder()),
            "CONTAINERS_CONF": str(podman_settings()),
            "ANSIBLE_SSH_CONTROL_PATH_DIR": f"/tmp/{self.prefix}ssh",  # short: a socket's path may have 107 bytes
        }

    def containers(self) -> list[str]:
        """The names of this lab's containers that there are, running or not."""
        rows = podman("ps", "--all", "--filter", f"name=^{self.prefix}", "--format", "{{.Names}}")
        return sorted(name for name in rows.split() if name.startswith(self.prefix))

    def keep_packages(self) -> None:
        """Put the .deb files that containers downloaded into the cache: the next containers will not download them."""
        cache = packages_folder()
        known = {path.name for path in cache.glob("*.deb")}
        for name in self.containers():
            listed = podman("exec", name, "ls", "/var/cache/apt/archives", may_fail=True).split()
            for package in {each for each in listed if each.endswith(".deb")} - known:
                partial = cache / f".{self.scenario}-{package}"  # another lab may bring the same one now
                podman("cp", f"{name}:/var/cache/apt/archives/{package}", str(partial), may_fail=True)
                if partial.exists():
                    partial.rename(cache / package)
                    known.add(package)

    def remove(self) -> None:
        """Take away containers, network, the connections to them and what Molecule knows of them. May be repeated."""
        for name in self.containers():
            podman("rm", "--force", "--time", "0", "--volumes", name, may_fail=True)
        if _own_net(f"{self.prefix}net"):
            podman("network", "rm", "--force", f"{self.prefix}net")
        shutil.rmtree(self.folder / "molecule", ignore_errors=True)
        sockets = Path(f"/tmp/{self.prefix}ssh")
        for socket in sockets.glob("*") if sockets.is_dir() else ():
            subprocess.run(["ssh", "-S", str(socket), "-O", "exit", "nobody"], capture_output=True, check=False)
            socket.unlink(missing_ok=True)
        if sockets.is_dir():
            sockets.rmdir()


def cache_folder() -> Path:
    """Where what is slow to get is kept between runs."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mrcore-tests"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def packages_folder() -> Path:
    """The downloaded .deb files; emptied when they are too many."""
    folder = cache_folder() / "archives"
    (folder / "partial").mkdir(parents=True, exist_ok=True)
    files = list(folder.glob("*.deb"))
    if sum(path.stat().st_size for path in files) > CACHED_BYTES:
        for path in files:
            path.unlink()
    return folder


def podman_settings() -> Path:
    """The file that CONTAINERS_CONF names."""
    file = cache_folder() / "containers.conf"
    if not file.exists() or file.read_text() != PODMAN_SETTINGS:
        file.write_text(PODMAN_SETTINGS)
    return file


def podman(*arguments: str, may_fail: bool = False, timeout: float = 120) -> str:
    """What a podman command prints. Raises LabError with what it said."""
    environment = os.environ | {"CONTAINERS_CONF": str(podman_settings())}
    done = subprocess.run(["podman", *arguments], env=environment, capture_output=True, text=True, timeout=timeout)
    if done.returncode and not may_fail:
        raise LabError(f"podman {' '.join(arguments)}: {done.stderr.strip() or done.returncode}")
    return done.stdout


def image_name(system: str, fresh: bool = False) -> str:
    """The image's name; its tag stands for the recipe, so that another recipe makes another image."""
    recipe = json.dumps([SUITES[system], *_recipe(fresh), mirror()])
    kind = f"{system}-fresh" if fresh else system
    return f"localhost/{PREFIX}{kind}:{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"


def _recipe(fresh: bool) -> tuple[list[str], list[str]]:
    return (FRESH_PACKAGES, []) if fresh else (PACKAGES, HOOKS)


def mirror() -> str:
    """Whence Debian's packages come: MRCORE_TEST_MIRROR, or mmdebstrap's own choice."""
    return os.environ.get("MRCORE_TEST_MIRROR", "")


def require_image(system: str, fresh: bool = False) -> str:
    """Make the image of a bare machine, or a fresh one, unless it is there; give its name. Raises LabError."""
    name, (packages, hooks) = image_name(system, fresh), _recipe(fresh)
    if podman("images", "--quiet", name).strip():
        return name
    tar = cache_folder() / f"image-{os.getpid()}.tar"
    command: list[str] = ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={','.join(packages)}"]
    command += [f"--customize-hook={hook}" for hook in hooks]
    command += [SUITES[system], str(tar), *([mirror()] if mirror() else [])]
    print(f"appliance: making the image {name} from Debian's packages (half a minute, once)", flush=True)
    try:
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=1200)
        if done.returncode:
            raise LabError(f"the image cannot be made: {' '.join(command)}:\n{done.stderr.strip()[-2000:]}")
        podman("import", "--change", "CMD=/lib/systemd/systemd", str(tar), name, timeout=600)
    finally:
        tar.unlink(missing_ok=True)
    for line in podman("images", "--format", "{{.Repository}}:{{.Tag}}", name.partition(":")[0]).split():
        if line != name:
            podman("rmi", line, may_fail=True)  # of an older recipe; one that is in use stays
    return name


def require_containers(image: str) -> None:
    """Start one container to see that this machine can. Raises LabError with what podman says."""
    name = f"{PREFIX}probe-{os.getpid()}"
    limits = ["--cap-add", "NET_ADMIN", "--systemd=always"]
    try:
        podman("run", "--rm", "--name", name, *limits, image, "/bin/true")
    finally:
        podman("rm", "--force", "--time", "0", name, may_fail=True)


def _own_net(name: str) -> str | None:
    """The first three numbers of a network's addresses, if there is one of that name."""
    found = json.loads(podman("network", "inspect", name, may_fail=True) or "[]")
    return found[0]["subnets"][0]["subnet"].rsplit(".", 1)[0] if found else None


def _free_net(number: int) -> str:
    """Three numbers of a private network that no route of this machine meets."""
    routes = json.loads(subprocess.run(["ip", "-j", "route"], capture_output=True, text=True, check=True).stdout)
    used = [ipaddress.ip_network(row["dst"], strict=False) for row in routes if row["dst"] != "default"]
    for step in range(256):
        net = f"10.{128 + number % 100}.{(number // 100 + step) % 256}"
        if not any(ipaddress.ip_network(f"{net}.0/24").overlaps(each) for each in used):
            return net
    raise LabError("no private network 10.x.y.0/24 is free here: every one meets a route of this machine")


def leftovers(prefixes: Sequence[str]) -> list[str]:
    """What of these prefixes is still there: containers and networks."""
    names = podman("ps", "--all", "--format", "{{.Names}}").split()
    names += podman("network", "ls", "--format", "{{.Name}}").split()
    return sorted(name for name in names if name.startswith(tuple(prefixes)))
