"""A function that takes its time, so that things can happen in mid-job."""

import time


def slowly(line, auxiliary_data):
    time.sleep(0.5)
    return [(line.strip(), 1)]
