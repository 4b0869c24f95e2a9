"""Says as one line of JSON what preflight must know of a machine. Changes nothing; needs Python 3.6.

Arguments: the controller's seconds since 1970, its JSON of {"address", "compute_dir", "ports", "users"}.
"""

import json
import os
import platform
import pwd
import shutil
import socket
import sys
import time


def os_release():
    values = {}
    with open("/etc/os-release") as stream:
        for line in stream:
            key, _, value = line.strip().partition("=")
            values[key] = value.strip("\"'")
    return values


def may_bind(address, port):
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError:
            return False
        return True


def has_account(name):
    try:
        pwd.getpwnam(name)
    except KeyError:
        return False
    return True


def text_of(path):
    try:
        with open(path) as stream:
            return stream.read()
    except OSError:
        return ""


def main():
    skew, asked, system = time.time() - float(sys.argv[1]), json.loads(sys.argv[2]), os_release()
    folder = asked["compute_dir"]
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    deployed = os.path.islink("/opt/mrcore/current")
    address_is_here = may_bind(asked["address"], 0)
    taken = [
        port for port in asked["ports"] if address_is_here and not deployed and not may_bind(asked["address"], port)
    ]
    print(
        json.dumps(
            {
                "skew_seconds": skew,
                "python": list(sys.version_info[:3]),
                "os_id": system.get("ID", "an unknown system"),
                "os_version": system.get("VERSION_ID", ""),
                "systemd": os.path.isdir("/run/systemd/system"),
                "machine": platform.machine(),
                "glibc": (os.confstr("CS_GNU_LIBC_VERSION") or "glibc 0.0").split()[-1],
                "disk_free_bytes": shutil.disk_usage(folder).free,
                "address_is_here": address_is_here,
                "ports_taken": taken,
                "unknown_users": [name for name in asked["users"] if not has_account(name)],
                "release": os.path.basename(os.readlink("/opt/mrcore/current")) if deployed else None,
                "configured": os.path.exists("/etc/mrcore/cluster.yml"),
                "authority": text_of("/etc/mrcore/pki/ca.crt"),
            }
        )
    )


if __name__ == "__main__":
    main()
