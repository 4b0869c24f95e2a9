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


def confined(line, auxiliary_data):
    with open("/proc/self/status") as status:
        return [entry.split() for entry in status if entry.startswith("NoNewPrivs")]


def flood(line, auxiliary_data):
    for _ in range(100):
        print(("z" * 1023 + "\n") * 1024)
    print("after the flood", flush=True)
    return [(line.strip(), 1)]
