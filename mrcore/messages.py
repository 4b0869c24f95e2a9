"""What other machines answer, checked where it comes in: one entry for each method, one function for a task's events.

A node may be broken, of another release, or in somebody else's hands. So nothing of an answer is used before its types,
names and numbers are those that an honest node can give; what does not fit is `Malformed`, a fault of the cluster that
names the node: the queue holds, and no job fails for it. Names that become parts of paths match strict patterns.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from mrcore.errors import ClusterFault, InternalError, JobFault, Malformed, MrcoreError, TaskDied, from_dict
from mrcore.text import clean, one_line

ANSWER_BYTES = 1 << 20  # one answer as JSON, unless its entry says otherwise: decoded it may take thirty times as much
LARGE_BYTES = 32 << 20
PAGE_FILES, NAME_CHARACTERS = 5_000, 4_096
# Of one node in one run, and no honest node lists more: 16 TiB are 262,144 splits, which the master plans in memory.
MAX_INPUT_FILES, MAX_INPUT_BYTES, MAX_INPUT_NAMES = 500_000, 1 << 44, 64 << 20
MAX_EMPTY_PAGES = 5_000  # while a node looks for the first file
KEY_DEPTH = 64

Json = dict[str, Any]
Check = Callable[[Any], Any]


# --- Kinds of values: each check returns the value, or raises ValueError ----------------------------------------------


def _show(value: Any) -> str:
    return one_line(value, 80) if type(value) in (str, int, float, bool) else f"a {type(value).__name__}"


def _int(low: int = 0, high: int = 1 << 62) -> Check:
    def check(value: Any) -> Any:
        if type(value) is not int or not low <= value <= high:
            raise ValueError(f"{_show(value)} is no whole number from {low} to {high}")
        return value

    return check


def _text(pattern: str = ".*", most: int = 200) -> Check:
    compiled = re.compile(pattern, re.DOTALL)

    def check(value: Any) -> Any:
        if type(value) is not str or len(value) > most or not compiled.fullmatch(value):
            raise ValueError(f"{_show(value)!r} is no text of the kind that belongs there")
        value.encode()  # raises UnicodeEncodeError, which is a ValueError
        return value

    return check


def _of(*kinds: type) -> Check:
    def check(value: Any) -> Any:
        if type(value) not in kinds:
            raise ValueError(f"{_show(value)!r} is of another type")
        return value

    return check


def _number(value: Any) -> Any:
    if type(value) not in (int, float) or not 0 <= value < 1e15:
        raise ValueError(f"{_show(value)} is no number from 0 on")
    return value


def _maybe(item: Check) -> Check:
    return lambda value: None if value is None else item(value)


def _row(*items: Check) -> Check:
    def check(value: Any) -> Any:
        if type(value) is not list or len(value) != len(items):
            raise ValueError(f"{_show(value)!r} is no list of {len(items)}")
        for item, each in zip(items, value, strict=True):
            item(each)
        return value

    return check


def _list(item: Check, most: int = 1 << 62) -> Check:
    def check(value: Any) -> Any:
        if type(value) is not list or len(value) > most:
            raise ValueError(f"{_show(value)!r} is no list of at most {most}")
        return [item(each) for each in value]

    return check


def _table(key: Check, item: Check) -> Check:
    def check(value: Any) -> Any:
        if type(value) is not dict:
            raise ValueError(f"{_show(value)!r} is no table")
        return {key(name): item(each) for name, each in value.items()}

    return check


def _record(fields: Mapping[str, Check], optional: Mapping[str, Check] | None = None, closed: bool = False) -> Check:
    """A dict with these fields; others are dropped if it is `closed`, else kept as they are."""

    def check(value: Any) -> Any:
        if type(value) is not dict or not fields.keys() <= value.keys():
            missing = sorted(fields.keys() - value.keys()) if type(value) is dict else []
            raise ValueError(f"{_show(value)!r} lacks {', '.join(missing) or 'all its fields'}")
        known, every = {}, {**fields, **(optional or {})}
        for name, item in every.items():
            if name in value:
                try:
                    known[name] = item(value[name])
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from None
        return known if closed else value | known

    return check


_FLAG, _COUNT = _of(bool), _int()
_TIME, _INODE, _CRC = _int(-(1 << 63), 1 << 63), _int(0, 1 << 64), _int(0, (1 << 32) - 1)
_TOKEN, _WORD, _LINE = _text("[A-Za-z0-9_-]{1,64}"), _text(), _text(most=20_000)
_NAME = _text(r"[^\0/][^\0]*", NAME_CHARACTERS)  # under a folder; `staging.checked_name` looks at its parts
_PATH = _text(r"/[^\0]*", NAME_CHARACTERS)
_WHO: dict[str, Check] = {"name": _WORD, "version": _WORD, "wire_version": _COUNT, "python": _WORD}
_FILE = _row(_NAME, _COUNT, _TIME, _int(0, 0o7777))
_HELD = _row(_NAME, _COUNT, _TIME, _int(0, 0o7777), _INODE)
_GOING: dict[str, Check] = {"files": _COUNT, "bytes": _COUNT, "outputs": _list(_row(_WORD, _COUNT, _COUNT, _COUNT))}
_INPUT = _row(_PATH, _int(0, MAX_INPUT_BYTES), _TIME, _INODE)
_SPACE: dict[str, Check] = {"disk_free_bytes": _COUNT}


# --- The methods of agents and cluster servers ------------------------------------------------------------------------


class Answer(NamedTuple):
    """What a method answers: `like` names the argument, a list, to each of whose items the answer has one.

    `blames` says that the method may find fault with the job; of any other, even a JobFault is the node's.
    """

    check: Check
    most_bytes: int = ANSWER_BYTES
    like: str | None = None
    blames: bool = False


def _page(file: Check, **more: Check) -> Check:
    return _record({"listing": _TOKEN, "files": _list(file, PAGE_FILES), "next": _maybe(_COUNT)}, more)


_INPUTS: dict[str, Check] = {
    "files": _list(_INPUT, PAGE_FILES),
    "matched": _table(_text(most=NAME_CHARACTERS), _COUNT),
    "skipped": _table(_WORD, _COUNT),
    "fingerprint": _WORD,
    "faults": _list(_LINE),
    "next": _maybe(_TOKEN),
}
_EVENTS = _list(_row(_int(1), _record({"event": _WORD})), 1_000)
ANSWERS: dict[str, Answer] = {
    "health": Answer(_record({**_WHO, **_SPACE, "time": _number, "served_bytes": _table(_WORD, _COUNT)})),
    "project_state": Answer(_FLAG),
    "environment_state": Answer(_FLAG),
    "install_environment": Answer(_FLAG, blames=True),
    "start_run": Answer(_record(_SPACE)),
    "list_inputs": Answer(_record(_INPUTS), LARGE_BYTES, blames=True),
    "look_into": Answer(_list(_row(_COUNT, _CRC, _maybe(_CRC))), like="files", blames=True),
    "auxiliary": Answer(_FLAG),
    "publish": Answer(_record({"published": _COUNT, "removed": _COUNT})),
    "end_run": Answer(_FLAG),
    "sweep": Answer(_table(_WORD, _COUNT)),
    "end_server": Answer(_FLAG),
    "exists": Answer(_FLAG, blames=True),
    "list_files": Answer(_page(_FILE), LARGE_BYTES, blames=True),
    "file_checksum": Answer(_CRC, blames=True),
    "begin_upload": Answer(_record({**_SPACE, "upload": _TOKEN}), blames=True),
    "announce": Answer(_maybe(_COUNT), blames=True),
    "commit_upload": Answer(_COUNT, blames=True),
    "drop_upload": Answer(_of(type(None))),
    "delete_files": Answer(_record(_GOING), LARGE_BYTES, blames=True),
    "holdings": Answer(_page(_HELD, count=_COUNT, bytes=_COUNT, faults=_list(_LINE)), LARGE_BYTES, blames=True),
    "taken": Answer(_list(_FLAG), like="names", blames=True),
    "begin_moves": Answer(_record({**_SPACE, "upload": _TOKEN}), blames=True),
    "stage_moves": Answer(_list(_maybe(_row(_INODE, _TIME))), like="files", blames=True),
    "publish_moves": Answer(_list(_FLAG), like="files", blames=True),
    "remove_moves": Answer(_list(_FLAG), like="files", blames=True),
    "hello": Answer(_record({**_WHO, "incarnation": _TOKEN, "pid": _COUNT, "anonymous_bytes": _COUNT})),
    "order": Answer(_record({"accepted": _FLAG})),
    "give": Answer(_record({"given": _COUNT})),
    "poll": Answer(_record({"incarnation": _TOKEN, "events": _EVENTS}), LARGE_BYTES),
    "cancel": Answer(_record({"cancelled": _FLAG})),
}


def most_bytes(method: str) -> int:
    """Return how many bytes the answer to a method may have."""
    return ANSWERS[method].most_bytes if method in ANSWERS else LARGE_BYTES


def checked(method: str, arguments: Mapping[str, Any], result: Any, node: str) -> Any:
    """Return what a node answered, if it is an answer to this method. Raises Malformed."""
    entry = ANSWERS.get(method)
    if entry is None:
        return result
    try:
        value = entry.check(result)
        if entry.like and len(value) != len(arguments[entry.like]):
            raise ValueError(f"{len(value)} answers for {len(arguments[entry.like])} {entry.like}")
    except ValueError as error:
        raise Malformed(f"node {node} gave no answer to {method}: {one_line(error, 300)}", node=node) from None
    return value


def error(plain: Any, node: str, method: str = "") -> MrcoreError:
    """Return the error that a node answered with, or, without a `method`, that a task or a data request ended with.

    Only some methods may blame the job; a task may whatever its error is, or its job would hold the queue.
    """
    match plain:
        case {"class": str(kind), "message": str(message), **rest}:
            given: Any = rest.get("details")
            details = {name: given[name] for name in given.keys() - {"message", "self"}} if type(given) is dict else {}
            made = from_dict({"class": kind, "message": clean(message), "details": details})
            blames = method not in ANSWERS or ANSWERS[method].blames
            ours = isinstance(made, ClusterFault | TaskDied | InternalError) or not method
            if ours or (blames and isinstance(made, JobFault)):
                return made
            return ClusterFault(f"node {node}: {made.message}", **made.details)
    return Malformed(f"node {node} answered with an error that is none", node=node)


# --- Inputs as a whole ------------------------------------------------------------------------------------------------


class InputPages:
    """The pages of one node's input files, put together: bounded, each file once, no cursor twice."""

    def __init__(self, node: str, entries: Sequence[str]) -> None:
        self._node, self._entries, self._cursors, self._paths = node, entries, set[str](), set[str]()
        self._files: list[Any] = []
        self._names = self._bytes = self._empty = 0
        self.listing: Json = {}

    def add(self, page: Json) -> str | None:
        """Take a page; return the cursor of the next. After the last, `listing` is that page with all files.

        Raises Malformed when the node lists more than an honest one does, or something twice.
        """
        files, cursor = page["files"], page["next"]
        self._files += files
        self._paths.update(file[0] for file in files)
        self._names += sum(len(file[0]) for file in files)
        self._bytes += sum(file[1] for file in files)
        self._empty += not files
        if len(self._paths) != len(self._files):
            raise self._malformed("a file twice")
        if len(self._paths) > MAX_INPUT_FILES or self._names > MAX_INPUT_NAMES or self._bytes > MAX_INPUT_BYTES:
            raise self._malformed(f"more than {MAX_INPUT_FILES:,} files or {MAX_INPUT_BYTES >> 40} TiB")
        if cursor in self._cursors or self._empty > MAX_EMPTY_PAGES:
            raise self._malformed("pages without an end")
        if cursor is not None:
            self._cursors.add(cursor)
        elif missing := [entry for entry in self._entries if entry not in page["matched"]]:
            raise self._malformed(f"nothing about {one_line(missing[0], 100)!r}")
        self.listing = page | {"files": self._files}
        return cursor  # type: ignore[no-any-return]

    def _malformed(self, what: str) -> Malformed:
        return Malformed(f"node {self._node} gave no answer to list_inputs: it lists {what}", node=self._node)


