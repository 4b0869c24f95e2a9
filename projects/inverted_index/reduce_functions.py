"""Inverted index: the files of one name, each once."""


def each_file_once(group, auxiliary_data):
    """The combiner: drops repetitions and keeps the form of what the map function emits.

    `[("f", "a.py"), ("f", "a.py")]` gives `[("f", "a.py")]`.
    """
    name = group[0][0]
    return [(name, path) for path in {path for _, path in group}]


def list_files(group, auxiliary_data):
    """`[("f", "b.py"), ("f", "a.py"), ("f", "b.py")]` gives `[("f", ["a.py", "b.py"])]`."""
    return [(group[0][0], sorted({path for _, path in group}))]
