"""The server put together: the service, the forms on it, the rules before them, and the socket."""

import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI

from zimage.errors import RequestError
from zimage.serve.database import Database
from zimage.serve.door import Door
from zimage.serve.forms import history, meta, own
from zimage.serve.guard import Guard
from zimage.serve.history import History
from zimage.serve.listening import serve
from zimage.serve.openapi import describe
from zimage.serve.safety import protected
from zimage.serve.schema import drawing_body, drawing_parts
from zimage.serve.service import Launch, Service
from zimage.serve.token import read_token
from zimage.settings.environment import data_folder
from zimage.settings.fields import Plain
from zimage.settings.paths import user_path
from zimage.settings.serving import ServeSettings
from zimage.version import __version__

log = logging.getLogger("zimage.serve")


def run(
    loading: Mapping[str, Plain], drawing: Mapping[str, Plain], rewriting: Mapping[str, Plain], serving: ServeSettings
) -> None:
    """Serve until the process is told to stop. Raises what keeps it from beginning."""
    token = read_token(serving)
    service = Service(Launch(loading, {**drawing, **rewriting}, serving, folder_of(serving)))
    guard = Guard(serving, Door(token))
    serve(protected(build(service), guard), serving, token, _said, lambda: service.stop(serving.grace))


def _said(url: str) -> None:
    log.info("%s", url)


def reindex(serving: ServeSettings) -> None:
    """Make the index of the history anew from its pictures."""
    folder = folder_of(serving)
    database = Database(folder / "index.sqlite")
    try:
        History(folder, database).reindex()
    finally:
        database.close()


def folder_of(serving: ServeSettings) -> Path:
    """Where a server keeps everything. Raises RequestError for a user without a home folder who names none."""
    folder = user_path(serving.data, "data") if serving.data else data_folder()
    if folder is None:
        raise RequestError("data: there is no home folder; name a folder with --data", fields=("data",))
    return folder.absolute()


def build(service: Service) -> FastAPI:
    """The forms, as an ASGI app without the rules of safety."""

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        yield

    off = {"docs_url": None, "redoc_url": None}
    app = FastAPI(title="zimage", version=__version__, lifespan=life, redirect_slashes=False, **off)
    for form in (own, history, meta):
        app.include_router(form.routes(service))
    bodies = {"Drawing": drawing_body(service.settings)}
    describe(app, {**bodies, "DrawingParts": drawing_parts(bodies["Drawing"]), **history.SCHEMAS})
    return app
