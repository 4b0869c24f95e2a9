"""Identifiers of Python source: the names that a program calls, indexes, assigns or reaches through a dot."""

import keyword
import re

# Before `(` `[` `=` or `.name`, or after a dot: nearly all words of comments and docstrings stay out.
NAME = re.compile(r"[^\W\d]\w*(?=\s?[(\[=]|\.\w)|(?<=[\w)\]]\.)[^\W\d]\w*")
KEYWORDS = frozenset(keyword.kwlist)


def names_used(line, auxiliary_data):
    """`"size = len(self.rows)"` gives `[("size", 1), ("len", 1), ("self", 1), ("rows", 1)]`."""
    return [(name, 1) for name in NAME.findall(line) if name not in KEYWORDS]
