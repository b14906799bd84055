"""Answers to what no route takes, in the form of the path; an app has them as its exception handlers."""

from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from zimage.serve.answers import error_body
from zimage.serve.openapi import methods_of


async def _unknown(request: Request, error: HTTPException) -> Response:
    """No such path, or no such method on it."""
    path, status = request.url.path, error.status_code
    text = f"{request.method} {path[:80]!r} is not something that this server does"
    known = methods_of(request.app, path) if status == 405 else ""
    return JSONResponse(error_body(path, status, text), status, {"Allow": known} if known else error.headers)


async def _failed(request: Request, error: Exception) -> Response:
    """A fault of the program; the log tells where."""
    text = "the server failed at this; its log says more"
    return JSONResponse(error_body(request.url.path, 500, text), 500)


HANDLERS: dict[Any, Any] = {HTTPException: _unknown, Exception: _failed}
