"""OpenAI's images API, as its own package, chat programs and agents speak it: generations, edits, streams, models.

    JSON or parts ─ openai_request ─→ Asked ─ submit ─→ job ─→ pictures in base64 or as links | events of a stream

Everything that our own form can set may stand beside the API's own fields (`extra_body` in the package).
"""

import asyncio
import base64
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from zimage.errors import RequestError, ZImageError
from zimage.pictures.files import encoded
from zimage.pictures.opening import opened_bytes
from zimage.serve.answers import OPENAI, error_body, error_status
from zimage.serve.asking import ATTACHMENTS, Asked, asked, named_as
from zimage.serve.bodies import FormRoute, read_object, read_parts
from zimage.serve.forms.openai_request import (
    INSTEAD,
    OWN_NAME,
    ModelNotFound,
    Standard,
    bodies,
    from_parts,
    is_known,
    opaque_mask,
    translated,
)
from zimage.serve.forms.texts import over_defaults
from zimage.serve.forms.waiting import give_up, stream, unfinished, until_the_end
from zimage.serve.openapi import EVENTS, TEXT, WHOLE, answers, content, listed, record, reference, takes
from zimage.serve.refusals import Conflict, Failed
from zimage.serve.schema import Schema, whole
from zimage.serve.service import Service
from zimage.serve.stream import END, PREVIEW, Message
from zimage.serve.view import DRAWING, JobView
from zimage.settings.declared import SIZE_MULTIPLE, TextSettings
from zimage.settings.fields import Plain
from zimage.settings.serving import ServeSettings

GENERATION, EDIT = "image_generation", "image_edit"  # what a stream's events begin with
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
QUALITY = "high"  # what every picture is called that was not asked for as "low"


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


@dataclass
class Wanted:
    """A request, translated: what to draw, and how to answer."""

    standard: Standard
    asked: Asked
    kind: str = GENERATION
    tokens: int = 0
    names: set[str] = field(default_factory=set)


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


def wanted(service: Service, values: dict[str, Plain], files: dict[str, bytes], kind: str) -> Wanted:
    """What a body asks for. Raises RequestError and ModelNotFound."""
    steps = service.launch.defaults.get("steps") or service.about.defaults["steps"]
    standard, request = translated(values, steps)
    check_model(service, standard.model)
    with named_as(INSTEAD, values):
        return Wanted(standard, asked(request, files, "openai", service.settings), kind, names=set(values))


async def read_edit(request: Request, service: Service) -> tuple[dict[str, Plain], dict[str, bytes]]:
    """Values and files of an edit, its mask in our convention. Raises RequestError, Malformed, WrongMedia, TooLarge."""
    texts: dict[str, list[str]] = {}
    files: dict[str, bytes] = {}
    for part in await read_parts(request):
        name = "image" if part.name in PICTURES else part.name
        if part.filename is None:
            texts.setdefault(name, []).append(part.text)
        elif name not in ATTACHMENTS:
            raise RequestError(f"{name}: no file of this name is used", fields=(name,))
        elif name in files:
            raise RequestError(f"{name}: only one can be used; pass one", fields=(name,))
        else:
            files[name] = part.content
    values = from_parts(texts)
    if "image" not in files:
        raise RequestError("image: a file is needed", fields=("image",))
    if "mask" in files:
        most = service.settings.max_decoded
        files["mask"] = await asyncio.to_thread(opaque_mask, files["mask"], files["image"], most)
    return values, files


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


async def datum(
    service: Service, request: Request, standard: Standard, view: JobView, image: dict[str, Plain]
) -> dict[str, Plain]:
    """One picture of an answer, with its seed."""
    revised = {"revised_prompt": image["prompt"]} if view.rewritten else {}
    if standard.response_format == "url":
        return {"url": str(request.base_url).rstrip("/") + image["url"], "seed": image["seed"], **revised}
    return {"b64_json": await finished_picture(service, standard, image), "seed": image["seed"], **revised}


async def finished_picture(service: Service, standard: Standard, image: dict[str, Plain]) -> str:
    """A picture of the history in the format that was asked for, its settings in it, as base64."""

    def convert() -> str:
        content = service.history.file(image["id"]).read_bytes()
        if standard.output_format != "png":
            content = in_format(content, standard, image["settings"])
        return base64.b64encode(content).decode()

    return await asyncio.to_thread(convert)


def in_format(content: bytes, standard: Standard, settings: dict[str, Plain] | None) -> bytes:
    """A picture file in another format, with the settings that draw it, if there are any."""
    with opened_bytes("the picture", content) as picture:
        return encoded(picture, standard.output_format.upper(), settings, standard.output_compression)


