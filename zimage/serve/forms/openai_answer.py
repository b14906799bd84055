"""What OpenAI's clients are answered: pictures in the format that they want, usage, and a job's events in their form.

image ─→ b64_json or url      preview ─→ image_generation.partial_image      image ─→ image_generation.completed
"""

import asyncio
import base64
import time
from collections import Counter
from collections.abc import AsyncIterator

from fastapi import Request

from zimage.errors import ZImageError
from zimage.pictures.files import encoded
from zimage.pictures.opening import opened_bytes
from zimage.serve.answers import OPENAI, error_body, error_status
from zimage.serve.asking import named_as
from zimage.serve.forms.openai_request import INSTEAD, Standard, Wanted, check_format
from zimage.serve.forms.waiting import give_up, unfinished
from zimage.serve.service import Service
from zimage.serve.stream import END, PREVIEW, Message
from zimage.serve.view import DRAWING, JobView
from zimage.settings.declared import SIZE_MULTIPLE
from zimage.settings.fields import Plain

QUALITY = "high"  # what every picture is called that was not asked for as "low"


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
        check_format(standard.output_format, *picture.size)
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
