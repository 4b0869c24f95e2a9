"""Where functions were written that were copied into a project: their errors name that place, not the copy.

`mrcore.face` writes the functions of a script or a notebook into a project's modules, each of which ends with a call of
`restore`.
"""

from __future__ import annotations

import gc
import linecache
from collections.abc import Sequence
from types import CodeType, FunctionType
from typing import NamedTuple


class Piece(NamedTuple):
    """Lines `first` to `last` of a copy, and the place where they were written: a name for people, the first line."""

    first: int
    last: int
    place: str
    written: int


def restore(file: str, pieces: Sequence[tuple[int, int, str, int]]) -> None:
    """Let all functions that were compiled from `file`, methods and inner ones too, say that they are of `pieces`.

    Their lines are kept for tracebacks, as if there was a file named `place`.
    """
    own = [Piece(*piece) for piece in pieces]
    lines = linecache.getlines(file)
    for piece in own:
        known = linecache.cache.get(piece.place, (0, None, list[str](), piece.place))
        there = list(known[2]) if len(known) == 4 else []
        there += ["\n"] * (piece.written + piece.last - piece.first - len(there))
        there[piece.written - 1 : piece.written + piece.last - piece.first] = lines[piece.first - 1 : piece.last]
        linecache.cache[piece.place] = (1, None, there, piece.place)  # without a time of change it is not looked for
    for thing in gc.get_objects():
        if type(thing) is FunctionType and thing.__code__.co_filename == file:
            thing.__code__ = _moved(thing.__code__, file, own)


def _moved(code: CodeType, file: str, pieces: Sequence[Piece]) -> CodeType:
    line = code.co_firstlineno
    piece = next((piece for piece in pieces if piece.first <= line <= piece.last), None)
    constants = tuple(
        _moved(inner, file, pieces) if type(inner) is CodeType and inner.co_filename == file else inner
        for inner in code.co_consts
    )
    if piece is None:
        return code.replace(co_consts=constants)
    return code.replace(co_consts=constants, co_filename=piece.place, co_firstlineno=piece.written + line - piece.first)
