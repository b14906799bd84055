"""OpenAI's images API, as its own package, chat programs and agents speak it: generations, edits, streams, models.

    JSON or parts ─ openai_request ─→ Asked ─ submit ─→ job ─→ pictures in base64 or as links | events of a stream

Everything that our own form can set may stand beside the API's own fields (`extra_body` in the package).
"""

import asyncio
import time

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from zimage.errors import RequestError, ZImageError
from zimage.serve.answers import OPENAI, error_body
from zimage.serve.asking import ATTACHMENTS, CONDITIONS, Asked, Files, asked, named_as
from zimage.serve.bodies import FormRoute, read_object, read_parts
from zimage.serve.forms.openai_answer import Told, datum, manner, usage
from zimage.serve.forms.openai_request import (
    EDIT,
    GENERATION,
    INSTEAD,
    OWN_NAME,
    ModelNotFound,
    Wanted,
    bodies,
    from_parts,
    is_known,
    opaque_mask,
    translated,
    with_references,
)
from zimage.serve.forms.texts import over_defaults
from zimage.serve.forms.waiting import stream, unfinished, until_the_end
from zimage.serve.openapi import EVENTS, TEXT, WHOLE, answers, content, listed, record, reference, takes
from zimage.serve.refusals import Conflict, Failed
from zimage.serve.schema import Schema, whole
from zimage.serve.service import Service
from zimage.settings.captions import TextSettings
from zimage.settings.fields import Plain
from zimage.settings.serving import ServeSettings

PICTURES = ("image", "image[]")
ON_DRAWING = (404, 409, 507)
TOKENS = record("", text_tokens=WHOLE, image_tokens=WHOLE)
USAGE = record(
    "",
    input_tokens=WHOLE,
    input_tokens_details=TOKENS,
    output_tokens=WHOLE,
    output_tokens_details=TOKENS,
    total_tokens=WHOLE,
)
DATUM = whole("", {"b64_json": TEXT, "url": TEXT, "seed": WHOLE, "revised_prompt": TEXT}, ("seed",))
PICTURES_DRAWN = record(
    "",
    created=WHOLE,
    data=listed(DATUM),
    usage=USAGE,
    size=TEXT,
    quality=TEXT,
    background=TEXT,
    output_format=TEXT,
)
MODEL = record("", id=TEXT, object={"const": "model"}, created=WHOLE, owned_by=TEXT)
MODELS = record("", object={"const": "list"}, data=listed(MODEL))
DRAWN = content("The pictures; or, with `stream`, events of previews and pictures.", PICTURES_DRAWN)
DRAWN["content"][EVENTS] = {"schema": TEXT}


class Route(FormRoute):
    """Errors as the API's clients tell them apart: by codes, and by whether to try the same again."""

    def told(self, path: str, status: int, error: ZImageError) -> dict[str, Plain]:
        body = error_body(path, status, str(error), error.fields)
        if isinstance(error, ModelNotFound):
            body["error"]["code"] = "model_not_found"
        return body

    def headers(self, error: ZImageError) -> dict[str, str]:
        again = {"x-should-retry": "false"} if isinstance(error, Failed | Conflict) else {}
        return {**super().headers(error), **again}


def schemas(settings: ServeSettings) -> dict[str, Schema]:
    """What the description of these routes refers to."""
    return bodies(settings)


