"""The page's session: a token once, then a cookie that no script can read and no other site can send."""

import json

from fastapi import APIRouter, Request, Response

from zimage.errors import CheckpointError
from zimage.formats.json_text import json_object
from zimage.serve.answers import error_body
from zimage.serve.door import Door, no_cookie
from zimage.serve.openapi import answers, takes

LONGEST = 4096  # bytes of a body
EXAMPLE = {"token": "the token that the server was started with"}
BODY = {
    "type": "object",
    "required": ["token"],
    "properties": {"token": {"type": "string", "description": "The server's token."}},
    "example": EXAMPLE,
}
DONE = {"description": "There is nothing to say."}


def routes(door: Door) -> APIRouter:
    """`/api/session`; the rule `FewTries` of `safety` counts what is answered with 401 here."""
    router = APIRouter(tags=["session"])

    @router.post(
        "/api/session",
        status_code=204,
        openapi_extra=takes("The token.", json=BODY),
        responses=answers(DONE, 422, status=204, body=True),
    )
    async def begin(request: Request) -> Response:
        """Exchange the token for a cookie."""
        try:
            token = json_object("the body", await request.body(), LONGEST).get("token")
        except CheckpointError as error:
            return _refused(400, str(error))
        if not isinstance(token, str) or not door.knows(token):
            return _refused(401, "the token is wrong")
        secure = request.headers.get("origin", "").startswith("https:") or request.url.scheme == "https"
        return Response(status_code=204, headers={"Set-Cookie": door.cookie(secure)} if door.is_locked else None)

    @router.delete("/api/session", status_code=204, responses=answers(DONE, status=204))
    async def end() -> Response:
        """Forget the cookie."""
        return Response(status_code=204, headers={"Set-Cookie": no_cookie()})

    return router


def _refused(status: int, message: str) -> Response:
    body = json.dumps(error_body("/api/session", status, message))
    return Response(body, status, media_type="application/json")
