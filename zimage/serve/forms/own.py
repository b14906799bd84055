"""Our own form: jobs, their events, and a picture at once. The page and `gen --server` speak it."""

import asyncio

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from zimage.errors import RequestError
from zimage.serve.asking import Asked, asked
from zimage.serve.bodies import FormRoute, read_object, read_with_files
from zimage.serve.forms.history import pieces
from zimage.serve.forms.waiting import stream, unfinished, until_the_end
from zimage.serve.openapi import (
    EVENTS,
    EXAMPLE_JOB,
    JSON,
    TEXT,
    WHOLE,
    answers,
    content,
    listed,
    record,
    reference,
    takes,
)
from zimage.serve.schema import whole
from zimage.serve.service import Service

JOB = content("The job.", reference("Job"), EXAMPLE_JOB)
JOBS = content("The jobs.", record("Jobs", jobs=listed(reference("Job"))), {"jobs": [EXAMPLE_JOB]})
EVENT = record(
    "Event",
    id={**TEXT, "description": "What Last-Event-ID takes up again."},
    event={"enum": ["job", "position", "progress", "preview", "image", "end", "queue", "history"]},
    data={**TEXT, "contentMediaType": JSON, "description": "JSON, with the job's id as `job` where it is of one."},
)
STREAM = content("Server-sent events.", EVENT, media=EVENTS)
PICTURE_DRAWN = content("The picture.", {"type": "string", "format": "binary"}, media="image/png")
DRAWING = takes("What to draw.", json=reference("Drawing"), parts=reference("DrawingParts"))
PLACE = whole("Place", {"position": {**WHOLE, "minimum": 0}}, ("position",), example={"position": 0})


def routes(service: Service) -> APIRouter:
    router = APIRouter(prefix="/api", route_class=FormRoute, tags=["jobs"])
    _drawing(router, service)
    _jobs(router, service)
    _events(router, service)
    return router


def _drawing(router: APIRouter, service: Service) -> None:
    @router.post(
        "/jobs",
        status_code=202,
        openapi_extra=DRAWING,
        responses=answers(JOB, 422, 507, status=202, body=True),
    )
    async def submit(request: Request) -> Response:
        """Queue a request for pictures."""
        key = request.headers.get("idempotency-key")
        view = await service.submit(await read_asked(request, service), key)
        return JSONResponse(view.plain(), 202, {"Location": f"/api/jobs/{view.id}"})

    @router.post(
        "/generate",
        openapi_extra=DRAWING,
        responses=answers(PICTURE_DRAWN, 409, 422, 507, body=True),
    )
    async def generate(request: Request) -> Response:
        """Draw one picture and wait for it. A client that goes away cancels it."""
        return await picture_of(service, request, one_picture(await read_asked(request, service)))


def _jobs(router: APIRouter, service: Service) -> None:
    @router.get("/jobs", responses=answers(JOBS, 422))
    async def jobs(state: str = "", limit: int = Query(100, ge=1, le=1000)) -> Response:
        """Running jobs, then waiting ones in their order, then the latest that have ended."""
        views = await service.jobs([one for one in state.split(",") if one], limit)
        return JSONResponse({"jobs": [view.plain() for view in views]})

    @router.get("/jobs/{id}", responses=answers(JOB, 404))
    async def job(id: str) -> Response:
        """A job as it is now."""
        return JSONResponse((await service.job(id)).plain())

    @router.patch(
        "/jobs/{id}",
        openapi_extra=takes("The jobs that are to stay before it.", json=PLACE),
        responses=answers(JOB, 404, 409, 422, body=True),
    )
    async def move(id: str, request: Request) -> Response:
        """Move a waiting job to another place in the queue."""
        position = (await read_object(request)).get("position")
        if not isinstance(position, int) or isinstance(position, bool) or not 0 <= position < 1 << 31:
            raise RequestError("position should be a whole number from 0", fields=("position",))
        return JSONResponse((await service.move(id, position)).plain())

    @router.delete("/jobs/{id}", responses=answers(JOB, 404, 409))
    async def cancel(id: str) -> Response:
        """Cancel a job, also in the middle of a step. The pictures that it has drawn stay."""
        return JSONResponse((await service.cancel(id)).plain())


def _events(router: APIRouter, service: Service) -> None:
    @router.get("/jobs/{id}/events", responses=answers(STREAM, 404))
    async def events(id: str, request: Request) -> Response:
        """A job's events until it has ended; Last-Event-ID takes them up again."""
        await service.job(id)
        return stream(service.watch(id, request.headers.get("last-event-id", "")))

    @router.get("/events", responses=answers(STREAM))
    async def all_events(request: Request) -> Response:
        """The events of all jobs, for ever."""
        return stream(service.watch_all(request.headers.get("last-event-id", "")))


async def read_asked(request: Request, service: Service) -> Asked:
    """A request for pictures, as JSON or in parts."""
    values, files = await read_with_files(request)
    return asked(values, files, "own", service.settings)


async def picture_of(service: Service, request: Request, wanted: Asked) -> Response:
    """The one picture that is asked for, when it is drawn. Raises what keeps it from that."""
    view = await until_the_end(service, await service.submit(wanted), request)
    if fault := unfinished(view):
        raise fault
    image = view.images[0]
    seconds = (view.finished or 0.0) - (view.started or 0.0)
    told = {"X-Seed": str(image["seed"]), "X-Generation-Time": f"{seconds:.3f}", "X-History-Id": image["id"]}
    file = await asyncio.to_thread(service.history.open, image["id"])
    return StreamingResponse(pieces(file), media_type="image/png", headers=told)


def one_picture(wanted: Asked) -> Asked:
    """Raises RequestError for a request for several."""
    prompt, images = wanted.values.get("prompt"), wanted.values.get("images", 1)
    if isinstance(prompt, list) and len(prompt) != 1:
        raise RequestError("prompt: pass one here; /api/jobs takes a list", fields=("prompt",))
    if images != 1:
        raise RequestError("images: one picture is drawn here; /api/jobs draws several", fields=("images",))
    return wanted
