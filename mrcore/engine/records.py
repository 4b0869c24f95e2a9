"""What a key, a value and an item are: which are allowed, how keys are ordered and distributed to partitions.

Nothing here knows how the engine moves data, so another engine can keep the same meaning.

Keys: None, bool, int, float but NaN, str, tuples and lists of these. Keys that Python calls equal are one key and
are written in one form (`canonical_key`). Order: None < numbers < str < tuples, tuples element by element.
Values: the scalars above, NaN, lists, tuples and dicts of them, with the meaning of a JSON round trip by Python's json.
Subclasses (Counter, IntEnum, a named tuple) are taken as what json writes for them: the plain dict, int, list.
"""

from __future__ import annotations

import heapq
import json
import operator
import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from zlib import crc32

import ujson

from mrcore.text import type_name

Key = Any  # None | bool | int | float | str | tuple[Key, ...]
Value = Any

SCALARS = frozenset((str, int, float, bool, type(None)))
# How json reads objects of subclasses: scalars by the C functions of the base type, containers by their own methods.
_PLAIN: tuple[tuple[type, Callable[[Any], Any]], ...] = (
    (str, str.__str__),
    (int, int.__int__),
    (float, float.__float__),
    (list, list),
    (tuple, tuple),
    (dict, lambda mapping: dict(mapping.items())),
)
NUMBERISH = frozenset((int, float, bool, type(None)))
MAX_DEPTH = 100  # of nested keys and values; ujson itself gives up at 1,024
LARGE = 1024  # a str of so many characters or a value of so many nodes is sized before it is encoded
SLICE = 8192  # as many things are sorted at a time when each needs a sort key, which outweighs it
_MAX_INT = 10**4300  # Python's own limit for turning text into int, on which a reader would fail


class BadItem(ValueError):
    """An item that is no pair, or a key or value that is not allowed; the text says which and why."""


def dumps(value: Any) -> str:
    """Encode as compact JSON text, `NaN` and `Infinity` as Python's json writes them.

    Raises ValueError, OverflowError or TypeError on what JSON cannot hold.
    """
    text: str = ujson.dumps(value, ensure_ascii=False, escape_forward_slashes=False)
    return text


loads: Callable[[str | bytes], Any] = ujson.loads


def describe(value: Any) -> str:
    """Return a short `repr` for error messages, at most 120 characters."""
    try:
        text = repr(value)
    except BaseException as error:  # noqa: BLE001 - a user's own __repr__ may raise anything
        text = f"<{type_name(value)} whose repr raises {type_name(error)}>"
    return text if len(text) <= 120 else text[:100] + f"… ({len(text)} characters)"


def _check_scalar(value: Any, what: str) -> None:
    kind = value.__class__
    if kind is int and not -_MAX_INT < value < _MAX_INT:
        raise BadItem(f"{what} is an integer of more than 4,300 digits, which could not be read back")
    if kind is str and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise BadItem(f"{what} {describe(value)} holds a lone surrogate (half a character): {error}") from None


def as_plain(thing: Any) -> Any:
    """Return an object of a subclass as its plain base type, as json.dumps sees it; any other object as it is."""
    kind = type(thing)
    if kind not in SCALARS:  # bool is a subclass of int, and plain
        for base, take in _PLAIN:
            if issubclass(kind, base) and kind is not base:
                return take(thing)
    return thing


def canonical_key(key: Any, depth: int = 0) -> Key:
    """Return the one form in which all keys equal to `key` are kept (True → 1, 2.0 → 2, list → tuple, IntEnum → int).

    Raises BadItem for a type that is no key, NaN, a lone surrogate or an int over 4,300 digits.
    """
    kind = key.__class__
    if kind is str or key is None:
        _check_scalar(key, "the key")
        return key
    if kind is bool:
        return int(key)
    if kind is int or kind is float:
        _check_scalar(key, "the key")
        if key != key:
            raise BadItem("the key is nan, which is equal to no key, itself included: nothing can be grouped by it")
        return int(key) if kind is float and key.is_integer() else key
    if kind is tuple or kind is list:
        if depth >= MAX_DEPTH:
            raise BadItem(f"the key is nested more than {MAX_DEPTH} deep")
        copy = tuple([canonical_key(element, depth + 1) for element in key])
        return key if kind is tuple and all(map(operator.is_, copy, key)) else copy  # a copy per key would add up
    if (plain := as_plain(key)) is not key and plain.__class__ is not dict:
        return canonical_key(plain, depth)
    allowed = "None, bool, numbers, str, and tuples and lists of these"
    raise BadItem(f"the key {describe(key)} is of type {kind.__name__}; allowed are {allowed}")


def as_key(key: Any) -> Key:
    """Return a key that was read from JSON with its tuples, inner ones too, which JSON made lists."""
    if key.__class__ is not list:
        return key
    return tuple(map(as_key, key)) if list in map(type, key) else tuple(key)  # flat ones without recursion


def is_plain_tuple(key: Any) -> bool:
    """Return whether `key` is a tuple of scalars only, which can enter a dict of groups as it is."""
    return key.__class__ is tuple and SCALARS.issuperset(map(type, key))


