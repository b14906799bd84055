"""What a render tells its consumer while it runs, and its result."""

import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from PIL import Image
from torch import Tensor

from zimage.settings.declared import Request

R = TypeVar("R")


@dataclass(frozen=True)
class Event:
    """One step of a render. Step 0 marks the beginning of a stage, step = total its end.

    `stage` is "load" (of the component that `detail` names), "see" (a reference), "encode", "encode image", "encode
    control", "denoise", "enlarge" (between two passes) or "decode"; `index` of `count` counts distinct references,
    texts or images. `latents` (B, 16, h, w) come with denoising steps, those of the region that is rendered, with what
    is `carried` besides them to the next step, by name; `image` with each finished picture, the whole of it.
    """

    stage: str
    step: int
    total: int
    index: int = 0
    count: int = 1
    detail: str = ""
    latents: Tensor | None = None
    carried: Mapping[str, Tensor] | None = None
    image: Image.Image | None = None


@dataclass(frozen=True)
class Result:
    """Pictures in order, prompt by prompt, with the seed of each, the request as it ran, and seconds per stage."""

    images: list[Image.Image]
    seeds: list[int]
    request: Request
    timings: dict[str, float]
    metadata: list[dict[str, object]] = field(repr=False)


def timed(events: Generator[Event, None, R], seconds: dict[str, float]) -> Generator[Event, None, R]:
    """The same events; what each took is added to the `seconds` of its stage, without the time of their consumer."""
    try:
        while True:
            begun = time.perf_counter()
            try:
                event = next(events)
            except StopIteration as finished:
                return finished.value
            seconds[event.stage] = seconds.get(event.stage, 0.0) + time.perf_counter() - begun
            yield event
    finally:
        events.close()
