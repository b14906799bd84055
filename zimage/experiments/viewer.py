"""The viewer: a page on the cells of a folder, as a server of its own. It needs the extra `serve`.

Listening, safety, session and the answers to errors are the server's. The folder is read anew whenever the page asks
for the grid, so that a sweep that runs can be watched.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Query, Request
from fastapi.responses import JSONResponse, Response

from zimage.errors import RequestError, quoted
from zimage.experiments import pagedata, pages
from zimage.experiments.again import Renders
from zimage.experiments.difference import GAIN, MOST_GAIN, difference, distance, kind_of
from zimage.experiments.folder import Cell, Experiment
from zimage.experiments.layout import arranged, placed
from zimage.experiments.thumbnails import thumbnail
from zimage.experiments.votes import Ballot, Pair, standings
from zimage.pictures.files import encoded
from zimage.serve.bodies import FormRoute, read_object
from zimage.serve.door import Door
from zimage.serve.forms import session
from zimage.serve.forms.page import routes_of
from zimage.serve.guard import HEALTH, Guard
from zimage.serve.listening import serve
from zimage.serve.refusals import NotFound
from zimage.serve.safety import protected
from zimage.serve.token import read_token
from zimage.serve.unhandled import HANDLERS
from zimage.settings.serving import ServeSettings

AT_ONCE = 2  # pictures that are decoded at the same time
LONGEST = 2000  # characters of a name in a query
Names = Annotated[list[str], Query(max_length=64)]


class Viewer:
    """What the page is about: an experiment as it was last read, its votes, and cells that are rendered again."""

    def __init__(self, folder: Path):
        self.folder, self.renders = folder, Renders()
        self.experiment, self.ballot = Experiment.open(folder), Ballot(folder)
        self._decoding = asyncio.Semaphore(AT_ONCE)

    def read(self) -> Experiment:
        """The folder as it is now."""
        self.experiment = Experiment.open(self.folder)
        return self.experiment

    def cell(self, id: str) -> Cell:
        """Raises NotFound."""
        found = next((cell for cell in self.experiment.cells if cell.id == id), None)
        if found is None:
            raise NotFound(f"there is no cell {quoted(id)}")
        return found

    def pair(self, token: str) -> Pair:
        """Raises NotFound."""
        pair = self.ballot.pair(token)
        if pair is None:
            raise NotFound("this pair has been voted on, or is too old; ask for another one")
        return pair

    async def decoded(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """What takes a decoded picture's time and memory, beside the event loop."""
        async with self._decoding:
            return await asyncio.to_thread(work, *arguments)


def run(folder: Path, serving: ServeSettings, ready: Callable[[str, Viewer], None]) -> None:
    """Serve the page until the process is told to stop; `ready` gets its address. Raises what keeps it from that."""
    token = read_token(serving)
    viewer, guard = Viewer(folder), Guard(serving, Door(token))

    async def stop() -> None:
        await asyncio.to_thread(viewer.renders.stop)

    def tell(url: str) -> None:
        ready(url, viewer)

    serve(protected(build(viewer, guard.door), guard), serving, token, tell, stop)


def build(viewer: Viewer, door: Door) -> FastAPI:
    """The viewer as an ASGI app, without the rules of safety."""

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        yield

    app = FastAPI(lifespan=life, exception_handlers=HANDLERS, redirect_slashes=False, openapi_url=None)
    app.include_router(routes_of(pages.files()))
    app.include_router(session.routes(door))
    router = APIRouter(route_class=FormRoute)
    for add in (add_grid, add_cells, add_differences, add_votes, add_renders):
        add(router, viewer)
    app.include_router(router)
    return app


def add_grid(router: APIRouter, viewer: Viewer) -> None:
    @router.get(HEALTH)
    async def health() -> Response:
        return JSONResponse({"status": "ok"})

    @router.get("/api/grid")
    async def grid(columns: Names = [], rows: Names = [], pages: Names = [], only: Names = []) -> Response:  # noqa: B006
        return JSONResponse(await asyncio.to_thread(arrange, columns, rows, pages, only))

    def arrange(columns: list[str], rows: list[str], pages: list[str], only: list[str]) -> dict[str, Any]:
        whole = viewer.read()
        part = whole.only(only)
        axes = placed(part, columns, rows, pages)
        return pagedata.described(whole, arranged(part, axes), axes)

    @router.get("/api/ranks")
    async def ranks() -> Response:
        return JSONResponse(await asyncio.to_thread(pagedata.ranks, viewer.experiment))


