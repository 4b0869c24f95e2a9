"""An independent single-process computation to compare with: plain Python, none of the code under test."""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings

# Machines differ: no example may fail for being slow.
settings.register_profile("ours", deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ours")


def tuples(key: Any) -> Any:
    """Make lists tuples, inner ones too."""
    return tuple(tuples(each) for each in key) if isinstance(key, list | tuple) else key


def one_form(key: Any) -> Any:
    """The form in which keys are written: bool and whole floats as int, lists as tuples."""
    if isinstance(key, list | tuple):
        return tuple(one_form(each) for each in key)
    return int(key) if isinstance(key, bool) or (isinstance(key, float) and key.is_integer()) else key


def rank(key: Any) -> Any:
    """None < numbers < str < tuples, spelled out as a sort key."""
    if key is None:
        return (0, 0)
    if isinstance(key, int | float):
        return (1, key)
    return (2, key) if isinstance(key, str) else (3, [rank(each) for each in key])


def grouped(items: Iterable[tuple[Any, Any]]) -> list[tuple[Any, list[Any]]]:
    """Group items by key, keys ascending, values in order of appearance."""
    ordered = sorted(((one_form(key), value) for key, value in items), key=lambda item: rank(item[0]))
    return [(key, [value for _, value in group]) for key, group in itertools.groupby(ordered, key=lambda item: item[0])]


def lines_of(content: bytes) -> list[bytes]:
    """Cut at newlines only, keeping them."""
    lines = [line + b"\n" for line in content.split(b"\n")]
    lines[-1] = lines[-1][:-1]
    return [line for line in lines if line]


def read_part(path: Path) -> Iterator[tuple[Any, Any]]:
    """Read an output file with the standard library's json."""
    opened: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8", newline="\n") as lines:
        for line in lines:
            key, value = json.loads(line)
            yield tuples(key), value


def bag(items: Iterable[tuple[Any, Any]]) -> list[str]:
    """Items in an order of their own, comparable whatever their types and whatever their order was."""
    return sorted(json.dumps([key, value], sort_keys=True) for key, value in items)
