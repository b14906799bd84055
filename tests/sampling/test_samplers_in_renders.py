"""Every sampler through whole renders: the same bits alone, in a batch, and gone on with from any step."""

import contextlib
import itertools
from collections.abc import Generator

import pytest
import torch
from PIL import Image
from torch import Tensor

import zimage
from zimage import flow
from zimage.errors import RequestError
from zimage.events import Event
from zimage.render.denoising import Evaluation
from zimage.render.state import RenderState, load_state, save_state
from zimage.settings.sampling import SAMPLERS

SIZE = {"width": 32, "height": 48}
SEEDS = [5, 6, 9]


def picture(mode: str = "RGB") -> Image.Image:
    noise = torch.randint(256, (6, 4, 3), generator=torch.Generator().manual_seed(2)).byte().numpy()
    return Image.fromarray(noise).resize((32, 48), Image.Resampling.BICUBIC).convert(mode)


WAYS = {
    "from noise, two images": {**SIZE, "steps": 4, "images": 2},
    "guided in the first half": {**SIZE, "steps": 4, "guidance": 2.0, "cfg_truncation": 0.4},
    "from a picture": {"image": picture(), "mask": picture("L"), "strength": 0.8, "steps": 5},
    "in two passes": {**SIZE, "steps": 4, "hires": 2.0, "strength": 0.7},
}


def elementwise(_):
    """In the place of the DiT: a velocity of which each value depends on its own alone, rounded alike in any batch."""

    def velocity(e: Evaluation) -> Tensor:
        x = e.latents
        return x * (0.7 - 0.1 * x) * float(e.sigmas[e.step]) - 0.2 * x

    return velocity


def denoised(events: Generator[Event, None, None]) -> list[Tensor]:
    """The latents of every step; nothing is decoded at the end."""
    found = []
    with contextlib.closing(events):
        for event in itertools.takewhile(lambda event: event.stage != "decode", events):
            found += [event.latents] if event.stage == "denoise" and event.latents is not None else []
    return found


def ends(pipe, request: zimage.Request, **more) -> Tensor:
    """The finished latents of every image."""
    events = [e for e in pipe.run(request, **more) if e.latents is not None and e.step == e.total]
    return torch.cat([event.latents for event in events])


@pytest.mark.parametrize("together", [2, 3])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_same_bits_alone_and_in_a_batch(pipe, sampler, together):
    request = {"prompt": "a cat", "sampler": sampler, "steps": 4, **SIZE}
    alone = [ends(pipe, zimage.Request(**request, seed=seed), hooks=[elementwise]) for seed in SEEDS]
    batch = ends(pipe, zimage.Request(**request, seed=SEEDS, images=3, batch_size=together), hooks=[elementwise])
    assert torch.equal(batch, torch.cat(alone))
    assert not torch.equal(batch[0], batch[1])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_render_goes_on_from_any_step_to_the_same_bits(pipe, tmp_path, sampler, way):
    """Each state is written to a file and read again."""
    job = pipe.prepare(zimage.Request(prompt="a cat", sampler=sampler, seed=5, **WAYS[way]))
    state, file, states, whole = RenderState(), tmp_path / "state", [], []
    for event in pipe.run(job):
        if state.update(event) and event.latents is not None:
            whole.append(event.latents)
            states.append((state.snapshot(), len(whole)))
    for kept, done in states:
        save_state(file, kept, {})
        begun, _ = load_state(file)
        rest = denoised(pipe.run(job, begun))
        assert len(rest) == len(whole) - done
        assert all(map(torch.equal, rest, whole[done:]))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_steps_are_counted_and_not_evaluations(pipe, sampler):
    asked = []

    def counted(evaluate):
        return lambda e: asked.append(e.step) or evaluate(e)

    request = zimage.Request(prompt="a cat", sampler=sampler, seed=1, steps=4, **SIZE)
    events = list(pipe.run(request, hooks=[counted]))
    steps = [(e.step, e.total) for e in events if e.stage == "denoise"]
    assert steps == [(step, 4) for step in range(5)]
    assert asked == [level for i in range(4) for level in flow.SOLVERS[sampler].levels(i, 4)]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_denoise_with_tensors_is_the_render(pipe, sampler):
    request = zimage.Request(prompt="a cat", sampler=sampler, seed=SEEDS[:2], images=2, batch_size=2, steps=3, **SIZE)
    noise = torch.cat([flow.start_noise(seed, 16, 6, 4) for seed in SEEDS[:2]])
    found = pipe.denoise(pipe.encode(["a cat"]) * 2, noise, steps=3, sampler=sampler, seeds=SEEDS[:2])
    assert torch.equal(found, ends(pipe, request))


