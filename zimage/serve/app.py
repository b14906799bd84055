"""The server put together: the service, the forms on it, the rules before them, and the socket."""

import logging
from collections.abc import Mapping
from pathlib import Path

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.types import ASGIApp

from zimage.serve.forms import own
from zimage.serve.service import Launch, Service
from zimage.settings.environment import data_folder
from zimage.settings.fields import Plain
from zimage.settings.paths import user_path
from zimage.settings.serving import ServeSettings
from zimage.version import __version__

log = logging.getLogger("zimage.serve")


def build(service: Service) -> FastAPI:
    """The forms, as an ASGI app without the rules of safety."""
    app = FastAPI(title="zimage", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    for form in (own,):
        app.include_router(form.routes(service))
    return app
