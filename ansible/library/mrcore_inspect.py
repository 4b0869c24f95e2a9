#!/usr/bin/python
"""Look at one machine of a cluster, as root and without mrcore itself: it may be what is broken. Changes nothing."""

from __future__ import annotations

import json
import os
import pwd
import re
import ssl
import stat
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: mrcore_inspect
short_description: Look at one machine of a mrcore cluster
description:
  - Gathers what C(make doctor) judges. Uses the standard library and the system's own tools only, each bounded in time.
options:
  user:
    description: The account of the program.
    type: str
    default: mrcore
  is_node:
    description: Whether daemons belong on this machine.
    type: bool
    default: false
  is_master:
    description: Whether the Runner, backups and the way to the nodes belong on this machine.
    type: bool
    default: false
  compute_dir:
    description: The node's data folder.
    type: str
    default: /var/lib/mrcore/compute
  hosts:
    description: Nodes that the master's account must reach over SSH, as mappings of name, address and ssh_port.
    type: list
    elements: dict
    default: []
  controller_time:
    description: Seconds since 1970 by the controller's clock, to compare.
    type: float
    required: true
author:
  - mrcore
"""
EXAMPLES = r"""
- name: Look at this machine
  mrcore_inspect:
    is_node: true
    controller_time: "{{ now().timestamp() }}"
"""
RETURN = r"""
facts:
  description: What was seen, by topic; what could not be looked at is null.
  returned: always
  type: dict
"""
SECONDS = 20


def run(*command: str) -> tuple[int, str, str]:
    """Exit status, output and errors of a command in the C locale; 127 if it is not installed, 124 if it hangs."""
    environment = {**os.environ, "LC_ALL": "C", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=environment, check=False)
    except FileNotFoundError:
        return 127, "", f"{command[0]} is not installed"
    except subprocess.TimeoutExpired:
        return 124, "", f"{command[0]} did not end within {SECONDS} seconds"
    return done.returncode, done.stdout, done.stderr.strip()


def unit(name: str) -> dict[str, str]:
    keys = "LoadState,ActiveState,SubState,UnitFileState,Result,NRestarts"
    lines = run("systemctl", "show", "--property", keys, name)[1].splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line)


def failed_units() -> list[str]:
    lines = run("systemctl", "list-units", "--state=failed", "--plain", "--no-legend", "--all")[1].splitlines()
    return [line.split()[0] for line in lines if line.split()]


def listening() -> list[str] | None:
    """Every `address:port` with a TCP listener, or None if it cannot be known."""
    status, output, _ = run("ss", "-H", "-l", "-t", "-n")
    return None if status else sorted({line.split()[3] for line in output.splitlines() if len(line.split()) > 3})


def window(name: str, user: str) -> bool:
    """Whether the server's screen has its window: `screen -ls` as its owner."""
    folder = f"SCREENDIR=/run/mrcore-{name}"
    output = run("runuser", "-u", user, "--", "env", folder, "screen", "-ls", name)[1]
    return re.search(rf"\d+\.{re.escape(name)}\s", output) is not None


def disk(folder: str) -> dict[str, int] | None:
    """Free and whole bytes, free and all inodes of the file system that holds the folder."""
    try:
        found = os.statvfs(folder)
    except OSError:
        return None
    size = {"free_bytes": found.f_bavail * found.f_frsize, "bytes": found.f_blocks * found.f_frsize}
    return size | {"free_inodes": found.f_favail, "inodes": found.f_files}


