"""Submitters call `mrcore` as themselves; what touches queue or cluster runs as the settings' `user`, through sudo.

The command line replaces itself by `sudo -n -u USER mrcore …`, so that exit status, signals, terminal and pipes are
those of the command itself. Job files are read before, with the caller's rights, and handed over on standard input.
"""

from __future__ import annotations

import grp
import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, NoReturn

from mrcore.errors import MrcoreError, UsageError
from mrcore.settings.config import Settings

SUBMITTERS = "mrcore-users"  # the group whose members the master's sudoers rule lets through
ASK_SECONDS = 10.0


def needs_sudo(settings: Settings) -> bool:
    """Return whether the settings name a user that this process is not. UsageError: the machine has no such user."""
    if settings.user is None:
        return False
    try:
        return pwd.getpwnam(settings.user).pw_uid != os.geteuid()
    except KeyError:
        raise UsageError(
            f"the settings say that mrcore runs as user {settings.user}, whom this machine does not have: call mrcore "
            "on the cluster's master, or name other settings with --config"
        ) from None


def require_owner(settings: Settings) -> Settings:
    """Return the settings. Raises UsageError for a Python program that another user runs, also root."""
    if needs_sudo(settings):
        raise UsageError(
            f"this queue belongs to user {settings.user}, for whom what others write there would be closed: run the "
            f"program as that user (`sudo -u {settings.user} …`), or call the command `mrcore`, which does so by itself"
        )
    return settings


def _as_user(settings: Settings, arguments: Sequence[str]) -> list[str]:
    """Return the command that is `mrcore ARGUMENTS` as the settings' user. UsageError: the caller may not."""
    sudo = shutil.which("sudo")
    if sudo is None:
        raise UsageError(f"mrcore runs as user {settings.user} here, and there is no sudo to become that: install sudo")
    ourselves = _ourselves()
    if not _is_submitter() and not _may(sudo, str(settings.user), ourselves):
        caller = pwd.getpwuid(os.getuid()).pw_name
        raise UsageError(
            f"{caller} may not use this cluster: mrcore runs as user {settings.user} here, for members of the group "
            f"{SUBMITTERS}; the operator adds {caller} to mrcore_users of the inventory and deploys"
        )
    return [sudo, "-n", "-u", str(settings.user), "--", ourselves, *arguments]


def call(settings: Settings, arguments: Sequence[str], output: IO[bytes]) -> None:
    """Run `mrcore ARGUMENTS` as the settings' user, its output into a file; raises MrcoreError if it fails."""
    status = subprocess.run(
        _as_user(settings, arguments), stdin=subprocess.DEVNULL, stdout=output, check=False
    ).returncode
    if status:
        raise MrcoreError(f"`mrcore {' '.join(arguments)}` as user {settings.user} ended with status {status}")


def reexec_with_sudo(settings: Settings, arguments: Sequence[str], standard_input: bytes | None = None) -> NoReturn:
    """Become `mrcore ARGUMENTS` as the settings' user. Raises UsageError when the caller may not."""
    command = _as_user(settings, arguments)
    if standard_input is not None:
        content = os.memfd_create("mrcore-jobs")  # no file that somebody else could read or change, and no pipe to feed
        with os.fdopen(os.dup(content), "wb") as stream:
            stream.write(standard_input)
        os.lseek(content, 0, os.SEEK_SET)
        os.dup2(content, 0)
    sys.stdout.flush()
    os.execv(command[0], command)


def submitter(settings: Settings) -> str | None:
    """Return who called sudo to submit, which a job's own text cannot change; None when nobody did."""
    return os.environ.get("SUDO_USER") if settings.user and not needs_sudo(settings) else None


def _ourselves() -> str:
    """Return the path of this command as the sudoers rule has it: sudo 1.9.16 compares folders, not only the file.

    Links to the command are followed, and links in its folders are not: a release may be switched meanwhile.
    """
    called = Path(sys.argv[0])
    if called.name != "mrcore" or not called.is_file():
        called = Path(sys.executable).with_name("mrcore")
    while called.is_symlink():
        called = called.parent / called.readlink()
    return os.path.abspath(called)


def _is_submitter() -> bool:
    """Return whether the caller is root or in the group, as sudo sees it: also when he was added after his login."""
    if os.geteuid() == 0:
        return True
    try:
        caller, group = pwd.getpwuid(os.getuid()), grp.getgrnam(SUBMITTERS)
    except KeyError:
        return False
    return group.gr_gid in os.getgrouplist(caller.pw_name, caller.pw_gid)


def _may(sudo: str, user: str, command: str) -> bool:
    """Return whether another rule of sudo lets the caller through, such as an administrator's."""
    asked = [sudo, "-n", "-l", "-u", user, "--", command]
    quiet = subprocess.DEVNULL
    try:
        done = subprocess.run(asked, stdin=quiet, stdout=quiet, stderr=quiet, timeout=ASK_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0
