"""Word count: one item for each word of a line."""


class MapFunctions:
    """The original's style: a class that hands out the function asked for by name."""

    def __init__(self, map_function_name):
        self.map_function = {"count_words": count_words}.get(map_function_name)

    def get_map_function(self):
        return self.map_function


def count_words(line, auxiliary_data):
    """`"to be or not to be"` gives `[("to", 1), ("be", 1), ("or", 1), …]`."""
    return [(word, 1) for word in line.split()]
