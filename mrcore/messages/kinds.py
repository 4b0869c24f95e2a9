"""Kinds of values, each with its bounds, and the base of all messages."""

from __future__ import annotations

import threading
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta, Struct

from mrcore.text import one_line

T = TypeVar("T")
NAME_CHARACTERS, PAGE_FILES = 4_096, 5_000
# Of one node in one run, and no honest node lists more: 16 TiB are 262,144 splits, which the master plans in memory.
MAX_INPUT_FILES, MAX_INPUT_BYTES, MAX_INPUT_NAMES = 500_000, 1 << 44, 64 << 20

Count = Annotated[int, Meta(ge=0, le=(1 << 62))]
Positive = Annotated[int, Meta(ge=1, le=(1 << 62))]
TimeNs = Annotated[int, Meta(ge=-(1 << 62), le=(1 << 62))]  # of a file: 1970 and later, or before
Inode = Annotated[int, Meta(ge=0)]  # some file systems use all 64 bits
Mode = Annotated[int, Meta(ge=0, le=0o777)]
Crc32 = Annotated[int, Meta(ge=0, le=(1 << 32) - 1)]
Seconds = Annotated[float, Meta(ge=0, lt=1e15)]
Token = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9_-]{1,64}\Z")]  # made by the node: a listing, an upload, a cursor
Hash = Annotated[str, Meta(pattern=r"\A[0-9a-f]{32}\Z")]  # of a project's content, or its packages'
Word = Annotated[str, Meta(max_length=200)]
Line = Annotated[str, Meta(max_length=20_000)]
JobName = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}\Z")]
ServerName = JobName
PART_PATTERN = r"part-([0-9]{1,12})-[0-9]{1,9}-[0-9]{1,9}\.data(\.gz)?"  # of every part; group 1: run
PartName = Annotated[str, Meta(pattern=rf"\A{PART_PATTERN}\Z")]
# Of a file below a folder, with the folders between: it does not lead out.
Name = Annotated[str, Meta(pattern=r"\A(?!([^\0]*/)?\.{1,2}(/|\Z))[^\0/]+(/[^\0/]+)*\Z", max_length=NAME_CHARACTERS)]
AbsolutePath = Annotated[str, Meta(pattern=r"\A/[^\0]*\Z", max_length=NAME_CHARACTERS)]


class Message(Struct, frozen=True, kw_only=True):
    """A message whose fields travel by name; fields that this release does not know are left out."""


class Row(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, order=True, gc=False):
    """A message of which there are many: its fields travel by position."""


_decoders: dict[Any, msgspec.json.Decoder[Any]] = {}
_building = threading.Lock()


def decoder(kind: Any) -> msgspec.json.Decoder[Any]:
    """Return the decoder of a type, made once.

    msgspec collects what it knows of a struct at its first use; a second thread that meets this half done crashes the
    process (seen with 0.22). So it is done here only, by one thread at a time.
    """
    with _building:
        if kind not in _decoders:
            _decoders[kind] = msgspec.json.Decoder(kind)
        return _decoders[kind]


def decode(kind: type[T], text: str | bytes) -> T:
    """Return JSON as the type it is to have. Raises ValueError in one line, with the place in the text."""
    try:
        return decoder(kind).decode(text)  # type: ignore[no-any-return]
    except msgspec.MsgspecError as error:
        raise ValueError(one_line(error, 300)) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def convert(kind: type[T], plain: object) -> T:
    """Return what JSON was decoded to as the type it is to have. Raises ValueError in one line, with the place."""
    decoder(kind)  # so that `convert` finds all that msgspec has to know
    try:
        return msgspec.convert(plain, kind)
    except msgspec.MsgspecError as error:
        raise ValueError(one_line(error, 300)) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
