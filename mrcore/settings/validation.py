"""Parse user-supplied YAML and JSON safely, and turn validation errors into one-line messages."""

from __future__ import annotations

import codecs
import difflib
import functools
import json
import math
import re
import reprlib
from collections import Counter
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ValidationError

from mrcore.errors import UsageError
from mrcore.text import one_line, type_name, unfit

MAX_DEPTH = 64
# Tag, pattern, first characters of the plain scalars of YAML 1.2's core schema (yaml.org/spec/1.2.2, 10.3.2), and the
# merge key of 1.1, which is what PyYAML reads: 10:00 is 600 there, 010 is 8, no is false, 1e-5 a text, 2026-11-30 none.
_CORE = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", "<<", ["<"]),
)
_HALF = re.compile("[\ud800-\udfff]")
_brief = reprlib.Repr()  # YAML aliases can make a value whose whole repr would never end
_brief.maxlevel = 2


def brief(value: Any) -> str:
    """Return the repr of a value that somebody else wrote, cut to a part of a line."""
    try:
        return _brief.repr(value)
    except ValueError:  # an integer of too many digits
        return f"<{type_name(value)}>"


def nearest(word: str, known: Iterable[str]) -> str:
    """Return `" (did you mean 'x'?)"` for the known word nearest to a mistyped one, or an empty text."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def unfit_texts(value: Any, place: str = "") -> list[str]:
    """Return an error for every text, in whatever lists and mappings, that no file, database or terminal would take."""
    if isinstance(value, str):
        return [f"{place}: {brief(value)} {why}"] if (why := unfit(value)) else []
    if isinstance(value, dict):
        value = [member for pair in value.items() for member in pair]
    return [error for member in value for error in unfit_texts(member, place)] if isinstance(value, list) else []


def explain(error: ValidationError, *models: type[BaseModel]) -> list[str]:
    """Return pydantic's errors as one line for each key: what is wrong, what was given, the nearest known key."""
    known = [key for model in models for key in model.model_fields]
    lines: dict[str, str] = {}
    for detail in error.errors(include_url=False):
        if detail["type"] == "too_short" and detail["input"]:
            continue  # only because its wrong members, which have lines of their own, do not count
        *above, last = detail["loc"]
        unknown, message = detail["type"] == "extra_forbidden", detail["msg"].removeprefix("Value error, ")
        # A union adds its members' names to the place of an error: they are no part of the key.
        place = [part for part in above if isinstance(part, int) or part in known]
        place += [last] if unknown or isinstance(last, int) or last in known else []
        key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")
        if unknown:
            lines[key] = f"unknown key {key!r}{nearest(str(last), known)}"
        elif detail["type"] == "missing":
            lines[key] = f"{key!r} is missing"
        else:
            lines[key] = f"{key}: {message[:1].lower()}{message[1:]}, got {brief(detail['input'])}"
    return list(lines.values())


def parse_yaml(content: str | bytes, where: str) -> Any:
    """Return the value of a UTF-8 text that is JSON or else YAML (1.2's core schema and merge keys).

    Raises UsageError naming `where` if it is neither, nested too deeply, or holds what no job and no setting can: a key
    twice, NaN, infinity, half a character.
    """
    raw = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    if raw[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) or b"\0" in raw:
        raise UsageError(f"{where} holds NUL bytes, as UTF-16 and binary files do: save it as UTF-8")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{where} is not UTF-8: byte {raw[error.start]:#x} in line {line}: save it as UTF-8") from None
    try:
        value = _json(text, where)
    except json.JSONDecodeError:
        value = _yaml(text, where)
    except RecursionError:
        raise _too_deep(where) from None
    except ValueError as error:  # an integer of thousands of digits
        raise UsageError(f"{where} cannot be read: {error}") from None
    _refuse_unfit(value, where)
    return value


def _too_deep(where: str) -> UsageError:
    return UsageError(f"{where} is nested more than {MAX_DEPTH} deep: is it the right file?")


def _json(text: str, where: str) -> Any:
    twins: list[str] = []  # an error only if all of it is JSON: it may be YAML, too

    def mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            twins.append(Counter(key for key, _ in pairs).most_common(1)[0][0])
        return made

    value = json.loads(text, object_pairs_hook=mapping)
    if twins:
        raise UsageError(f"{where} has the key {brief(twins[0])} twice in one mapping: leave one of them out")
    return value


@functools.cache
def _loader() -> Any:
    """Return libyaml's safe loader, or Python's, with `_CORE` instead of the scalars of YAML 1.1."""
    import yaml  # here: most commands never need it

    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
        pass

    Loader.yaml_implicit_resolvers = {}

    def integer(loader: Any, node: Any) -> int:
        return int(node.value, {"0o": 8, "0x": 16}.get(node.value[:2], 10))

    for tag, pattern, first in _CORE:
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"({pattern})$"), first)
    Loader.add_constructor("tag:yaml.org,2002:int", integer)
    return Loader


