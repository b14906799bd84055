"""Asks a server for /health ten times a second until its input ends, and prints how long that took, in milliseconds."""

import http.client
import json
import sys
import threading
import time
from urllib.parse import urlsplit

PAUSE = 0.1  # seconds


def main(url: str) -> None:
    over, taken = threading.Event(), list[float]()

    def wait() -> None:
        sys.stdin.read()
        over.set()

    threading.Thread(target=wait, daemon=True).start()
    place = urlsplit(url)
    while not over.wait(PAUSE):
        begun = time.perf_counter()
        connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=30)
        connection.request("GET", "/health")
        status = connection.getresponse().status
        connection.close()
        taken.append(1e3 * (time.perf_counter() - begun))
        assert status == 200, status
    taken.sort()
    at = {"median": 0.5, "p99": 0.99, "max": 1.0}
    print(json.dumps({name: round(taken[min(int(q * len(taken)), len(taken) - 1)], 1) for name, q in at.items()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
