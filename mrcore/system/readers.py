"""Reading files whatever they are: plain ones without opening a pipe by mistake, compressed ones by their format.

A compressed file is a row of streams (gzip and bzip2 call them members and streams, zstd frames), and all of it counts:
what `gzip -dc`, `bzip2 -dc`, `xz -dc` or `zstd -dc` would write is what is read, padding included, or the reader fails
with the byte. It is stricter in one thing: what follows the last stream and is none fails, where gzip and bzip2 warn.
Formats: RFC 1952 (gzip), the bzip2 manual, the .xz file format 1.2 (section 2), RFC 8878 (zstd).
"""

from __future__ import annotations

import bz2
import errno
import lzma
import os
import stat
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

try:  # comes with xopen where it runs, and is three times as fast
    from isal.isal_zlib import decompressobj
except ImportError:
    from zlib import decompressobj  # type: ignore[assignment]  # the same, but for the kind of its argument

READ_BYTES = 128 * 1024
FIRST_BYTES = 4 * 1024  # handed to a new stream: what it leaves over is copied, and a log may have a stream per line
HEAD_BYTES = 512  # a tar archive's first block, the longest thing by which a format is known
_KINDS = {
    stat.S_IFIFO: "fifo", stat.S_IFSOCK: "socket", stat.S_IFBLK: "device", stat.S_IFCHR: "device",
    stat.S_IFDIR: "folder",
}  # fmt: skip


class NotRegular(OSError):
    """What should be opened is no plain file; `kind` is what it is: fifo, socket, device, folder."""

    def __init__(self, path: str | os.PathLike[str], kind: str) -> None:
        super().__init__(errno.EINVAL, f"it is a {kind}, no plain file", os.fspath(path))
        self.kind = kind


def open_regular(path: str | os.PathLike[str]) -> int:
    """Open a plain file to read and return its descriptor. Raises OSError, NotRegular for anything but a file.

    A FIFO must not even be opened: its writer would go on, find no reader, and die of SIGPIPE.
    """
    handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        mode = os.fstat(handle).st_mode
        if not stat.S_ISREG(mode):
            raise NotRegular(path, _KINDS.get(stat.S_IFMT(mode), "special file"))
        return os.open(f"/proc/self/fd/{handle}", os.O_RDONLY | os.O_CLOEXEC)  # this very file, whatever took its name
    finally:
        os.close(handle)


# --- Formats ---------------------------------------------------------------------------------------------------------


class Damaged(Exception):
    """A compressed file is not what its format demands; the text names the byte."""


class Coder(Protocol):
    """Decodes one stream: the interface of bz2's, lzma's and zstd's decompressors."""

    @property
    def eof(self) -> bool:
        """Whether the stream has ended, its checksum compared."""

    @property
    def needs_input(self) -> bool:
        """Whether `decompress` can do nothing without new input."""

    @property
    def unused_data(self) -> bytes:
        """What was handed in and lies behind the stream's end."""

    def decompress(self, data: Any, max_length: int = -1) -> bytes:
        """Return up to `max_length` bytes; without input goes on with what it holds."""


class _Gzip:
    """One gzip member, with the interface of the others."""

    def __init__(self) -> None:
        self._zlib = decompressobj(wbits=31)
        self.eof, self.needs_input, self.unused_data = False, True, b""

    def decompress(self, data: Any, max_length: int = -1) -> bytes:
        """Return up to `max_length` bytes; `data` only when `needs_input`."""
        result: bytes = self._zlib.decompress(self._zlib.unconsumed_tail or data, max_length)
        self.eof, self.unused_data = self._zlib.eof, self._zlib.unused_data
        self.needs_input = not self._zlib.unconsumed_tail and len(result) < max_length
        return result


class Format(NamedTuple):
    """How the files of one format are named and read.

    `begins` judges the first `header` bytes of a stream; zero bytes may follow one in units of `padding` (0: none).
    """

    name: str
    suffixes: tuple[str, ...]
    header: int
    begins: Callable[[bytes], bool]
    coder: Callable[[], Coder]
    padding: int = 0


def _gzip_begins(head: bytes) -> bool:
    return head[:3] == b"\x1f\x8b\x08" and not head[3] & 0xE0  # reserved flags: isal would pass over them


def _bzip2_begins(head: bytes) -> bool:
    return head[:3] == b"BZh" and head[3] in b"123456789" and head[4:] in (b"1AY&SY", b"\x17rE8P\x90")


def _zstd_begins(head: bytes) -> bool:
    return head == b"\x28\xb5\x2f\xfd" or (head[1:] == b"\x2a\x4d\x18" and head[0] & 0xF0 == 0x50)  # or skippable


FORMATS = (
    Format("gzip", (".gz", ".gzip", ".tgz"), 4, _gzip_begins, _Gzip, padding=1),
    Format("bzip2", (".bz2", ".bz", ".tbz2", ".tbz"), 10, _bzip2_begins, bz2.BZ2Decompressor),
    Format("xz", (".xz", ".txz"), 6, b"\xfd7zXZ\0".__eq__, lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ), padding=4),
    Format("zstd", (".zst", ".zstd", ".tzst"), 4, _zstd_begins, zstd.ZstdDecompressor),
)
SUFFIXES = tuple(suffix for form in FORMATS for suffix in form.suffixes)
# What is read by none of these, and what begins such a file (at which byte): named in errors, instead of bad text.
_OTHERS = (
    ("an lz4 file", 0, (b"\x04\x22\x4d\x18", b"\x02\x21\x4c\x18")),
    ("a zip archive", 0, (b"PK\x03\x04", b"PK\x05\x06")),
    ("a 7z archive", 0, (b"7z\xbc\xaf\x27\x1c",)),
    ("a rar archive", 0, (b"Rar!\x1a\x07",)),
    ("a file of compress (.Z)", 0, (b"\x1f\x9d",)),
    ("an lzma file", 0, (b"\x5d\0\0",)),
    ("an lzip file", 0, (b"LZIP\x01",)),
    ("an lzop file", 0, (b"\x89LZO\0",)),
    ("a snappy file", 0, (b"\xff\x06\0\0sNaPpY",)),
    ("a tar archive", 257, (b"ustar\0", b"ustar  \0")),
)


