"""Functions that a person watches in the screen window of a server."""

import time


def say(line, auxiliary_data):
    print("the function saw:", line.strip(), flush=True)
    time.sleep(1)
    return [(line.strip(), 1)]


def ask(line, auxiliary_data):
    answer = 20
    breakpoint()
    return [(line.strip(), answer)]
