"""The history over HTTP: pages and searches, pictures and their thumbnails, deleting and bringing back."""

import asyncio
import hashlib
import os
from collections.abc import Iterator
from typing import Annotated, Any, BinaryIO

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from zimage.errors import RequestError, quoted
from zimage.serve.bodies import FormRoute, read_object
from zimage.serve.history import UNDO_SECONDS
from zimage.serve.openapi import MAYBE_TEXT, TEXT, WHOLE, answers, content, listed, record, reference, takes
from zimage.serve.refusals import NotFound
from zimage.serve.schema import EXAMPLE, whole
from zimage.serve.service import Service

CHANGED = "history"  # the event that tells other clients
PIECE = 1 << 18  # bytes of a picture that are read at once
DRAWN = 2  # thumbnails that are made at once: a large picture takes much memory
PRIVATE = {"Cache-Control": "private, max-age=3600"}

EXAMPLE_IMAGE = {
    "id": "20261127-174501-3fa9c2d1-1",
    "job": "20261127-174501-3fa9c2d1",
    "url": "/api/images/20261127-174501-3fa9c2d1-1",
    "thumbnail": "/api/images/20261127-174501-3fa9c2d1-1/thumbnail",
    "width": 1024,
    "height": 1024,
    "seed": 42,
    "prompt": EXAMPLE["prompt"],
    "created": 1795801508.4,
    "bytes": 1_482_113,
    "settings": {"request": {**EXAMPLE, "width": 1024, "height": 1024, "steps": 8, "guidance": 0.0, "shift": 3.0}},
}
PAGE = record("HistoryPage", images=listed(reference("Image")), next=MAYBE_TEXT, total=WHOLE)
DELETED = record("Deleted", deleted=listed(TEXT), undo_seconds=WHOLE)
RESTORED = record("Restored", restored=listed(TEXT))
WANTED = whole("Restoring", {"ids": listed(TEXT)}, needed=("ids",), example={"ids": [EXAMPLE_IMAGE["id"]]})
SCHEMAS = {str(schema["title"]): schema for schema in (PAGE, DELETED, RESTORED, WANTED)}
BYTES = {"type": "string", "format": "binary"}

A_PAGE = content(
    "A page",
    reference("HistoryPage"),
    {"images": [EXAMPLE_IMAGE], "next": "1795801508400000000_20261127-174501-3fa9c2d1-1", "total": 61},
)
A_PICTURE = content("The picture", reference("Image"), EXAMPLE_IMAGE)
WHAT_WENT = content(
    "What was deleted", reference("Deleted"), {"deleted": [EXAMPLE_IMAGE["id"]], "undo_seconds": UNDO_SECONDS}
)
WHAT_CAME_BACK = content("What was brought back", reference("Restored"), {"restored": [EXAMPLE_IMAGE["id"]]})
UNCHANGED: dict[str, Any] = {"description": "The picture that the client has, by If-None-Match, is still the same."}

Id = Annotated[str, Path(description="A picture's id.", examples=[EXAMPLE_IMAGE["id"]])]
Words = Annotated[str, Query(description="Words that the prompt contains, all of them.", max_length=1000)]
Cursor = Annotated[str, Query(description="`next` of the page before; empty for the first.", max_length=200)]
Limit = Annotated[int, Query(description="Pictures of a page.", ge=1, le=200)]


def routes(service: Service) -> APIRouter:
    router = APIRouter(prefix="/api", route_class=FormRoute, tags=["history"])
    add_looking(router, service)
    add_changing(router, service)
    add_files(router, service)
    return router


def add_looking(router: APIRouter, service: Service) -> None:
    @router.get("/history", responses=answers(A_PAGE, 422, 507))
    async def page(q: Words = "", before: Cursor = "", limit: Limit = 50) -> Response:
        """Pictures, newest first."""
        found = await asyncio.to_thread(service.history.page, q, before or None, limit)
        images = [picture.plain() for picture in found.pictures]
        return JSONResponse({"images": images, "next": found.next, "total": found.total})

    @router.get("/history/{id}", responses=answers(A_PICTURE, 404, 507))
    async def entry(id: Id) -> Response:
        """What is known of a picture."""
        return JSONResponse((await asyncio.to_thread(service.history.get, id)).plain())


