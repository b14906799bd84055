"""The form of AUTOMATIC1111's web UI (`/sdapi/v1`), which Open WebUI, SillyTavern and many scripts speak.

    body ─ a1111_request ─→ Asked ─ submit ─→ job ─ its end ─→ {"images": base64, "parameters", "info": JSON as text}

There a client has no name for its job: `progress` tells of the one that this form runs, and `interrupt` ends it.
"""

import asyncio
import base64
import json
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response

from zimage.errors import RequestError, one_line
from zimage.pictures.opening import opened_bytes
from zimage.pictures.parameters import parameters_text, sampling_items
from zimage.pictures.texts import GRAPH_KEY, METADATA_KEY, picture_texts
from zimage.serve.answers import A1111
from zimage.serve.asking import LORA, asked, from_base64, named_as
from zimage.serve.bodies import FormRoute, read_object
from zimage.serve.forms.a1111_request import (
    CHECKPOINT,
    HEAVY,
    INSTEAD,
    bodies,
    check_overrides,
    translated,
)
from zimage.serve.forms.waiting import give_up, unfinished, until_the_end
from zimage.serve.jobs import CANCELLED, OPEN, RUNNING
from zimage.serve.openapi import MAYBE_TEXT, RECORD, TEXT, answers, content, listed, record, reference, takes
from zimage.serve.schema import SMALL_PNG, Schema, whole
from zimage.serve.service import Service
from zimage.serve.uploads import check_pixels
from zimage.serve.view import DRAWING, JobView
from zimage.settings.fields import Plain
from zimage.settings.merging import laid_over
from zimage.settings.names import AUTOMATIC, SAMPLER_NAMES, SCHEDULE_NAMES
from zimage.settings.serving import ServeSettings
from zimage.version import __version__

FORM = "a1111"
LONGEST_WARNING = 2000  # characters of a header
SAMPLERS: list[Plain] = [
    {
        "name": names.label,
        "aliases": [ours, *names.others],
        "options": {"scheduler": names.automatic} if names.automatic else {},
    }
    for ours, names in SAMPLER_NAMES.items()
]
SCHEDULES: list[Plain] = [
    {"name": AUTOMATIC, "label": "Automatic", "aliases": []},
    *(
        {"name": names.label.lower().replace(" ", "_"), "label": names.label, "aliases": list(names.others)}
        for names in SCHEDULE_NAMES.values()
    ),
]
LISTS: dict[str, tuple[str, list[Plain]]] = {  # what clients ask for before they draw, and what is the same everywhere
    "samplers": ("The samplers.", SAMPLERS),
    "schedulers": ("The schedules.", SCHEDULES),
    "upscalers": ("How the first of two passes is enlarged.", [{"name": "Lanczos", "model_name": None, "scale": 4}]),
    "latent-upscale-modes": ("There are none.", []),
    "sd-vae": ("The model has its own.", []),
    "hypernetworks": ("There are none.", []),
    "prompt-styles": ("There are none; templates are at /api/templates.", []),
}
DRAWN = content("The pictures.", record("", images=listed(TEXT), parameters=RECORD, info=TEXT))
PROGRESS = record("", others=True, progress={"type": "number"}, eta_relative={"type": "number"}, state=RECORD)
PNG_INFO = content("Its texts.", record("", info=TEXT, items=RECORD))
OPTIONS = content("The settings.", record("", others=True, sd_model_checkpoint=TEXT))
NOTHING = content("Nothing.", {})
IMAGE = {**TEXT, "description": "base64 or a data URL"}
IMAGE_BODY = whole("", {"image": IMAGE}, ("image",), {"image": SMALL_PNG}, others=True)
OPTIONS_BODY = whole("", {CHECKPOINT: MAYBE_TEXT}, others=True, example={"samples_format": "png"})
Skip = Annotated[bool, Query(description="Leave out the preview.")]


def schemas(settings: ServeSettings) -> dict[str, Schema]:
    """What the description of these routes refers to."""
    return bodies(settings)


def routes(service: Service) -> APIRouter:
    router = APIRouter(prefix="/sdapi/v1", route_class=FormRoute, tags=["A1111"])
    _drawing(router, service)
    _running(router, service)
    _lists(router, service)
    _options(router, service)
    return router