def dump_yaml(value: Any) -> str:
    """Return a value as YAML that `parse_yaml` and readers of YAML 1.1 read back: what either mistakes is quoted."""
    import yaml

    class Dumper(yaml.SafeDumper):
        pass

    for tag, pattern, first in _CORE:
        Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"({pattern})$"), first)
    return yaml.dump(value, Dumper=Dumper, sort_keys=False)  # ASCII: PyYAML writes some characters as blanks else


def _yaml(text: str, where: str) -> Any:
    import yaml

    depth = 0
    try:
        for event in yaml.parse(text, _loader()):  # libyaml's loader overflows the C stack: measure the depth first
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise _too_deep(where)
        loader = _loader()(text)
        try:
            node = loader.get_single_node()
            _refuse_twins(loader, node, where)
            return loader.construct_document(node) if node else None
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        before = text[: mark.index] if mark else ""
        if sum(map(before.count, "[{")) - sum(map(before.count, "]}")) > MAX_DEPTH:  # libyaml's own limit came first
            raise _too_deep(where) from None
        place = f"line {mark.line + 1}, column {mark.column + 1}: {getattr(error, 'problem', '')}" if mark else error
        raise UsageError(f"{where} is neither YAML nor JSON: {one_line(place)}") from None
    except UsageError:
        raise
    except Exception as error:  # noqa: BLE001  its constructors raise what they like: IndexError for `!!float ""`
        raise UsageError(f"{where} cannot be read: {one_line(error)}") from None


def _refuse_twins(loader: Any, root: Any, where: str) -> None:
    """Raise UsageError for a key that stands twice in a mapping: PyYAML would take the last one."""
    todo, seen = [root], set[int]()
    while todo:
        node = todo.pop()
        if node is None or id(node) in seen or not isinstance(node.value, list):
            continue
        seen.add(id(node))
        lines: dict[Any, int] = {}
        for member in node.value:  # nodes of a list, pairs of nodes of a mapping
            todo += member if isinstance(member, tuple) else [member]
            if isinstance(member, tuple) and isinstance(member[0].value, str):
                key, line = member[0], member[0].start_mark.line + 1
                name = key.value if key.tag.endswith(":merge") else loader.construct_object(key)
                if name in lines:
                    raise UsageError(f"{where} has the key {brief(name)} twice, in lines {lines[name]} and {line}")
                lines[name] = line


def _refuse_unfit(value: Any, where: str) -> None:
    """Raise UsageError naming the place of what is nested too deeply, no finite number, or half a character."""
    todo: list[tuple[Any, Any, int]] = [((), value, 1)]  # a place is (the place above, key): a text only for errors
    seen = set[int]()

    def path(place: Any) -> str:
        keys = []
        while place:
            place, key = place
            keys.append(f"[{key}]" if isinstance(key, int) else f".{key}")
        return one_line("".join(reversed(keys)).lstrip(".") or "the text", 200)

    while todo:
        place, item, depth = todo.pop()
        if isinstance(item, dict | list) and id(item) not in seen:
            if depth > MAX_DEPTH:
                raise _too_deep(where)
            seen.add(id(item))
            for key, member in item.items() if isinstance(item, dict) else enumerate(item):
                todo += [((place, key), member, depth + 1), ((place, key), key, depth)]
        elif isinstance(item, float) and not math.isfinite(item):
            raise UsageError(f"{where}: {path(place)}: {item} is no number that mrcore takes")
        elif isinstance(item, str) and (half := _HALF.search(item)):
            escape = f"\\u{ord(half[0]):04x}"
            raise UsageError(f"{where}: {path(place)} holds {escape}, half of a character: write both")
