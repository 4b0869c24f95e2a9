"""Events as dicts, checked by hand: to go when the attempt takes `tasks.TaskEvent`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from msgspec import Meta

from mrcore.errors import Malformed
from mrcore.messages.kinds import Message, Positive, Token
from mrcore.text import one_line

KEY_DEPTH = 64


class Polled(Message, frozen=True, kw_only=True):
    """Numbered events of an incarnation."""

    incarnation: Token
    events: Annotated[list[tuple[Positive, dict[str, Any]]], Meta(max_length=1_000)]


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


_FLAG, _COUNT, _CRC, _WORD = _of(bool), _int(), _int(0, (1 << 32) - 1), _text()


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
