"""What Molecule's steps of the scenario `cluster` do: prepare, deploy [--check], prove FOLDER.

The environment says which lab (tests/appliance/lab.py); tests/appliance/run.py sets it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

from harness import CommandFailed, Machine, Operator, Person
from lab import HERE, Lab, packages_folder

# Another tool's table, which accepts and counts, and what ufw leaves: its own chains in iptables' table `filter`.
FOREIGN_RULES = """
table ip filter {
    chain ufw-user-input {
        tcp dport 22 counter accept
    }
    chain INPUT {
        type filter hook input priority 0; policy accept;
        jump ufw-user-input
    }
}
table inet neighbour {
    chain input {
        type filter hook input priority 10; policy accept;
        tcp dport 8080 counter drop
    }
}
"""
FOREIGN_TABLES = ("ip filter", "inet neighbour")


def foreign_rules(machine: Machine) -> str:
    """The tables of other tools on a machine, without their counters."""
    listed = "".join(machine.nft("list", "table", *table.split()) for table in FOREIGN_TABLES)
    return re.sub(r"packets \d+ bytes \d+", "", listed)


def prepare(operator: Operator) -> None:
    """Other tools' rules on every machine, accounts on the master, the operator's inventory."""
    for name in ("m1", "w1", "w2", "w3"):
        Machine(operator.lab, name).nft("-f", "-", stdin=FOREIGN_RULES)
    for person in ("anna", "zoe"):
        Person(operator.master, person).make()
    shutil.rmtree(operator.folder, ignore_errors=True)  # with the authority of an earlier lab
    operator.write_inventory(operator.usual_inventory())


def deploy(operator: Operator, *arguments: str) -> None:
    """`make deploy`; says whether anything changed."""
    played = operator.make("deploy", **({"ARGS": " ".join(arguments)} if arguments else {}))
    changed = {host: number for host, number in played.changed.items() if number}
    if not arguments:
        first = "deploy from bare machines" not in operator.times()
        operator.note_time("deploy from bare machines" if first else "deploy with nothing to do", played.seconds)
    operator.lab.keep_packages()
    print(f"changed: {changed}" if changed else "nothing changed")


def prove(operator: Operator, folder: str) -> int:
    """Run pytest on a folder of proofs; what it prints goes to a file, which run.py shows as it grows."""
    files = sorted(str(path) for path in (HERE / folder).glob("*_proofs.py"))
    command = [sys.executable, "-m", "pytest", "-v", "--maxfail=5", "-p", "no:cacheprovider", "--timeout=2700", *files]
    with open(operator.lab.folder / "proofs.log", "a") as log:
        status = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    if status == 0:
        (operator.lab.folder / f"{folder}.proved").touch()
    return status


def main() -> int:
    """Do the step that the arguments name; give the exit status."""
    operator = Operator(Lab.of("cluster"))
    packages_folder()
    step, *arguments = sys.argv[1:]
    try:
        if step == "prove":
            return prove(operator, *arguments)
        {"prepare": prepare, "deploy": deploy}[step](operator, *arguments)
    except CommandFailed as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
