"""Word count: add up. The same function serves as combiner, since adding is associative."""


class ReduceFunctions:
    def __init__(self, reduce_function_name):
        self.reduce_function = {"add_up": add_up}.get(reduce_function_name)

    def get_reduce_function(self):
        return self.reduce_function


def add_up(group, auxiliary_data):
    return [(group[0][0], sum(count for _, count in group))]
