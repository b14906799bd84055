"""What forms share while a job runs: waiting for its end, streaming its events, giving it up with its client."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from starlette.requests import ClientDisconnect

from zimage.errors import RequestError, ZImageError
from zimage.serve.jobs import CANCELLED, DONE, ENDED
from zimage.serve.openapi import EVENTS
from zimage.serve.refusals import Conflict, Failed, NotFound, Unavailable
from zimage.serve.service import Service
from zimage.serve.stream import Message, as_text
from zimage.serve.view import JobView

T = TypeVar("T")
UNBUFFERED = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
_cancelling: set[asyncio.Task[None]] = set()  # the loop itself holds tasks weakly


async def until_the_end(service: Service, view: JobView, request: Request, keep: bool = False) -> JobView:
    """The job once it has ended, however it did.

    Raises ClientDisconnect where the client goes away before that; then the job is cancelled, unless it is to `keep`
    for a client that can ask for it again.
    """
    ending = asyncio.ensure_future(service.finished(view.id))
    leaving = asyncio.ensure_future(gone(request))
    try:
        await asyncio.wait([ending, leaving], return_when=asyncio.FIRST_COMPLETED)
        if ending.done():
            return ending.result()
        if not keep:
            give_up(service, view.id)
        raise ClientDisconnect
    finally:
        ending.cancel()
        leaving.cancel()


async def while_there(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of short work, which is cancelled where the client goes away. Raises ClientDisconnect then."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone(request))
    try:
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        working.cancel()
        leaving.cancel()


def unfinished(view: JobView) -> ZImageError | None:
    """Why there is nothing to answer after a job's end: what its request would have raised, or what went wrong."""
    if view.state == DONE:
        return None if view.images else NotFound(f"the pictures of job {view.id} are deleted")
    if view.state not in ENDED:
        return Unavailable(f"the server is stopping; job {view.id} goes on when it is started again", retry_after=30)
    if view.state == CANCELLED:
        return Conflict(f"job {view.id} was cancelled")
    error: dict[str, Any] = view.error or {}
    kind = RequestError if error.get("fields") else Failed
    return kind(error.get("message", "the job failed"), fields=error.get("fields", ()))


async def gone(request: Request) -> None:
    """Wait until the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def give_up(service: Service, id: str) -> None:
    """Cancel a job that nobody waits for any more, from wherever: also from what is itself being cancelled."""
    task = asyncio.get_running_loop().create_task(_cancel(service, id))
    _cancelling.add(task)
    task.add_done_callback(_cancelling.discard)


def stream(messages: AsyncIterator[Message]) -> Response:
    """Server-sent events as they come."""
    return StreamingResponse(as_text(messages), media_type=EVENTS, headers=UNBUFFERED)


async def _cancel(service: Service, id: str) -> None:
    try:
        await service.cancel(id)
    except Conflict:  # it has ended meanwhile
        return
