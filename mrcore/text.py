"""Text from outside, made fit to be stored, shown and sent: the one place that cleans and bounds it.

Whatever users, data, file names or other machines bring may hold lone surrogates (which no file or terminal takes),
control characters (which a terminal obeys) and megabytes. A text is cleaned where it enters an error, an event, a log
line, a terminal or the store; cleaning never raises, so recording a failure cannot fail for its content.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Iterable
from typing import Any

LINE_LIMIT, TEXT_LIMIT = 2_000, 20_000  # characters: one line of a message; a traceback or the end of an output
FACTS_LIMIT, MEMBERS_LIMIT, DEPTH_LIMIT = 100_000, 100, 8  # of `plain`: characters in all, members of each list
_NOTE = 50  # characters of the note that something was left out
FEW = 20  # faults that a message lists
# C0 but newline and tab, DEL, C1, line separators, controls of writing direction (they reorder text), surrogates
_UNFIT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def clean(text: object, limit: int = TEXT_LIMIT) -> str:
    """Return `text` with every unfit character escaped, cut to about `limit` characters if it has more; never raises.

    What is left out is the middle, and its length is said. Any object will do: one whose `__str__` raises is named by
    its type. The result encodes to UTF-8 and may go to a terminal. Newlines and tabs stay; see `one_line`.
    """
    if type(text) is not str:
        try:
            text = str.__str__(str(text))  # twice: `__str__` may give a str of a class with ideas of its own
        except BaseException as error:  # noqa: BLE001  user code may raise anything here
            return f"<{type_name(text)} whose __str__ raises {type_name(error)}>"
    fit = _UNFIT.sub(_escape, text) if len(text) <= limit + _NOTE else ""
    if len(text) <= limit + _NOTE and len(fit) <= limit + _NOTE:  # so that what was cut once is not cut again
        return fit
    head = _first(text[: limit * 3 // 4], limit * 3 // 4)
    tail = _first(text[len(text) - (limit - limit * 3 // 4) :][::-1], limit - limit * 3 // 4)
    middle = f" […{len(text) - head - tail:,} characters left out…] "
    return _UNFIT.sub(_escape, text[:head]) + middle + _UNFIT.sub(_escape, text[len(text) - tail :])


def _first(text: str, room: int) -> int:
    """Return how many of the first characters of `text` take at most `room` once they are escaped."""
    return bisect_right(range(len(text)), room, key=lambda count: len(_UNFIT.sub(_escape, text[: count + 1])))


def escaped(text: str) -> str:
    """Return `text` with every unfit character escaped, as long as it may be."""
    return _UNFIT.sub(_escape, text)


def one_line(text: object, limit: int = LINE_LIMIT) -> str:
    """`clean` for what must stay one line: newlines and tabs are escaped, too."""
    return clean(text, limit).replace("\n", "\\n").replace("\t", "\\t")


def message(text: object) -> str:
    """`clean` for a message: what is to be a further line of it must be indented, any other newline is escaped.

    So no name of a file can look like a line of its own.
    """
    return re.sub(r"\n(?!  )", r"\\n", clean(text)).replace("\t", "\\t")


def plain(value: Any) -> Any:
    """Return a copy of `value` that any JSON writer takes, every text in it cleaned, bounded as a whole; never raises.

    What is no JSON becomes text; of long lists and mappings the first members stay, and how many are left out.
    """
    left = FACTS_LIMIT

    def copy(value: Any, depth: int) -> Any:
        nonlocal left
        left -= 1
        kind = type(value)
        if value is None or kind is bool or (kind is float and math.isfinite(value)):
            return value
        if kind is int:
            return value if value.bit_length() <= 1024 else f"<integer of {value.bit_length():,} bits>"
        if kind not in (dict, list, tuple):
            cut = clean(value, max(200, min(TEXT_LIMIT, left)))
            left -= len(cut)
            return cut
        if depth >= DEPTH_LIMIT:
            return f"<{type_name(value)}>"
        kept: list[Any] = []
        for member in value.items() if kind is dict else value:
            if (left <= 0 or len(kept) >= MEMBERS_LIMIT) and len(value) - len(
                kept
            ) > 1:  # one alone may be our own note
                break
            kept.append(
                (one_line(member[0], 200), copy(member[1], depth + 1)) if kind is dict else copy(member, depth + 1)
            )
        more = f"… and {len(value) - len(kept):,} more"
        if len(kept) < len(value):
            kept.append(("…", more) if kind is dict else more)
        return dict(kept) if kind is dict else kept

    return copy(value, 0)


def listed(faults: Iterable[str]) -> str:
    """Return the first of many faults for a message, and how many more there are; equal ones are told once."""
    all_of_them = list(dict.fromkeys(faults))
    more = len(all_of_them) - FEW
    return "; ".join(all_of_them[:FEW]) + (f"; and {more:,} more like these" if more > 0 else "")


def unfit(text: str) -> str | None:
    """Return why a text can be no name or argument, None if it can: every file, terminal and database takes it."""
    if "\0" in text:
        return "holds a NUL character"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "is not UTF-8"
    return None


def json_text(text: str) -> str:
    """Return JSON text with all that is unfit escaped as JSON does it, which means the same and can be written."""
    return _UNFIT.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def type_name(thing: object) -> str:
    """Return the name of a thing's type, whatever its `__class__` or its metaclass says."""
    return str(type.__dict__["__name__"].__get__(type(thing)))


# --- Numbers for people: the same in the command line, the dashboard, notebooks and errors ---------------------------


def size(count: float) -> str:
    """Return a number of bytes as people read it: 134 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 99.95 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def percent(fraction: float) -> str:
    """Return a fraction in per cent: 43 %."""
    return f"{100 * fraction:.0f} %"


def duration(seconds: float) -> str:
    """Return a length of time that was measured: 0.37 s, 2.5 s, 2 min 08 s, 1 h 05 min."""
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 0.995 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def rough(seconds: float) -> str:
    """Return a length of time that is estimated or set, in one number and a unit: 90 s, 2 min, 3 h."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
