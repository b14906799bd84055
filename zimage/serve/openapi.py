"""The description of the server as OpenAPI has it: bodies, answers and errors of every operation, with examples.

Bodies are read by the forms themselves and described here: what a field may be is declared once, in `zimage.settings`.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from zimage.serve.answers import A1111, CONTROLNET, OPENAI, error_body, phrase
from zimage.serve.schema import EXAMPLE, Schema, whole
from zimage.settings.fields import Plain
from zimage.version import __version__

JSON, EVENTS, PARTS = "application/json", "text/event-stream", "multipart/form-data"
OWN = "/api/"
DESCRIPTION = (
    "Pictures from prompts: jobs with live progress, a history, and the forms of OpenAI's and A1111's clients."
)
EVERYWHERE = (400, 401, 403, 414, 429, 431, 500, 503)  # what the rules of safety answer, and a server that stops
ON_BODIES = (408, 413, 415)
FAULTS: dict[int, tuple[str, tuple[str, ...]]] = {
    400: ("the body is not JSON: Expecting value: line 1 column 1 (char 0)", ()),
    401: ("a token is needed: Authorization: Bearer TOKEN", ()),
    403: ("requests from another site's pages are refused", ()),
    404: ("there is no job '20261127-174501-3fa9c2d1'", ()),
    408: ("the body came too slowly", ()),
    409: ("the job has ended", ()),
    413: ("a request may have 32 MiB with its uploads", ()),
    414: ("path and query may have 8,192 bytes", ()),
    415: ("the body should be application/json, not text/plain", ()),
    422: ("width 1000 is not a multiple of 16; nearest 992 or 1008", ("width",)),
    429: ("200 jobs are waiting; try again later", ()),
    431: ("the header is too long", ()),
    500: ("the render failed: the device ran out of memory", ()),
    502: ("the server at the rewriter_url cannot be reached", ()),
    503: ("the server is stopping", ()),
    507: ("the disk is full; make room and try again", ()),
}
TEXT: Schema = {"type": "string"}
MAYBE_TEXT: Schema = {"type": ["string", "null"]}
WHOLE: Schema = {"type": "integer"}
SECONDS: Schema = {"type": ["number", "null"]}
RECORD: Schema = {"type": "object"}


def listed(items: Schema) -> Schema:
    """An array of these."""
    return {"type": "array", "items": items}


def reference(title: str) -> Schema:
    """A schema that the description holds once."""
    return {"$ref": f"#/components/schemas/{title}"}


def record(title: str, others: bool = False, **fields: Schema) -> Schema:
    """The schema of an object that has all of these."""
    return whole(title, fields, needed=tuple(fields), others=others)


IMAGE = record(
    "Image",
    id={**TEXT, "examples": ["20261127-174501-3fa9c2d1-1"]},
    job=TEXT,
    url=TEXT,
    thumbnail=TEXT,
    width=WHOLE,
    height=WHOLE,
    seed=WHOLE,
    prompt=TEXT,
    created={"type": "number", "description": "Unix time in seconds."},
    bytes=WHOLE,
    settings={**RECORD, "description": "Everything that draws the picture again, as its file holds it."},
)
JOB = record(
    "Job",
    id={**TEXT, "examples": ["20261127-174501-3fa9c2d1"]},
    kind={**TEXT, "description": "The form in which it was asked for."},
    state={"enum": ["queued", "running", "done", "failed", "cancelled"]},
    position={"type": ["integer", "null"], "description": "Jobs before it; null unless it is queued."},
    created={"type": "number", "description": "Unix time in seconds."},
    started=SECONDS,
    finished=SECONDS,
    request={**RECORD, "description": "Every field as it was decided; attachments by name and hash."},
    seeds={**listed(WHOLE), "description": "One per picture."},
    stage=TEXT,
    step=WHOLE,
    total=WHOLE,
    index=WHOLE,
    count=WHOLE,
    remaining={**SECONDS, "description": "Estimated seconds until it is done."},
    images=listed(reference("Image")),
    timings={**RECORD, "additionalProperties": {"type": "number"}, "description": "Seconds per stage."},
    notes=listed(TEXT),
    rewritten=listed(RECORD),
    error={"type": ["object", "null"]},
)
EXAMPLE_JOB = {
    "id": "20261127-174501-3fa9c2d1",
    "kind": "own",
    "state": "queued",
    "position": 0,
    "created": 1795801501.2,
    "started": None,
    "finished": None,
    "request": {**EXAMPLE, "width": 1024, "height": 1024, "steps": 8, "guidance": 0.0, "shift": 3.0, "lora": []},
    "seeds": [42],
    "stage": "",
    "step": 0,
    "total": 0,
    "index": 0,
    "count": 1,
    "remaining": None,
    "images": [],
    "timings": {},
    "notes": [],
    "rewritten": [],
    "error": None,
}
OPENAI_FAULT = record("", message=TEXT, type=TEXT, param=MAYBE_TEXT, code=MAYBE_TEXT)
ERRORS: dict[str, Schema] = {
    OWN: record("Error", error=record("", message=TEXT, fields=listed(TEXT))),
    OPENAI: record("OpenAIError", error=OPENAI_FAULT),
    A1111: record("A1111Error", others=True, error=TEXT, detail=TEXT),
}
ERRORS[CONTROLNET] = ERRORS[A1111]
SHARED: dict[str, Schema] = {schema["title"]: schema for schema in (IMAGE, JOB, *ERRORS.values())}


def answers(
    ok: Mapping[str, Plain], *faults: int, form: str = OWN, status: int = 200, body: bool = False
) -> dict[int | str, dict[str, Any]]:
    """The answers of an operation, for FastAPI: `ok` on success, errors of these statuses and of those that all have.

    `body`: it reads one, which may be too large, too slow or of the wrong kind.
    """
    statuses = sorted({*faults, *EVERYWHERE, *(ON_BODIES if body else ())})
    return {status: dict(ok), **{one: _fault(one, form) for one in statuses}}


def content(description: str, schema: Schema, example: Plain = None, media: str = JSON) -> dict[str, Plain]:
    """One answer, or a body, as OpenAPI describes it."""
    shown = {} if example is None else {"example": example}
    return {"description": description, "content": {media: {"schema": schema, **shown}}}


def takes(description: str, **bodies: Schema) -> dict[str, Plain]:
    """The body of an operation, for FastAPI's `openapi_extra`: `json`, `parts` or both."""
    media = {"json": JSON, "parts": PARTS}
    contents = {media[name]: {"schema": schema} for name, schema in bodies.items()}
    return {"requestBody": {"required": True, "description": description, "content": contents}}


