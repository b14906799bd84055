"""What the server sees in pictures: whether it can, how it is asked, and what it saw, as a file or mixed into a prompt.

A server without a vision model answers 409 where it would have to look.
"""

from collections.abc import Mapping

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from zimage.errors import RequestError
from zimage.serve.asking import REFERENCE, Files, from_base64, unknown
from zimage.serve.bodies import FormRoute, read_with_files
from zimage.serve.conditions import PICTURE
from zimage.serve.forms.encoder import taken
from zimage.serve.forms.own import DRAWING, PICTURE_DRAWN, one_picture, picture_of, read_asked
from zimage.serve.forms.texts import CAPTION, over_defaults
from zimage.serve.forms.waiting import while_there
from zimage.serve.openapi import MAYBE_TEXT, RECORD, TEXT, WHOLE, answers, content, record, takes
from zimage.serve.refusals import Conflict
from zimage.serve.schema import FILE, SIGHT, SMALL_PNG, Schema, sight_fields, whole
from zimage.serve.service import Service
from zimage.serve.uploads import named
from zimage.settings.captions import VISION_BLENDS
from zimage.settings.conditions import ALPHA
from zimage.settings.declared import Request as Drawing
from zimage.settings.fields import Plain

NONE = "this server has no vision model; start it with --vision-model"
TRUTH = {"type": "boolean"}
COUNTED = record(
    "",
    hits=WHOLE,
    misses=WHOLE,
    evictions=WHOLE,
    disk_hits=WHOLE,
    size=WHOLE,
    bytes=WHOLE,
    hit_rate={"type": "number"},
)
STATUS = content(
    "Whether it can.", record("", available=TRUTH, loaded=TRUTH, model=MAYBE_TEXT, mode=MAYBE_TEXT, reason=TEXT)
)
CONFIG = content("The ways, and what is usual.", record("", modes={"type": "array", "items": TEXT}, defaults=RECORD))
CACHE = content("Its figures, of all workers together.", COUNTED)


def routes(service: Service) -> APIRouter:
    router = APIRouter(prefix="/api/vl", route_class=FormRoute, tags=["vision"])
    _telling(router, service)
    _cache(router, service)
    _seeing(router, service)
    if not service.settings.encoder_only:
        _drawing(router, service)
    return router


def needed(service: Service) -> Mapping[str, Plain]:
    """The vision model. Raises Conflict where there is none."""
    if not service.about.vision:
        raise Conflict(NONE)
    return service.about.vision


def _telling(router: APIRouter, service: Service) -> None:
    @router.get("/status", responses=answers(STATUS))
    async def status() -> Response:
        """Whether the server can look at pictures, and with what; it is loaded while it is needed."""
        vision = service.about.vision
        loaded = any(one["loaded"] for one in await service.ask_all("vision")) if vision else False
        told = {"available": bool(vision), "loaded": loaded, "model": vision.get("name"), "mode": vision.get("mode")}
        return JSONResponse({**told, "reason": "" if vision else NONE})

    @router.get("/config", responses=answers(CONFIG))
    async def config() -> Response:
        """The ways in which captions of references are mixed with a prompt's, and what is usual."""
        usual = Drawing(**over_defaults(service, {}, Drawing)).to_mapping()
        defaults = {name: usual[name] for name in ("vision_blend", *SIGHT)}
        return JSONResponse({"modes": list(VISION_BLENDS), "defaults": {"alpha": ALPHA, **defaults}})


def _cache(router: APIRouter, service: Service) -> None:
    async def counted(clear: bool) -> Response:
        needed(service)
        found = [one["cache"] for one in await service.ask_all("vision", clear=clear)]
        told = {name: sum(one[name] for one in found) for name in found[0]}
        looked = told["hits"] + told["misses"]
        return JSONResponse({**told, "hit_rate": told["hits"] / looked if looked else 0.0})

    @router.get("/cache", responses=answers(CACHE, 409))
    async def cache() -> Response:
        """Figures of the cache of captions, which those of prompts share."""
        return await counted(clear=False)

    @router.delete("/cache", responses=answers(CACHE, 409))
    async def clear() -> Response:
        """Forget what was seen, and what was encoded."""
        return await counted(clear=True)


def _seeing(router: APIRouter, service: Service) -> None:
    told = answers(CAPTION, 409, 422, 507, body=True)
    bodies = takes("A picture, and how to look at it.", json=sight_body(), parts=sight_parts())

    @router.post("/extract", openapi_extra=bodies, responses=told, response_class=Response)
    async def extract(request: Request) -> Response:
        """Look at a picture, and send what is seen as a file, for `embeddings` or `reference` of a later request."""
        needed(service)
        content, settings = sight(*await read_with_files(request, (PICTURE,), ()))
        upload = await service.uploads.keep(PICTURE, content)
        looking = service.compute(
            "see", form="sight", picture=str(upload.path), settings=over_defaults(service, settings, Drawing)
        )
        with named({str(upload.path): PICTURE}):
            seen = await while_there(request, looking)
        name = {"Content-Disposition": f'attachment; filename="{seen["hash"]}.safetensors"'}
        return Response(await taken(seen["path"]), media_type="application/octet-stream", headers=name)


def _drawing(router: APIRouter, service: Service) -> None:
    drawn = answers(PICTURE_DRAWN, 409, 422, 507, body=True)

    @router.post("/generate", openapi_extra=DRAWING, responses=drawn)
    async def generate(request: Request) -> Response:
        """Draw one picture with references and wait for it. A client that goes away cancels it."""
        needed(service)
        wanted = one_picture(await read_asked(request, service))
        if REFERENCE not in wanted.conditions:
            raise RequestError(f"{REFERENCE}: a picture to look at is needed", fields=(REFERENCE,))
        return await picture_of(service, request, wanted)


def sight(values: Mapping[str, Plain], files: Files) -> tuple[bytes, dict[str, Plain]]:
    """The picture of a body, and how it is looked at. Raises RequestError."""
    for name in values:
        if name not in (PICTURE, *SIGHT):
            raise unknown(name, (PICTURE, *SIGHT))
    settings = {name: value for name, value in values.items() if name in SIGHT and value is not None}
    for name, value in settings.items():
        Drawing.check_one(name, value)
    inline = values.get(PICTURE)
    if (inline is None) != bool(files):
        raise RequestError(f"{PICTURE}: pass one, in the body or as a file", fields=(PICTURE,))
    return files[PICTURE][0] if inline is None else from_base64(PICTURE, inline), settings


def sight_body() -> Schema:
    """The body of a question on one picture."""
    picture = {"type": "string", "contentEncoding": "base64", "description": "base64 or a data URL."}
    return whole("Sight", {PICTURE: picture, **sight_fields()}, (PICTURE,), {PICTURE: SMALL_PNG})


def sight_parts() -> Schema:
    """The same in parts."""
    request = {**whole("", sight_fields()), "contentMediaType": "application/json"}
    return whole("SightParts", {"request": request, PICTURE: FILE}, (PICTURE,))
