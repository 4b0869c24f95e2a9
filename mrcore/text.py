"""Text from outside, made fit to be stored, shown and sent: the one place that cleans and bounds it.

Whatever users, data, file names or other machines bring may hold lone surrogates (which no file or terminal takes),
control characters (which a terminal obeys) and megabytes. A text is cleaned where it enters an error, an event, a log
line, a terminal or the store; cleaning never raises, so recording a failure cannot fail for its content.
"""

from __future__ import annotations

import re

LINE_LIMIT, TEXT_LIMIT = 2_000, 20_000  # characters: one line of a message; a traceback or the end of an output
# C0 but newline and tab, DEL, C1, line separators, controls of writing direction (they reorder text), surrogates
_UNFIT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def clean(text: object, limit: int = TEXT_LIMIT) -> str:
    """Return `text` with every unfit character escaped, at most about `limit` characters of it; never raises.

    What is left out is the middle, and its length is said. Any object will do: one whose `__str__` raises is named by
    its type. The result encodes to UTF-8 and may go to a terminal. Newlines and tabs stay; see `one_line`.
    """
    if not isinstance(text, str):
        try:
            text = str(text)
        except BaseException as error:  # noqa: BLE001  user code may raise anything here
            return f"<{type(text).__name__} whose __str__ raises {type(error).__name__}>"
    if len(text) > limit:  # before escaping, so that the work is bounded as well
        head = limit * 3 // 4
        tail = limit - head
        text = f"{text[:head]} […{len(text) - limit:,} characters left out…] {text[len(text) - tail :]}"
    return _UNFIT.sub(_escape, text)


def one_line(text: object, limit: int = LINE_LIMIT) -> str:
    """`clean` for what must stay one line: newlines and tabs are escaped, too."""
    return clean(text, limit).replace("\n", "\\n").replace("\t", "\\t")
