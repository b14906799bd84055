"""Hidden states for other programs: `POST /v1/hidden_states`, whose values are float32 in little-endian order.

Texts come formatted, with their chat template. There is one model here: `model` is not looked at, and the answer says
which one it was.
"""

from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from zimage.errors import RequestError, quoted
from zimage.serve.answers import OPENAI
from zimage.serve.bodies import JSON, FormRoute, read_object
from zimage.serve.forms.encoder import taken
from zimage.serve.forms.waiting import while_there
from zimage.serve.openapi import TEXT, WHOLE, Schema, answers, content, listed, record, takes
from zimage.serve.service import Service
from zimage.settings.captions import HIDDEN_LAYER, TextSettings
from zimage.settings.fields import Plain, check_text

MOST_TEXTS = 16
MOST_TOKENS = 4096  # of one text, some 200 MB as JSON numbers
MAX_LENGTH = 512  # by default, as these servers have it
ENCODINGS = ("float", "base64")
BODY: Schema = {
    "type": "object",
    "properties": {
        "input": {
            "anyOf": [TEXT, {**listed(TEXT), "minItems": 1, "maxItems": MOST_TEXTS}],
            "description": "A text with its chat template, or several.",
        },
        "model": {"description": "Not looked at: a server has one model, which the answer names."},
        "layer": {"type": ["integer", "null"], "minimum": -1000, "maximum": -1, "default": HIDDEN_LAYER},
        "max_length": {**WHOLE, "minimum": 1, "maximum": MOST_TOKENS, "default": MAX_LENGTH},
        "encoding_format": {"enum": list(ENCODINGS), "default": ENCODINGS[0]},
    },
    "required": ["input"],
    "example": {"input": "<|im_start|>user\na cat<|im_end|>\n", "layer": -2, "encoding_format": "base64"},
}
STATES: Schema = {
    "description": "Numbers (tokens, width), or base64 of them as little-endian float32; a list of these for several.",
}
ANSWER = record(
    "HiddenStates",
    hidden_states=STATES,
    shape={"type": "array", "description": "[tokens, width], or a list of these for several."},
    dtype=TEXT,
    layer=WHOLE,
    model=TEXT,
    encoding_format={"enum": list(ENCODINGS)},
    fingerprint={**TEXT, "description": "Of the text encoder's weights."},
)
EXAMPLE = {
    "hidden_states": "AACAPwAAAEA=",
    "shape": [1, 2],
    "dtype": "float32",
    "layer": -2,
    "model": "Z-Image-Turbo",
    "encoding_format": "base64",
    "fingerprint": "0123456789ab",
}


def routes(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1", route_class=FormRoute, tags=["encoder"])
    told: dict[str, Any] = {
        "responses": answers(content("Hidden states of one layer.", ANSWER, EXAMPLE), form=OPENAI, body=True),
        "openapi_extra": takes("Texts and the layer to send.", json=BODY),
    }

    @router.post("/hidden_states", response_class=Response, **told)
    async def hidden_states(request: Request) -> Response:
        """The hidden states of one layer for each token of a text. Unknown fields are ignored."""
        asked = checked(await read_object(request))
        answer = await while_there(request, service.compute("encode", form="hidden_states", **asked))
        return Response(await taken(answer["path"]), media_type=JSON)

    return router


def checked(body: Mapping[str, Plain]) -> dict[str, Plain]:
    """What a body asks for. Raises RequestError with the field at fault."""
    given = body.get("input")
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not 0 < len(texts) <= MOST_TEXTS:
        raise RequestError(f"input should be a text, or a list of 1 to {MOST_TEXTS}", fields=("input",))
    for text in texts:
        if not isinstance(text, str) or not text:
            raise RequestError(f"input {quoted(text)} should be a text that is not empty", fields=("input",))
        check_text("input", text)
    encoding = body.get("encoding_format", ENCODINGS[0])
    if encoding not in ENCODINGS:
        known = " or ".join(ENCODINGS)
        raise RequestError(f"encoding_format {quoted(encoding)}: use {known}", fields=("encoding_format",))
    layer, length = body.get("layer", HIDDEN_LAYER), body.get("max_length", MAX_LENGTH)
    if not isinstance(length, int) or isinstance(length, bool) or not 1 <= length <= MOST_TOKENS:
        raise RequestError(f"max_length {quoted(length)} should be 1 to {MOST_TOKENS}", fields=("max_length",))
    try:
        layer = TextSettings.check_one("hidden_layer", layer) or HIDDEN_LAYER
    except RequestError as error:
        raise RequestError(str(error).replace("hidden_layer", "layer"), fields=("layer",)) from None
    asked = {"input": texts, "single": isinstance(given, str), "layer": layer, "max_length": length}
    return {**asked, "encoding_format": encoding}
