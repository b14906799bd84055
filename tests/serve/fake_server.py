"""A server that draws nothing: what `gen --server` asks it is answered from a script, faults included.

Everything that it is asked stands in `asked`; jobs run as far as their `script` goes, one stream after the other.
"""

import contextlib
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from PIL import Image, PngImagePlugin

from zimage.settings.declared import Request as Settings

ID = "20261127-174501-3fa9c2"
DEFAULTS = {"width": 64, "height": 32, "steps": 4, "guidance": 0.0, "shift": 3.0, "images": 1, "negative": None}
FACTS = {"model": {"name": "demo", "fingerprint": "0"}, "dtype": "fp32", "lora": [], "device": "cpu", "version": "1"}
CUT = object()  # in a script: the stream ends here
Script = list[tuple[str, dict[str, Any]] | object]


@dataclass
class Asked:
    method: str
    path: str
    headers: dict[str, str]
    request: dict[str, Any] = field(default_factory=dict)
    files: dict[str, tuple[str, bytes]] = field(default_factory=dict)  # of several of one name the last
    parts: list[tuple[str, str, bytes]] = field(default_factory=list)
    time: float = field(default_factory=time.time)


@dataclass
class Fake:
    """The server and its one job. `streams`: a script for each time that the events are asked for, the last one again.

    `answers`: what stands in for the usual answer to "METHOD /path", each once.
    """

    url: str = ""
    asked: list[Asked] = field(default_factory=list)
    job: dict[str, Any] = field(default_factory=dict)
    streams: list[Callable[["Fake"], Script]] = field(default_factory=list)
    answers: dict[str, list[Response]] = field(default_factory=dict)
    pictures: dict[str, bytes] = field(default_factory=dict)

    def of(self, method: str, path: str) -> list[Asked]:
        return [one for one in self.asked if (one.method, one.path) == (method, path)]

    @property
    def submitted(self) -> Asked:
        (one,) = {one.headers["idempotency-key"]: one for one in self.of("POST", "/api/jobs")}.values()
        return one

    def accept(self, request: dict[str, Any]) -> dict[str, Any]:
        """The job of a request; the same one for the same key."""
        asked = {**DEFAULTS, **{name: value for name, value in request.items() if value is not None}}
        asked.pop("mask", None)  # a real one tells its name and hash
        prompts = asked["prompt"] if isinstance(asked.get("prompt"), list) else [asked.get("prompt", "")]
        first = asked.get("seed", 7)
        seeds = [first + k for _ in prompts for k in range(asked["images"])]
        self.job = {"id": ID, "state": "queued", "position": 0, "request": {**asked, "prompt": asked.get("prompt", "")}}
        self.job |= {"seeds": seeds, "images": [], "notes": [], "rewritten": [], "error": None}
        return self.job

    def draw(self, index: int) -> dict[str, Any]:
        """Finish a picture, and what the event on it says."""
        r, seeds = self.job["request"], self.job["seeds"]
        prompts = r["prompt"] if isinstance(r["prompt"], list) else [r["prompt"]]
        r = {name: value for name, value in r.items() if name in Settings.names()}
        one = {**r, "prompt": prompts[index * len(prompts) // len(seeds)], "seed": seeds[index], "images": 1}
        id, settings = f"{ID}-{index + 1}", {"request": one, **FACTS}
        self.pictures[id] = png(r["width"], r["height"], settings, seeds[index])
        image = {"id": id, "job": ID, "url": f"/api/images/{id}", "width": r["width"], "height": r["height"]}
        image |= {"seed": seeds[index], "settings": settings}
        self.job["images"].append(image)
        return {"image": image}

    def end(self, state: str = "done", **more: Any) -> tuple[str, dict[str, Any]]:
        self.job |= {"state": state, "position": None, **more}
        return "end", self.job


def png(width: int, height: int, settings: dict[str, Any], seed: int) -> bytes:
    """A picture of one colour that carries its settings."""
    stream, chunks = io.BytesIO(), PngImagePlugin.PngInfo()
    chunks.add_text("zimage", json.dumps(settings))
    Image.new("RGB", (width, height), (seed % 256, 0, 0)).save(stream, "PNG", pnginfo=chunks)
    return stream.getvalue()


def usual(fake: Fake) -> Script:
    """A job that waits, runs and draws all its pictures."""
    script: Script = [("job", dict(fake.job)), ("position", {"job": ID, "position": 1})]
    fake.job |= {"state": "running", "position": None}
    script.append(("job", dict(fake.job)))
    count = len(fake.job["seeds"])
    for index in range(count):
        for step in range(5):
            place = {"step": step, "total": 4, "index": index, "count": count, "remaining": 1.0}
            script.append(("progress", {"job": ID, "stage": "denoise", **place}))
        script.append(("preview", {"job": ID, "index": index, "image": "data:image/jpeg;base64,AAAA"}))
        script.append(("image", {"job": ID, **fake.draw(index)}))
    return [*script, fake.end()]


@contextlib.contextmanager
def serving(*streams: Callable[[Fake], Script], port: int = 0, job: dict[str, Any] | None = None) -> Iterator[Fake]:
    """The server on a free port of this machine; `job` is one of an earlier life."""
    fake = Fake(streams=list(streams) or [usual], job=job or {})
    server = uvicorn.Server(
        # A configuration of logs would close all handlers; absl's, which a reference brings, closes its stream with it.
        uvicorn.Config(_app(fake), "127.0.0.1", port, log_level="error", log_config=None, timeout_graceful_shutdown=1)
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    fake.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    try:
        yield fake
    finally:
        server.should_exit = True
        thread.join()


def event(place: str, kind: str, data: dict[str, Any]) -> str:
    return f"id: {place}\nevent: {kind}\ndata: {json.dumps(data)}\n\n"


def _app(fake: Fake) -> FastAPI:
    app = FastAPI()

    @app.middleware("http")
    async def scripted(request: Request, call_next: Any) -> Response:
        fake.asked.append(Asked(request.method, request.url.path, dict(request.headers)))
        answers = fake.answers.get(f"{request.method} {request.url.path}")
        return answers.pop(0) if answers else await call_next(request)

    @app.post("/api/jobs")
    async def submit(request: Request) -> Response:
        if request.headers["content-type"].startswith("multipart/"):
            form = await request.form()
            files = [(name, part) for name, part in form.multi_items() if not isinstance(part, str)]
            fake.asked[-1].parts = [(name, part.filename, await part.read()) for name, part in files]
            fake.asked[-1].files = {name: (filename, content) for name, filename, content in fake.asked[-1].parts}
            fake.asked[-1].request = json.loads(form["request"])
        else:
            fake.asked[-1].request = await request.json()
        job = fake.job or fake.accept(fake.asked[-1].request)
        return JSONResponse(job, 202)

    @app.get("/api/jobs/{id}/events")
    def events(id: str) -> Response:
        script = fake.streams.pop(0) if len(fake.streams) > 1 else fake.streams[0]
        return StreamingResponse(_streamed(script(fake)), media_type="text/event-stream")

    @app.delete("/api/jobs/{id}")
    def cancel(id: str) -> Response:
        return JSONResponse(fake.end("cancelled")[1])

    @app.get("/api/images/{id}")
    def image(id: str) -> Response:
        found = fake.pictures.get(id)
        return Response(found, media_type="image/png") if found else JSONResponse({"error": {"message": "gone"}}, 404)

    return app


def _streamed(script: Script) -> Iterator[str]:
    for number, item in enumerate(script):
        if item is CUT:
            return
        if callable(item):
            item()
            continue
        yield ": alive\n\n" + event(f"a-{number}", *item)
