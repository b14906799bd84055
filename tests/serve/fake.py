"""A service that draws nothing: pictures of one colour, at once or when told, for what a real server rarely does."""

import asyncio
import base64
import io
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

from fastapi import FastAPI
from PIL import Image

from zimage.pictures.files import save
from zimage.serve.about import About
from zimage.serve.asking import Asked
from zimage.serve.refusals import Conflict, NotFound
from zimage.serve.service import Launch
from zimage.serve.stream import Message
from zimage.serve.uploads import Uploads
from zimage.serve.view import JobView
from zimage.settings.declared import Request
from zimage.settings.serving import ServeSettings
from zimage.version import __version__

MODEL = {"name": "fake", "fingerprint": "f00d", "is_demo": False}
DEFAULTS = {"width": 64, "height": 48, "steps": 8, "guidance": 0.0, "shift": 3.0}
OPEN = {"stage": "", "step": 0, "total": 0, "index": 0, "count": 1, "remaining": None, "images": []}


class FakeService:
    """`asked` are the requests that were accepted, `cancelled` the jobs that were given up.

    `hold`: jobs run until `release`d or cancelled. `error`: what they fail of. `deleted`: their pictures are gone.
    `refusal` is raised on submitting.
    """

    def __init__(self, folder: Path, **serving):
        self.launch = Launch({}, {}, ServeSettings(**serving), folder)
        self.settings = self.launch.serving
        self.about = About(MODEL, DEFAULTS, 512, "bfloat16", "cpu", [])
        self.history, self.folder = self, folder
        self.asked: list[Asked] = []
        self.cancelled: list[str] = []
        self.computed: list[tuple[str, dict]] = []
        self.cleared = 0
        self.uploads = Uploads(folder / "uploads", self.settings)
        self.hold, self.deleted, self.error, self.refusal = False, False, None, None
        self.views: dict[str, JobView] = {}
        self._over: dict[str, asyncio.Event] = {}
        self.last_preview: dict | None = None

    async def loras(self) -> dict[str, Path]:
        return {"style": self.folder / "style.safetensors"}

    async def controls(self) -> dict[str, Path]:
        return {"union": self.folder / "union.safetensors"}

    async def submit(self, asked: Asked, key: str | None = None) -> JobView:
        if self.refusal:
            raise self.refusal
        self.asked.append(asked)
        known = {name: value for name, value in asked.values.items() if value is not None}
        listed = {name: [{**one.values, "picture": "file"} for one in some] for name, some in asked.conditions.items()}
        files = {**dict.fromkeys(asked.attachments, "file"), **listed}
        request = Request.from_mapping({**DEFAULTS, **known, **files})
        seeds = [(request.seed or 0) + k for k in range(request.count)]
        id = f"job{len(self.asked)}"
        values = {**request.to_mapping(), "lora": list(asked.lora)}
        view = JobView(id, asked.form, "running", None, 1e9, 1e9, None, values, seeds, timings={}, notes=[],
                       rewritten=[], error=None, **OPEN)  # fmt: skip
        self.views[id], self._over[id] = view, asyncio.Event()
        if not self.hold:
            self.release(id)
        return view

    def release(self, id: str) -> None:
        view = self.views[id]
        if self.error:
            ended = replace(view, state="failed", error=self.error)
        else:
            left = 0 if self.deleted else len(view.seeds)
            ended = replace(view, state="done", images=[self._drawn(view, k) for k in range(left)])
        self.views[id] = replace(ended, finished=1e9 + 1)
        self._over[id].set()

    def _drawn(self, view: JobView, index: int) -> dict:
        request = {**view.request, "seed": view.seeds[index], "images": 1}
        record = {"version": __version__, "request": request, "model": MODEL, "lora": []}
        size = request["width"], request["height"]
        id = f"{view.id}-{index + 1}"
        save(Image.new("RGB", size, (200, index, 0)), self.file(id), record, replace=True)
        return {"id": id, "job": view.id, "url": f"/api/images/{id}", "width": size[0], "height": size[1],
                "seed": request["seed"], "prompt": request["prompt"], "settings": record}  # fmt: skip

    def file(self, id: str) -> Path:
        return self.folder / f"{id}.png"

    async def job(self, id: str) -> JobView:
        if id not in self.views:
            raise NotFound(f"there is no job {id!r}")
        return self.views[id]

    async def jobs(self, states=(), limit: int = 100) -> list[JobView]:
        return [view for view in self.views.values() if not states or view.state in states][:limit]

    async def finished(self, id: str) -> JobView:
        await self._over[id].wait()
        return self.views[id]

    async def cancel(self, id: str) -> JobView:
        if self.views[id].state != "running":
            raise Conflict(f"job {id} has ended already")
        self.cancelled.append(id)
        self.views[id] = replace(self.views[id], state="cancelled")
        self._over[id].set()
        return self.views[id]

    async def watch(self, id: str, after: str = "") -> AsyncIterator[Message]:
        """Eight steps of each picture with a preview each, then the pictures."""
        view = self.views[id]
        steps = [(index, step) for index in range(len(view.seeds)) for step in range(1, 9)]
        for index, step in steps:
            yield Message(0, "", "progress", {"stage": "denoise", "step": step, "total": 8, "index": index})
            yield Message(0, "", "preview", preview(index, step))
        await self._over[id].wait()
        for image in self.views[id].images:
            yield Message(0, "", "image", {"image": image})
        yield Message(0, "", "end", self.views[id].plain())

    async def ask_all(self, op: str, **plain) -> list[dict]:
        assert op == "vision"
        self.cleared += plain.get("clear", False)
        cache = {"hits": 3, "misses": 1, "evictions": 0, "disk_hits": 0, "size": 1, "bytes": 64, "hit_rate": 0.75}
        return [{"loaded": False, "cache": cache}, {"loaded": True, "cache": cache}]

    async def compute(self, op: str, **asked) -> dict:
        self.computed.append((op, asked))
        path = self.folder / "seen.safetensors"
        path.write_bytes(b"seen")
        return {"path": str(path), "hash": "f00d"}

    async def ask(self, op: str, **plain) -> dict:
        assert op == "tokens"
        words = plain["prompt"].split()
        return {"text": f"<{plain['prompt']}>", "tokens": len(words), "limit": 512, "outcome": "fits"}

    def preview(self, id: str) -> dict | None:
        return self.last_preview


def preview(index: int, step: int) -> dict:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 12), (index, step * 20, 0)).save(buffer, "JPEG")
    image = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return {"index": index, "width": 16, "height": 12, "image": image}


def app_of(form, service: FakeService) -> FastAPI:
    """One form by itself."""
    app = FastAPI()
    app.include_router(form.routes(service))
    return app
