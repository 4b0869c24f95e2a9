"""The pages of a listing, put together by the master within bounds."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from mrcore.errors import Malformed
from mrcore.messages.kinds import MAX_INPUT_BYTES, MAX_INPUT_FILES, MAX_INPUT_NAMES
from mrcore.messages.nodes import InputFile, InputPage
from mrcore.text import one_line

MAX_EMPTY_PAGES = 5_000  # while a node looks for the first file


class InputPages:
    """The pages of one node's input files, put together: bounded, each file once, no cursor twice."""

    def __init__(self, node: str, entries: Sequence[str]) -> None:
        self._node, self._entries, self._cursors, self._paths = node, entries, set[str](), set[str]()
        self._files: list[InputFile] = []
        self._names = self._bytes = self._empty = 0
        self.listing: InputPage | None = None

    def add(self, page: InputPage) -> str | None:
        """Take a page; return the cursor of the next. After the last, `listing` is that page with all files.

        Raises Malformed when the node lists more than an honest one does, or something twice.
        """
        files, cursor = page.files, page.next
        self._files += files
        self._paths.update(file.path for file in files)
        self._names += sum(len(file.path) for file in files)
        self._bytes += sum(file.size for file in files)
        self._empty += not files
        if len(self._paths) != len(self._files):
            raise self._malformed("a file twice")
        if len(self._paths) > MAX_INPUT_FILES or self._names > MAX_INPUT_NAMES or self._bytes > MAX_INPUT_BYTES:
            raise self._malformed(f"more than {MAX_INPUT_FILES:,} files or {MAX_INPUT_BYTES >> 40} TiB")
        if cursor in self._cursors or self._empty > MAX_EMPTY_PAGES:
            raise self._malformed("pages without an end")
        if cursor is not None:
            self._cursors.add(cursor)
            return cursor
        if missing := [entry for entry in self._entries if entry not in page.matched]:
            raise self._malformed(f"nothing about {one_line(missing[0], 100)!r}")
        self.listing = msgspec.structs.replace(page, files=self._files)
        return None

    def _malformed(self, what: str) -> Malformed:
        return Malformed(f"node {self._node} gave no answer to list_inputs: it lists {what}", node=self._node)
