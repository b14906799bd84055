"""Previews from latents alone: how near they come to the picture, and that a render neither changes nor waits."""

import io
import json
import threading
import time

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import zimage
from zimage.errors import NonFiniteError, OutOfMemory
from zimage.events import Event
from zimage.pictures.image import from_pil, to_pil
from zimage.render import preview as module
from zimage.render.preview import Factors, Previews, fit, least_squares, pairs, prefitted
from zimage.vae import AutoencoderKL, AutoencoderKLWan

CPU = torch.device("cpu")
PROMPTS = ["a cat face on a blue background", "a red circle", "a green tree under a yellow sky"]

EIGHT = [
    *PROMPTS,
    "a dog face on a red background",
    "a cat",
    "a house at night",
    "two dogs and a bird",
    "a fish",
]


@pytest.fixture(scope="module")
def demo():
    return zimage.ZImage.load(device="cpu", dtype="fp32")


@pytest.fixture(scope="module")
def factors(demo):
    return fit(demo.vae, CPU)


@pytest.fixture(scope="module")
def made(demo, factors):
    """A render of the demo with a preview of every step."""
    return rendered(demo, factors, prompt=PROMPTS, seed=[3, 4, 5])


class Shown(list):
    """Previews, each waited for: a step is not begun before the one before it is drawn."""

    def __init__(self):
        super().__init__()
        self.drawn = threading.Semaphore(0)

    def __call__(self, preview):
        self.append(preview)
        self.drawn.release()


def rendered(pipe, factors, **request):
    shown, images = Shown(), []
    job = pipe.prepare(zimage.Request.from_mapping(request))
    with Previews(factors, shown, pause=0) as previews:
        for event in pipe.run(job, hooks=[previews.hook]):
            previews.take(event)
            if event.stage == "denoise" and event.latents is not None:
                assert shown.drawn.acquire(timeout=10)
            if event.image is not None:
                images.append(event.image)
    return images, shown


def levels(picture, size=None):
    if isinstance(picture, module.Preview):
        picture = Image.open(io.BytesIO(picture.jpeg))
    return np.asarray(picture.resize(size or picture.size, Image.Resampling.BOX), dtype=float)


def error(preview, image):
    """The mean difference of a preview to its picture, in levels of 256."""
    return abs(levels(preview) - levels(image, (preview.width, preview.height))).mean()


def last_of(shown, index):
    return [preview for preview in shown if preview.index == index][-1]


# ------------------------------------------------------------------ how near they come


def test_the_last_preview_is_near_the_picture(made):
    """12.5 on average over eight renders; the best that a matrix could do on them is 11.2."""
    images, shown = made
    errors = [error(last_of(shown, i), image) for i, image in enumerate(images)]
    assert np.mean(errors) < 15
    for i, image in enumerate(images):
        preview = last_of(shown, i)
        small = levels(image, (preview.width, preview.height))
        assert np.corrcoef(levels(preview).ravel(), small.ravel())[0, 1] > 0.9


@pytest.mark.full
def test_both_kinds_of_pairs_are_better_than_one(demo):
    """The figures of `preview.py`, without JPEG."""
    request = zimage.Request(prompt=EIGHT, seed=list(range(8)))
    latents = torch.cat([e.latents for e in demo.run(request) if e.latents is not None and e.step == e.total])
    pictures = demo.decode(latents).detach()
    small = [np.asarray(to_pil(one)[0], dtype=float) for one in torch.nn.functional.avg_pool2d(pictures, 4).split(1)]

    def mean_error(factors):
        drawn = [levels(factors.draw(one)) for one in latents.split(1)]
        return np.mean([abs(a - b).mean() for a, b in zip(drawn, small, strict=True)])

    x, y = pairs(demo.vae, CPU)
    grey = Factors([[0.0] * 3] * 16, [0.0] * 3)
    both, decoded, encoded = (least_squares(x[part], y[part]) for part in (slice(None), slice(8), slice(8, None)))
    itself = least_squares(latents, torch.nn.functional.avg_pool2d(pictures, 8))
    errors = [mean_error(factors) for factors in (both, decoded, encoded, itself, grey)]
    assert errors == pytest.approx([12.5, 14.0, 12.9, 11.2, 63.2], abs=0.5)


