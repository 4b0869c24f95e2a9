"""Reads splits and calls the map function on every line."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

from mrcore import task
from mrcore.engine.functions import Function
from mrcore.engine.inputs import Reader, cut_lines
from mrcore.engine.output import DirectOutput
from mrcore.engine.records import NUMBERISH, SCALARS, BadItem, Snapshot, check_item, is_plain_tuple
from mrcore.engine.shuffler import Shuffle
from mrcore.engine.user_errors import NOTHING, flaw_of, user_fault
from mrcore.errors import JobFault
from mrcore.messages.tasks import Part, Spill, Split
from mrcore.system import forks
from mrcore.system.readers import unfinished_bytes
from mrcore.text import clean

LINES_PER_LOOK = 512  # at the memory
NO_BLOCK: tuple[int, str, Iterator[str]] = (0, "", iter(()))
SMALL_TEXT = 1024  # characters; longer values go the long way, which remembers that frames must be sized


def _line_offset(offset: int, text: str, stream: Iterator[str]) -> Callable[[], int]:
    """Return a function that works out the byte offset of the line that was read last from `stream`; for any thread."""
    place = offset, 0  # a byte, and which character stands there: only what follows it is encoded again

    def line_offset() -> int:
        nonlocal place
        known, character = place
        if isinstance(stream, io.StringIO):
            start = text.rfind("\n", 0, max(0, stream.tell() - 1)) + 1
            known += len(text[character:start].encode()) if start >= character else -len(text[start:character].encode())
            place = known, start
        return known

    return line_offset


class Map:
    """Calls `function(line, auxiliary)` for the lines of splits and hands its items to `sink`.

    `on_bad_text` says what happens to bytes that are no UTF-8: "fail" or "replace", which counts the lines in
    `replaced_lines`; a character that a plain file ends inside of is left out and counted in `unfinished_characters`.
    Items that got into the shuffle unchecked (see `shuffler`) are checked at the spill; when one is bad, the lines
    since the last spill are mapped again with every item checked, only to name the line.
    """

    def __init__(
        self,
        function: Function,
        name: str,
        auxiliary: Any,
        sink: Shuffle | DirectOutput,
        reader: Reader,
        *,
        on_bad_text: str = "fail",
    ) -> None:
        self._function, self._name, self._auxiliary = function, name, auxiliary
        self._sink, self._reader, self._on_bad_text = sink, reader, on_bad_text
        self._since_spill: list[Split] = []
        self._emit = self._to_shuffle if isinstance(sink, Shuffle) else self._to_parts
        self.lines = self.items = self.unfinished_characters = self.replaced_lines = 0
        self._held = 0
        self._block = NO_BLOCK  # in work: its bytes, its text, and the stream of its lines

    def map(self, splits: Sequence[Split]) -> dict[str, int]:
        """Map the splits of one bundle and return `{"lines", "items", "bytes"}` read and emitted by them.

        Raises JobFault naming function, file, offset and line for whatever the user's code or data does wrong.
        """
        lines, items, read = self.lines, self.items, self._reader.bytes_read
        for split in splits:
            self._since_spill.append(split)
            self._map_split(split, self._emit)
        return {"lines": self.lines - lines, "items": self.items - items, "bytes": self._reader.bytes_read - read}

    def so_far(self) -> tuple[int, int]:
        """Return the bytes of input and the lines that were mapped, about; for any thread, as the loop goes on."""
        size, text, stream = self._block
        read, lines, place = self._reader.bytes_read, self.lines, 0
        if isinstance(stream, io.StringIO):
            place = stream.tell()
        return max(0, read - size * (len(text) - place) // (len(text) or 1)), lines + text.count("\n", 0, place)

    def finish(self) -> list[Spill] | list[Part]:
        """Seal the output and return its spills (or its parts, for a job without a reduce function)."""
        try:
            return self._sink.close() if isinstance(self._sink, DirectOutput) else self._sink.shuffle()
        except (ValueError, OverflowError, TypeError) as error:
            raise self._name_the_line(error) from error

    def _map_split(self, split: Split, emit: Callable[[Iterator[str]], None]) -> None:
        path, size = split.path, None if split.end is None else split.size
        task.set_surroundings(input_file=path)
        for block_offset, block in self._reader.blocks(split):
            if block_offset + len(block) == size and (cut := unfinished_bytes(block)):
                block = block[:-cut]  # a writer has flushed half a character: the rest is to come
                self.unfinished_characters += 1
            for offset, text in self._decode(path, block_offset, block) if block else ():
                lines = text.count("\n") + (not text.endswith("\n"))
                stream = io.StringIO(text, newline="\n") if lines > 1 else iter((text,))  # StringIO takes 4 bytes/char
                task.set_offset(_line_offset(offset, text, stream))
                forks.read_from(stream if isinstance(stream, io.StringIO) else None)
                self._block = len(block), text, stream
                for _ in range(0, lines, LINES_PER_LOOK):
                    self._note()
                    emit(islice(stream, LINES_PER_LOOK))
                    forks.check()
                    self._sink.watch.look()  # its own thread may be kept waiting on a busy machine
                self.lines, self._block = self.lines + lines, NO_BLOCK
        task.in_hand(f"what map function {self._name} emitted up to the end of {path}")
        task.set_offset(None)

    def _note(self) -> None:
        task.in_hand(self._in_hand(), self._in_hand)

    def _in_hand(self) -> str:
        return f"map function {self._name}, the lines from byte {task.offset} of {task.input_file} on"

    def _decode(self, path: str, offset: int, block: bytes) -> Iterator[tuple[int, str]]:
        try:
            yield offset, block.decode("utf-8")
        except UnicodeDecodeError as error:
            if self._on_bad_text == "replace":  # line by line: the replacements move what follows them
                for line in cut_lines(block):
                    text = line.decode("utf-8", "replace")
                    self.replaced_lines += text.encode() != line
                    yield offset, text
                    offset += len(line)
                return
            raise JobFault(
                f"input file {path} is not UTF-8 at byte {offset + error.start} ({error.reason}): convert it, or set "
                "on_bad_text: replace to read it with replacement characters",
                file=path,
                offset=offset + error.start,
            ) from error

    def _to_shuffle(self, stream: Iterator[str]) -> None:
        """The hot loop: one dict operation per item that is a tuple of a scalar or flat key and a small scalar."""
        assert isinstance(self._sink, Shuffle)
        function, auxiliary = self._function, self._auxiliary
        sink, watch, limit = self._sink, self._sink.watch, self._sink.max_items
        groups, held, spilled = sink.groups, self._held, 0
        line, item, items = "", None, NOTHING
        try:
            for line in stream:
                item, items = None, NOTHING
                items = function(line, auxiliary)
                for item in items:
                    if item.__class__ is tuple:
                        key, value = item
                        if (key.__class__ in SCALARS or is_plain_tuple(key)) and (
                            value.__class__ in NUMBERISH or (value.__class__ is str and len(value) < SMALL_TEXT)
                        ):
                            groups[key].append(value)
                        else:
                            sink.add(item)
                    else:
                        sink.add(item)
                    held += 1
                    if watch.due or held >= limit:
                        self._spill()
                        spilled, held = spilled + held, 0
        except BaseException as error:
            raise self._fault(error, line, item, items) from error
        self.items += spilled + held - self._held
        self._held = held

    def _to_parts(self, stream: Iterator[str]) -> None:
        """Every item checked and written straight away: jobs without a reduce function, and `_name_the_line`."""
        add = self._sink.add if isinstance(self._sink, DirectOutput) else partial(check_item, snapshot=Snapshot())
        line, item, items = "", None, NOTHING
        try:
            for line in stream:
                item, items = None, NOTHING
                items = self._function(line, self._auxiliary)
                for item in items:
                    add(item)
                    self.items += 1
        except BaseException as error:
            raise self._fault(error, line, item, items) from error

    def _spill(self) -> None:
        assert isinstance(self._sink, Shuffle)
        try:
            self._sink.spill()
        except (ValueError, OverflowError, TypeError) as error:
            raise self._name_the_line(error) from error
        self._note()  # a combiner had others
        del self._since_spill[:-1]  # the split that is being read may go on

    def _name_the_line(self, error: Exception) -> JobFault:
        for split in self._since_spill:
            try:
                self._map_split(split, self._to_parts)
            except JobFault as named:
                return named
        return JobFault(f"map function {self._name}: {error}", function=self._name)

    def _fault(self, error: BaseException, line: str, item: Any, items: Any) -> JobFault:
        """Return what went wrong at a line: the function raised, or returned what is no item."""
        where = {"function": self._name, "file": task.input_file, "offset": task.offset, "line": clean(line, 500)}
        place = f"{where['file']}, byte {where['offset']}: {clean(line.rstrip(chr(10)), 120)!r}"
        what, flaw = f"map function {self._name}", flaw_of(error, item, items)
        if flaw is None:
            return user_fault(error, f"{what} failed at {place}", **where)
        is_bad = issubclass(type(flaw), BadItem)
        what += " emitted a bad item" if is_bad else " returned no iterable of (key, value) pairs"
        return JobFault(f"{what}: {flaw}; at {place}", **where)
