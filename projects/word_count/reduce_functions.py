"""Word count: add up. The same function serves as combiner, since adding is associative."""


class ReduceFunctions:
    """The original's style, as in `map_functions`."""

    def __init__(self, reduce_function_name):
        self.reduce_function = {"add_up": add_up}.get(reduce_function_name)

    def get_reduce_function(self):
        return self.reduce_function


def add_up(group, auxiliary_data):
    """`[("to", 1), ("to", 1)]` gives `[("to", 2)]`."""
    return [(group[0][0], sum(count for _, count in group))]
