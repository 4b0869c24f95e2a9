"""`mrcore new`: the files of a project that works as it is, to be changed into one's own."""

from __future__ import annotations

import json
import re
from pathlib import Path

from mrcore.errors import UsageError
from mrcore.queue.job import NAME
from mrcore.text import one_line

MAP = '''\
"""Map functions of {name}: each gets a line of the input and yields (key, value) pairs."""

import re

WORD = re.compile(r"\\w+")


def count_words(line, auxiliary_data):
    """`"To be"` gives `("to", 1)` and `("be", 1)`."""
    for word in WORD.findall(line.lower()):
        yield word, 1
'''
REDUCE = '''\
"""Reduce functions of {name}: each gets all (key, value) pairs of one key. `add_up` is also the combiner."""


def add_up(group, auxiliary_data):
    """`[("to", 1), ("to", 1)]` gives `[("to", 2)]`."""
    return [(group[0][0], sum(count for _, count in group))]
'''
TESTS = '''\
"""Tests of the functions of {name}: `mrcore test {name}`."""

from map_functions import count_words
from reduce_functions import add_up


def test_every_word_of_a_line_counts():
    assert list(count_words("To be, or not\\n", None)) == [("to", 1), ("be", 1), ("or", 1), ("not", 1)]


def test_an_empty_line_has_no_word():
    assert list(count_words("\\n", None)) == []


def test_what_belongs_to_a_word_is_added_up():
    assert add_up([("to", 1), ("to", 3)], None) == [("to", 4)]
'''
JOB = """\
# The job of {name}. `mrcore template mapreduce` prints all keys, docs/jobs.md explains them.
job_type: mapreduce
job_name: {name}
project_name: {name}
run_once: true
input_dirs: [{inputs}]
map_function_name: count_words
combine_function_name: add_up
reduce_function_name: add_up
"""
README = """\
# {name}

Counts words. `map_functions.py` and `reduce_functions.py` have the functions, `job.yml` says what they read, `sample/`
has some input.

{commands}
"""
SAMPLE = "to be or not to be\nthat is the question\n"


def make(projects: Path, name: str, local: bool) -> list[str]:
    """Write a new project into the folder of `projects`; return the commands that lead to its first output.

    A `local` cluster reads the sample where it lies, a deployed one from its nodes. Raises UsageError.
    """
    folder = projects / name
    if not re.fullmatch(NAME, name):
        raise UsageError(f"{one_line(name)!r} is no name of a project: letters, digits, _, - and ., at most 100")
    if folder.exists() or folder.is_symlink():
        raise UsageError(f"{folder} is there already, and nothing was changed: choose another name, or remove it")
    sample = folder / "sample"
    inputs = json.dumps(str(sample), ensure_ascii=False) if local else f"inputs/{name}"
    shown = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
    commands = [
        f"mrcore test {name}",
        "mrcore cluster start" if local else f"mrcore upload {sample} inputs/{name}",
        f"mrcore run {shown / 'job.yml'}",
        f"mrcore cat {name}",
    ]
    files = {"map_functions.py": MAP, "reduce_functions.py": REDUCE, "test_functions.py": TESTS}
    files |= {"job.yml": JOB, "README.md": README, "sample/words.txt": SAMPLE}
    try:
        sample.mkdir(parents=True)
        for file, text in files.items():
            typed = "\n".join(f"    {command}" for command in commands)
            (folder / file).write_text(text.format(name=name, inputs=inputs, commands=typed), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot make the project {folder}: {error.strerror}") from None
    return commands
