"""Identifiers: add up. Also the combiner, since adding is associative."""


def add_up(group, auxiliary_data):
    """`[("self", 1), ("self", 1)]` gives `[("self", 2)]`."""
    return [(group[0][0], sum(count for _, count in group))]
