"""The scenario `fresh`: machines that have nothing but what the README asks for. The project is cloned there, shown and
tested, so all else that it runs has to come from what its scripts install: a program that no script names is missing
here, whatever the machine has on which these tests run.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from keyboard import publish
from lab import Failed, Lab, LabError, cache_folder, mirror, packages_folder, podman, podman_settings, require_image

# Who works there: both ways in which the scripts may install what is missing.
PEOPLE = {"debian12": "root", "debian13": "admin"}
# What is typed in the clone, and what it must say: with CI=true nothing may be left out.
STEPS = (
    ("make demo", "The demo took"),
    ("make test-quick", " passed"),
    ("make test-appliance ARGS='roles create'", "scenario roles passed"),  # a container, and what it takes to start one
    ("make test-appliance ARGS=clean", ""),
)
STEP_SECONDS = 2400
SHOWN_LINES = 60  # of a step that failed
PIP_SETTINGS = ("index-url", "extra-index-url", "find-links", "trusted-host", "proxy", "timeout", "default-timeout")
CERTIFICATES = "/srv/certificates.pem"
NEW_PERSON = """apt-get update -qq && apt-get install -qq --yes --no-install-recommends sudo &&
useradd --create-home --shell /bin/bash {name} && echo '{name} ALL=(ALL) NOPASSWD: ALL' >/etc/sudoers.d/{name}"""


def run(lab: Lab, systems: Sequence[str]) -> None:
    """Prove it on these systems, or the scenario's. Raises Failed, LabError."""
    if unknown := set(systems) - set(PEOPLE):
        raise LabError(f"fresh knows the systems {', '.join(PEOPLE)}, and not {', '.join(sorted(unknown))}")
    repository = publish(lab)
    bundle = lab.folder / "mrcore.bundle"  # a clone of somebody else's folder is refused by git
    subprocess.run(["git", "-C", str(repository), "bundle", "create", "-q", str(bundle), "HEAD", "--all"], check=True)
    podman("network", "create", "--subnet", f"{lab.net}.0/24", f"{lab.prefix}net")
    for system in systems or [lab.system]:
        start(lab, system, bundle)
        log = lab.folder / f"{system}.log"
        log.unlink(missing_ok=True)
        type_in(lab, system, log, "git clone -q /srv/mrcore.bundle mrcore", "", folder="")
        for command, said in STEPS:
            began = time.monotonic()
            type_in(lab, system, log, command, said)
            print(f"{system}: {command}: {time.monotonic() - began:.0f} s", flush=True)
        lab.keep_packages()
        podman("rm", "--force", "--time", "0", "--volumes", f"{lab.prefix}{system}")


def start(lab: Lab, system: str, bundle: Path) -> None:
    """Start the machine. It may start containers itself, on a disk of its own: no overlay lies on an overlay."""
    variables, volumes = pip_of_this_machine()
    variables |= {"CI": "true"} | ({"MRCORE_TEST_MIRROR": mirror()} if mirror() else {})
    kept = cache_folder() / f"pip-{system}"
    kept.mkdir(exist_ok=True)
    kept.chmod(0o777)
    variables["PIP_CACHE_DIR"] = "/srv/pip"
    volumes += [f"{bundle}:/srv/mrcore.bundle:ro", f"{kept}:/srv/pip", f"{packages_folder()}:/var/cache/apt/archives:O"]
    volumes += ["/sys/fs/cgroup:/sys/fs/cgroup", "/var/lib/containers"]
    command = ["run", "--detach", "--name", f"{lab.prefix}{system}", "--hostname", system, "--privileged"]
    command += ["--cgroupns=host", "--systemd=false", "--network", f"{lab.prefix}net"]
    command += [f"--env={name}={value}" for name, value in variables.items()]
    command += [f"--volume={volume}" for volume in volumes]
    podman(*command, require_image(system, fresh=True), "bash", "-c", "sleep infinity; :")  # bash reaps orphans
    if PEOPLE[system] != "root":
        podman("exec", f"{lab.prefix}{system}", "sh", "-c", NEW_PERSON.format(name=PEOPLE[system]), timeout=300)


def type_in(lab: Lab, system: str, log: Path, command: str, said: str, folder: str = "mrcore") -> None:
    """Type a command as the person; raises Failed unless it succeeds and says `said`."""
    person = PEOPLE[system]
    home = Path("/root" if person == "root" else f"/home/{person}")
    words = ["podman", "exec", "--user", person, "--env", f"HOME={home}", "--workdir", str(home / folder)]
    begins = log.stat().st_size if log.exists() else 0
    with open(log, "a") as stream:
        done = subprocess.run(
            [*words, f"{lab.prefix}{system}", "sh", "-c", command],
            env=os.environ | {"CONTAINERS_CONF": str(podman_settings())},
            stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, timeout=STEP_SECONDS,
        )  # fmt: skip
    printed = log.read_bytes()[begins:].decode(errors="replace")
    if done.returncode or said not in printed:
        end = "\n".join(printed.splitlines()[-SHOWN_LINES:])
        raise Failed(f"fresh {system}: {command}: status {done.returncode}\n{end}\nall of it: {log}")


def pip_of_this_machine() -> tuple[dict[str, str], list[str]]:
    """Variables and volumes by which pip in a container takes packages from where this machine's pip does."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, str] = {}
    for line in sorted(listed.stdout.splitlines(), key=lambda line: line.startswith(":env:")):  # which win over files
        name, _, value = line.partition("=")
        found[name.rpartition(".")[2]] = ast.literal_eval(value)
    variables, volumes = {}, []
    for name in PIP_SETTINGS:
        words = found.get(name, "").split()
        for word in words:
            folder = Path(word.removeprefix("file://"))
            if folder.is_absolute() and folder.exists():  # an index in files links to its siblings
                folder = folder.parent if word.startswith("file://") else folder
                volumes.append(f"{folder}:{folder}:ro")
        if words:
            variables[f"PIP_{name.upper().replace('-', '_')}"] = " ".join(words)
    if "cert" in found:
        variables["PIP_CERT"] = CERTIFICATES
        volumes.append(f"{found['cert']}:{CERTIFICATES}:ro")
    return variables, volumes
