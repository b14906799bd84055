"""Renders that do not start from noise alone: a picture, a mask, a first pass; and renders that go on from a state."""

import itertools
import re

import control_nets
import numpy as np
import pytest
import torch
from PIL import Image

import zimage
from zimage.errors import CheckpointError, RequestError
from zimage.pictures.image import to_pil
from zimage.render.state import RenderState, load_state, save_state

SIZE = {"width": 64, "height": 48}


@pytest.fixture(scope="module")
def picture():
    levels = torch.rand(1, 3, 6, 8, generator=torch.Generator().manual_seed(3)) * 2 - 1
    return to_pil(torch.nn.functional.interpolate(levels, (48, 64), mode="bicubic"))[0]


def difference(a: Image.Image, b: Image.Image) -> float:
    return float(np.abs(np.asarray(a, dtype=np.float32) - np.asarray(b, dtype=np.float32)).mean())


def rebuilt(pipe, picture):
    """What the VAE makes of a picture."""
    return to_pil(pipe.decode(pipe.vae.encode(zimage.pictures.image.from_pil(picture))))[0]


def test_the_result_goes_from_the_picture_to_noise_with_the_strength(pipe, picture):
    strengths = [0.05, 0.3, 0.6, 1.0]
    images = [pipe.generate("a", seed=1, steps=8, image=picture, strength=s).images[0] for s in strengths]
    away = [difference(image, rebuilt(pipe, picture)) for image in images]
    assert away == sorted(away)
    assert len({image.tobytes() for image in images}) == 4
    assert images[-1].tobytes() == pipe.generate("a", seed=1, steps=8, **SIZE).images[0].tobytes()


@pytest.mark.parametrize(
    ("steps", "strength", "runs"), [(8, 0.01, 1), (8, 0.5, 4), (8, 0.51, 5), (1, 0.3, 1), (8, 1, 8)]
)
def test_any_strength_runs_at_least_one_step(pipe, picture, steps, strength, runs):
    request = zimage.Request(prompt="a", seed=1, steps=steps, image=picture, strength=strength)
    totals = {e.total for e in pipe.run(request) if e.stage == "denoise"}
    assert totals == {runs}


def test_the_size_is_the_pictures_unless_given(pipe, picture, tmp_path):
    odd = picture.resize((75, 50))
    odd.save(tmp_path / "odd.png")
    sizes = [
        pipe.generate("a", seed=1, steps=1, image=tmp_path / "odd.png", **given).images[0].size
        for given in ({}, {"width": 96}, {"height": 96}, {"width": 32, "height": 32})
    ]
    assert sizes == [(80, 48), (96, 64), (144, 96), (32, 32)]


def test_a_camera_s_rotation_and_transparency_are_gone_before_it_starts(pipe, picture, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter to the right
    picture.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    clear = picture.convert("RGBA")
    clear.paste((9, 9, 9, 0), (0, 0, 32, 48))
    white = picture.copy()
    white.paste("white", (0, 0, 32, 48))
    for given, plain in ((tmp_path / "turned.png", picture), (clear, white)):
        one, other = (pipe.generate("a", seed=1, steps=2, image=i, strength=0.5).images[0] for i in (given, plain))
        assert one.size == (64, 48)
        assert one.tobytes() == other.tobytes()


def test_metadata_holds_name_and_hash_and_no_path(pipe, picture, tmp_path):
    picture.save(tmp_path / "start.png")
    result = pipe.generate("a", seed=1, steps=1, image=tmp_path / "start.png", mask=tmp_path / "start.png")
    request = result.metadata[0]["request"]
    assert request["image"]["name"] == "start.png"
    assert len(request["image"]["hash"]) == 16
    assert request["strength"] == 1.0, "what is masked is painted anew"
    assert str(tmp_path) not in str(result.metadata)
    assert (
        pipe.generate("a", seed=1, steps=1, image=picture).metadata[0]["request"]["image"]["hash"]
        == (request["image"]["hash"])
    )


def test_outside_the_mask_the_picture_stays(pipe, picture):
    mask = Image.new("L", (64, 48))
    mask.paste(255, (32, 0, 64, 48))
    events = list(pipe.run(zimage.Request(prompt="a", seed=1, steps=3, image=picture, mask=mask, paste=False)))
    latents = [e.latents for e in events if e.latents is not None][-1]
    clean = pipe.vae.encode(zimage.pictures.image.from_pil(picture))
    assert torch.equal(latents[..., :4], clean[..., :4])
    assert not torch.isclose(latents[..., 4:], clean[..., 4:]).any()
    stretched = mask.resize((20, 90))
    again = pipe.generate("a", seed=1, steps=3, image=picture, mask=stretched, paste=False).images[0]
    assert again.tobytes() == next(e.image for e in events if e.image).tobytes(), "a mask is stretched over its image"


def test_the_picture_is_read_in_the_tiles_that_are_asked_for(pipe, picture):
    tiles = {"tile_size": 32, "tile_overlap": 8, "tile_mode": "blend"}
    nothing = Image.new("L", (64, 48))
    events = list(
        pipe.run(zimage.Request(prompt="a", seed=1, steps=2, image=picture, mask=nothing, paste=False, **tiles))
    )
    latents = [e.latents for e in events if e.latents is not None][-1]
    assert torch.equal(latents, pipe.vae.encode(zimage.pictures.image.from_pil(picture), **tiles))


def test_every_image_of_a_batch_starts_from_the_picture(pipe, picture):
    together = pipe.generate(["a", "b"], seed=[1, 2], steps=2, image=picture, images=1)
    for prompt, seed, image in zip("ab", (1, 2), together.images, strict=True):
        alone = pipe.generate(prompt, seed=seed, steps=2, image=picture).images[0]
        assert alone.tobytes() == image.tobytes()


def test_two_passes_are_a_small_render_enlarged_and_refined(pipe):
    result = pipe.generate("a", seed=1, steps=4, hires=2, strength=0.5, width=96, height=64)
    small = pipe.generate("a", seed=1, steps=4, width=48, height=32).images[0]
    large = zimage.pictures.image.fit(small, 96, 64)
    by_hand = pipe.generate("a", seed=1, steps=4, image=large, strength=0.5)
    assert result.images[0].size == (96, 64)
    assert result.images[0].tobytes() == by_hand.images[0].tobytes()


def test_two_passes_of_several_images(pipe):
    request = zimage.Request(prompt=["a", "b"], seed=[1, 2], steps=2, hires=2, width=64, height=64)
    events = list(pipe.run(request))
    stages = [e.stage for i, e in enumerate(events) if i == 0 or events[i - 1].stage != e.stage]
    assert [s for s in stages if s != "load"] == ["encode", "denoise", "enlarge", "denoise", "decode"]
    assert [e.count for e in events if e.stage == "enlarge"] == [2] * 4
    for prompt, seed, image in zip("ab", (1, 2), [e.image for e in events if e.image], strict=True):
        alone = pipe.generate(prompt, seed=seed, steps=2, hires=2, width=64, height=64).images[0]
        assert alone.tobytes() == image.tobytes()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"strength": 0.5}, "no effect without an image"),
        ({"mask": Image.new("L", (8, 8))}, "no effect without an image"),
        ({"image": Image.new("L", (8, 8)), "strength": 0.0}, "must be above 0"),
        ({"image": Image.new("L", (8, 8)), "strength": 1.1}, "too large"),
        ({"image": Image.new("L", (8, 8)), "hires": 2}, "pass only one of them"),
        ({"image": "nowhere.png"}, "is missing"),
        ({"image": __file__}, "cannot be read as a picture"),
        ({"image": 3}, "should be the path of a file"),
        ({"hires": 1}, "must be above 1"),
    ],
)
def test_starts_that_make_no_sense(pipe, settings, words):
    with pytest.raises(RequestError, match=words):
        pipe.generate("a", seed=1, steps=1, **settings)


