"""Many clients at once: what they are answered, whether every picture is right, and what it does to the server.

Clients are tasks of one process; another one asks for /health, so that what it measures is the server. The library
draws every picture in use beforehand.
"""

import asyncio
import hashlib
import io
import json
import os
import random
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import click
import httpx
from PIL import Image

from bench.machine import command_line, describe_machine
from bench.options import JSON
from bench.serve.running import Server

PROMPTS = ("a dog face on a red background", "a cat", "a red ball on a table", "a green tree")
SEEDS = range(5)
WAIT = 300.0  # seconds that a job may take at most
MINUTE = 60.0  # seconds after which memory should stay as it is
ENDED = ("done", "failed", "cancelled")


@dataclass
class Tally:
    """What clients saw."""

    accepted: int = 0
    refused: Counter[int] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


@click.command()
@click.option("--clients", default=100, show_default=True, help="Clients at once.")
@click.option("--seconds", default=300.0, show_default=True, help="How long they go on to submit.")
@click.option("--size", default=128, show_default=True, help="Side of the picture in pixels.")
@click.option("--steps", default=8, show_default=True, help="Steps of each.")
@click.option("--threads", default=1, show_default=True, help="OMP_NUM_THREADS of the server and its worker.")
@JSON
def load(clients: int, seconds: float, size: int, steps: int, threads: int, as_json: bool) -> None:
    """Every accepted job ends once with the library's bits; /health meanwhile; memory after a minute and in the end."""
    requests = [{"prompt": p, "seed": s, "width": size, "height": size, "steps": steps} for p in PROMPTS for s in SEEDS]
    right = {_name(request): pixels for request, pixels in zip(requests, _drawn(requests, threads), strict=True)}
    with Server("--max-queue", str(2 * clients), threads=threads) as server:
        tally, memory, health = asyncio.run(_run(server, clients, seconds, requests, right))
        kept = _kept(server)
    told = _figures(tally, memory, health, kept, seconds)
    if not as_json:
        for name, value in told.items():
            print(f"{name:28} {value}")
    settings = {"clients": clients, "seconds": seconds, "size": size, "steps": steps, "threads": threads}
    print(json.dumps({"machine": describe_machine(), "command": command_line(), **settings, **told}))
    if told["faults"] or not told["kept_agrees"]:
        raise SystemExit(1)


async def _run(
    server: Server, clients: int, seconds: float, requests: list[dict[str, Any]], right: dict[str, str]
) -> tuple[Tally, dict[str, list[float]], dict[str, float]]:
    """Warm up, let the clients go, and wait for their last jobs; what they saw, bytes in memory, seconds of /health."""
    tally, limits = Tally(), httpx.Limits(max_connections=3 * clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=server.url, timeout=WAIT, limits=limits) as http:
        await _one(http, requests[0], "warm-up", right, Tally())
        with _Prober(server.url) as prober:
            watching = asyncio.create_task(_watch_memory(server))
            end = time.monotonic() + seconds
            await asyncio.gather(*(_client(http, n, end, requests, right, tally) for n in range(clients)))
            watching.cancel()
            memory = await watching
            health = prober.figures()
    return tally, memory, health


async def _client(
    http: httpx.AsyncClient,
    number: int,
    end: float,
    requests: list[dict[str, Any]],
    right: dict[str, str],
    tally: Tally,
) -> None:
    chance, sent = random.Random(number), 0
    while time.monotonic() < end:
        try:
            await _one(http, chance.choice(requests), f"{number}-{sent}", right, tally, follow=number % 2 == 0)
        except Exception as error:  # one that is not understood is a fault of the server
            tally.faults.append(f"client {number}: {type(error).__name__}: {error}")
        sent += 1


async def _one(
    http: httpx.AsyncClient,
    request: dict[str, Any],
    key: str,
    right: dict[str, str],
    tally: Tally,
    follow: bool = True,
) -> None:
    """One job from its request to the bits of its picture."""
    answer = await http.post("/api/jobs", json=request, headers={"Idempotency-Key": key})
    if answer.status_code != 202:
        tally.refused[answer.status_code] += 1
        await asyncio.sleep(1)
        return
    tally.accepted += 1
    id = answer.json()["id"]
    job = await (_followed(http, id, tally) if follow else _polled(http, id))
    tally.ends[job["state"]] += 1
    if job["state"] != "done":
        tally.faults.append(f"job {id} {job['state']}: {job['error']}")
        return
    (image,) = job["images"]
    png = await http.get(image["url"])
    if _hash(Image.open(io.BytesIO(png.content))) != right[_name(request)]:
        tally.faults.append(f"job {id} has another picture than the library for {request}")