def _drawing(router: APIRouter, service: Service) -> None:
    drawn = answers(DRAWN, 409, 507, form=A1111, body=True)

    @router.post("/txt2img", openapi_extra=takes("What to draw.", json=reference("Txt2Img")), responses=drawn)
    async def txt2img(request: Request) -> Response:
        """Draw pictures from a prompt."""
        sent = await read_object(request)
        sent.pop("init_images", None)
        return await draw(service, request, sent)

    @router.post(
        "/img2img", openapi_extra=takes("What to draw, from what.", json=reference("Img2Img")), responses=drawn
    )
    async def img2img(request: Request) -> Response:
        """Draw a picture anew from another one."""
        sent = await read_object(request)
        if not sent.get("init_images"):
            raise RequestError("init_images: a picture is needed", fields=("init_images",))
        return await draw(service, request, sent)

    info = answers(PNG_INFO, form=A1111, body=True)

    @router.post("/png-info", openapi_extra=takes("A picture.", json=IMAGE_BODY), responses=info)
    async def png_info(request: Request) -> Response:
        """The settings that a picture carries, as text."""
        data = from_base64("image", (await read_object(request)).get("image"))
        return JSONResponse(await asyncio.to_thread(_texts_of, data, service.settings.max_decoded))


def _running(router: APIRouter, service: Service) -> None:
    told = answers(content("How far it is.", PROGRESS), form=A1111)

    @router.get("/progress", responses=told)
    async def progress(skip_current_image: Skip = False) -> Response:
        """How far the job of this form is, or else the one that runs."""
        view = await current(service)
        picture = service.preview(view.id) if view and not skip_current_image else None
        image = picture["image"].partition(",")[2] if picture else None
        return JSONResponse({**state(view), "current_image": image, "textinfo": None})

    for name in ("interrupt", "skip"):

        @router.post(f"/{name}", name=name, responses=answers(NOTHING, form=A1111))
        async def interrupt() -> Response:
            """End the job of this form; its finished pictures are answered."""
            for view in await service.jobs((RUNNING,)):
                if view.kind == FORM:
                    give_up(service, view.id)
            return JSONResponse({})


def _lists(router: APIRouter, service: Service) -> None:
    for name, (description, entries) in LISTS.items():
        listed_here = answers(content(description, listed(RECORD), entries), form=A1111)
        router.add_api_route(f"/{name}", constant(entries), name=name, responses=listed_here, summary=description)

    one = content("One entry.", listed(RECORD))

    @router.get("/sd-models", responses=answers(one, form=A1111))
    async def models() -> Response:
        """The loaded model."""
        return JSONResponse([model_entry(service)])

    @router.get("/loras", responses=answers(one, form=A1111))
    async def loras() -> Response:
        """The LoRAs that a prompt may name as <lora:NAME:WEIGHT>."""
        return JSONResponse([{"name": n, "alias": n, "path": n, "metadata": {}} for n in await service.loras()])

    @router.get("/embeddings", responses=answers(content("None.", RECORD), form=A1111))
    async def embeddings() -> Response:
        """There are no textual inversions."""
        return JSONResponse({"loaded": {}, "skipped": {}})

    @router.get("/cmd-flags", responses=answers(content("None.", RECORD), form=A1111))
    async def flags() -> Response:
        """Nothing of how the server was started."""
        return JSONResponse({})


def _options(router: APIRouter, service: Service) -> None:
    @router.get("/options", responses=answers(OPTIONS, form=A1111))
    async def options() -> Response:
        """The settings that clients read."""
        entry = model_entry(service)
        told = {CHECKPOINT: entry["title"], "sd_checkpoint_hash": entry["hash"]}
        return JSONResponse({**told, "sd_vae": "Automatic", "samples_format": "png"})

    changed = answers(NOTHING, form=A1111, body=True)

    @router.post("/options", openapi_extra=takes("Settings.", json=OPTIONS_BODY), responses=changed)
    async def set_options(request: Request) -> Response:
        """Accept the loaded model and refuse another one; the rest is ignored."""
        ignored = check_overrides(await read_object(request), service.about.model["name"])
        return JSONResponse({}, headers=warning(ignored))


# ---------------------------------------------------------------------- drawing


async def draw(service: Service, request: Request, sent: dict[str, Plain]) -> Response:
    """Draw what a body asks for, and answer with the pictures, also with those of a job that was interrupted."""
    model = service.about.model["name"]
    with named_as(their_names(sent), sent):
        wanted = translated(sent, _usual(service, sent.get("preset")), model)
        ask = asked(wanted.values, {}, FORM, service.settings)
        view = await service.submit(ask)
        view = await until_the_end(service, view, request)
    ignored = wanted.ignored
    if view.state == CANCELLED and view.images:
        ignored = [*ignored, f"interrupted after {len(view.images)} of {len(view.seeds)} pictures"]
    elif fault := unfinished(view):
        raise fault
    images = [await _base64(service, image) for image in view.images] if wanted.fields.send_images else []
    shown = {name: value for name, value in sent.items() if name not in HEAVY}
    told = {"images": images, "parameters": shown, "info": json.dumps(info(service, view), ensure_ascii=False)}
    return JSONResponse(told, headers=warning(ignored))


