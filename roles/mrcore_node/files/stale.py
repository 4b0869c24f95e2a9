"""Names the units of mrcore's daemons that run since before their spec, unit or release was written.

With the argument `reload` systemd reads its units first. Times, not what this deploy has changed: the next one makes
good what one left that was cut off before restarting.
"""

import os
import subprocess
import sys
from pathlib import Path

UNITS, SPECS, RELEASE = Path("/etc/systemd/system"), Path("/etc/mrcore/daemons"), Path("/opt/mrcore/current")


def files_of(unit):
    """What a daemon was started from."""
    template, _, name = unit.removesuffix(".service").partition("@")
    return [UNITS / f"{template}@.service" if name else UNITS / unit, SPECS / f"{name or 'agent'}.json", RELEASE]


def main():
    if sys.argv[1:] == ["reload"]:
        subprocess.run(["systemctl", "daemon-reload"], check=True)
    shown = ["systemctl", "show", "--timestamp=unix", "--property=Id,ActiveState,ExecMainStartTimestamp"]
    units = ["mrcore-agent.service", *(f"mrcore-server@{path.stem}.service" for path in sorted(SPECS.glob("S_*.json")))]
    done = subprocess.run([*shown, *units], stdout=subprocess.PIPE, check=True, text=True)
    for block in done.stdout.strip().split("\n\n"):
        unit = dict(line.split("=", 1) for line in block.splitlines())
        started = unit.get("ExecMainStartTimestamp", "").lstrip("@")
        if unit["ActiveState"] in ("active", "activating") and started.isdecimal():
            written = [os.lstat(path).st_mtime for path in files_of(unit["Id"]) if os.path.lexists(path)]
            if int(max(written)) > int(started):
                print(unit["Id"])


if __name__ == "__main__":
    sys.exit(main())