def test_it_beats_grey_and_other_factors(demo, made, factors):
    images, shown = made
    wrong = Factors(factors.matrix[1:] + factors.matrix[:1], factors.bias)
    grey = Factors([[0.0] * 3] * 16, [0.0] * 3)
    for i, image in enumerate(images):
        latents = demo.vae.encode(from_pil(image)).detach()
        others = [levels(one.draw(latents)) for one in (grey, wrong)]
        small = levels(image, (32, 32))
        assert error(last_of(shown, i), image) < 0.5 * min(abs(other - small).mean() for other in others)


def test_early_previews_show_the_picture_and_not_its_noise(demo, factors, made):
    """The latents of a step themselves are mostly noise at first."""
    run = demo.run(zimage.Request(prompt=PROMPTS, seed=[3, 4, 5]))
    noisy = [(e.index, factors.draw(e.latents)) for e in run if e.latents is not None and e.step == 1]
    images, shown = made
    early = [error(preview, images[preview.index]) for preview in shown if preview.step == 1]
    raw = [abs(levels(drawn) - levels(images[index], (32, 32))).mean() for index, drawn in noisy]
    assert len(early) == len(raw) == 3
    assert max(early) < 30 < 60 < min(raw)


def step_of(latents, velocity, sigma, start=None, number=1):
    """The first of three steps, after an evaluation."""
    event = Event("denoise", number, 3, latents=torch.full_like(latents, 7.0))
    return module._Step(
        event, module._Seen(latents, velocity, sigma, start or zimage.flow.Start(latents, 0, latents)), None
    )


def test_the_estimate_is_the_clean_latents(factors):
    """x at σ and the velocity of one picture and one noise, as `flow` mixes them; at the end, what was reached."""
    picture, noise = torch.randn(1, 16, 4, 4), torch.randn(1, 16, 4, 4)
    mixed, previews = zimage.flow.noised(picture, noise, torch.tensor(0.9)), Previews(factors, list.append)
    assert np.abs(previews._clean(step_of(mixed, noise - picture, 0.9)) - picture.numpy()).max() < 1e-5
    assert (previews._clean(step_of(mixed, noise - picture, 0.9, number=3)) == 7).all()


def test_cells_show_the_picture_until_they_are_repainted(factors):
    """Beside a mask by value, whose cells begin with different steps."""
    zeros, previews = torch.zeros(1, 16, 1, 4), Previews(factors, list.append)
    begins = torch.tensor([2.0, 3.0, 4.0, 5.0]).view(1, 1, 1, 4)  # of five steps, of which the last three run
    start = zimage.flow.Start(zeros, 2, zeros, zeros + 3, begins)
    shown = [previews._clean(step_of(zeros, zeros, 0.5, start, number))[0, 0, 0].tolist() for number in (1, 2)]
    assert shown == [[0, 3, 3, 3], [0, 0, 3, 3]]


@pytest.mark.parametrize("sampler", zimage.flow.SOLVERS)
def test_previews_of_every_sampler_are_free_of_noise(demo, factors, sampler):
    """Also of those that evaluate twice in a step, or add noise after it."""
    images, shown = rendered(demo, factors, prompt=PROMPTS[0], seed=3, steps=6, sampler=sampler)
    assert [preview.step for preview in shown] == [1, 2, 3, 4, 5, 6]
    errors = [error(preview, images[0]) for preview in shown]
    assert errors[0] < 50, "new noise may change what the first step saw; noise itself is above 60"
    assert max(errors[2:]) < 18


def test_a_preview_has_twice_the_latents_size(factors):
    assert factors.draw(torch.zeros(1, 16, 5, 7)).size == (14, 10)


def test_drawing_takes_three_milliseconds_at_most(factors):
    """1024 × 1024 px, on one core; the least of many, since others may be at work on it."""
    latents = torch.randn(1, 16, 128, 128)
    step = step_of(latents, 0.9 * latents, 0.9)
    previews, seconds = Previews(factors, list.append, pause=0), []
    for _ in range(40):
        start = time.perf_counter()
        preview = previews._drawn(step)
        seconds.append(time.perf_counter() - start)
    assert (preview.width, preview.height) == (256, 256)
    assert min(seconds) < 0.003


