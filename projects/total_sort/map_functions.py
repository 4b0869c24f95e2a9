"""Total order sort: the key is what the order goes by."""


def key_and_rest(line, auxiliary_data):
    """`"pear\\tgreen\\n"` gives `[("pear", "green")]`; a line without a tab is all key."""
    key, _, rest = line.rstrip("\n").partition("\t")
    return [(key, rest)]