# ------------------------------------------------------------------ going on


RENDERS = {
    "plain": {"prompt": ["a", "b"], "images": 2, "steps": 3, **SIZE},
    "batched": {"prompt": ["a", "b", "c"], "batch_size": 2, "steps": 3, **SIZE},
    "guided": {"prompt": "a", "guidance": 2.0, "steps": 3, **SIZE},
    "two passes": {"prompt": ["a", "b"], "hires": 2, "steps": 3, "width": 64, "height": 64},
    "picture": {"prompt": ["a", "b"], "image": True, "mask": True, "strength": 0.6, "steps": 5},
}


@pytest.mark.parametrize("kind", RENDERS)
def test_a_render_goes_on_to_the_same_bits_from_any_event(pipe, picture, kind, tmp_path):
    settings = {k: picture if v is True else v for k, v in RENDERS[kind].items()}
    job = pipe.prepare(zimage.Request(seed=5, **settings))
    pipe.cache.clear()
    events = list(pipe.run(job))
    expected = [e.image.tobytes() for e in events if e.image]
    steps = sum(e.latents is not None for e in events)
    path = tmp_path / "state"
    for stop in range(len(list(pipe.run(job)))):
        state, before = RenderState(), []
        run = pipe.run(job)
        for event in itertools.islice(run, stop):
            state.update(event)
            before.append(event)
        run.close()
        save_state(path, state, {"note": "x"})
        again, record = load_state(path)
        assert record == {"note": "x"}
        whole = before + list(pipe.run(job, again))
        assert [e.image.tobytes() for e in whole if e.image] == expected, stop
        assert sum(e.latents is not None for e in whole) == steps, "no step is computed twice"


def test_every_stage_that_is_emitted_is_documented(seeing_folder, picture, tmp_path):
    from zimage.events import Event

    pipe = zimage.ZImage.load(seeing_folder, device="cpu", dtype="fp32", vision_model=f"{seeing_folder}/vision")
    seen, net = set(), control_nets.write(tmp_path, "2.1", **control_nets.BESIDE_TINY)
    for settings in (*RENDERS.values(), {"prompt": "a", "control": [(net, picture)], "reference": [picture]}):
        given = {k: picture if v is True else v for k, v in settings.items()}
        seen |= {event.stage for event in pipe.run(zimage.Request(seed=5, **given))}
    named = set(re.findall(r'"([a-z ]+)"', " ".join(Event.__doc__.split())))
    assert named == seen | {"load"}


def test_a_state_that_is_none(tmp_path):
    from safetensors.torch import save_file

    (tmp_path / "text").write_text("hello")
    save_file({"latents": torch.zeros(1)}, tmp_path / "other")
    for name, words in (("nowhere", "cannot be read"), ("text", "cannot be read"), ("other", "is not the state")):
        with pytest.raises(CheckpointError, match=words):
            load_state(tmp_path / name)
