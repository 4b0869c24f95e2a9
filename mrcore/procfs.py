"""What Linux tells about processes: identity, family, memory; and the two prctl calls that supervision needs.

A process id alone is no identity, since ids are used again: wherever a process is to be signalled later, its start
time (field 22 of `/proc/PID/stat`, in clock ticks since boot) is kept beside it and compared first.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_libc = ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}): {os.strerror(number)}")


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel SIGKILL this process when the thread that forked it ends; exit now if that happened already."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(1)


def become_subreaper() -> None:
    """Make orphaned descendants children of this process instead of init's, so that none can slip away."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _stat(pid: int) -> list[str]:
    """Fields 3 and on of `/proc/PID/stat`: the name in field 2 may itself hold blanks and brackets."""
    return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()


def state(pid: int) -> str | None:
    """The state letter of a process ("R", "S", "T", …), None when there is none or only its zombie is left."""
    with contextlib.suppress(OSError, IndexError):
        letter = _stat(pid)[0]
        return None if letter in "ZX" else letter
    return None


def start_ticks(pid: int) -> int | None:
    """When the process started, in clock ticks since boot; None when there is no such process."""
    with contextlib.suppress(OSError, IndexError):
        return int(_stat(pid)[19])
    return None


def send_signal(pid: int, ticks: int, number: int) -> bool:
    """Signal the process with this id and start time, and no other; False when it is gone."""
    try:
        handle = os.pidfd_open(pid)  # pins the process: what is compared is what is signalled
    except OSError:
        return False
    try:
        if start_ticks(pid) != ticks or state(pid) is None:
            return False
        signal.pidfd_send_signal(handle, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(handle)
    return True


def environment_value(pid: int, name: str) -> str | None:
    """The value that `name` had in the environment the process was executed with; None if unset or not readable."""
    prefix = os.fsencode(name) + b"="
    with contextlib.suppress(OSError):
        for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            if entry.startswith(prefix):
                return os.fsdecode(entry[len(prefix) :])
    return None


def processes() -> list[int]:
    """The ids of all processes."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def children(pid: int) -> set[int]:
    """The children of a process, zombies included. Kernels without CONFIG_PROC_CHILDREN: by a walk over /proc."""
    try:
        lists = [entry.read_text() for entry in Path(f"/proc/{pid}/task").glob("*/children")]
    except OSError:
        lists = []
    return {int(word) for text in lists for word in text.split()} if lists else family().get(pid, set())


def family() -> dict[int, set[int]]:
    """All processes by parent: `{parent: {child, …}}`."""
    result: dict[int, set[int]] = {}
    for pid in processes():
        with contextlib.suppress(OSError, IndexError):
            result.setdefault(int(_stat(pid)[1]), set()).add(pid)
    return result


def descendants(*pids: int) -> set[int]:
    """Children of these processes, their children, and so on."""
    by_parent, found, front = family(), set[int](), set(pids)
    while front:
        front = {child for parent in front for child in by_parent.get(parent, ())} - found
        found |= front
    return found


def anonymous_bytes(pid: int | str = "self") -> int:
    """Resident memory of a process that no file backs, in bytes; 0 when there is no such process."""
    try:
        with open(f"/proc/{pid}/statm", "rb", buffering=0) as stream:
            fields = stream.read(128).split()
        return (int(fields[1]) - int(fields[2])) * _PAGE_BYTES
    except (OSError, IndexError):
        return 0


def announce_ready() -> None:
    """Tell the launcher, on the descriptor that MRCORE_READY_FD names, that this daemon answers; close it."""
    number = os.environ.pop("MRCORE_READY_FD", "")
    if number.isdigit():
        with contextlib.suppress(OSError):
            os.write(int(number), b"ready\n")
            os.close(int(number))