# --- A task's events --------------------------------------------------------------------------------------------------


def _key(value: Any, depth: int = 0) -> Any:
    if type(value) is list and depth < KEY_DEPTH:
        return [_key(each, depth + 1) for each in value]
    return _of(str, int, float, bool, type(None))(value)


def _part(identity: Json) -> Check:
    name = rf"part-{identity['run']:06d}-{identity['task']:05d}-\d{{5,9}}\.data(\.gz)?"
    counts: dict[str, Check] = dict.fromkeys(("records", "bytes", "text_bytes", "batch_bytes", "max_decoded"), _COUNT)
    mine = _int(identity["task"], identity["task"])
    return _record({"name": _text(name), "partition": mine, "crc32": _CRC, **counts}, closed=True)


def _run(identity: Json, partitions: int) -> Check:
    def partition(name: Any) -> Any:
        if not (
            type(name) is str and name.isascii() and name.isdecimal() and len(name) < 10 and int(name) < partitions
        ):
            raise ValueError(f"{_show(name)!r} is no partition")
        return name

    mine = _text(rf"map-{identity['task']}-{identity['try']}-\d{{1,9}}")
    counts: dict[str, Check] = dict.fromkeys(("bytes", "groups", "values", "max_decoded"), _COUNT)
    counts |= {"id": mine, "partitions": _table(partition, _COUNT), "samples": _list(_row(_key, _COUNT))}
    return _record(counts, closed=True)


