"""Runs the appliance's tests: bad inventories, the images, the scenarios; and takes all of it away again.

    tests/appliance/run.py                        everything, two scenarios at a time
    tests/appliance/run.py scenarios              without the bad inventories
    tests/appliance/run.py cluster                one scenario
    tests/appliance/run.py cluster create prepare converge     some of its steps; the machines stay
    tests/appliance/run.py cluster shell          a shell in which molecule, podman and proofs know this lab
    tests/appliance/run.py fresh debian12 debian13       a scenario without Molecule: on these systems
    tests/appliance/run.py upgrade                with MRCORE_TEST_UPGRADE_FROM=COMMIT: from there to this checkout
    tests/appliance/run.py clean                  remove the machines of all scenarios

Exit status: 0, 1 (something failed), 130 (interrupted), 3: it could not run here (no rights, no containers). See
docs/testing.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import fresh
import yaml
from lab import BIN, HERE, PROJECT, Failed, Lab, LabError, image_name, leftovers, require_containers, require_image

# Each lane one after the other, the lanes beside one another: Ansible waits for machines half of the time.
UPGRADE_FROM = "MRCORE_TEST_UPGRADE_FROM"  # a commit: with it the scenario `upgrade` is one of all
UPGRADE = ("upgrade",) if os.environ.get(UPGRADE_FROM) else ()
LANES = (("cluster", *UPGRADE), ("roles", "documents", "fresh"))
SCENARIOS = tuple(each for lane in LANES for each in lane)
NOT_HERE = 3
STRAYS_SECONDS = 10.0  # for what is told to end, before it is killed


def molecule(lab: Lab, steps: Sequence[str]) -> None:
    """Run a scenario's whole sequence, or single steps of it. Raises Failed."""
    environment = os.environ | lab.environment()
    environment |= {"MOLECULE_GLOB": str(HERE / "molecule/*/molecule.yml"), "ANSIBLE_FORCE_COLOR": "0"}
    for step in steps or ["test"]:
        command = [str(BIN / "molecule"), "-c", str(HERE / "molecule/base.yml"), *step.split(), "-s", lab.scenario]
        if step == "test":
            command.append("--destroy=never")  # we destroy: packages are kept first, and Ctrl-C must not come between
        process = subprocess.Popen(command, cwd=PROJECT, env=environment)
        try:
            status = process.wait()
        except BaseException:
            at_peace()
            end_strays(lab)
            process.wait()
            raise
        if status:
            raise Failed(f"scenario {lab.scenario}: molecule {step} failed; logs: {lab.folder}")


def end_strays(lab: Lab) -> None:
    """End what a scenario has started, wherever it has gone: Ansible's workers leave our process group."""
    mark = f"MRCORE_LAB_PREFIX={lab.prefix}".encode()
    ours, pid = set(), os.getpid()
    while pid > 1:  # we ourselves, and a shell of the lab that we may have been called from
        ours.add(pid)
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    deadline = time.monotonic() + STRAYS_SECONDS
    for number in (signal.SIGTERM, signal.SIGKILL):
        while strays := [each for each in marked(mark) if each not in ours]:
            for each in strays:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(each, number)
            if time.monotonic() > deadline:
                break
            time.sleep(0.2)


def marked(mark: bytes) -> list[int]:
    """Processes whose environment has this line, but for those that have ended and wait for their parent."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with contextlib.suppress(OSError):
                if mark in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
    return found


def follow(file: Path, stop: threading.Event) -> None:
    """Show what proofs write into a file while Molecule keeps silent about them."""
    position = 0
    while True:
        last = stop.wait(1)
        if file.exists():
            with open(file, errors="replace") as log:
                log.seek(position)
                sys.stdout.write(log.read())
                sys.stdout.flush()
                position = log.tell()
        if last:
            return


def scenario(name: str, steps: Sequence[str]) -> None:
    """Run a scenario from nothing to nothing, or `steps` of it on machines that stay. Raises Failed, LabError."""
    lab = Lab.of(name)
    started = time.monotonic()
    if not steps or name == "fresh":
        lab.remove()  # what a run that was killed left
        known = ("*.log", "logs/*.log", "*.proved", "times.json")
        for old in (path for pattern in known for path in lab.folder.glob(pattern)):
            old.unlink(missing_ok=True)
    lab.folder.mkdir(parents=True, exist_ok=True)
    stop = threading.Event()
    shower = threading.Thread(target=follow, args=(lab.folder / "proofs.log", stop))
    shower.start()
    try:
        (fresh.run if name == "fresh" else molecule)(lab, steps)
    finally:
        stop.set()
        shower.join()
        if not steps or name == "fresh":
            at_peace()
            lab.keep_packages()
            lab.remove()
    left_out = [] if steps else [step for step in side_effects(lab) if not (lab.folder / f"{step}.proved").exists()]
    if left_out:
        raise Failed(f"scenario {name}: Molecule left out the proofs of {', '.join(left_out)}")
    times = lab.folder / "times.json"
    where = " and ".join(steps) if steps and name == "fresh" else lab.system
    print(f"appliance: scenario {name} passed on {where} in {time.monotonic() - started:.0f} s")
    for what, seconds in (json.loads(times.read_text()) if times.exists() else {}).items():
        print(f"  {seconds:>8.1f} s  {what}")


def side_effects(lab: Lab) -> list[str]:
    """The folders of proofs that the scenario's sequence has as side effects."""
    file = HERE / "molecule" / lab.scenario / "molecule.yml"
    sequence = yaml.safe_load(file.read_text())["scenario"]["test_sequence"] if file.exists() else []
    words = [step.split() for step in sequence]
    return [each[1].removesuffix(".yml") for each in words if each[0] == "side_effect"]


