"""The first stages of a job: from prompts and references to the captions that it is drawn from.

    references ─ look ─→ sights ─ read ─┐
    prompts ─ encode ───────────────────┴ mixed ─→ captions

Shapes: L caption tokens, C caption width.
"""

from collections.abc import Generator, Sequence
from typing import NamedTuple

from torch import Tensor

from zimage.events import Event
from zimage.loading.registry import TEXT_ENCODER
from zimage.render.conditioning import Encoder, Texts
from zimage.render.job import EMBEDDED, Job
from zimage.render.seeing import Reading, Stages, Vision, look, mixed, read, references, unread, views_of


class Conditions(NamedTuple):
    """The captions (L, C) of the prompts, and of the negative prompt where there is guidance or NAG."""

    prompts: list[Tensor]
    negative: Tensor | None


def encode(
    components: Stages, job: Job, encoder: Encoder, texts: Texts, vision: Vision | None = None
) -> Generator[Event, None, Conditions]:
    """The caption of each distinct text, once, those of prompts mixed with the captions of references.

    What sees and what encodes are loaded only for pictures and texts that are not known already.
    """
    found = references(job.request.reference, job.request, components.model, vision)
    readings = (yield from look(components, vision, views_of(found))) if vision else []
    known = {text: encoder.known(job.text(text)) for text in job.token_ids}
    missing = any(caption is None for caption in known.values())
    events = _captions(components, job, encoder, known, vision, readings)
    name = encoder.component if missing else TEXT_ENCODER if unread(readings) else ""
    captions, seen = yield from components.stage(name, events)
    weighed = list(zip((*job.texts, *job.negative_texts), job.emphasis, strict=True))
    long = job.request.long_prompt
    finished = {one: texts.finished(*one, captions, job.token_ids, long) for one in dict.fromkeys(weighed)}
    prompts, negative = weighed[: len(job.texts)], weighed[len(job.texts) :]
    whole = {one: mixed(finished[one], job.request, found, seen, texts.limit) for one in dict.fromkeys(prompts)}
    return Conditions([whole[one] for one in prompts], finished[negative[0]] if negative else None)


def _captions(
    components: Stages,
    job: Job,
    encoder: Encoder,
    known: dict[str, Tensor | None],
    vision: Vision | None,
    readings: Sequence[Reading],
) -> Generator[Event, None, tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """The captions of texts, and those of the pictures that are seen."""
    seen = (yield from read(components, vision, readings)) if vision else {}
    return (yield from _encode_texts(components, job, encoder, known)), seen


def _encode_texts(
    components: Stages, job: Job, encoder: Encoder, known: dict[str, Tensor | None]
) -> Generator[Event, None, dict[str, Tensor]]:
    found, shown = {}, [text for text in known if text != EMBEDDED]
    for text, caption in known.items():
        if text in shown:
            yield Event("encode", 0, 1, shown.index(text), len(shown))
        if caption is None:
            caption = encoder.encode(job.text(text), components.plan)
        found[text] = caption
        if text in shown:
            yield Event("encode", 1, 1, shown.index(text), len(shown))
    return found