def add_changing(router: APIRouter, service: Service) -> None:
    @router.delete("/history/{id}", responses=answers(WHAT_WENT, 404, 507))
    @router.delete("/images/{id}", responses=answers(WHAT_WENT, 404, 507), operation_id="delete_image")
    async def delete(id: Id) -> Response:
        """Delete a picture; it can be restored for ten minutes."""
        gone = await asyncio.to_thread(service.history.delete, [id])
        if not gone:
            raise NotFound(f"there is no picture {quoted(id)}")
        return told_deleted(gone)

    @router.delete("/history", responses=answers(WHAT_WENT, 507))
    async def delete_all() -> Response:
        """Delete every picture; they can be restored for ten minutes."""
        return told_deleted(await asyncio.to_thread(service.history.delete_all))

    def told_deleted(ids: list[str]) -> Response:
        if ids:
            service.streams.tell("", CHANGED, {"deleted": ids})
        return JSONResponse({"deleted": ids, "undo_seconds": UNDO_SECONDS})

    body = takes("The pictures", json=reference("Restoring"))

    @router.post("/history/restore", responses=answers(WHAT_CAME_BACK, 422, 507, body=True), openapi_extra=body)
    async def restore(request: Request) -> Response:
        """Bring deleted pictures back: those of the `ids` that were deleted in the last ten minutes."""
        ids = wanted(await read_object(request))
        back = await asyncio.to_thread(service.history.restore, ids)
        if back:
            service.streams.tell("", CHANGED, {"restored": back})
        return JSONResponse({"restored": back})


def add_files(router: APIRouter, service: Service) -> None:
    making = asyncio.Semaphore(DRAWN)

    @router.get("/images/{id}", response_class=Response, responses=file_answers("The PNG", "image/png"))
    async def image(id: Id, request: Request) -> Response:
        """A picture as it was saved, with its settings in it."""
        file = await asyncio.to_thread(service.history.open, id)
        stat = os.fstat(file.fileno())
        headers = described(f"{id}.png", f"{stat.st_mtime_ns:x}-{stat.st_size:x}")
        if is_known(request, headers["ETag"]):
            file.close()
            return Response(status_code=304, headers=headers)
        return StreamingResponse(pieces(file), 200, {**headers, "Content-Length": str(stat.st_size)}, "image/png")

    small_answers = file_answers("A WebP file", "image/webp")

    @router.get("/images/{id}/thumbnail", response_class=Response, responses=small_answers)
    async def thumbnail(id: Id, request: Request) -> Response:
        """A picture with a longer side of at most 320 px."""
        async with making:
            small = await asyncio.to_thread(service.history.thumbnail, id)
        headers = described(f"{id}.webp", hashlib.sha256(small).hexdigest()[:16])
        if is_known(request, headers["ETag"]):
            return Response(status_code=304, headers=headers)
        return Response(small, 200, headers, "image/webp")


def file_answers(description: str, media: str) -> dict[int | str, dict[str, Any]]:
    """The answers of an operation that gives a file."""
    return {**answers(content(description, BYTES, media=media), 404, 507), 304: UNCHANGED}


def wanted(body: dict[str, object]) -> list[str]:
    """The ids to restore. Raises RequestError."""
    ids = body.get("ids")
    if not isinstance(ids, list) or not all(isinstance(id, str) for id in ids) or len(body) > 1:
        raise RequestError('ids: pass {"ids": [ID, …]}, a list of texts and nothing else', fields=("ids",))
    return ids


def described(name: str, tag: str) -> dict[str, str]:
    """Headers of a file; ids have no character that would need another form."""
    return {**PRIVATE, "ETag": f'"{tag}"', "Content-Disposition": f'inline; filename="{name}"'}


def is_known(request: Request, tag: str) -> bool:
    """Whether the client says that it has this very file."""
    known = [one.strip().removeprefix("W/") for one in request.headers.get("if-none-match", "").split(",")]
    return tag in known or known == ["*"]


def pieces(file: BinaryIO) -> Iterator[bytes]:
    """An open file's content, piece by piece; it is closed at the end."""
    with file:
        while piece := file.read(PIECE):
            yield piece