def handshake(folder: str, stem: str) -> str | None:
    """Let the pair prove itself to its own authority, in memory; what is wrong, or None. No name is checked."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    try:
        server.load_cert_chain(f"{folder}/{stem}.crt", f"{folder}/{stem}.key")
        client.load_verify_locations(cafile=f"{folder}/ca.crt")
    except (OSError, ssl.SSLError) as error:
        return str(error)
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [client.wrap_bio(back, there, server_side=False), server.wrap_bio(there, back, server_side=True)]
    for _ in range(4):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLError as error:
                return getattr(error, "verify_message", "") or str(error)
    return None


def certificate(path: str) -> dict[str, Any]:
    """Expiry and serial of PATH.crt, mode and owner of PATH.key, and what is wrong with the pair."""
    folder, stem = os.path.split(path)
    answer: dict[str, Any] = {"path": f"{path}.crt", "key": f"{path}.key"}
    try:
        about = ssl._ssl._test_decode_cert(f"{path}.crt")  # the only reader of certificates in the standard library
        status = os.stat(f"{path}.key")
    except (OSError, ssl.SSLError) as error:
        return answer | {"fault": str(error)}
    owner = next((each.pw_name for each in pwd.getpwall() if each.pw_uid == status.st_uid), str(status.st_uid))
    answer |= {"serial": about["serialNumber"].lstrip("0"), "expires": ssl.cert_time_to_seconds(about["notAfter"])}
    return answer | {
        "mode": f"{stat.S_IMODE(status.st_mode):04o}",
        "owner": owner,
        "fault": handshake(folder, stem),
    }


def ssh(host: dict[str, Any], user: str) -> dict[str, Any]:
    """What the master's account sees of a node: the launcher's own path, with strict host keys."""
    options = ["BatchMode=yes", "StrictHostKeyChecking=yes", "ConnectTimeout=8", "ControlPath=none"]
    words = [word for option in options for word in ("-o", option)]
    place = ["-p", str(host["ssh_port"]), f"{user}@{host['address']}"]
    asked = ["sudo", "-n", "/opt/mrcore/bin/units", "status"]
    status, _, errors = run("runuser", "-u", user, "--", "ssh", *words, *place, *asked)
    return {"name": host["name"], "address": host["address"], "status": status, "errors": errors[-600:]}


def newest(folder: str) -> float | None:
    """Time of the newest whole backup, or None."""
    try:
        with os.scandir(folder) as entries:
            times = [each.stat().st_mtime for each in entries if each.is_file() and "partial" not in each.name]
    except OSError:
        return None
    return max(times, default=None)


def release() -> dict[str, Any]:
    """What `current` points at, and which releases there are."""
    base = "/opt/mrcore"
    try:
        current = os.path.basename(os.readlink(f"{base}/current"))
    except OSError:
        current = None
    try:
        there = sorted(os.listdir(f"{base}/releases"))
    except OSError:
        there = []
    works = run(f"{base}/current/bin/python", "-P", "-c", "import mrcore, rpyc, ujson")[0] == 0 if current else False
    return {"current": current, "there": there, "works": works}


def servers() -> dict[str, int]:
    """Names and ports of the servers that were set up here, by the files that they are started from."""
    found = {}
    for file in sorted(Path("/etc/mrcore/daemons").glob("S_*.json")):
        try:
            found[file.stem] = int(json.loads(file.read_text())["port"])
        except (OSError, ValueError, KeyError, TypeError):
            found[file.stem] = 0
    return found


def inspect(given: dict[str, Any]) -> dict[str, Any]:
    """Everything at once."""
    now = time.time()
    user, is_node, is_master = given["user"], given["is_node"], given["is_master"]
    there = servers() if is_node else {}
    units: list[str] = []
    folders, certificates = ["/opt", "/var/lib", "/var/log"], []
    if is_node:
        units += [
            "mrcore-firewall.service",
            "mrcore-agent.service",
            *(f"mrcore-server@{name}.service" for name in there),
        ]
        folders.append(given["compute_dir"])
        certificates.append("/etc/mrcore/pki/node")
    if is_master:
        units += ["mrcore-runner.service", "mrcore-backup.timer", "mrcore-doctor.timer"]
        units += [file.name for file in Path("/etc/systemd/system").glob("mrcore-dashboard.service")]
        certificates.append("/etc/mrcore/pki/master")
    with ThreadPoolExecutor(16) as pool:  # a dead node costs seconds
        reached = list(pool.map(lambda host: ssh(host, user), given["hosts"]))
    return {
        "time": now,
        "skew": now - given["controller_time"],
        "is_node": is_node,
        "is_master": is_master,
        "servers": there,
        "release": release(),
        "disks": {folder: disk(folder) for folder in folders},
        "units": {name: unit(name) for name in units},
        "failed_units": failed_units(),
        "listening": listening(),
        "table": run("nft", "list", "table", "inet", "mrcore")[0] == 0,
        "windows": {name: window(name, user) for name in there},
        "certificates": [certificate(path) for path in certificates],
        "ssh": reached,
        "newest_backup": newest("/var/lib/mrcore/backups") if is_master else None,
    }


def main() -> None:
    """Ansible calls this."""
    module = AnsibleModule(
        argument_spec={
            "user": {"type": "str", "default": "mrcore"},
            "is_node": {"type": "bool", "default": False},
            "is_master": {"type": "bool", "default": False},
            "compute_dir": {"type": "str", "default": "/var/lib/mrcore/compute"},
            "hosts": {"type": "list", "elements": "dict", "default": []},
            "controller_time": {"type": "float", "required": True},
        },
        supports_check_mode=True,
    )
    module.exit_json(changed=False, facts=inspect(module.params))


if __name__ == "__main__":
    main()