def manner(standard: Standard) -> dict[str, str]:
    """What an answer and each event repeat of the request."""
    return {"output_format": standard.output_format, "quality": "low" if standard.is_low else QUALITY}


def usage(want: Wanted, images: list[dict[str, Plain]]) -> dict[str, Plain]:
    """The tokens that the DiT has read and written: the prompt's, and one for each 16 × 16 pixels of a picture."""
    drawn = [image["width"] * image["height"] // SIZE_MULTIPLE**2 for image in images]
    begun = drawn[0] if "image" in want.asked.attachments else 0
    return {
        "input_tokens": want.tokens + begun,
        "input_tokens_details": {"text_tokens": want.tokens, "image_tokens": begun},
        "output_tokens": sum(drawn),
        "output_tokens_details": {"text_tokens": 0, "image_tokens": sum(drawn)},
        "total_tokens": want.tokens + begun + sum(drawn),
    }


# ---------------------------------------------------------------------- streams


class Told:
    """A job as the API's stream tells it: some previews of each picture, then the picture; last of all an error."""

    def __init__(self, service: Service, want: Wanted, view: JobView, keep: bool):
        self._service, self._want, self._view, self._keep = service, want, view, keep
        self._partials = Partials(want.standard.partial_images)
        self._done: set[str] = set()

    async def messages(self) -> AsyncIterator[Message]:
        """Closed before the job has ended, since the client has gone, it cancels it, unless it is to `keep`."""
        ended = False
        try:
            async for message in self._service.watch(self._view.id):
                ended = message.event == END
                for event, data in await self._translated(message.event, message.data):
                    yield Message(0, "", event, data)
            ended = True  # or the server stops: the job goes on when it starts again
        finally:
            if not (ended or self._keep):
                give_up(self._service, self._view.id)

    async def _translated(self, event: str, data: dict[str, Plain]) -> list[tuple[str, dict[str, Plain]]]:
        if event == "progress" and data["stage"] == DRAWING:
            self._partials.advance(data["index"], data["step"], data["total"])
        elif event == PREVIEW and (number := self._partials.due(data["index"])) is not None:
            return [await self._partial(number, data)]
        elif event == "image":
            return [await self._completed(data["image"])]
        elif event == END:
            missed = [image for image in data["images"] if image["id"] not in self._done]
            return [*[await self._completed(image) for image in missed], *self._faults(data)]
        return []

    async def _partial(self, number: int, preview: dict[str, Plain]) -> tuple[str, dict[str, Plain]]:
        content = base64.b64decode(preview["image"].partition(",")[2])
        picture = await asyncio.to_thread(in_format, content, self._want.standard, None)
        told = self._told(f"{self._want.kind}.partial_image", base64.b64encode(picture).decode())
        return told["type"], {**told, "partial_image_index": number}

    async def _completed(self, image: dict[str, Plain]) -> tuple[str, dict[str, Plain]]:
        self._done.add(image["id"])
        picture = await finished_picture(self._service, self._want.standard, image)
        told = self._told(f"{self._want.kind}.completed", picture)
        return told["type"], {**told, "seed": image["seed"], "usage": usage(self._want, [image])}

    def _told(self, kind: str, picture: str) -> dict[str, Plain]:
        request = self._view.request
        told = {"type": kind, "b64_json": picture, "created_at": int(time.time()), "background": "opaque"}
        return {**told, "size": f"{request['width']}x{request['height']}", **manner(self._want.standard)}

    def _faults(self, data: dict[str, Plain]) -> list[tuple[str, dict[str, Plain]]]:
        """The API's package raises an error for data with the key `error`."""
        try:
            with named_as(INSTEAD, self._want.names):
                if fault := unfinished(JobView(**data)):
                    raise fault
        except ZImageError as error:
            body = error_body(OPENAI, error_status(OPENAI, error), str(error), error.fields)
            return [("error", {"type": "error", **body})]
        return []


class Partials:
    """Which previews are passed on: so many of each picture, spread evenly over its steps."""

    def __init__(self, wanted: int):
        self._wanted = wanted
        self._steps: dict[int, tuple[int, int]] = {}
        self._passed, self._sent = Counter[int](), Counter[int]()

    def advance(self, index: int, step: int, total: int) -> None:
        """A step of picture `index` is done."""
        self._steps[index] = step, total

    def due(self, index: int) -> int | None:
        """The number of the preview that a picture has now, from 0, if it is to be passed on."""
        step, total = self._steps.get(index, (0, 1))
        passed = sum(total * (k + 1) <= step * (self._wanted + 1) for k in range(self._wanted))
        if passed <= self._passed[index]:
            return None
        self._passed[index] = passed
        self._sent[index] += 1
        return self._sent[index] - 1
