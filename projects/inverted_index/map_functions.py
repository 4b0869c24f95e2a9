"""Inverted index: which files does a name stand in? Functions are found by their names in the module."""

import re

from mrcore import task

NAME = re.compile(r"[^\W\d]\w*")  # a letter or underscore, then letters, digits, underscores


def names_and_file(line, auxiliary_data):
    """`"x = f(x)"` in a.py gives `[("x", "a.py"), ("f", "a.py")]`: each name once a line, with the file's path."""
    path = task.input_file
    return [(name, path) for name in set(NAME.findall(line))]
