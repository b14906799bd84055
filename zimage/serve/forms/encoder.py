"""Captions for other machines: `encoder_url` of zimage there asks here. What travels: `zimage.text.wire`."""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from zimage.errors import RequestError, quoted
from zimage.serve.bodies import FormRoute, read_object
from zimage.serve.forms.waiting import while_there
from zimage.serve.openapi import TEXT, Schema, answers, listed, takes
from zimage.serve.service import Service
from zimage.settings.captions import TextSettings
from zimage.settings.fields import Plain, check_text, json_schema

MOST_TEXTS = 64
MEDIA = "application/octet-stream"
DTYPES = ("bfloat16", "float32", "float64")
TEXT_SCHEMA: Schema = {
    "type": "object",
    "properties": {
        "text": {**TEXT, "description": "As it is formatted, with its template and chat parts."},
        "ids": {**TEXT, "description": "Hash of its token ids as JSON: 32 hex digits of SHA-256."},
    },
    "required": ["text", "ids"],
    "additionalProperties": False,
}
BODY: Schema = {
    "type": "object",
    "properties": {
        "texts": {**listed(TEXT_SCHEMA), "minItems": 1, "maxItems": MOST_TEXTS},
        "layers": json_schema(TextSettings)["properties"]["layer_weights"],
        "dtype": {"enum": list(DTYPES), "description": "What the text encoder has to compute in."},
    },
    "required": ["texts", "layers", "dtype"],
    "additionalProperties": False,
    "example": {
        "texts": [{"text": "<|im_start|>user\na cat<|im_end|>\n", "ids": "5f2d0c8e6b7a4f19a3d1c2b4e5f60718"}],
        "layers": {"-2": 1.0},
        "dtype": "bfloat16",
    },
}
SENT: dict[str, Plain] = {
    "description": "Safetensors: tensors 0, 1, …, one (tokens, width) for each text. The metadata say the text "
    "encoder's fingerprint, layers, dtype, shapes and token counts.",
    "content": {MEDIA: {"schema": {"type": "string", "format": "binary"}}},
}


def routes(service: Service) -> APIRouter:
    router = APIRouter(prefix="/api", route_class=FormRoute, tags=["encoder"])
    told: dict[str, Any] = {
        "responses": answers(SENT, 422, body=True),
        "openapi_extra": takes("Formatted texts, all of them read by the same layers.", json=BODY),
    }

    @router.post("/captions", response_class=Response, **told)
    async def captions(request: Request) -> Response:
        """Encode texts, and send the bits that were computed. A text that has other tokens here is refused."""
        asked = checked(await read_object(request))
        answer = await while_there(request, service.compute("encode", form="captions", **asked))
        return Response(await taken(answer["path"]), media_type=MEDIA)

    return router


def checked(body: Mapping[str, Plain]) -> dict[str, Plain]:
    """What a body asks for. Raises RequestError with the field at fault."""
    if unknown := [name for name in body if name not in BODY["properties"]]:
        raise RequestError(f"there is no field {quoted(unknown[0])}", fields=(unknown[0],))
    texts = body.get("texts")
    if not isinstance(texts, list) or not 0 < len(texts) <= MOST_TEXTS:
        raise RequestError(f"texts should be a list of 1 to {MOST_TEXTS} texts", fields=("texts",))
    for text in texts:
        if not isinstance(text, dict) or not _is_text(text.get("text")) or not _is_text(text.get("ids")):
            raise RequestError("texts should have a text and the hash of its ids each", fields=("texts",))
        check_text("texts", text["text"])
    if body.get("dtype") not in DTYPES:
        raise RequestError(f"dtype {quoted(body.get('dtype'))}: use {', '.join(DTYPES)}", fields=("dtype",))
    try:
        layers = TextSettings.check_one("layer_weights", body.get("layers"))
    except RequestError as error:
        raise RequestError(str(error).replace("layer_weights", "layers"), fields=("layers",)) from None
    if layers is None:
        raise RequestError('layers: a value is needed, such as {"-2": 1}', fields=("layers",))
    return {"texts": texts, "layers": body["layers"], "dtype": body["dtype"]}


async def taken(path: str) -> bytes:
    """A file that a worker wrote for one answer; it is gone then."""
    return await asyncio.to_thread(_taken, Path(path))


def _taken(path: Path) -> bytes:
    content = path.read_bytes()
    path.unlink()
    return content


def _is_text(value: Plain) -> bool:
    return isinstance(value, str) and value != ""
