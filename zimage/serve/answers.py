"""Errors as the clients of each form read them: our own, OpenAI's below /v1/, A1111's below /sdapi/ and
/controlnet/."""

import json
from collections.abc import Iterable, Sequence
from http import HTTPStatus

from starlette.types import Scope, Send

from zimage.errors import ZImageError, one_line
from zimage.serve.refusals import Refusal, status_of
from zimage.settings.fields import Plain

OPENAI, A1111, CONTROLNET = "/v1/", "/sdapi/", "/controlnet/"
WEBUI = (A1111, CONTROLNET)
KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
CODES = {401: "invalid_api_key", 404: "not_found", 413: "request_too_large", 429: "rate_limit_exceeded"}
Header = tuple[bytes, bytes]


def error_body(path: str, status: int, message: str, fields: Sequence[str] = ()) -> dict[str, Plain]:
    """What the clients of `path` expect in the body of an error; the foremost of `fields` is the one at fault."""
    message = one_line(message)
    if path.startswith(OPENAI):
        kind = KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
        field = fields[0] if fields else None
        return {"error": {"message": message, "type": kind, "param": field, "code": CODES.get(status)}}
    if path.startswith(WEBUI):
        return {"error": phrase(status), "detail": message}
    return {"error": {"message": message, "fields": list(fields)}}


def error_status(path: str, error: ZImageError) -> int:
    """The status of an error below `path`: other programs' clients know 400 for values that cannot be used, not 422."""
    status = status_of(error)
    return 400 if status == 422 and path.startswith((OPENAI, *WEBUI)) else status


def error_headers(error: ZImageError) -> dict[str, str]:
    """`Retry-After`, in whole seconds, where the same request may succeed later."""
    after = error.retry_after if isinstance(error, Refusal) else None
    return {} if after is None else {"Retry-After": str(max(1, round(after)))}


def phrase(status: int) -> str:
    """HTTP's own words for a status."""
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Error"


async def send_error(scope: Scope, send: Send, status: int, message: str, headers: Iterable[Header] = ()) -> None:
    """Answer a request of plain ASGI with an error, in the form of its path."""
    body = json.dumps(error_body(scope["path"], status, message), ensure_ascii=False).encode(errors="replace")
    plain = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*plain, *headers]})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})
