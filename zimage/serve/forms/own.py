"""Our own form: jobs, their events, and a picture at once. The page and `gen --server` speak it."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse

from zimage.errors import RequestError, ZImageError
from zimage.serve.asking import Asked, asked
from zimage.serve.bodies import FormRoute, read_object
from zimage.serve.jobs import CANCELLED, DONE
from zimage.serve.refusals import Conflict, Unavailable
from zimage.serve.service import Service
from zimage.serve.stream import Message, as_text
from zimage.serve.uploads import read_parts
from zimage.serve.view import JobView

EVENTS = "text/event-stream"
UNBUFFERED = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
MULTIPART = "multipart/form-data"


def routes(service: Service) -> APIRouter:
    router = APIRouter(prefix="/api", route_class=FormRoute, tags=["jobs"])

    @router.post("/jobs", status_code=202)
    async def submit(request: Request) -> Response:
        """Queue a request for pictures."""
        key = request.headers.get("idempotency-key")
        view = await service.submit(await read_asked(request, service), key)
        return JSONResponse(view.plain(), 202, {"Location": f"/api/jobs/{view.id}"})

    @router.get("/jobs")
    async def jobs(state: str = "", limit: int = Query(100, ge=1, le=1000)) -> Response:
        """Running jobs, then waiting ones in their order, then the latest that have ended."""
        views = await service.jobs([one for one in state.split(",") if one], limit)
        return JSONResponse({"jobs": [view.plain() for view in views]})

    @router.get("/jobs/{id}")
    async def job(id: str) -> Response:
        """A job as it is now."""
        return JSONResponse((await service.job(id)).plain())

    @router.patch("/jobs/{id}")
    async def move(id: str, request: Request) -> Response:
        """Move a waiting job to another place in the queue."""
        position = (await read_object(request)).get("position")
        if not isinstance(position, int) or isinstance(position, bool) or not 0 <= position < 1 << 31:
            raise RequestError("position should be a whole number from 0", fields=("position",))
        return JSONResponse((await service.move(id, position)).plain())

    @router.delete("/jobs/{id}")
    async def cancel(id: str) -> Response:
        """Cancel a job, also in the middle of a step. The pictures that it has drawn stay."""
        return JSONResponse((await service.cancel(id)).plain())

    @router.get("/jobs/{id}/events")
    async def events(id: str, request: Request) -> Response:
        """A job's events until it has ended; Last-Event-ID takes them up again."""
        await service.job(id)
        return stream(service.watch(id, request.headers.get("last-event-id", "")))

    @router.get("/events")
    async def all_events(request: Request) -> Response:
        """The events of all jobs, for ever."""
        return stream(service.watch_all(request.headers.get("last-event-id", "")))

    @router.post("/generate")
    async def generate(request: Request) -> Response:
        """Draw one picture and wait for it. A client that goes away cancels it."""
        view = await service.submit(one_picture(await read_asked(request, service)))
        view = await until_the_end(service, view, request)
        image = view.images[0]
        seconds = (view.finished or 0.0) - (view.started or 0.0)
        told = {"X-Seed": str(image["seed"]), "X-Generation-Time": f"{seconds:.3f}", "X-History-Id": image["id"]}
        return FileResponse(service.history.file(image["id"]), media_type="image/png", headers=told)

    return router


async def read_asked(request: Request, service: Service) -> Asked:
    """A request for pictures as JSON, or as multipart with the JSON in the part `request` and files in others."""
    if request.headers.get("content-type", "").lower().startswith(MULTIPART):
        values, files = await read_parts(request, service.settings)
    else:
        values, files = await read_object(request), {}
    return asked(values, files, "own", service.settings)


def one_picture(wanted: Asked) -> Asked:
    """Raises RequestError for a request for several."""
    prompt, images = wanted.values.get("prompt"), wanted.values.get("images", 1)
    if isinstance(prompt, list) and len(prompt) != 1:
        raise RequestError("prompt: pass one here; /api/jobs takes a list", fields=("prompt",))
    if images != 1:
        raise RequestError("images: one picture is drawn here; /api/jobs draws several", fields=("images",))
    return wanted


async def until_the_end(service: Service, view: JobView, request: Request) -> JobView:
    """The job when it is done; cancelled where the client goes away. Raises what it failed of."""
    ending = asyncio.ensure_future(service.finished(view.id))
    leaving = asyncio.ensure_future(gone(request))
    try:
        await asyncio.wait([ending, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not ending.done():
            await service.cancel(view.id)
        view = await ending
    finally:
        leaving.cancel()
    if view.state == CANCELLED:
        raise Conflict(f"job {view.id} was cancelled")
    if view.state != DONE:
        raise failed(view)
    return view


def failed(view: JobView) -> ZImageError:
    """What a job failed of, as the request for it would have."""
    error: dict[str, Any] = view.error or {}
    kind = RequestError if error.get("fields") else Unavailable
    return kind(error.get("message", "the job failed"), fields=error.get("fields", ()))


async def gone(request: Request) -> None:
    """Wait until the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def stream(messages: AsyncIterator[Message]) -> Response:
    return StreamingResponse(as_text(messages), media_type=EVENTS, headers=UNBUFFERED)
