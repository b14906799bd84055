"""Texts before they are drawn: what a prompt becomes, templates, rewriting, and captions as files.

Formatting and counting answer at once, also while a picture is drawn; encoding and rewriting go before the queue.
"""

import asyncio
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response

from zimage.errors import RequestError
from zimage.serve.asking import REWRITE, check_limits, unknown
from zimage.serve.bodies import FormRoute, read_object
from zimage.serve.forms.encoder import taken
from zimage.serve.forms.waiting import while_there
from zimage.serve.openapi import MAYBE_TEXT, RECORD, TEXT, WHOLE, answers, content, listed, record, takes
from zimage.serve.schema import FILE, text_body
from zimage.serve.service import Service
from zimage.settings.captions import TextSettings
from zimage.settings.declared import Request as Drawing
from zimage.settings.fields import Plain, Settings
from zimage.settings.merging import laid_over
from zimage.settings.paths import user_path
from zimage.settings.rewriting import DEFAULT_REWRITER, RewriteSettings
from zimage.text.templates import REWRITER, Template, Templates, user_folder

PARTS = ("name", "description", "category", "system_prompt", "thinking_content", "assistant_content", "add_think_block")
TRUTH = {"type": ["boolean", "null"]}
TEMPLATE = record(
    "",
    name=TEXT,
    description=TEXT,
    category=TEXT,
    system_prompt=TEXT,
    thinking_content=MAYBE_TEXT,
    assistant_content=MAYBE_TEXT,
    add_think_block=TRUTH,
    tokens={"type": ["integer", "null"], "description": "What it adds to a prompt; null for the server's own."},
)
EXAMPLE_COUNT = {
    "text": "<|im_start|>user\na cat<|im_end|>\n<|im_start|>assistant\n",
    "tokens": 9,
    "limit": 512,
    "outcome": "fits",
}
EXAMPLE_REWRITE = {
    "prompt": "A grey cat asleep on a sunlit windowsill, dust in the light",
    "thinking": "",
    "original": "a cat",
    "rewriter": DEFAULT_REWRITER,
    "seed": 7,
}
COUNTED = content("The text.", record("", text=TEXT, tokens=WHOLE, limit=WHOLE, outcome=TEXT), EXAMPLE_COUNT)
REWRITTEN_FIELDS = record("", prompt=TEXT, thinking=TEXT, original=TEXT, rewriter=TEXT, seed=WHOLE)
REWRITTEN = content("The new prompt.", REWRITTEN_FIELDS, EXAMPLE_REWRITE)
ENCODED_FIELDS = record("", tokens=WHOLE, shape=listed(WHOLE), dtype=TEXT, hash=TEXT)
ENCODED = content("What its caption is.", ENCODED_FIELDS)
CAPTION = content("A file of embeddings.", FILE, media="application/octet-stream")
CONFIG = content("How prompts are rewritten.", record("", default=TEXT, remote={"type": "boolean"}, settings=RECORD))
FOUND = content("The templates.", record("", templates=listed(TEMPLATE)))
Words = Annotated[str, Query(description="Words to look for; the beginning of one is enough.", max_length=200)]


def routes(service: Service) -> APIRouter:
    router = APIRouter(prefix="/api", route_class=FormRoute, tags=["texts"])
    _counting(router, service)
    _templates(router, service)
    _rewriting(router, service)
    _encoding(router, service)
    return router


def _counting(router: APIRouter, service: Service) -> None:
    body = takes("A prompt and what stands around it.", json=text_body("TextQuestion"))

    @router.post("/format-prompt", openapi_extra=body, responses=answers(COUNTED, 422, body=True))
    async def format_prompt(request: Request) -> Response:
        """The text that the model reads, its tokens, and the most that the model was trained for."""
        prompt, text = question(service, await read_object(request), TextSettings, TextSettings.names())
        told = await service.ask("tokens", prompt=prompt, text=text)
        return JSONResponse({name: told[name] for name in ("text", "tokens", "limit", "outcome")})