# ------------------------------------------------------------------ every kind of render


def test_a_batch_shows_its_first_image(demo, factors):
    _, shown = rendered(demo, factors, prompt=PROMPTS, seed=1, steps=2, batch_size=2)
    assert [(p.index, p.step, p.total) for p in shown] == [(0, 1, 2), (0, 2, 2), (2, 1, 2), (2, 2, 2)]


def test_both_passes_are_shown(demo, factors):
    images, shown = rendered(demo, factors, prompt=PROMPTS[0], seed=3, width=128, height=128, hires=2.0, steps=4)
    assert [(p.width, p.step) for p in shown][:4] == [(16, 1), (16, 2), (16, 3), (16, 4)]
    assert {p.width for p in shown[4:]} == {32}
    assert error(shown[-1], images[0]) < 20


def test_a_render_from_a_picture_shows_it_where_the_mask_keeps_it(demo, factors, made):
    picture = made[0][0]
    mask = Image.new("L", picture.size)
    mask.paste(255, (0, 0, 64, 128))  # the left half is painted anew
    _, shown = rendered(demo, factors, prompt=PROMPTS[1], seed=9, image=picture, mask=mask, strength=0.9)
    kept = levels(factors.draw(demo.vae.encode(from_pil(picture)).detach()))[:, 18:]
    for preview in shown:
        assert abs(levels(preview)[:, 18:] - kept).mean() < 4.5  # JPEG's own error


def test_a_render_that_goes_on_is_shown(demo, factors):
    job = demo.prepare(zimage.Request(prompt=PROMPTS[0], seed=1, steps=4))
    state, shown = zimage.render.state.RenderState(), Shown()
    for event in demo.run(job):
        state.update(event)
        if event.stage == "denoise" and event.step == 2:
            break
    with Previews(factors, shown, pause=0) as previews:
        for event in demo.run(job, state, hooks=[previews.hook]):
            previews.take(event)
    assert shown[-1].step == 4


# ------------------------------------------------------------------ the render's own way


def test_pixels_stay_the_same(demo, factors, made):
    request = zimage.Request(prompt=PROMPTS, seed=[3, 4, 5])
    alone = [event.image for event in demo.run(request) if event.image is not None]
    assert [image.tobytes() for image in alone] == [image.tobytes() for image in made[0]]


def test_a_render_does_not_wait_for_previews(demo, factors):
    """The first preview is drawn until the render is over; of the others only the last is left."""
    over, shown = threading.Event(), []

    def show(preview):
        assert over.wait(20)
        shown.append(preview.step)

    with Previews(factors, show, pause=0) as previews:
        for event in demo.run(zimage.Request(prompt=PROMPTS[0], seed=1), hooks=[previews.hook]):
            previews.take(event)
        assert shown == []
        over.set()
    assert shown in ([1, 8], [8])


def test_a_fault_in_a_preview_ends_previews_and_not_the_render(demo, factors, caplog):
    def show(preview):
        raise BrokenPipeError("gone")

    with Previews(factors, show, pause=0) as previews:
        events = list(demo.run(zimage.Request(prompt=PROMPTS[0], seed=1, steps=2), hooks=[previews.hook]))
        for event in events:
            previews.take(event)
    assert events[-1].image is not None
    assert "no further previews of this render: BrokenPipeError: gone" in caplog.text


def test_a_cancelled_render_leaves_no_thread(demo, factors):
    before = threading.active_count()
    with Previews(factors, lambda preview: None, pause=0) as previews:
        run = demo.run(zimage.Request(prompt=PROMPTS[0], seed=1), hooks=[previews.hook])
        while (event := next(run)).latents is None:
            previews.take(event)
        run.close()
    assert threading.active_count() == before


# ------------------------------------------------------------------ fitting