def _usual(service: Service, preset: Plain) -> dict[str, Plain]:
    """What is drawn where a body says nothing but its preset. Raises RequestError for a preset that there is not."""
    launch, own = service.launch, {"preset": preset} if isinstance(preset, str) else {}
    return {**service.about.defaults, **laid_over(launch.defaults, own, launch.presets)}


def their_names(sent: Mapping[str, Plain]) -> dict[str, str]:
    """How this client calls what we call otherwise: pictures go by two names, and LoRAs stand in the prompt."""
    images = "n_iter" if "n_iter" in sent else "batch_size"
    return {**INSTEAD, "images": images, **({} if LORA in sent else {LORA: "prompt"})}


async def _base64(service: Service, image: dict[str, Plain]) -> str:
    content = await asyncio.to_thread(service.history.file(image["id"]).read_bytes)
    return base64.b64encode(content).decode()


def info(service: Service, view: JobView) -> dict[str, Plain]:
    """What the web UI tells of its pictures."""
    request, model = view.request, model_entry(service)
    how = sampling_items(request)
    texts = [parameters_text(image["settings"]) for image in view.images]
    negative = request.get("negative") or ""
    return {
        "prompt": view.images[0]["prompt"],
        "all_prompts": [image["prompt"] for image in view.images],
        "negative_prompt": negative,
        "all_negative_prompts": [negative] * len(view.images),
        "seed": view.images[0]["seed"],
        "all_seeds": [image["seed"] for image in view.images],
        "width": request["width"],
        "height": request["height"],
        "steps": request["steps"],
        "cfg_scale": request["guidance"] + 1,
        "denoising_strength": request.get("strength"),
        "sampler_name": how["Sampler"],
        "extra_generation_params": {"Schedule type": how.get("Schedule type")},
        "batch_size": len(view.images),
        "sd_model_name": model["model_name"],
        "sd_model_hash": model["hash"],
        "index_of_first_image": 0,
        "infotexts": texts,
        "job_timestamp": _timestamp(view),
        "version": f"zimage {__version__}",
    }


def model_entry(service: Service) -> dict[str, Plain]:
    """The loaded model, as the web UI lists its own."""
    name, fingerprint = service.about.model["name"], service.about.model["fingerprint"]
    told = {"title": f"{name} [{fingerprint[:10]}]", "model_name": name, "hash": fingerprint[:10]}
    return {**told, "sha256": None, "filename": name, "config": None}


def warning(ignored: Sequence[str]) -> dict[str, str]:
    """The header that names what had no effect; headers are ASCII, and blanks may not end them."""
    text = one_line(f"ignored: {'; '.join(ignored)}", LONGEST_WARNING).strip()
    return {"X-Warning": text.encode("ascii", "backslashreplace").decode()} if ignored else {}


# ---------------------------------------------------------------------- how far it is


async def current(service: Service) -> JobView | None:
    """The job of this form that runs or waits, else any that runs."""
    views = await service.jobs(OPEN)
    own = [view for view in views if view.kind == FORM]
    return next(iter([*own, *(view for view in views if view.state == RUNNING)]), None)


def state(view: JobView | None) -> dict[str, Plain]:
    """A job's progress; of no job, that nothing is left to do."""
    if view is None:
        idle = {"job": "", "job_count": 0, "job_timestamp": "0", "job_no": 0, "sampling_step": 0, "sampling_steps": 0}
        return {"progress": 0.0, "eta_relative": 0.0, "state": {**idle, **_flags()}}
    drawing = view.stage == DRAWING
    done = (view.index * view.total + view.step) / max(1, view.count * view.total) if drawing else 0.0
    told = {
        "job": view.id,
        "job_count": len(view.seeds),
        "job_timestamp": _timestamp(view),
        "job_no": view.index,
        "sampling_step": view.step if drawing else 0,
        "sampling_steps": view.total if drawing else view.request["steps"],
    }
    progress = 0.99 if view.stage == "decode" else 0.99 * done
    return {"progress": round(progress, 4), "eta_relative": view.remaining or 0.0, "state": {**told, **_flags()}}


def _flags() -> dict[str, bool]:
    return {"skipped": False, "interrupted": False, "stopping_generation": False}


def _timestamp(view: JobView) -> str:
    return time.strftime("%Y%m%d%H%M%S", time.gmtime(view.created))


def _texts_of(data: bytes, most_pixels: int) -> dict[str, Plain]:
    with opened_bytes("image", data) as image:
        check_pixels("image", image, most_pixels)  # looking for EXIF decodes a PNG
        texts = picture_texts(image, "image")
    others = {METADATA_KEY: texts.settings, GRAPH_KEY: texts.graph}
    return {"info": texts.parameters, "items": {key: text for key, text in others.items() if text}}


def constant(entries: Plain) -> Any:
    """An endpoint that always answers the same."""

    async def listing() -> Response:
        return JSONResponse(entries)

    return listing