def _templates(router: APIRouter, service: Service) -> None:
    @functools.cache
    def known() -> Templates:
        folder = service.launch.loading.get("templates")
        return Templates.open(user_path(folder, "templates") if folder else user_folder())

    @router.get("/templates", responses=answers(FOUND, 422))
    async def templates(q: Words = "") -> Response:
        """Templates by category and name, or those with the most of the words, best first."""
        return await _listing(lambda: (known().search([q]) if q.strip() else known().list(), known()))

    @router.get("/rewriters", responses=answers(FOUND))
    async def rewriters() -> Response:
        """Templates that rewrite prompts."""
        return await _listing(lambda: (known().list(REWRITER), known()))


def _rewriting(router: APIRouter, service: Service) -> None:
    defaults = service.launch.defaults

    @router.get("/rewriter-config", responses=answers(CONFIG))
    async def config() -> Response:
        """The usual rewriter, whether another server does it, and the settings of writing."""
        plain = RewriteSettings().to_mapping()
        settings = {name: defaults.get(name, plain[name]) for name in REWRITE}
        default = defaults.get("rewriter") or DEFAULT_REWRITER
        remote = bool(defaults.get("rewriter_url") or service.launch.loading.get("encoder_url"))
        return JSONResponse({"default": default, "remote": remote, "settings": settings})

    body = takes("A prompt and how to write.", json=text_body("Rewriting", (RewriteSettings,)))

    @router.post("/rewrite", openapi_extra=body, responses=answers(REWRITTEN, 422, 502, body=True))
    async def rewrite(request: Request) -> Response:
        """Write a prompt out. It is not drawn."""
        prompt, settings = question(service, await read_object(request), RewriteSettings, REWRITE)
        check_limits(settings, service.settings)
        writing = service.compute("rewrite", prompt=prompt, settings=settings)
        return JSONResponse(await while_there(request, writing))


def _encoding(router: APIRouter, service: Service) -> None:
    body = takes("A prompt and what stands around it.", json=text_body("TextQuestion"))

    async def encoded(request: Request) -> dict[str, Plain]:
        prompt, text = question(service, await read_object(request), TextSettings, TextSettings.names())
        return await while_there(request, service.compute("encode", prompt=prompt, text=text))

    @router.post("/encode", openapi_extra=body, responses=answers(ENCODED, 422, 507, body=True))
    async def encode(request: Request) -> Response:
        """Encode a prompt, and tell what its caption is."""
        told = await encoded(request)
        await taken(told["path"])
        return JSONResponse({name: told[name] for name in ("tokens", "shape", "dtype", "hash")})

    saved = answers(CAPTION, 422, 507, body=True)

    @router.post("/save-embeddings", openapi_extra=body, responses=saved, response_class=Response)
    async def save_embeddings(request: Request) -> Response:
        """Encode a prompt, and send its caption as a file, for `embeddings` of a later request."""
        told = await encoded(request)
        name = {"Content-Disposition": f'attachment; filename="{told["hash"]}.safetensors"'}
        return Response(await taken(told["path"]), media_type="application/octet-stream", headers=name)


def question(
    service: Service, sent: Mapping[str, Plain], kind: type[Settings], allowed: Sequence[str]
) -> tuple[str, dict[str, Plain]]:
    """The prompt of a body and its settings of this kind, over the server's own. Raises RequestError."""
    for name in sent:
        if name not in ("prompt", *allowed):
            raise unknown(name, ("prompt", *allowed))
    prompt = sent.get("prompt")
    if not isinstance(prompt, str):
        raise RequestError("prompt: text is needed", fields=("prompt",))
    Drawing.check_one("prompt", prompt)
    for name in sent.keys() & set(allowed):
        kind.check_one(name, sent[name])
    return prompt, over_defaults(service, sent, kind)


def over_defaults(service: Service, values: Mapping[str, Plain], kind: type[Settings]) -> dict[str, Plain]:
    """The settings of one kind among these, over the server's own."""
    own, given = (
        {name: value for name, value in some.items() if name in kind.names()}
        for some in (service.launch.defaults, values)
    )
    return laid_over(own, given)


async def _listing(found: Callable[[], tuple[Sequence[Template], Templates]]) -> Response:
    """Templates as JSON; their files are read in a thread."""
    some, known = await asyncio.to_thread(found)
    return JSONResponse({"templates": [_shown(template, known) for template in some]})


def _shown(template: Template, known: Templates) -> dict[str, Plain]:
    return {**{name: getattr(template, name) for name in PARTS}, "tokens": known.stored_count(template.name)}