def format_of(path: str) -> Format | None:
    """Return the format by which a file of this name is read, None for a plain one; its suffix decides, in any case."""
    name = path.lower()
    return next((form for form in FORMATS if name.endswith(form.suffixes)), None)


def suffix_of(path: str) -> str:
    """Return the suffix, as it is written, that makes a file a compressed one, or an empty text."""
    name = path.lower()
    return next((path[-len(suffix) :] for suffix in SUFFIXES if name.endswith(suffix)), "")


def no_text(head: bytes) -> str | None:
    """Return what a file is and what to do, if its first HEAD_BYTES show that it is compressed or an archive."""
    for form in FORMATS:
        if len(head) >= form.header and form.begins(head[: form.header]):
            return f"is compressed by {form.name}: give it a name that ends in {form.suffixes[0]}"
    for name, at, marks in _OTHERS:
        if head.startswith(marks, at):
            return f"is {name}, which is not read: unpack it, or pack its text by gzip, bzip2, xz or zstd"
    return None


class _Source:
    """The bytes of a file up to its listed size, with the position of the next one in `at`."""

    def __init__(self, raw: Any, size: int) -> None:
        self._raw, self._size = raw, size
        self._held, self._next, self.at = b"", 0, 0

    def peek(self, count: int) -> bytes:
        """Return the next `count` bytes, fewer at the end."""
        while len(self._held) - self._next < count and self._fill():
            pass
        return self._held[self._next : self._next + count]

    def take(self, count: int) -> memoryview:
        """Return at most `count` of the next bytes, none at the end, and go behind them."""
        if self._next == len(self._held):
            self._fill()
        view = memoryview(self._held)[self._next : self._next + count]
        self.back(-len(view))
        return view

    def back(self, count: int) -> None:
        """Give back the last `count` bytes that were taken."""
        self._next -= count
        self.at -= count

    def _fill(self) -> bool:
        left = self._size - self.at - (len(self._held) - self._next)
        fresh = self._raw.read(min(READ_BYTES, left)) if left > 0 else b""
        self._held, self._next = self._held[self._next :] + fresh, 0
        return bool(fresh)


def decompress(raw: Any, size: int, form: Format, block_bytes: int) -> Iterator[bytes]:
    """Yield what the first `size` bytes of a file hold, in blocks of at most `block_bytes`. Raises Damaged, OSError."""
    source, streams = _Source(raw, size), 0
    while head := source.peek(form.header):
        if streams and form.padding and not head[0]:
            if _skip_zeros(source) % form.padding or (form.padding == 1 and source.peek(1)):
                raise Damaged(f"the zero bytes that end at byte {source.at:,} are no padding of {form.name}")
            continue
        if len(head) < form.header or not form.begins(head):
            what = f"what follows its last stream, at byte {source.at:,}," if streams else "what it begins with"
            raise Damaged(f"{what} is no stream of {form.name}{_other(source, form)}")
        yield from _stream(source, form, block_bytes)
        streams += 1
    if not streams:
        raise Damaged(f"it is empty, and even no data is some bytes of {form.name}")


def _other(source: _Source, form: Format) -> str:
    other = next((one for one in FORMATS if one.begins(source.peek(one.header).ljust(one.header))), None)
    return f" but of {other.name}" if other and other is not form else ""


def _skip_zeros(source: _Source) -> int:
    count = 0
    while view := source.take(FIRST_BYTES):
        zeros = len(view) - len(bytes(view).lstrip(b"\0"))
        count += zeros
        if zeros < len(view):
            source.back(len(view) - zeros)
            break
    return count


def _stream(source: _Source, form: Format, block_bytes: int) -> Iterator[bytes]:
    begin, coder, portion = source.at, form.coder(), FIRST_BYTES
    while not coder.eof:
        view = memoryview(b"")
        if coder.needs_input:
            view = source.take(portion)
            portion = min(2 * portion, READ_BYTES)
            if not view:
                raise Damaged(f"it ends at byte {source.at:,}, inside of the stream that begins at byte {begin:,}")
        try:
            block = coder.decompress(view, block_bytes)
        except Exception as error:  # four libraries with error classes of their own
            raise Damaged(f"near byte {source.at - len(view):,}: {type(error).__name__}: {error}") from error
        if block:
            yield block
    source.back(len(coder.unused_data))


def unfinished_bytes(text: bytes) -> int:
    """Return how many of the last bytes are the beginning of a UTF-8 character whose rest is not there yet: 0 to 3."""
    for count in (1, 2, 3):
        try:
            text[-count:].decode()
        except UnicodeDecodeError as error:
            if error.start == 0 and error.reason == "unexpected end of data":
                return count
    return 0