def routes(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1", route_class=Route, tags=["OpenAI"])
    begun = int(time.time())

    @router.post(
        "/images/generations",
        openapi_extra=takes("What to draw.", json=reference("OpenAIGeneration")),
        responses=answers(DRAWN, *ON_DRAWING, form=OPENAI, body=True),
    )
    async def generate(request: Request) -> Response:
        """Draw pictures from a prompt."""
        values = await read_object(request)
        return await answer(service, request, wanted(service, values, {}, GENERATION))

    @router.post(
        "/images/edits",
        openapi_extra=takes("What to draw, and from what.", parts=reference("OpenAIEdit")),
        responses=answers(DRAWN, *ON_DRAWING, form=OPENAI, body=True),
    )
    async def edit(request: Request) -> Response:
        """Draw a picture anew from another one, everywhere or where the mask is transparent."""
        values, files = await read_edit(request, service)
        return await answer(service, request, wanted(service, values, files, EDIT))

    @router.get("/models", responses=answers(content("The models.", MODELS), form=OPENAI))
    async def models() -> Response:
        """The loaded model."""
        return JSONResponse({"object": "list", "data": [model_card(service, begun)]})

    @router.get("/models/{id:path}", responses=answers(content("The model.", MODEL), 404, form=OPENAI))
    async def model(id: str) -> Response:
        """The loaded model, by its name."""
        check_model(service, id)
        return JSONResponse(model_card(service, begun))

    return router


# ---------------------------------------------------------------------- requests


def wanted(service: Service, values: dict[str, Plain], files: Files, kind: str) -> Wanted:
    """What a body asks for. Raises RequestError and ModelNotFound."""
    steps = service.launch.defaults.get("steps") or service.about.defaults["steps"]
    standard, request = translated(values, steps)
    check_model(service, standard.model)
    with named_as(INSTEAD, values):
        return Wanted(standard, asked(request, files, "openai", service.settings), kind, names=set(values))


async def read_edit(request: Request, service: Service) -> tuple[dict[str, Plain], Files]:
    """Values and files of an edit, its mask in our convention. Raises RequestError, Malformed, WrongMedia, TooLarge."""
    texts: dict[str, list[str]] = {}
    files: dict[str, list[bytes]] = {}
    for part in await read_parts(request):
        name = "image" if part.name in PICTURES else part.name
        if part.filename is None:
            texts.setdefault(name, []).append(part.text)
        elif name not in (*ATTACHMENTS, *CONDITIONS):
            raise RequestError(f"{name}: no file of this name is used", fields=(name,))
        elif name in files and name not in ("image", *CONDITIONS):
            raise RequestError(f"{name}: only one can be used; pass one", fields=(name,))
        else:
            files.setdefault(name, []).append(part.content)
    values = from_parts(texts)
    if "image" not in files:
        raise RequestError("image: a file is needed", fields=("image",))
    if "mask" in files:
        most = service.settings.max_decoded
        files["mask"] = [await asyncio.to_thread(opaque_mask, files["mask"][0], files["image"][0], most)]
    return values, files if len(files["image"]) == 1 else with_references(values, files, service.about.vision)


def check_model(service: Service, name: str) -> None:
    """Raise ModelNotFound where a client asks for another model than the loaded one."""
    loaded = service.about.model["name"]
    if not is_known(name, loaded):
        raise ModelNotFound(f"model {name!r} is not loaded; this server has {loaded!r}", fields=("model",))


def model_card(service: Service, begun: int) -> dict[str, Plain]:
    return {"id": service.about.model["name"], "object": "model", "created": begun, "owned_by": OWN_NAME}


# ---------------------------------------------------------------------- answers


async def answer(service: Service, request: Request, want: Wanted) -> Response:
    """Draw, and answer with the pictures or with the stream of their events."""
    key = request.headers.get("idempotency-key")
    with named_as(INSTEAD, want.names):
        want.tokens = await text_tokens(service, want.asked)
        view = await service.submit(want.asked, key)
    if want.standard.stream:
        return stream(Told(service, want, view, keep=key is not None).messages())
    with named_as(INSTEAD, want.names):
        view = await until_the_end(service, view, request, keep=key is not None)
        if fault := unfinished(view):
            raise fault
    data = [await datum(service, request, want.standard, view, image) for image in view.images]
    size = f"{view.images[0]['width']}x{view.images[0]['height']}"
    told = {"created": int(view.created), "data": data, "size": size, **manner(want.standard)}
    return JSONResponse({**told, "background": "opaque", "usage": usage(want, view.images)})


async def text_tokens(service: Service, ask: Asked) -> int:
    """Tokens of the prompt with its chat parts; embeddings have no text to count."""
    if "embeddings" in ask.attachments:
        return 0
    text = over_defaults(service, ask.values, TextSettings)
    told = await service.ask("tokens", prompt=ask.values.get("prompt", ""), text=text)
    return int(told["tokens"])
