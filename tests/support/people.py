"""Real users, groups and a sudoers rule, in a mount namespace of their own: nothing of it exists outside or is left.

Needs root. `alice` and `erin` are submitters, `mallory` is nobody's friend; `mrcore` is whom the program runs as.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from checkout import PROJECT

TOP = Path("/mnt")  # a tmpfs in the namespace
USERS = {"mrcore": 61001, "alice": 61002, "erin": 61003, "mallory": 61004}
SUBMITTERS = 61010
RULE = "%mrcore-users ALL=(mrcore) NOPASSWD: /mnt/opt/current/bin/mrcore\n"


class People:
    """A world in which these users exist. `run` runs something as one of them; `close` ends the world."""

    def __init__(self) -> None:
        self._holder = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", "cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._holder.stdin and self._holder.stdout
        self._holder.stdin.write(b"ready\n")
        self._holder.stdin.flush()
        assert self._holder.stdout.readline() == b"ready\n"
        self._open_ways([Path(sys.base_prefix), Path(sys.prefix), PROJECT])
        self.shell(f"mount -t tmpfs -o mode=755 tmpfs {TOP} && mkdir -p {TOP}/etc {TOP}/opt/releases/1/bin {TOP}/home")
        etc = {
            "passwd": [f"{name}:x:{number}:{number}::/mnt/home/{name}:/bin/sh" for name, number in USERS.items()],
            "shadow": [f"{name}:*:19000:0:99999:7:::" for name in USERS],
            "group": [f"{name}:x:{number}:" for name, number in USERS.items()],
        }
        etc["group"] += [f"mrcore-users:x:{SUBMITTERS}:alice,erin"]
        for name, lines in etc.items():
            text = Path("/etc", name).read_text() + "\n".join(lines) + "\n"
            self.shell(f"cat >{TOP}/etc/{name} && mount --bind {TOP}/etc/{name} /etc/{name}", text)
        rules = "Defaults env_reset\nDefaults use_pty\nroot ALL=(ALL:ALL) ALL\n" + RULE
        self.shell(f"cat >{TOP}/etc/sudoers && chmod 440 {TOP}/etc/sudoers && visudo -cqf {TOP}/etc/sudoers", rules)
        self.shell(f"mount --bind {TOP}/etc/sudoers /etc/sudoers")
        command = f"#!{sys.executable}\nfrom mrcore.cli.main import main\nmain()\n"
        self.shell(f"cat >{TOP}/opt/releases/1/bin/mrcore && chmod 755 {TOP}/opt/releases/1/bin/mrcore", command)
        self.shell(f"ln -s releases/1 {TOP}/opt/current && ln -s {TOP}/opt/current/bin/mrcore {TOP}/mrcore")
        for name in USERS:
            self.shell(f"install -d -m 700 -o {name} -g {name} {TOP}/home/{name}")

    def _open_ways(self, needed: Iterable[Path]) -> None:
        """Let everybody reach these folders, though one above them may be root's alone."""
        closed: dict[Path, list[Path]] = {}
        for path in {path.resolve() for path in needed}:
            for above in reversed(path.parents):
                if not above.stat().st_mode & 0o001:
                    closed.setdefault(above, []).append(path)
                    break
        for number, (above, paths) in enumerate(sorted(closed.items())):
            door = f"/run/mrcore-test-{os.getpid()}-{number}"
            self.shell(f"mkdir {door} && mount -t tmpfs -o mode=755 tmpfs {door}")
            for path in paths:
                inside = f"{door}/{path.relative_to(above)}"
                self.shell(f"mkdir -p {inside} && mount --bind {path} {inside}")
            self.shell(f"mount --rbind {door} {above}; umount -l {door}; rmdir {door}")

    def enter(self, user: str, *command: str) -> list[str]:
        """The command line that runs a command in this world as a user."""
        there = ["nsenter", f"--mount=/proc/{self._holder.pid}/ns/mnt"]
        become = ["setpriv", "--reuid", user, "--regid", user, "--init-groups", "--"]  # in place, unlike runuser
        ours = ["-u", "SUDO_USER"]  # of the user who runs the tests by sudo
        return [*there, *become, "env", *ours, f"HOME={TOP}/home/{user}", *command]

    def shell(self, script: str, text: str = "", user: str = "root") -> str:
        """Run a script and return what it printed."""
        command = self.enter(user, "sh", "-ec", script)
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, (script, done.stdout, done.stderr)
        return done.stdout

    def mrcore(self, user: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Call `mrcore` as a user, in that user's home."""
        call = f'cd && exec {TOP}/mrcore "$@"'
        command = self.enter(user, "sh", "-c", call, "sh", "--config", f"{TOP}/cluster.json", *arguments)
        return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)

    def close(self) -> None:
        """End the world: its mounts go with its last process."""
        assert self._holder.stdin and self._holder.stdout
        self._holder.stdin.close()
        self._holder.stdout.close()
        self._holder.wait(10)
