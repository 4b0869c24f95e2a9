"""A function that takes as long as the proof wants: until there is a file beside its input."""

import os
import time

DEADLINE_SECONDS = 1800


def slowly(line, auxiliary_data):
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not os.path.exists("/var/tmp/go") and time.monotonic() < deadline:
        time.sleep(0.1)
    return [(line.strip(), 1)]