def _result(identity: Json, partitions: int) -> Check:
    counts, times = _table(_WORD, _COUNT), _table(_WORD, _number)
    fields: dict[str, Check] = {"peak_bytes": _COUNT, "counters": counts, "seconds": times}
    parts, runs = _list(_part(identity)), _list(_run(identity, partitions))
    if identity["phase"] == "MAP":
        return _record(fields, {"parts": parts, "runs": runs}, closed=True)
    fields |= {"keys_kept": _FLAG, "fetched": counts, "parts": parts}
    return _record(fields, closed=True)


def event(plain: Json, identity: Json, partitions: int, node: str) -> Json:
    """Return an event of the task of this identity, if a task can have it. Raises Malformed naming the node."""
    kinds: dict[str, dict[str, Check]] = {
        "bundle_done": {"id": _COUNT},
        "phase": {"phase": _WORD},
        "done": {"result": _result(identity, partitions)},
        "failed": {"error": _record({"class": _WORD, "message": _of(str)})},
        "died": {"message": _of(str)},
    }
    try:
        told: Json = _record(kinds.get(plain["event"], {}))(plain)
        for key in ("parts", "runs"):
            made = [each.get("name", each.get("id")) for each in (told.get("result") or {}).get(key, ())]
            if len(made) != len(set(made)):
                raise ValueError(f"two {key} of one name")
    except ValueError as error:
        what = one_line(plain["event"], 40)
        raise Malformed(f"node {node} gave no event of a task: {what}: {one_line(error, 300)}", node=node) from None
    return told