class Snapshot:
    """Copies a value at emit, so that a list which the function goes on to change does no harm.

    `nodes` counts what the last copy holds, strings by length, so that the caller can see that a value is large.
    """

    def __init__(self) -> None:
        self.nodes = 0

    def take(self, value: Any) -> Value:
        """Copy `value` with the meaning of a JSON round trip. Raises BadItem for what is not allowed."""
        self.nodes = 0
        return self._copy(value, 0)

    def _copy(self, value: Any, depth: int) -> Value:
        kind = value.__class__
        if kind in SCALARS:
            _check_scalar(value, "the value")
            self.nodes += len(value) if kind is str else 1
            return value
        if depth >= MAX_DEPTH:
            raise BadItem(f"the value is nested more than {MAX_DEPTH} deep (or holds itself)")
        self.nodes += 1
        if kind is list or kind is tuple:
            if not value or set(map(type, value)) - {str}:
                return [self._copy(element, depth + 1) for element in value]
            text = "".join(value)  # all of one kind, so one check does for all
            _check_scalar(text, "the value")
            self.nodes += len(text)
            return list(value)
        if kind is dict:
            return {self._dict_key(name): self._copy(element, depth + 1) for name, element in value.items()}
        if (plain := as_plain(value)) is not value:
            return self._copy(plain, depth)
        raise BadItem(
            f"the value {describe(value)} is of type {kind.__name__}; "
            "allowed are None, bool, numbers, str, and lists, tuples and dicts of these"
        )

    def _dict_key(self, name: Any) -> str:
        name = as_plain(name)
        if name.__class__ not in SCALARS:
            raise BadItem(
                f"the dict key {describe(name)} is of type {type(name).__name__}; "
                "allowed are None, bool, numbers and str, which all become str"
            )
        _check_scalar(name, "the dict key")
        text = name if name.__class__ is str else json.dumps(name)
        self.nodes += len(text)
        return text


def nodes_of(key: Key) -> int:
    """Count what a key holds, strings by length, as `Snapshot.nodes` does for values."""
    if key.__class__ is str:
        return len(key)
    return sum(map(nodes_of, key)) if key.__class__ is tuple else 1


def check_item(item: Any, snapshot: Snapshot) -> tuple[Key, Value]:
    """Return the canonical key and the copied value of one item. Raises BadItem, which names what is wrong with it."""
    if (item.__class__ is not tuple and not isinstance(item, tuple | list)) or len(item) != 2:
        raise BadItem(f"{describe(item)} is no (key, value) pair")
    return canonical_key(item[0]), snapshot.take(item[1])


def order_key(key: Key) -> tuple[Any, ...]:
    """Return a sort key that orders keys of all kinds: None < numbers < str < tuples."""
    kind = key.__class__
    if kind is str:
        return (2, key)
    if kind is tuple:
        return (3, tuple([order_key(element) for element in key]))
    return (0,) if key is None else (1, key)


def sort_keys(keys: Iterable[Key]) -> list[Key]:
    """Sort canonical keys. Python's own order agrees with ours wherever it does not raise, and is 5 times faster."""
    keys = list(keys)
    try:
        keys.sort()
    except TypeError:
        keys = _sort_by(order_key, keys)
    return keys


def _sort_by(order: Callable[[Any], Any], things: list[Any]) -> list[Any]:
    slices = [sorted(things[start : start + SLICE], key=order) for start in range(0, len(things), SLICE)]
    return slices[0] if len(slices) == 1 else list(heapq.merge(*slices, key=order))


def value_order_key(value: Value) -> tuple[Any, ...]:
    """Return a sort key for `sort_values`: None < numbers < NaN < str < lists < dicts (by canonical JSON)."""
    kind = value.__class__
    if kind is str:
        return (2, value)
    if kind is list or kind is tuple:
        return (3, tuple([value_order_key(element) for element in value]))
    if kind is dict:
        return (4, ujson.dumps(value, ensure_ascii=False, sort_keys=True))
    if value is None:
        return (0,)
    return (1, value) if value == value else (1.5,)  # NaN is below nothing and above nothing: it needs a place


def sort_values(values: list[Value]) -> None:
    """Sort one group's values in place by `value_order_key`, taking the short way for plain scalars."""
    kinds = set(map(type, values))
    plain = kinds <= {str} or kinds <= {int, float, bool}
    if plain and not (float in kinds and any(map(operator.ne, values, values))):  # no NaN, which differs from itself
        values.sort()
    else:
        values[:] = _sort_by(value_order_key, values)


def key_hash(key: Key, start: int = 0) -> int:
    """Hash a canonical key to 32 bits: the same in every process, and equal for equal keys (chained crc32)."""
    kind = key.__class__
    if kind is str:
        return crc32(key.encode("utf-8"), start)
    if kind is tuple:
        state = crc32(b"(", start)
        for element in key:
            state = crc32(b",", key_hash(element, state))
        return state
    # hash() of a number is fixed by the language (modulo 2**61 - 1) and agrees with == across int and float.
    return crc32(b"n" if key is None else struct.pack("<q", hash(key)), start)


def partition_keys(keys: Sequence[Key], partitions: int) -> list[list[Key]]:
    """Distribute canonical keys to `partitions` lists by their hash, in one pass."""
    if partitions == 1:
        return [list(keys)]
    parts: list[list[Key]] = [[] for _ in range(partitions)]
    if set(map(type, keys)) == {str}:
        adders = [part.append for part in parts]
        for key in keys:
            adders[crc32(key.encode()) % partitions](key)
    else:
        for key in keys:
            parts[key_hash(key) % partitions].append(key)
    return parts
