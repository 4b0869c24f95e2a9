"""Connects to ports of other machines and names the silent ones. Argument: JSON of [[name, address, port]…]."""

import json
import socket
import sys
from concurrent.futures import ThreadPoolExecutor

SECONDS = 5


def trouble(place):
    name, address, port = place
    try:
        socket.create_connection((address, port), SECONDS).close()
    except OSError as error:
        return f"{name} ({address} port {port}: {error.strerror or 'no answer'})"
    return None


places = json.loads(sys.argv[1])
with ThreadPoolExecutor(max(1, min(32, len(places)))) as pool:
    print("\n".join(filter(None, pool.map(trouble, places))))
