"""Our side through the server, started as SCENARIO ARGUMENTS OUT."""

import itertools
from typing import Any

from bench.serve.running import Server
from bench.sides.clock import Clock, serve


def picture(clock: Clock, request: dict[str, Any], warmup: int, repeats: int) -> None:
    """From a request to its PNG in the hands of the client."""
    import httpx

    seeds = itertools.count()
    with Server() as server, httpx.Client(base_url=server.url, timeout=120) as http:

        def draw() -> None:
            http.post("/api/generate", json={**request, "seed": next(seeds)}).raise_for_status()

        clock.repeated("picture", draw, warmup, repeats)


if __name__ == "__main__":
    serve({"picture": picture})
