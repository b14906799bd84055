"""The server put together: the service, the forms on it, the rules before them, and the socket."""

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

from fastapi import FastAPI

from zimage.errors import RequestError
from zimage.serve.about import About
from zimage.serve.database import Database
from zimage.serve.door import Door
from zimage.serve.forms import (
    a1111,
    controlnet,
    encoder,
    hidden_states,
    history,
    meta,
    openai,
    own,
    page,
    session,
    texts,
    vision,
)
from zimage.serve.guard import Guard
from zimage.serve.history import History
from zimage.serve.listening import serve
from zimage.serve.openapi import describe
from zimage.serve.safety import protected
from zimage.serve.schema import drawing_body, drawing_parts
from zimage.serve.service import Launch, Service
from zimage.serve.token import read_token
from zimage.serve.unhandled import HANDLERS
from zimage.settings.environment import data_folder
from zimage.settings.fields import Plain
from zimage.settings.merging import Presets
from zimage.settings.paths import user_path
from zimage.settings.scale import BatchSettings
from zimage.settings.serving import ServeSettings


class Ready(NamedTuple):
    """A server that takes requests now: its address, its model, the folder that it keeps."""

    url: str
    about: About
    folder: Path


def run(
    loading: Mapping[str, Plain],
    defaults: Mapping[str, Plain],
    serving: ServeSettings,
    machines: BatchSettings,
    presets: Presets,
    ready: Callable[[Ready], None],
) -> None:
    """Serve until the process is told to stop; `ready` is called once. Raises what keeps it from beginning.

    `defaults` are what requests leave open, of pictures and of rewriting; `machines`: a cluster with further workers;
    `presets`: those of the settings file, which requests may name.
    """
    token = read_token(serving)
    service = Service(Launch(loading, defaults, serving, folder_of(serving), machines, presets))
    guard = Guard(serving, Door(token), observe=service.metrics.answered)

    def tell(url: str) -> None:
        ready(Ready(url, service.about, service.folder))

    serve(protected(build(service, guard.door), guard), serving, token, tell, lambda: service.stop(serving.grace))


def reindex(serving: ServeSettings) -> int:
    """Make the index of the history anew from its pictures; returns how many there are."""
    folder = folder_of(serving)
    database = Database(folder / "index.sqlite")
    try:
        history = History(folder, database)
        history.reindex()
        return history.total()
    finally:
        database.close()


def folder_of(serving: ServeSettings) -> Path:
    """Where a server keeps everything. Raises RequestError for a user without a home folder who names none."""
    folder = user_path(serving.data, "data") if serving.data else data_folder()
    if folder is None:
        raise RequestError("data: there is no home folder; name a folder with --data", fields=("data",))
    return folder.absolute()


def build(service: Service, door: Door) -> FastAPI:
    """The forms, as an ASGI app without the rules of safety."""

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        yield

    app = FastAPI(lifespan=life, exception_handlers=HANDLERS, redirect_slashes=False, docs_url=None, redoc_url=None)
    forms = (encoder, hidden_states, texts, vision, meta)
    for form in forms if service.settings.encoder_only else (own, history, openai, a1111, controlnet, page, *forms):
        app.include_router(form.routes(service))
    app.include_router(session.routes(door))
    bodies = {"Drawing": drawing_body(service.settings)}
    others = {**history.SCHEMAS, **openai.schemas(service.settings), **a1111.schemas(service.settings)}
    describe(app, {**bodies, "DrawingParts": drawing_parts(bodies["Drawing"]), **others})
    return app
