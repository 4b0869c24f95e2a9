"""How far the run under way is, and what stays known of one that has ended: what every view of a run shows.

`Progress` is one row of the queue's file, replaced about once a second by the Runner and read by any process.
`RunDetail` is written once, with the end of a run, whatever its ending, and forgotten with its row in the history.
Times are seconds since 1970.
"""

from __future__ import annotations

import msgspec

MAX_SLOWEST, MAX_DEATHS, MAX_HEAVY_KEYS = 200, 50, 10  # rows of a RunDetail


class Phase(msgspec.Struct, kw_only=True):
    """A phase of a run. `done` of `total` (0: not known) counts `unit`; `records`: lines, values or items so far."""

    name: str  # PREFLIGHT, MAP, SORT, REDUCE, COMMIT; scripts and transfers have their own
    started: float
    ended: float | None = None
    done: int = 0
    total: int = 0
    unit: str = "bytes"  # or "files", or "" for what cannot be counted
    records: int = 0


class ServerNow(msgspec.Struct, kw_only=True):
    """What a cluster server does at the moment."""

    server: str
    node: str
    up: bool
    phase: str = ""  # of its task: MAP, SORT or REDUCE; "" when it has none
    task: int | None = None
    since: float | None = None  # when its task began
    bytes: int = 0
    records: int = 0
    spills: int = 0
    status: str = ""  # the last `task.status` of the user's function


class Progress(msgspec.Struct, kw_only=True):
    """The run under way. `fraction` (0 to 1) and `eta_seconds` are None where they cannot be estimated."""

    job_name: str
    run: int
    job_type: str
    started: float
    updated: float
    phases: list[Phase] = []
    servers: list[ServerNow] = []
    counters: dict[str, int] = {}  # of the user's functions; tasks under way included
    spills: int = 0
    deaths: int = 0  # tasks that were lost and are tried again
    fraction: float | None = None
    eta_seconds: float | None = None  # from `updated` on

    def left_seconds(self, now: float) -> float | None:
        """Return the seconds that it will still take from `now` on."""
        return None if self.eta_seconds is None else max(0.0, self.eta_seconds - (now - self.updated))


class TaskRow(msgspec.Struct, kw_only=True):
    """A try of a task. `outcome`: done, died or running (when the run ended)."""

    phase: str
    task: int
    try_: int
    server: str
    node: str
    started: float
    seconds: float
    bytes: int = 0
    records: int = 0
    spills: int = 0
    peak_bytes: int = 0
    outcome: str = "done"
    why: str = ""


class ServerShare(msgspec.Struct, kw_only=True):
    """What one server did in one phase of a run."""

    phase: str
    server: str
    node: str
    tasks: int
    seconds: float  # in which it had a task
    bytes: int
    records: int


class HeavyKey(msgspec.Struct, kw_only=True):
    """A key with many values, as errors print keys."""

    key: str
    values: int
    partition: int


class RunDetail(msgspec.Struct, kw_only=True):
    """What is known of a run that has ended beyond its counts."""

    phases: list[Phase] = []
    servers: list[ServerShare] = []
    slowest: list[TaskRow] = []  # tries of tasks, longest first
    deaths: list[TaskRow] = []
    heavy_keys: list[HeavyKey] = []  # most values first
    largest_partition_bytes: int = 0
    median_partition_bytes: int = 0
    counters: dict[str, int] = {}
    profile: bool = False  # whether there is a flame graph: `mrcore.state.profiles`
