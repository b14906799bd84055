"""Bodies of requests, read and checked, and errors answered as the clients of their path read them."""

import asyncio
import math
from collections.abc import Awaitable, Callable, Collection, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect

from zimage.errors import CheckpointError, RequestError, ZImageError, quoted
from zimage.formats.json_text import json_value
from zimage.serve.answers import error_body, error_headers, error_status
from zimage.serve.asking import ATTACHMENTS, CONDITIONS, Files
from zimage.serve.multipart import Part, parts_of
from zimage.serve.refusals import Malformed, WrongMedia
from zimage.settings.fields import Plain

JSON, MULTIPART = "application/json", "multipart/form-data"
VALUES = "request"  # the part of a multipart body that holds the values
LONG = 1 << 16  # bytes of JSON that are parsed beside the event loop
MOST_VALUES = 100_000  # in JSON: Python's parser holds up every other thread meanwhile; commas of prompts count as well
GONE = 499  # nobody reads it: the client has closed the connection


class FormRoute(APIRoute):
    """A route that answers errors in the form of its path; a form with names of its own overrides `told`."""

    def told(self, path: str, status: int, error: ZImageError) -> dict[str, Plain]:
        """The body of the answer to an error."""
        return error_body(path, status, str(error), error.fields)

    def headers(self, error: ZImageError) -> dict[str, str]:
        """What the answer to an error says beside its body."""
        return error_headers(error)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler: Callable[[Request], Awaitable[Response]] = super().get_route_handler()

        async def answer(request: Request) -> Response:
            try:
                return await handler(request)
            except ZImageError as error:
                return self._refused(request, error)
            except RequestValidationError as error:
                return self._refused(request, _of_parameter(error))
            except ClientDisconnect:
                return Response(status_code=GONE)

        return answer

    def _refused(self, request: Request, error: ZImageError) -> Response:
        path = request.scope["path"]
        status = error_status(path, error)
        return JSONResponse(self.told(path, status, error), status, self.headers(error))


async def read_object(request: Request) -> dict[str, Plain]:
    """The JSON object in a request's body. Raises WrongMedia, Malformed, or RequestError for another value."""
    media = media_type(request)
    if media != JSON:
        raise WrongMedia(f"the body should be {JSON}, not {media or 'without a Content-Type'}")
    body = await request.body()  # as long as the rules of safety let it be
    return parse_object(body) if len(body) < LONG else await asyncio.to_thread(parse_object, body)


async def read_parts(request: Request) -> list[Part]:
    """The parts of a multipart body. Raises WrongMedia or Malformed."""
    media = media_type(request)
    if media != MULTIPART:
        raise WrongMedia(f"the body should be {MULTIPART}, not {media or 'without a Content-Type'}")
    return parts_of(request.headers["content-type"], await request.body())


async def read_with_files(
    request: Request, single: Collection[str] = ATTACHMENTS, several: Collection[str] = tuple(CONDITIONS)
) -> tuple[dict[str, Plain], Files]:
    """Values and files: a JSON body has no files, and a multipart one its values as JSON in the part `request`.

    Parts may have the names of `single`, once, and those of `several`. Raises WrongMedia, Malformed, or RequestError
    for others, of which nothing is made.
    """
    if media_type(request) != MULTIPART:
        return await read_object(request), {}
    parts: dict[str, list[bytes]] = {}
    for part in await read_parts(request):
        if part.name in parts and part.name not in several:
            raise RequestError(f"{part.name}: it comes twice; pass it once", fields=(part.name,))
        parts.setdefault(part.name, []).append(part.content)
    for name in parts.keys() - {VALUES, *single, *several}:
        known = ", ".join((VALUES, *single, *several))
        raise RequestError(f"the part {quoted(name)} is not known; use {known}", fields=(name,))
    (values,) = parts.pop(VALUES, [b"{}"])
    return await asyncio.to_thread(parse_object, values), parts


def media_type(request: Request) -> str:
    """The type of a body, without its parameters; empty where none is named."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def parse_object(body: bytes) -> dict[str, Plain]:
    """The same of bytes. Raises Malformed, or RequestError for another value."""
    if sum(map(body.count, (b",", b"[", b"{"))) > MOST_VALUES:
        raise Malformed(f"the body has more than {MOST_VALUES:,} values")
    try:
        content = json_value("the body", body, len(body))
    except CheckpointError as error:
        raise Malformed(str(error)) from None
    if not isinstance(content, dict):
        raise RequestError(f"the body should be a JSON object of named values, not {_kind(content)}")
    _check(content)
    return content


def _check(value: Plain) -> None:
    """Raise Malformed for what Python reads, and neither JSON nor UTF-8 can say: NaN, Infinity, half a character."""
    if isinstance(value, dict):
        for name, inner in value.items():
            _check(name)
            _check(inner)
    elif isinstance(value, list):
        for inner in value:
            _check(inner)
    elif isinstance(value, float) and not math.isfinite(value):
        raise Malformed(f"the body is not JSON: {value} is not a number")
    elif isinstance(value, str) and not value.isascii() and value != value.encode(errors="ignore").decode():
        raise Malformed("the body holds text that is not valid Unicode")


def _kind(value: Plain) -> str:
    named = {list: "an array", str: "text", bool: "true or false", type(None): "null"}
    return named.get(type(value), "a number")


def _of_parameter(error: RequestValidationError) -> RequestError:
    """FastAPI's error on a parameter of the path or the query, as one line that names it."""
    first = error.errors()[0]
    name = str(first["loc"][-1])
    return RequestError(f"{name}: {first['msg']}", fields=(name,))