@pytest.mark.parametrize("kind", [AutoencoderKL, AutoencoderKLWan])
def test_every_vae_has_its_own_factors(kind):
    config = {AutoencoderKL: tiny.KL, AutoencoderKLWan: tiny.WAN}[kind]
    fits = [fit(tiny.randomised(kind.from_config(config), seed), CPU) for seed in (1, 2, 1)]
    assert fits[0] == fits[2] != fits[1]
    assert [len(row) for row in fits[0].matrix] == [3] * 16


def test_fitting_finds_a_map_that_is_one():
    """A VAE that is linear has no error: each pixel of a cell is the same matrix times its latents."""
    generator = torch.Generator().manual_seed(5)
    colours = 0.02 * torch.randn(16, 3, generator=generator)  # small, so that nothing is cut at ±1

    class Linear:
        spatial_factor, config = 8, type("Config", (), {"latent_channels": 16})

        def decode(self, latents):
            small = torch.einsum("bchw,co->bohw", latents, colours) + 0.25
            return small.repeat_interleave(8, 2).repeat_interleave(8, 3)

        def encode(self, images):
            """One of the latents that are decoded to these pictures' means."""
            means = torch.nn.functional.avg_pool2d(images, 8) - 0.25
            return torch.einsum("bohw,oc->bchw", means, torch.linalg.pinv(colours))

    found = fit(Linear(), CPU)
    assert (torch.tensor(found.matrix) - colours).abs().max() < 1e-4
    assert torch.tensor(found.bias).sub(0.25).abs().max() < 1e-4


def test_a_lack_of_memory_is_one_that_is_told(pipe, tmp_path, monkeypatch):
    """And not the end of the worker that looks for factors before its first job."""
    monkeypatch.setattr(module, "fit", lambda *_: torch.empty(1 << 60))
    with pytest.raises(OutOfMemory):
        prefitted(pipe, tmp_path)


def test_a_damaged_vae_has_no_previews():
    vae = tiny.randomised(AutoencoderKL.from_config(tiny.KL), 1)
    torch.nn.init.constant_(vae.decoder.conv_in.bias, float("nan"))
    with pytest.raises(NonFiniteError, match="allows no previews"):
        fit(vae, CPU)


# ------------------------------------------------------------------ factors that are kept


def test_factors_are_fitted_once(tmp_path, tiny_folder):
    first = prefitted(zimage.ZImage.load(tiny_folder, device="cpu"), tmp_path)
    again = zimage.ZImage.load(tiny_folder, device="cpu")
    assert prefitted(again, tmp_path) == first
    assert again.loaded == ()
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]


DAMAGE = {
    "cut short": lambda text: text[:40],
    "empty": lambda text: "",
    "another program's": lambda text: json.dumps({"a": 1}),
    "fitted in another way": lambda text: text.replace("zimage-preview-1", "zimage-preview-0"),
    "of fewer channels": lambda text: json.dumps({**json.loads(text), "matrix": json.loads(text)["matrix"][1:]}),
    "of two colours": lambda text: json.dumps({**json.loads(text), "bias": [0, 0]}),
    "not a number": lambda text: json.dumps({**json.loads(text), "bias": [float("nan"), 0, 0]}),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_factors_are_fitted_anew(tmp_path, pipe, kind, caplog):
    whole = prefitted(pipe, tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_text(DAMAGE[kind](path.read_text()))
    assert prefitted(pipe, tmp_path) == whole
    assert "fitted anew" in caplog.text
    caplog.clear()
    assert prefitted(pipe, tmp_path) == whole
    assert caplog.text == ""


def test_two_vaes_share_a_folder(tmp_path, pipe, demo):
    assert prefitted(pipe, tmp_path) != prefitted(demo, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_that_cannot_be_written_costs_only_the_fitting(tmp_path, pipe, caplog):
    (tmp_path / "file").touch()
    assert prefitted(pipe, tmp_path / "file" / "folder") == fit(pipe.vae, CPU)
    assert "cannot be kept" in caplog.text


def test_steps_that_nobody_could_see_are_left_out(pipe, factors):
    """But never the last one."""
    shown = []
    with Previews(factors, shown.append, pause=3600) as previews:
        for event in pipe.run(zimage.Request(prompt="a", seed=1, steps=5), hooks=[previews.hook]):
            previews.take(event)
    assert [preview.step for preview in shown] in ([1, 5], [5])