async def _followed(http: httpx.AsyncClient, id: str, tally: Tally) -> dict[str, Any]:
    ends = []
    async with http.stream("GET", f"/api/jobs/{id}/events") as stream:
        async for event, data in _events(stream):
            if data.get("job", data.get("id")) != id:
                tally.faults.append(f"job {id} was told of another: {event}")
            ends += [data] if event == "end" else []
    if len(ends) != 1:
        raise RuntimeError(f"job {id} ended {len(ends)} times")
    return ends[0]


async def _events(stream: httpx.Response) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    event = ""
    async for line in stream.aiter_lines():
        name, _, value = line.partition(": ")
        event = value if name == "event" else event
        if name == "data":
            yield event, json.loads(value)


async def _polled(http: httpx.AsyncClient, id: str) -> dict[str, Any]:
    while (job := (await http.get(f"/api/jobs/{id}")).json())["state"] not in ENDED:
        await asyncio.sleep(0.5)
    return dict(job)


async def _watch_memory(server: Server) -> dict[str, list[float]]:
    """Bytes in memory of each process, second by second, until it is cancelled."""
    processes, page = server.processes(), os.sysconf("SC_PAGE_SIZE")
    found: dict[str, list[float]] = {name: [] for name in processes}
    with suppress(asyncio.CancelledError):
        while True:
            for name, number in processes.items():
                with open(f"/proc/{number}/statm", encoding="ascii") as file:
                    found[name].append(int(file.read().split()[1]) * page)
            await asyncio.sleep(1)
    return found


class _Prober:
    """A process that asks for /health over and over."""

    def __init__(self, url: str):
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.serve.prober", url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> "_Prober":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def figures(self) -> dict[str, float]:
        output, _ = self._process.communicate("", timeout=30)
        return dict(json.loads(output))


def _figures(
    tally: Tally, memory: dict[str, list[float]], health: dict[str, float], kept: dict[str, int], seconds: float
) -> dict[str, Any]:
    told: dict[str, Any] = {"accepted": tally.accepted, "ends": dict(tally.ends), "refused": dict(tally.refused)}
    told |= {"per_second": round(tally.ends["done"] / seconds, 2), "health_ms": health}
    for name, values in memory.items():
        early, late = values[min(int(MINUTE), len(values) // 5)], values[-1]
        told[f"{name}_mb"] = [round(early / 1e6, 1), round(late / 1e6, 1)]
        told[f"{name}_growth"] = round(late / early - 1, 4)
    told |= {"faults": tally.faults[:20], "kept": kept}
    # The warm-up is one more.
    agrees = kept == {"jobs": tally.accepted + 1, "pictures": tally.ends["done"] + 1, "open": 0}
    return {**told, "kept_agrees": agrees}


def _kept(server: Server) -> dict[str, int]:
    """What stands in the server's index once all has ended."""
    index = sqlite3.connect(server.data / "index.sqlite")
    count = "SELECT count(*) FROM "
    (jobs,), (pictures,) = (index.execute(count + table).fetchone() for table in ("jobs", "images"))
    (still,) = index.execute(count + "jobs WHERE state IN ('queued', 'running')").fetchone()
    index.close()
    return {"jobs": jobs, "pictures": pictures, "open": still}


def _drawn(requests: list[dict[str, Any]], threads: int) -> list[str]:
    """The hashes of what the library draws; with other numbers of threads sums round otherwise."""
    import torch

    import zimage

    torch.set_num_threads(threads)
    pipe = zimage.ZImage.load()
    return [_hash(pipe.generate(**request).images[0]) for request in requests]


def _hash(image: Image.Image) -> str:
    return hashlib.sha256(image.tobytes()).hexdigest()


def _name(request: dict[str, Any]) -> str:
    return json.dumps(request, sort_keys=True)