def describe(app: FastAPI, schemas: Mapping[str, Schema]) -> None:
    """Make the app's description complete: `schemas` are what its bodies refer to, by title."""
    app.openapi = _description(app, {**SHARED, **schemas})  # type: ignore[method-assign]


def methods_of(app: FastAPI, path: str) -> str:
    """What can be done at a path, for `Allow`; empty for one that is not described. Names go before patterns."""
    paths = app.openapi()["paths"]
    template = path if path in paths else next((one for one in paths if _pattern(one).fullmatch(path)), None)
    return ", ".join(sorted(method.upper() for method in paths[template])) if template else ""


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\\{\w+\\\}", "[^/]+", re.escape(template)))


def _description(app: FastAPI, schemas: Mapping[str, Schema]) -> Callable[[], dict[str, Any]]:
    def description() -> dict[str, Any]:
        if not app.openapi_schema:
            found = get_openapi(title="zimage", version=__version__, description=DESCRIPTION, routes=app.routes)
            for operation in (one for path in found["paths"].values() for one in path.values()):
                _drop_added(operation["responses"])
                _summarise(operation)
            bearer = {"token": {"type": "http", "scheme": "bearer"}}
            components = {"schemas": dict(schemas), "securitySchemes": bearer}
            app.openapi_schema = {**found, "components": components, "security": [{"token": []}, {}]}
        return app.openapi_schema

    return description


def _drop_added(responses: dict[str, Any]) -> None:
    """FastAPI adds an answer of its own for parameters that are at fault; ours are listed by each operation."""
    schema = responses.get("422", {}).get("content", {}).get(JSON, {}).get("schema", {})
    if schema.get("$ref", "").endswith("/HTTPValidationError"):
        del responses["422"]


def _summarise(operation: dict[str, Any]) -> None:
    """The first sentence of an endpoint's docstring is its summary; FastAPI takes the function's name for that."""
    first, _, rest = operation.pop("description", "").partition(". ")
    if first:
        operation["summary"] = first.rstrip(".")
    if rest:
        operation["description"] = rest


def _fault(status: int, form: str) -> dict[str, Any]:
    message, fields = FAULTS[status]
    example = error_body(form, status, message, fields)
    found = content(phrase(status), reference(ERRORS[form]["title"]), example)
    if status in (429, 503):
        seconds = {"description": "Seconds after which to try again.", "schema": {"type": "integer"}}
        return {**found, "headers": {"Retry-After": seconds}}
    return found
