"""Join: every order of a customer together with the customer's name."""


class ReduceFunctions:
    """The original's style, as in `map_functions`."""

    def __init__(self, reduce_function_name):
        self.reduce_function = globals()[reduce_function_name]

    def get_reduce_function(self):
        return self.reduce_function


def orders_with_names(group, auxiliary_data):
    """An inner join: `(number, [name, order, amount])` for each order. Orders of nobody and customers without orders
    drop out."""
    names = [row[1] for _, row in group if row[0] == "customer"]
    return [(number, [name, *row[1:]]) for number, row in group if row[0] == "order" for name in names]
