"""The page for people: `page/` as it is, nothing made on the way."""

from collections.abc import Mapping
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse, Response

from zimage.serve.bodies import FormRoute
from zimage.serve.refusals import NotFound
from zimage.serve.service import Service

FOLDER = Path(__file__).parents[1] / "page"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
UNCHANGED = {"Cache-Control": "no-cache"}  # asked for anew, and sent only where it has changed


def routes(service: Service) -> APIRouter:
    return routes_of({path.name: path for path in FOLDER.iterdir() if path.suffix in TYPES})


def routes_of(files: Mapping[str, Path]) -> APIRouter:
    """`/`, which is index.html, and `/page/NAME`."""
    router = APIRouter(route_class=FormRoute, include_in_schema=False)

    @router.get("/")
    async def page() -> Response:
        return sent("index.html")

    @router.get("/page/{name}")
    async def part(name: str) -> Response:
        return sent(name)

    def sent(name: str) -> Response:
        if name not in files:
            raise NotFound(f"the page has no {name[:80]!r}")
        return FileResponse(files[name], media_type=TYPES[files[name].suffix], headers=UNCHANGED)

    return router
