"""What Linux knows of processes: identity, family, memory; and the prctl calls that supervision needs.

A process id alone is no identity, since ids are used again: wherever a process is to be signalled later, its start
time (field 22 of `/proc/PID/stat`, in clock ticks since boot) is kept beside it and compared first.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
MEMORY_SHARE = 0.6  # of the machine for its cluster servers: the rest is the system's, for the page cache above all
# A server and its supervisor hold 31 MiB, an idle task 16; with less than this a task would spill all the time.
MIN_SERVER_BYTES, MIN_TASK_BYTES = 64 << 20, 32 << 20
_libc = ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}): {os.strerror(ctypes.get_errno())}")


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel SIGKILL this process when the thread that forked it ends; exit now if that happened already."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(1)


def become_subreaper() -> None:
    """Make orphaned descendants children of this process instead of init's, so that none can slip away."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _stat(pid: int) -> list[str]:
    """Fields 3 and on of `/proc/PID/stat`, none when there is no such process; the name before may hold anything."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    return []


def umask() -> int:
    """Return the umask of this process; `os.umask` would change it for all threads to find out."""
    with open("/proc/self/status") as stream:
        return next(int(line.split()[1], 8) for line in stream if line.startswith("Umask:"))


def state(pid: int) -> str | None:
    """Return the state letter of a process ("R", "T", …), None when there is none or only its zombie is left."""
    fields = _stat(pid)
    return fields[0] if fields and fields[0] not in "ZX" else None


def start_ticks(pid: int) -> int | None:
    """Return when the process started, in clock ticks since boot; None when there is no such process."""
    fields = _stat(pid)
    return int(fields[19]) if fields else None


def send_signal(pid: int, ticks: int, number: int) -> bool:
    """Signal the process with this id and start time, and no other; False when it is gone."""
    with contextlib.suppress(OSError), open(os.pidfd_open(pid)) as handle:  # pinned: what is compared is signalled
        if start_ticks(pid) == ticks and state(pid):
            signal.pidfd_send_signal(handle.fileno(), number)
            return True
    return False


def environment_value(pid: int, name: str) -> str:
    """Return the value of `name` in the environment a process was executed with; empty if unset or not readable."""
    with contextlib.suppress(OSError):
        for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            if entry.startswith(os.fsencode(name) + b"="):
                return os.fsdecode(entry.partition(b"=")[2])
    return ""


def family() -> dict[int, set[int]]:
    """Return all processes by parent: `{parent: {child, …}}`."""
    result: dict[int, set[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit() and (fields := _stat(int(name))):
            result.setdefault(int(fields[1]), set()).add(int(name))
    return result


def children(pid: int) -> set[int]:
    """Return the children of a process, zombies too; by a walk over /proc on kernels without CONFIG_PROC_CHILDREN."""
    lists = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    return set(map(int, " ".join(lists).split())) if lists else family().get(pid, set())


def descendants(*pids: int) -> set[int]:
    """Return the children of these processes, their children, and so on."""
    by_parent, found, front = family(), set[int](), set(pids)
    while front:
        front = {child for parent in front for child in by_parent.get(parent, ())} - found
        found |= front
    return found


def newest_pid() -> int:
    """Return the process id that was given out last."""
    return int(Path("/proc/loadavg").read_text().rsplit(maxsplit=1)[1])


def anonymous_bytes(pid: int | str = "self") -> int:
    """Return the resident memory of a process that no file backs, in bytes; 0 when there is no such process."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/statm").read_bytes().split()
        return (int(fields[1]) - int(fields[2])) * _PAGE_BYTES
    return 0


def _group_files(root: Path, name: str, name_v1: str) -> Iterator[Path]:
    """Yield the files of that name (in v1: the other) of our memory control group and its ancestors, nearest first."""
    try:
        groups = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
    except OSError:
        groups = []
    for _, controllers, path in groups:
        if controllers not in ("", "memory") and "memory" not in controllers.split(","):
            continue
        top, called = ("memory", name_v1) if controllers else ("", name)
        inside = Path(path.lstrip("/"))
        for folder in (inside, *inside.parents):  # in a container the path may be the host's: its top still counts
            if (file := root / "sys/fs/cgroup" / top / folder / called).is_file():
                yield file


def machine_memory_bytes(root: Path = Path("/")) -> int:
    """Return what this machine, or our control group (v1 or v2, the tightest of its ancestors), may use."""
    limits = [int((root / "proc/meminfo").read_text().split(maxsplit=2)[1]) * 1024]
    texts = (file.read_text().strip() for file in _group_files(root, "memory.max", "memory.limit_in_bytes"))
    return min(limits + [int(text) for text in texts if text.isdigit()])


def oom_kills(root: Path = Path("/")) -> int:
    """Return how many processes of our control group, else of the machine, the kernel killed for want of memory."""
    for file in (*_group_files(root, "memory.events", "memory.oom_control"), root / "proc/vmstat"):
        with contextlib.suppress(OSError):
            if found := re.search(r"^oom_kill (\d+)$", file.read_text(), re.MULTILINE):
                return int(found[1])
    return 0


def budget_bytes(total_bytes: int | None, servers: int) -> int:
    """Return the share of one of `servers` cluster servers in `total_bytes`; None: MEMORY_SHARE of this machine."""
    return (total_bytes or int(machine_memory_bytes() * MEMORY_SHARE)) // servers


def too_little_memory(total_bytes: int | None, servers: int) -> str | None:
    """Return what is wrong if each of `servers` would get less than MIN_SERVER_BYTES, and the least that is of use."""
    each, least = budget_bytes(total_bytes, servers), MIN_SERVER_BYTES * servers
    if each >= MIN_SERVER_BYTES:
        return None
    return (
        f"memory_bytes: {servers} servers on a machine get {each >> 20} MiB each and need "
        f"{MIN_SERVER_BYTES >> 20}: set {least} or more for all together, or run fewer servers"
    )


def announce_ready() -> None:
    """Write to the launcher, on the descriptor that MRCORE_READY_FD names, that this daemon answers; close it."""
    if number := os.environ.pop("MRCORE_READY_FD", ""):
        with contextlib.suppress(OSError), open(int(number), "w") as launcher:
            launcher.write("ready\n")
