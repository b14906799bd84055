"""`python -m bench serve cost | first | preview | load`."""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from bench.machine import command_line, describe_machine
from bench.options import JSON, PAIRS
from bench.pairs import alternate, report
from bench.serve.load import load
from bench.serve.running import Server

REPEATS = click.option(
    "--repeats", default=20, show_default=True, help="Timed renders per run, after three that warm up."
)
REQUEST: dict[str, Any] = {"prompt": "a dog face on a red background", "width": 128, "height": 128, "steps": 8}
WARM_UP = 3


@click.group()
def serve() -> None:
    """Measure the server, with the demo model."""


@serve.command()
@PAIRS
@REPEATS
@JSON
def cost(pairs: int, repeats: int, as_json: bool) -> None:
    """A picture through the server (request to PNG, previews on), beside the pipeline's stages and a file."""
    arguments = {"request": REQUEST, "warmup": WARM_UP, "repeats": repeats}
    runs = alternate({"served": arguments, "zimage": arguments}, "picture", pairs)
    more = [1e3 * (a["picture"] - b["picture"]) for a, b in zip(runs["served"], runs["zimage"], strict=True)]
    report(runs, {"repeats": repeats, "more_ms": round(statistics.median(more), 2)}, as_json)


@serve.command()
@REPEATS
@JSON
def first(repeats: int, as_json: bool) -> None:
    """The answer to a request on an idle server, and its first event on a stream that is open."""
    import httpx

    seconds: dict[str, list[float]] = {"answer": [], "first_event": []}
    with (
        Server() as server,
        httpx.Client(base_url=server.url, timeout=60) as http,
        http.stream("GET", "/api/events") as stream,
    ):
        lines = stream.iter_lines()
        for seed in range(WARM_UP + repeats):
            begun = time.perf_counter()
            job = http.post("/api/jobs", json={**REQUEST, "seed": seed}).json()["id"]
            seconds["answer"].append(time.perf_counter() - begun)
            next(line for line in lines if job in line)
            seconds["first_event"].append(time.perf_counter() - begun)
            while http.get(f"/api/jobs/{job}").json()["state"] != "done":
                time.sleep(0.05)
    _told({name: _spread([1e3 * x for x in values[WARM_UP:]]) for name, values in seconds.items()}, as_json)


@serve.command()
@REPEATS
@JSON
def preview(repeats: int, as_json: bool) -> None:
    """What previews add to a step, and what drawing one takes in the thread that draws them."""
    import tempfile

    import zimage
    from zimage.render.preview import Previews, prefitted

    pipe = zimage.ZImage.load()
    request = zimage.Request.from_mapping({**REQUEST, "seed": 1})
    with tempfile.TemporaryDirectory() as folder:
        factors = prefitted(pipe, Path(folder))

    def plain() -> None:
        for _ in pipe.run(request):
            pass

    def shown() -> None:
        with Previews(factors, lambda preview: None) as previews:
            for event in pipe.run(request, hooks=[previews.hook]):
                previews.take(event)

    added = []
    for i in range(WARM_UP + repeats):
        taken = {call: _milliseconds(call) for call in ((plain, shown) if i % 2 else (shown, plain))}
        added.append((taken[shown] - taken[plain]) / REQUEST["steps"])
    latents = next(event.latents for event in pipe.run(request) if event.latents is not None).cpu()
    drawing = [_milliseconds(lambda: factors.draw(latents)) for _ in range(WARM_UP + repeats)]
    _told({"added": _spread(added[WARM_UP:]), "drawing": _spread(drawing[WARM_UP:])}, as_json)


serve.add_command(load)


def _milliseconds(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - begun)


def _spread(values: list[float]) -> dict[str, Any]:
    return {"median": round(statistics.median(values), 2), "range": [round(min(values), 2), round(max(values), 2)]}


def _told(figures: dict[str, dict[str, Any]], as_json: bool) -> None:
    """Milliseconds by name, and everything as a line of JSON."""
    if not as_json:
        for name, one in figures.items():
            print(f"{name:14}{one['median']:>8} ms ({one['range'][0]} to {one['range'][1]})")
    print(json.dumps({"machine": describe_machine(), "command": command_line(), "ms": figures}))
