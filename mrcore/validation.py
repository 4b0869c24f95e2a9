"""How what a user wrote is read and how its faults are told: hostile YAML, pydantic's findings, mistyped words."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ValidationError

from mrcore.errors import UsageError
from mrcore.text import clean, type_name, unfit

MAX_DEPTH = 64
_brief = reprlib.Repr()  # YAML aliases can make a value whose whole repr would never end
_brief.maxlevel = 2


def brief(value: Any) -> str:
    """The repr of a value that somebody else wrote, cut to a part of a line."""
    try:
        return _brief.repr(value)
    except ValueError:  # an integer of too many digits
        return f"<{type_name(value)}>"


def nearest(word: str, known: Iterable[str]) -> str:
    """Give `" (did you mean 'x'?)"` for the known word nearest to a mistyped one, or an empty text."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def unfit_texts(value: Any, place: str = "") -> list[str]:
    """Give a fault for each text, in whatever lists and mappings, that no file, database or terminal would take."""
    if isinstance(value, str):
        return [f"{place}: {brief(value)} {why}"] if (why := unfit(value)) else []
    if isinstance(value, dict):
        return [fault for key in value for fault in unfit_texts(key, place) + unfit_texts(value[key], place)]
    return [fault for each in value for fault in unfit_texts(each, place)] if isinstance(value, list) else []


def explain(error: ValidationError, *models: type[BaseModel]) -> list[str]:
    """Turn pydantic's findings into one line for each key: what is wrong, what was given, the nearest known key."""
    known = [key for model in models for key in model.model_fields]
    faults: dict[str, str] = {}
    for found in error.errors(include_url=False):
        if found["type"] == "too_short" and found["input"]:
            continue  # only because its faulty members, told by themselves, do not count
        *above, last = found["loc"]
        unknown, message = found["type"] == "extra_forbidden", found["msg"].removeprefix("Value error, ")
        # A union adds its members' names to the place of a fault: they are no part of the key.
        place = [part for part in above if isinstance(part, int) or part in known]
        place += [last] if unknown or isinstance(last, int) or last in known else []
        key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")
        if unknown:
            faults[key] = f"unknown key {key!r}{nearest(str(last), known)}"
        elif found["type"] == "missing":
            faults[key] = f"{key!r} is missing"
        else:
            faults[key] = f"{key}: {message[:1].lower()}{message[1:]}, got {brief(found['input'])}"
    return list(faults.values())


def parse_yaml(content: str | bytes, where: str) -> Any:
    """The value of a YAML or JSON text; UsageError naming `where` if it is neither, or nested too deeply."""
    import yaml  # here: most commands never need it

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    depth = 0
    try:
        for event in yaml.parse(content, loader):  # libyaml's loader overflows the C stack: measure the depth first
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise _too_deep(where)
        return yaml.load(content, loader)
    except UsageError:
        raise
    except Exception as error:  # noqa: BLE001  its constructors raise what they like: IndexError for `!!int ""`
        if _brackets(content, error) > MAX_DEPTH:  # since PyYAML 6.0.4 libyaml counts too, before it gives any event
            raise _too_deep(where) from None
        raise UsageError(f"{where} is neither YAML nor JSON: {' '.join(clean(error).split())}") from None


def _brackets(content: str | bytes, error: Exception) -> int:
    """Return how many brackets and braces are open where YAML cannot go on."""
    mark = getattr(error, "problem_mark", None)
    text = content if isinstance(content, str) else content.decode(errors="replace")
    text = text[: mark.index] if mark else ""
    return text.count("[") + text.count("{") - text.count("]") - text.count("}")


def _too_deep(where: str) -> UsageError:
    return UsageError(f"{where} is nested more than {MAX_DEPTH} deep: is it the right file?")