def test_noise_of_steps_continues_that_of_the_start(pipe):
    """Also where a run begins later: one draw for each step that runs. With D = x, LCM shows it."""
    clean, noise, stream = torch.randn(1, 16, 6, 4), flow.start_noise(7, 16, 6, 4), torch.Generator().manual_seed(7)
    start, drawn = (torch.randn(1, 16, 6, 4, generator=stream) for _ in range(2))
    still = {"sampler": "lcm", "seeds": [7], "hooks": [lambda _: lambda e: 0 * e.latents]}
    end = pipe.denoise(pipe.encode(["a cat"]), noise, 4, 3.0, clean=clean, strength=0.5, **still)
    sigmas = flow.sigmas(4, 3.0)
    assert torch.equal(start, noise)
    torch.testing.assert_close(end, flow.noised(flow.noised(clean, noise, sigmas[2]), drawn, sigmas[3]))


@pytest.mark.parametrize("sampler", [name for name, solver in flow.SOLVERS.items() if solver.draws])
@pytest.mark.parametrize("seeds", [(), (1,), (1, 2, 3), (1, -1), (1, 2**64), (1, 2.0), (1, True), "12", 12, None])
def test_noise_needs_a_seed_for_each_image(pipe, sampler, seeds):
    with pytest.raises(RequestError, match="pass one for each of 2 images") as raised:
        pipe.denoise(pipe.encode(["a cat"]) * 2, torch.zeros(2, 16, 6, 4), sampler=sampler, seeds=seeds)
    assert {"seeds", "sampler"} <= set(raised.value.fields)


def test_a_sampler_that_is_none_is_refused(pipe):
    with pytest.raises(RequestError, match="sampler"):
        pipe.denoise(pipe.encode(["a cat"]), torch.zeros(1, 16, 6, 4), sampler="eular")


# ------------------------------------------------------------------ what stays where it is


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_outside_a_mask_stands_the_picture_at_every_level(pipe, sampler):
    """What the model sees there is the picture with the start's noise, in every evaluation; in the end it is that."""
    mask = torch.zeros(1, 1, 6, 4)
    mask[..., 2:] = 1
    clean, noise = torch.randn(2, 1, 16, 6, 4, generator=torch.Generator().manual_seed(3))
    seen = []

    def watched(evaluate):
        return lambda e: seen.append((e.step, e.latents.clone())) or evaluate(e)

    given = {"clean": clean, "mask": mask, "strength": 0.8, "steps": 5, "sampler": sampler, "seeds": [1]}
    end = pipe.denoise(pipe.encode(["a cat"]), noise, shift=3.0, hooks=[watched], **given)
    sigmas = flow.sigmas(5, 3.0)
    assert [step for step, _ in seen] == [k for i in range(1, 5) for k in flow.SOLVERS[sampler].levels(i, 5)]
    for step, x in seen:
        assert torch.equal(x[..., :2], flow.noised(clean, noise, sigmas[step])[..., :2])
    assert torch.equal(end[..., :2], clean[..., :2])
    assert not torch.equal(end[..., 2:], clean[..., 2:])


# ------------------------------------------------------------------ states of others


def begun(pipe, sampler: str, steps: int) -> tuple[RenderState, zimage.Request]:
    request = zimage.Request(prompt="a cat", sampler=sampler, seed=1, steps=4, **SIZE)
    state = RenderState()
    for event in pipe.run(request):
        if state.update(event) and state.step == steps:
            return state, request
    raise AssertionError


@pytest.mark.parametrize(("ours", "other"), [("euler", "dpmpp_2m"), ("dpmpp_2m", "unipc"), ("er_sde", "heun")])
def test_what_another_sampler_remembers_is_refused(pipe, ours, other):
    state, _ = begun(pipe, other, 2)
    job = pipe.prepare(zimage.Request(prompt="a cat", sampler=ours, seed=1, steps=4, **SIZE))
    with pytest.raises(RequestError, match="what another sampler or guidance method remembers"):
        pipe.run(job, state)


@pytest.mark.parametrize("change", ["less", "more", "gap", "renamed", "none left", "shape", "nan"])
def test_what_the_sampler_cannot_have_left_is_refused(pipe, change):
    state, request = begun(pipe, "unipc", 2)
    assert set(state.carried) == {"past.0", "past.1"}
    one = state.carried["past.0"]
    state.carried = {
        "less": {"past.0": one},
        "more": {**state.carried, "past.2": one},
        "gap": {"past.0": one, "past.2": one},
        "renamed": {"past.0": one, "past.1": one, "other": one},
        "none left": {},
        "shape": {"past.0": one, "past.1": one[..., :2]},
        "nan": {"past.0": one, "past.1": one * torch.nan},
    }[change]
    with pytest.raises(RequestError, match="the state is that of another render"):
        pipe.run(request, state)


def test_nothing_is_carried_before_the_first_step(pipe):
    state, request = begun(pipe, "unipc", 2)
    with pytest.raises(RequestError, match="sampler"):
        pipe.run(request, RenderState(carried=state.carried))
