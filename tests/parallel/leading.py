"""What rank processes run in tests of the leader: rank 0 leads a pipeline through requests, the others follow."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import pytest
from torch import Tensor

import zimage
from zimage.errors import ZImageError
from zimage.events import Event
from zimage.parallel.follower import follow
from zimage.parallel.leader import Leader
from zimage.parallel.ranks import Ranks
from zimage.render.state import RenderState
from zimage.settings.declared import Request

Settings = Mapping[str, Any]
Given = Mapping[str, Any]  # a request


class Drawn(NamedTuple):
    """The latents and the pictures of a request, in their order."""

    latents: list[Tensor]
    pictures: list[bytes]


def load(settings: Settings) -> zimage.ZImage:
    return zimage.ZImage.load(**{"device": "cpu", "dtype": "fp32", **settings})


def collected(events: Iterable[Event]) -> Drawn:
    latents, pictures = [], []
    for event in events:
        if event.latents is not None and event.step == event.total:
            latents += event.latents.split(1)
        if event.image is not None:
            pictures.append(event.image.tobytes())
    return Drawn(latents, pictures)


def led(ranks: Ranks, settings: Settings, lead: Callable[..., Any], *given: Any, cfg_parallel: bool = False) -> Any:
    """What `lead(leader, *given)` returns on rank 0; of others, what is loaded in the end."""
    pipe = load(settings)
    if ranks.rank:
        follow(pipe, ranks, cfg_parallel)
        return pipe.loaded
    with Leader(pipe, ranks, cfg_parallel) as leader:
        return lead(leader, *given)


def led_tightly(ranks: Ranks, settings: Settings, lead: Callable[..., Any], request: Given) -> Any:
    """The same with as little memory as the request needs on a rank, of which the process itself takes none."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_held_bytes", "_base_bytes"):
            patch.setattr(f"zimage.loading.planner.{name}", lambda device: 0)
        pipe = load({**settings, "memory": 1e-9})
        pipe.planner.divide(ranks.size)
        plan = pipe.prepare(Request.from_mapping(request), must_fit=False).plan
        return led(ranks, {**settings, "memory": plan.tightest.peak / 1e9}, lead, request)


led_in_halves = functools.partial(led, cfg_parallel=True)


def draw(leader: Leader, requests: Sequence[Given]) -> list[Drawn]:
    """One job after another."""
    return [collected(leader.run(Request.from_mapping(request))) for request in requests]


def draw_listening(leader: Leader, requests: Sequence[Given]) -> list[set[str]]:
    """What kinds of traffic all ranks had with each other in each job."""
    kinds = []
    for request in requests:
        before = leader._ranks.sent.copy()
        draw(leader, [request])
        kinds.append({*(leader._ranks.sent - before)})
    return kinds


def draw_streamed(leader: Leader, request: Given) -> list[Drawn]:
    """One job in which blocks are streamed."""
    assert leader.pipe.prepare(Request.from_mapping(request)).plan.stages["dit"].streamed
    return draw(leader, [request])


def cancel(leader: Leader, request: Given, steps: Sequence[int]) -> list[Drawn]:
    """Runs that are closed after so many of their events, and then one to the end."""
    for count in steps:
        events = leader.run(Request.from_mapping(request))
        for _, _ in zip(range(count), events, strict=False):
            pass
        events.close()
    return draw(leader, [request])


def resume(leader: Leader, request: Given) -> list[Drawn]:
    """A run that is closed at every one of its events, and goes on from the state that was kept until then."""
    job, state, latents, pictures = leader.pipe.prepare(Request.from_mapping(request)), RenderState(), [], []
    while state.decoded < job.count:
        with contextlib.closing(leader.run(job, state)) as events:
            for event in events:
                if state.update(event):
                    break
        if event.latents is not None and event.step == event.total:
            latents += event.latents.split(1)
        pictures += [event.image.tobytes()] if event.image is not None else []
    return [Drawn(latents, pictures)]


def interleave(leader: Leader, request: Given) -> str:
    """What a second run says before the first is at its end."""
    events = leader.run(Request.from_mapping(request))
    next(event for event in events if event.stage == "denoise")
    try:
        draw(leader, [request])
    except ZImageError as error:
        return str(error)
    return "nothing"


def raise_midway(leader: Leader, request: Given) -> str:
    """What comes of an error of the consumer between two steps."""
    for event in leader.run(Request.from_mapping(request)):
        if event.stage == "denoise" and event.step == 1:
            raise ZImageError("the disk is full")
    return "nothing"


def plans(leader: Leader, request: Given) -> dict[str, int]:
    """Bytes of work that each stage is planned with."""
    job = leader.pipe.prepare(Request.from_mapping(request))
    return {name: stage.activations for name, stage in job.plan.stages.items()} | {"ranks": leader.pipe.planner.ranks}


def afterwards(ranks: Ranks, settings: Settings, request: Given) -> tuple[int, int]:
    """What a pipeline that has drawn with others plans the DiT with, and how many ranks its pictures tell of."""
    pipe = load(settings)
    if ranks.rank:
        follow(pipe, ranks)
    else:
        Leader(pipe, ranks).close()
    job = pipe.prepare(Request.from_mapping(request))
    return job.plan.stages["dit"].activations, pipe.metadata(job, 0)["ranks"]
