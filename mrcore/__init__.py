"""mrcore: a Python MapReduce cluster that a small team can deploy, trust and understand."""

__version__ = "1.0.0"
WIRE_VERSION = 1  # raised whenever orders, frames or the data channel change meaning
