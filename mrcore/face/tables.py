"""A job's output as a table of Arrow or Polars (extra `notebook`)."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import Any

from mrcore.errors import UsageError
from mrcore.text import one_line


def _load(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        raise UsageError(f"{name} is not installed, which makes tables: pip install 'mrcore[notebook]'") from None


def to_arrow(items: Iterable[tuple[Any, Any]], job_name: str) -> Any:
    """Return items as a table of Arrow; see `JobHandle.to_arrow`."""
    arrow = _load("pyarrow")
    keys, values = [], []
    for key, value in items:
        keys.append(key)
        values.append(value)
    widths = {len(key) if isinstance(key, tuple) else 0 for key in keys}
    columns: dict[str, list[Any]] = {"key": keys}
    if len(widths) == 1 and (width := widths.pop()):
        columns = {f"key_{place}": [key[place] for key in keys] for place in range(width)}
    made = {}
    for name, column in (columns | {"value": values}).items():
        try:
            made[name] = arrow.array(column)
        except (arrow.ArrowException, OverflowError) as error:
            raise UsageError(
                f"column {name} of job {job_name} is no column of one type ({one_line(error, 200)}): use items()"
            ) from None
    return arrow.table(made)


def to_polars(items: Iterable[tuple[Any, Any]], job_name: str) -> Any:
    """Return items as a data frame of Polars; see `JobHandle.to_polars`."""
    polars = _load("polars")
    return polars.from_arrow(to_arrow(items, job_name))