def at_peace() -> None:
    """From here on we only tidy up: a second Ctrl-C must not leave machines behind."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def ready_for_signals() -> None:
    """Ctrl-C, SIGTERM and SIGHUP end the tests in the same way."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)


def interrupt(number: int, frame: object) -> NoReturn:
    """A signal that ends the tests."""
    raise KeyboardInterrupt


def inventories() -> None:
    """Inventories that are wrong in themselves: no machine is needed. Raises Failed."""
    files = sorted(str(path) for path in (HERE / "inventories").glob("*_proofs.py"))
    environment = os.environ | {"PYTHONPATH": str(HERE)}  # where the proofs' helpers are
    # The conftest of the unit tests would say that these were not run without sshd and strace, which they do not need.
    command = [sys.executable, "-m", "pytest", "--noconftest", "-n", "2", "-q", *files]
    if subprocess.run(command, cwd=PROJECT, env=environment).returncode:
        raise Failed("bad inventories: see above")


def with_rights(arguments: Sequence[str]) -> int | None:
    """Run this again as root when we are not and may be; None: we are root, NOT_HERE: we may not."""
    if os.geteuid() == 0:
        return None
    if subprocess.run(["sudo", "-n", "true"], capture_output=True).returncode:
        return NOT_HERE
    print("appliance: podman's containers need root: going on with sudo -n", flush=True)
    status = subprocess.run(["sudo", "-n", "-E", sys.executable, __file__, *arguments]).returncode
    subprocess.run(["sudo", "-n", "chown", "-R", f"{os.getuid()}:{os.getgid()}", str(PROJECT / ".mrcore")])
    return status


def not_here(reason: str) -> int:
    """Say plainly what was not run. With CI=true that is a failure."""
    what = f"the scenarios {', '.join(SCENARIOS)} (deployment, security, upgrade: all proofs on machines)"
    print(f"\nappliance: NOT RUN: {what}.\nappliance: {reason}", file=sys.stderr)
    if file := os.environ.get("MRCORE_NOT_RUN"):  # of scripts/test.sh, which says it again at its end
        with open(file, "a") as stream:
            stream.write(f"{what}: {reason}\n")
    return 1 if os.environ.get("CI") == "true" else NOT_HERE


def main() -> int:
    """Do what the arguments say; give the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "scenario", nargs="?", choices=[*sorted({*SCENARIOS, "upgrade"}), "scenarios", "inventories", "clean"]
    )
    parser.add_argument("steps", nargs="*", help="steps of Molecule, or shell; of fresh: systems")
    chosen = parser.parse_args()
    if chosen.scenario == "upgrade" and not UPGRADE:
        parser.error(f"which commit does the upgrade come from? Say {UPGRADE_FROM}=COMMIT.")
    ready_for_signals()
    try:
        if chosen.scenario in (None, "inventories"):
            inventories()
            if chosen.scenario:
                return 0
        status = with_rights(sys.argv[1:] or ["scenarios"])
        if status is None:
            return as_root(chosen.scenario or "scenarios", chosen.steps)
        if status == NOT_HERE:
            return not_here("Containers need root: run it as root, or let sudo work without a password.")
        return status
    except (Failed, LabError, subprocess.TimeoutExpired) as error:
        print(f"appliance: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("appliance: interrupted", file=sys.stderr)
        return 130


def as_root(name: str, steps: Sequence[str]) -> int:
    """Run one scenario, or all, with the rights to."""
    if name == "clean":
        for each in {*SCENARIOS, "upgrade"}:
            Lab.of(each).remove()
        return 0
    chosen = SCENARIOS if name == "scenarios" else (name,)
    try:
        for each in chosen:
            require_image(Lab.of(each).system)
        require_containers(image_name(Lab.of(chosen[0]).system))
    except (LabError, OSError) as error:
        return not_here(f"Containers do not start here: {error}")
    if list(steps) == ["shell"]:
        lab = Lab.of(name)
        shell = os.environ.get("SHELL", "/bin/sh")
        return subprocess.run([shell], cwd=PROJECT, env=os.environ | lab.environment()).returncode
    if name == "scenarios":
        all_scenarios()
        return 0
    scenario(name, steps)
    if not steps and (left := leftovers([Lab.of(name).prefix])):
        raise Failed(f"left behind: {', '.join(left)}")
    return 0


def all_scenarios() -> None:
    """Run all lanes; what a scenario prints is shown with its name before it. Raises Failed when all have ended."""
    running: dict[str, subprocess.Popen[str]] = {}
    statuses: dict[str, int] = {}
    stopping = threading.Event()

    def drive(lane: Sequence[str]) -> None:
        for name in lane:
            if stopping.is_set():
                return
            process = subprocess.Popen(
                [sys.executable, __file__, name],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
                start_new_session=True,  # Ctrl-C comes to us, and we tell each once
            )  # fmt: skip
            running[name] = process
            if stopping.is_set():
                process.terminate()
            assert process.stdout is not None
            for line in process.stdout:
                sys.stdout.write(f"{name:<9} | {line}")
                sys.stdout.flush()
            statuses[name] = process.wait()

    threads = [threading.Thread(target=drive, args=(lane,)) for lane in LANES]
    for each in threads:
        each.start()
    try:
        for each in threads:
            each.join()
    except BaseException:
        at_peace()
        stopping.set()
        for process in list(running.values()):
            if process.poll() is None:
                process.terminate()
        for each in threads:
            each.join()
        raise
    if failed := [name for name in SCENARIOS if statuses.get(name) != 0]:
        raise Failed(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    sys.exit(main())