def add_cells(router: APIRouter, viewer: Viewer) -> None:
    @router.get("/api/cells/{id}")
    async def details(id: str) -> Response:
        return JSONResponse(pagedata.details(viewer.cell(id)))

    @router.get("/api/cells/{id}/picture")
    async def picture(id: str) -> Response:
        return png(await viewer.decoded(whole_of, viewer.cell(id)))

    @router.get("/api/cells/{id}/thumbnail")
    async def small(id: str) -> Response:
        return Response(await viewer.decoded(thumbnail, viewer.cell(id)), media_type="image/webp")


def add_differences(router: APIRouter, viewer: Viewer) -> None:
    @router.get("/api/difference")
    async def of_two(left: str, right: str, kind: str = "absolute", gain: float = GAIN) -> Response:
        if not 0 < gain <= MOST_GAIN:
            raise RequestError(f"gain {gain:g} should be above 0 and at most {MOST_GAIN:g}", fields=("gain",))
        cells = viewer.cell(right), viewer.cell(left)
        content, words = await viewer.decoded(differing, *cells, kind_of(kind), gain)
        return png(content, {"X-Distance": words})

    def differing(cell: Cell, base: Cell, kind: Any, gain: float) -> tuple[bytes, str]:
        picture, other = cell.picture(), base.picture()
        words = ", ".join(filter(None, distance(picture, other).lines))
        return encoded(difference(picture, other, kind, gain), "PNG", None), words


def add_votes(router: APIRouter, viewer: Viewer) -> None:
    """A pair's pictures are asked for by its token, so that nothing on the page says which cells they are."""

    @router.post("/api/pairs")
    async def draw(request: Request) -> Response:
        axis = text_of(await read_object(request), "axis")
        token, pair = await asyncio.to_thread(viewer.ballot.draw, viewer.experiment, axis)
        others = [name for name in viewer.experiment.axes if name not in (axis, "prompt")]
        shared = pagedata.label(pair.left, others) if others else ""
        sizes = [pagedata.size_of(cell) for cell in (pair.left, pair.right)]
        asked = {"token": token, "prompt": pair.left.record.prompt, "shared": shared, "sizes": sizes}
        return JSONResponse({**asked, "votes": len(viewer.ballot.votes)}, 201)

    @router.get("/api/pairs/{token}/{side}")
    async def side_of(token: str, side: str) -> Response:
        pair = viewer.pair(token)
        if side not in ("left", "right"):
            raise NotFound("a pair has the sides left and right")
        return png(await viewer.decoded(plain_png, pair.left if side == "left" else pair.right))

    @router.post("/api/pairs/{token}")
    async def vote(token: str, request: Request) -> Response:
        choice = text_of(await read_object(request), "choice")
        await asyncio.to_thread(viewer.ballot.cast, token, choice)
        return JSONResponse({"votes": len(viewer.ballot.votes)}, 201)

    @router.get("/api/votes")
    async def counted() -> Response:
        votes, axes = viewer.ballot.votes, viewer.experiment.axes
        rows = {axis: [vars(s) for s in standings(votes, viewer.experiment, axis)] for axis in axes}
        return JSONResponse({"votes": len(votes), "unread": viewer.ballot.unread, "standings": rows})


def add_renders(router: APIRouter, viewer: Viewer) -> None:
    @router.post("/api/cells/{id}/render")
    async def start(id: str) -> Response:
        return JSONResponse(viewer.renders.start(viewer.cell(id)).plain(), 202)

    @router.get("/api/cells/{id}/render")
    async def state(id: str) -> Response:
        return JSONResponse(render_of(id).plain())

    @router.get("/api/cells/{id}/render/picture")
    async def picture(id: str) -> Response:
        if not render_of(id).picture:
            raise NotFound("it is not rendered yet")
        return png(render_of(id).picture)

    def render_of(id: str) -> Any:
        found = viewer.renders.of(viewer.cell(id))
        if found is None:
            raise NotFound(f"{id} has not been rendered again")
        return found


def png(content: bytes, headers: dict[str, str] | None = None) -> Response:
    return Response(content, media_type="image/png", headers=headers)


def whole_of(cell: Cell) -> bytes:
    """A PNG with the cell's pixels; the file itself where it is one, with its settings."""
    if cell.path is None:
        raise NotFound(f"{cell.id} has no picture: {cell.fault}")
    cell.picture()  # raises RequestError where it is not a picture
    content = cell.path.read_bytes()
    return content if content.startswith(b"\x89PNG") else plain_png(cell)


def plain_png(cell: Cell) -> bytes:
    """A PNG with the pixels and nothing else: no settings, which would tell what it is."""
    return encoded(cell.picture(), "PNG", None)


def text_of(body: dict[str, Any], name: str) -> str:
    """A text in a body. Raises RequestError."""
    value = body.get(name)
    if not isinstance(value, str) or len(value) > LONGEST:
        raise RequestError(f"{name}: a text is needed", fields=(name,))
    return value
