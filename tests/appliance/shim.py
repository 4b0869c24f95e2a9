"""A machine whose Python is not what it seems: a proof's way to a wrong clock, a wrong version, a hostile root."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from harness import Machine, Operator

SHIM = '#!/bin/sh\nPYTHONPATH=/etc/shim exec /usr/bin/python3 "$@"\n'


@contextlib.contextmanager
def python_shim(operator: Operator, machine: Machine, code: str, variable: str = "mrcore_python") -> Iterator[None]:
    """The machine's Python runs `code` first; `variable` of the inventory names that Python for this machine."""
    machine.write("/etc/shim/python3", SHIM, "0755")
    machine.write("/etc/shim/sitecustomize.py", code)
    good = operator.inventory()
    bad = operator.inventory()
    bad["all"]["children"]["nodes"]["hosts"][machine.name][variable] = "/etc/shim/python3"
    operator.write_inventory(bad)
    try:
        yield
    finally:
        operator.write_inventory(good)
        machine.run("rm -r /etc/shim")
