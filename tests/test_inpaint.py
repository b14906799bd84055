"""Inpainting: the picture's own pixels outside the mask, masks by value, regions rendered alone, pictures extended."""

import itertools
import json
import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops, ImageDraw, ImageFilter

import zimage
from zimage import flow
from zimage.cli import main
from zimage.errors import RequestError
from zimage.pictures import inpaint
from zimage.pictures.image import fit, from_pil
from zimage.render.canvas import mask_of, picture_of
from zimage.render.job import Job
from zimage.render.state import RenderState

EDGE = 16  # px, as documented


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours with a little noise, unlike anything that a random VAE gives back."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (3, 4, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    return Image.fromarray((smooth + generator.integers(-9, 10, smooth.shape)).clip(0, 255).astype(np.uint8))


def ellipse(width: int, height: int, box=(0.4, 0.3, 0.6, 0.7), level: int = 255) -> Image.Image:
    mask = Image.new("L", (width, height))
    sides = (width, height, width, height)
    ImageDraw.Draw(mask).ellipse([share * side for share, side in zip(box, sides, strict=True)], fill=level)
    return mask


def away(mask: np.ndarray) -> np.ndarray:
    """Where no pixel of the mask is within EDGE px, each pixel looked for by itself."""
    near = np.zeros_like(mask, dtype=bool)
    for y, x in zip(*np.nonzero(mask), strict=True):
        near[max(y - EDGE, 0) : y + EDGE + 1, max(x - EDGE, 0) : x + EDGE + 1] = True
    return ~near


def latents_of(events) -> list[torch.Tensor]:
    return [event.latents for event in events if event.latents is not None]


def render(pipe, **settings) -> Image.Image:
    return pipe.generate("a cat", **{"seed": 1, "steps": 2, **settings}).images[0]


# ------------------------------------------------------------------ masks by value


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 8, 9, 30, 50, 100])
def test_a_cell_begins_where_image_to_image_at_its_value_does(steps):
    values = torch.tensor([i / 100 for i in range(101)])
    begins = flow.first_steps(values, steps).tolist()
    assert begins == [steps] + [flow.first_step(steps, i / 100) for i in range(1, 101)]
    grey = torch.tensor([level / 255 for level in range(256)])
    shares = [round(level / 255, 2) for level in range(256)]
    assert flow.first_steps(grey, steps).tolist() == [
        flow.first_step(steps, share) if share else steps for share in shares
    ]


def test_a_step_repaints_what_exceeds_the_share_of_the_steps_that_are_left():
    """The rule as it is written, at values that no rounding touches."""
    values = torch.tensor([0.0, 0.12, 0.13, 0.25, 0.3, 0.5, 0.51, 0.9, 1.0])
    begins = flow.first_steps(values, 8)
    for step in range(8):
        assert torch.equal(begins <= step, values > 1 - (step + 1) / 8), step


@pytest.mark.parametrize(("level", "strength"), [(128, 0.5), (127, 0.5), (64, 0.25), (20, 0.08), (204, 0.8)])
def test_a_constant_mask_is_that_strength(pipe, level, strength):
    """Bit for bit, after every step and in the picture; and no step runs that changes nothing."""
    picture, grey = photo(64, 48), Image.new("L", (64, 48), level)
    given = {"prompt": ["a", "b"], "seed": [1, 2], "image": picture, "steps": 8, "batch_size": 2}
    masked = list(pipe.run(zimage.Request(**given, mask=grey)))
    plain = list(pipe.run(zimage.Request(**given, strength=strength)))
    assert len(latents_of(masked)) == len(latents_of(plain)) == 8 - flow.first_step(8, strength)
    assert all(map(torch.equal, latents_of(masked), latents_of(plain)))
    drawn = [[event.image.tobytes() for event in events if event.image] for events in (masked, plain)]
    assert drawn[0] == drawn[1]


def test_a_value_is_a_share_of_the_steps_that_strength_leaves(pipe):
    """Strength 0.6 of 8 steps leaves 5; half of those are 3."""
    picture, grey = photo(64, 48), Image.new("L", (64, 48), 128)
    events = list(pipe.run(zimage.Request("a", seed=1, steps=8, image=picture, mask=grey, strength=0.6)))
    assert len(latents_of(events)) == 3
    plain = list(pipe.run(zimage.Request("a", seed=1, steps=8, image=picture, strength=3 / 8)))
    assert torch.equal(latents_of(events)[-1], latents_of(plain)[-1])


def test_each_cell_begins_by_its_own_value(pipe):
    """Before it does, it is the picture at that step's noise level."""
    picture, mask = photo(64, 48), Image.new("L", (64, 48))
    for i, level in enumerate((255, 191, 128, 0)):
        mask.paste(level, (16 * i, 0, 16 * (i + 1), 48))
    job = pipe.prepare(zimage.Request("a", seed=1, steps=4, image=picture, mask=mask))
    clean, noise = pipe.vae.encode(from_pil(picture)), flow.start_noise(1, 16, 6, 8)
    for step, latents in enumerate(latents_of(pipe.run(job))):
        kept = flow.noised(clean, noise, torch.tensor(job.sigmas[step + 1]))
        same = [torch.equal(latents[..., 2 * i : 2 * i + 2], kept[..., 2 * i : 2 * i + 2]) for i in range(4)]
        assert same == [False, step < 1, step < 2, True], step


def test_what_the_mask_touches_is_repainted_whole(pipe):
    """A single white pixel, wherever in its cell; without paste it is only the upper left that counts."""
    for x, y in ((0, 0), (7, 7), (3, 5)):
        mask = Image.new("L", (64, 48))
        mask.putpixel((24 + x, 16 + y), 255)
        begins = flow.first_steps(flow.soft_latent_mask(from_pil(mask)[:, :1] / 2 + 0.5, 6, 8), 4)
        assert (begins < 4).nonzero().tolist() == [[0, 0, 2, 3]]


def test_the_noise_of_jpeg_in_black_and_white_repaints_and_keeps_nothing():
    levels = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    cut = np.asarray(inpaint.levels(levels))[0]
    assert (cut[:8] == 0).all()
    assert (cut[248:] == 255).all()
    assert (cut[8:248] == np.arange(8, 248)).all()


# ------------------------------------------------------------------ the picture's own pixels


def random_case(pick: random.Random) -> tuple[Image.Image, dict]:
    """A picture of any size, and settings that leave some of it alone."""
    size = pick.randint(40, 110), pick.randint(40, 110)
    mask = Image.new("L", size)
    for _ in range(pick.randint(1, 2)):
        left, top = (pick.randrange(side) for side in size)
        box = (left, top, left + pick.randint(1, 14), top + pick.randint(1, 14))
        level = pick.choice([255, 255, 90, 9])
        (ImageDraw.Draw(mask).ellipse if pick.random() < 0.5 else ImageDraw.Draw(mask).rectangle)(box, fill=level)
    settings: dict = {"mask": mask}
    if pick.random() < 0.5:
        settings["mask_crop"] = pick.choice([0, 5, 30, 500])
    if pick.random() < 0.3:
        settings["mask_blur"] = pick.choice([0, 0.7, 2.5])
    if pick.random() < 0.4:
        settings["extend"] = ",".join(str(pick.choice([0, 0, 9, 40])) for _ in range(3)) + ",3"
    if pick.random() < 0.3:
        settings |= {"tile_mode": pick.choice(["exact", "blend"]), "tile_size": 64, "tile_overlap": 16}
    if pick.random() < 0.3:
        settings["strength"] = pick.choice([0.3, 0.9])
    if pick.random() < 0.2:
        settings |= {"mask": ImageChops.invert(mask), "mask_invert": True}
    if pick.random() < 0.3 and "mask_crop" in settings:
        settings |= {"width": 16 * pick.randint(2, 6), "height": 16 * pick.randint(2, 6)}
    return photo(*size, seed=pick.randrange(1000)), settings


@pytest.mark.parametrize("seed", range(40))
def test_outside_the_mask_stand_the_pictures_own_pixels(pipe, seed):
    picture, settings = random_case(random.Random(seed))
    drawn = render(pipe, image=picture, **settings)
    mask = ImageChops.invert(settings["mask"]) if settings.get("mask_invert") else settings["mask"]
    left, top, right, bottom = map(int, settings.get("extend", "0,0,0,0").split(","))
    size = picture.width + left + right, picture.height + top + bottom
    own, touched = Image.new("RGB", size), Image.new("L", size, 255)
    own.paste(picture, (left, top))
    touched.paste(mask, (left, top))
    if settings.get("mask_blur"):
        new = Image.new("L", size, 255)
        new.paste(0, (left, top, left + picture.width, top + picture.height))
        touched = ImageChops.lighter(touched.filter(ImageFilter.GaussianBlur(settings["mask_blur"])), new)
    assert drawn.size == size
    untouched = away(np.asarray(touched) >= 8)
    assert (np.asarray(drawn) == np.asarray(own))[untouched].all()
    assert (np.asarray(drawn) != np.asarray(own))[np.asarray(touched) >= 8].any()


def test_another_size_is_that_of_the_picture_brought_to_it(pipe):
    picture, mask = photo(100, 60), ellipse(100, 60, (0.45, 0.4, 0.5, 0.5))
    drawn, own = render(pipe, image=picture, mask=mask, width=96, height=96), fit(picture, 96, 96)
    assert drawn.size == (96, 96)
    untouched = away(np.asarray(fit(mask, 96, 96, Image.Resampling.BILINEAR)) >= 8)
    assert untouched.any()
    assert (np.asarray(drawn) == np.asarray(own))[untouched].all()


def test_a_camera_s_rotation_is_applied_to_picture_and_transparency(pipe, tmp_path):
    picture = photo(75, 50)
    clear = picture.convert("RGBA")
    clear.paste((1, 2, 3, 0), (60, 30, 70, 40))
    exif = Image.Exif()
    exif[0x0112] = 6
    clear.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    drawn = render(pipe, image=tmp_path / "turned.png", mask="alpha")
    assert drawn.size == (75, 50)
    touched = np.zeros((50, 75), dtype=bool)
    touched[30:40, 60:70] = True
    assert (np.asarray(drawn) == np.asarray(picture))[away(touched)].all()
    assert drawn.tobytes() == render(pipe, image=clear, mask="alpha").tobytes()


def test_what_comes_with_the_decode_stage_is_the_whole_picture(pipe):
    picture, mask = photo(150, 90), ellipse(150, 90, (0.1, 0.1, 0.2, 0.2))
    job = pipe.prepare(zimage.Request("a", seed=1, steps=2, image=picture, mask=mask, mask_crop=8))
    events = list(pipe.run(job))
    assert [event.image.size for event in events if event.image] == [(150, 90)] == [job.size]
    width, height, _ = job.passes[-1]
    assert (job.plan.work.width, job.plan.work.height) == (width, height) == (80, 48), "about 64 × 64, the usual size"
    assert {tuple(latents.shape) for latents in latents_of(events)} == {(1, 16, height // 8, width // 8)}


# ------------------------------------------------------------------ the edge


def test_the_edge_falls_from_the_mask_to_nothing():
    mask = Image.new("L", (90, 70))
    mask.paste(9, (40, 30, 46, 33))  # how grey does not matter
    mask.putpixel((0, 69), 255)
    shown, painted = np.asarray(inpaint.edge_of(mask)), np.asarray(mask) > 0
    assert (shown[painted] == 255).all()
    assert (shown[away(painted)] == 0).all()
    row = shown[31, 46:].astype(int)
    assert (np.diff(row) <= 0).all()
    assert row[0] > 235
    assert 0 < row[15] < 20
    assert row[16] == 0
    assert not np.asarray(inpaint.edge_of(Image.new("L", (9, 9)))).any()
    assert (np.asarray(inpaint.edge_of(Image.new("L", (9, 9), 255))) == 255).all()


@pytest.mark.parametrize("seed", range(20))
def test_the_edge_is_exact_at_both_ends(seed):
    """All of what is painted, nothing out of reach, whatever Pillow's filter rounds; at the borders too."""
    generator = np.random.default_rng(seed)
    painted = generator.random((40, 90)) < generator.choice([0.001, 0.01])
    shown = np.asarray(inpaint.edge_of(Image.fromarray((painted * generator.integers(1, 256)).astype(np.uint8))))
    assert (shown[painted] == 255).all()
    assert (shown[away(painted)] == 0).all()
    assert (shown[~away(painted)] > 0).all()


def test_a_render_takes_on_the_tone_of_the_picture_around_it():
    """A shift of all colours, as a VAE's, shows at no seam; where nothing of the picture stays, it is left alone."""
    picture, shown = Image.blend(photo(96, 80), Image.new("RGB", (96, 80), "grey"), 0.5), ellipse(96, 80)
    shown = inpaint.edge_of(shown)
    shifted = Image.fromarray((np.asarray(picture) + np.array([5, -4, 3])).astype(np.uint8))
    frame = inpaint.whole((96, 80))
    left = np.abs(np.asarray(inpaint.pasted(shifted, picture, shown, frame)).astype(int) - np.asarray(picture))
    before = np.abs(np.asarray(shifted).astype(int) - np.asarray(picture))
    assert left.max() <= 2 < before.max()
    everywhere = Image.new("L", (96, 80), 255)
    assert inpaint.pasted(shifted, picture, everywhere, frame).tobytes() == shifted.tobytes()


# ------------------------------------------------------------------ what is filled in


def test_blank_pixels_take_the_colours_around_them():
    picture, blank = photo(37, 21), Image.new("L", (37, 21))
    blank.paste(255, (10, 5, 30, 20))
    filled = inpaint.filled(picture, blank)
    known = np.asarray(blank) == 0
    assert (np.asarray(filled) == np.asarray(picture))[known].all()
    halves = Image.new("RGB", (64, 16), "red")
    halves.paste("blue", (48, 0, 64, 16))
    gap = Image.new("L", (64, 16))
    gap.paste(255, (16, 0, 48, 16))
    between = np.asarray(inpaint.filled(halves, gap))[8, 16:48].astype(int)
    assert between[0, 0] > 200 > 60 > between[0, 2]
    assert between[-1, 2] > 200 > 60 > between[-1, 0]
    assert (np.diff(between[:, 0]) <= 8).all(), "red falls"
    assert inpaint.filled(picture, Image.new("L", (37, 21), 255)).getextrema() == ((128, 128),) * 3


def test_soft_transparency_gives_its_own_colours_back():
    own = photo(20, 20)
    opacity = Image.linear_gradient("L").resize((20, 20))
    flat = Image.alpha_composite(Image.new("RGBA", (20, 20), "white"), _with(own, opacity)).convert("RGB")
    back = np.asarray(inpaint.unmixed(flat, ImageChops.invert(opacity))).astype(int)
    seen = np.asarray(opacity) >= 100
    assert np.abs(back - np.asarray(own))[seen].max() <= 3
    assert inpaint.unmixed(own, Image.new("L", (20, 20))).tobytes() == own.tobytes()


def _with(picture: Image.Image, alpha: Image.Image) -> Image.Image:
    layer = picture.convert("RGBA")
    layer.putalpha(alpha)
    return layer


def test_an_extended_picture_is_new_beside_the_old_one(pipe):
    """The new area is masked whole however the mask is blurred, and shows no trace of a border colour before."""
    request = pipe.prepare(zimage.Request("a", seed=1, image=photo(50, 40), extend="20,0,7,16", mask_blur=5)).request
    mask = np.asarray(mask_of(request))
    assert mask.shape == (56, 77)
    old = np.zeros(mask.shape, dtype=bool)
    old[:40, 20:70] = True
    assert (mask[~old] == 255).all()
    assert mask[2, 45] == 0
    assert mask[2, 21] > 90, "the blur reaches into the picture"
    canvas = np.asarray(picture_of(request)).astype(int)
    assert (canvas[:40, 20:70] == np.asarray(request.image.picture)).all()
    assert np.abs(canvas[:40, 19] - canvas[:40, 20]).mean() < 20


@pytest.mark.parametrize("transparent", [False, True])
def test_an_image_that_is_extended_brings_its_transparent_pixels(pipe, transparent):
    picture = photo(50, 40).convert("RGBA")
    if transparent:
        picture.paste((0, 0, 0, 0), (10, 10, 12, 12))
    job = pipe.prepare(zimage.Request("a", seed=1, image=picture, extend="0,0,16,0"))
    mask = np.asarray(mask_of(job.request))
    assert (mask[:, :50] == 255).sum() == (4 if transparent else 0)
    assert (job.request.mask is not None) == transparent
    assert job.request.strength == 1.0, "what is new is painted altogether"


# ------------------------------------------------------------------ regions


@pytest.mark.parametrize("seed", range(60))
def test_a_region_holds_the_mask_and_its_padding_and_is_found_again(pipe, seed):
    pick = random.Random(seed)
    size = pick.randint(30, 400), pick.randint(30, 400)
    spots = Image.new("L", size)
    left, top = (pick.randrange(side) for side in size)
    spots.paste(255, (left, top, left + pick.randint(1, 200), top + pick.randint(1, 200)))
    padding, sides = pick.choice([0, 20, 70]), {}
    for side in ("width", "height"):
        if pick.random() < 0.3:
            sides[side] = 16 * pick.randint(1, 12)
    given = {"prompt": "a", "seed": 1, "image": photo(*size), "mask": spots, "mask_crop": padding, **sides}
    job = pipe.prepare(zimage.Request(**given))
    frame, (width, height, _) = job.frame, job.passes[-1]
    box, reach = spots.getbbox(), max(padding, EDGE)
    assert frame.size == size
    assert frame.left <= max(box[0] - reach, 0)
    assert frame.top <= max(box[1] - reach, 0)
    assert frame.right >= min(box[2] + reach, size[0])
    assert frame.bottom >= min(box[3] + reach, size[1])
    assert min(frame.left, frame.top) >= 0
    across, down = (frame.right - frame.left) / width, (frame.bottom - frame.top) / height
    assert abs(across / down - 1) < 0.1, "it is hardly stretched"
    assert all(sides.get(name, side) == side for name, side in (("width", width), ("height", height)))
    again = pipe.prepare(job.request)
    assert (again.frame, again.passes) == (job.frame, job.passes)
    assert job.rendered().picture.shape == (1, 3, height, width)
    assert job.rendered().kept.shape == (1, 1, height, width)


def test_a_region_of_the_usual_size_is_not_scaled(pipe):
    """Its pixels are those of the picture; a smaller one is enlarged to the usual size."""
    picture, mask = photo(300, 200), ellipse(300, 200, (0.2, 0.2, 0.6, 0.6))
    job = pipe.prepare(zimage.Request("a", seed=1, image=picture, mask=mask, mask_crop=4))
    frame, (width, height, _) = job.frame, job.passes[-1]
    assert (frame.right - frame.left, frame.bottom - frame.top) == (width, height)
    assert torch.equal(job.rendered().picture, from_pil(picture.crop(frame.box)))
    small = pipe.prepare(
        zimage.Request("a", image=picture, mask=ellipse(300, 200, (0.5, 0.5, 0.52, 0.53)), mask_crop=0)
    )
    assert small.passes[-1][:2] == (64, 64)


def test_what_is_beyond_the_border_is_the_mirrored_picture():
    picture = photo(21, 18)
    across = np.asarray(inpaint.cut(picture, inpaint.whole((21, 18))))
    assert across.shape == (32, 32, 3)
    assert (across[:18, :21] == np.asarray(picture)).all()
    assert (across[:18, 21:32] == across[:18, 10:21][:, ::-1]).all()
    assert (across[18:32] == across[4:18][::-1]).all()


# ------------------------------------------------------------------ again, later, elsewhere


def masks() -> dict[str, Image.Image]:
    grey = Image.linear_gradient("L").resize((75, 50))
    return {"grey.png": grey, "spot.png": ellipse(75, 50, (0.7, 0.1, 0.8, 0.4))}


WAYS = {
    "odd size": {"mask": "grey.png"},
    "region": {"mask": "spot.png", "mask_crop": "4"},
    "sized region": {"mask": "spot.png", "mask_crop": "4", "width": "96", "height": "32"},
    "extended": {"extend": "0,9,30,0", "mask_blur": "2"},
    "both": {"extend": "0,9,30,0", "mask": "spot.png", "mask_crop": "0"},
    "transparent": {"mask": "alpha", "image": "clear.png"},
    "inverted": {"mask": "grey.png", "mask_invert": True},
    "not pasted": {"mask": "grey.png", "paste": False},
}


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture = photo(75, 50)
    picture.save("start.png")
    clear = picture.convert("RGBA")
    clear.paste((0, 0, 0, 0), (10, 10, 30, 30))
    clear.save("clear.png")
    for name, mask in masks().items():
        mask.save(name)
    return tmp_path


def arguments(settings: dict) -> list[str]:
    found = []
    for name, value in {"image": "start.png", **settings}.items():
        flag = "--" + name.replace("_", "-")
        found += [flag if value else flag.replace("--", "--no-")] if isinstance(value, bool) else [flag, value]
    return found


@pytest.mark.parametrize("way", WAYS)
def test_a_saved_picture_is_drawn_again_from_its_own_settings(tiny_folder, files, way):
    model = ["--model", str(tiny_folder), "-q"]
    assert main(["gen", "a cat", *model, "--seed", "3", "--steps", "2", *arguments(WAYS[way]), "-o", "a.png"]) == 0
    again = {name: value for name, value in WAYS[way].items() if name in ("image", "mask") and value != "alpha"}
    assert main(["gen", "--from", "a.png", *model, *arguments(again), "-o", "b.png"]) == 0
    with Image.open("a.png") as one, Image.open("b.png") as other:
        assert one.size == other.size
        assert one.tobytes() == other.tobytes()
        assert str(files) not in json.dumps(one.info)


def test_a_render_that_was_interrupted_goes_on_with_its_mask(tiny_folder, files, monkeypatch):
    from zimage.render import stages

    given = ["--steps", "3", *arguments(WAYS["transparent"]), "--extend", "0,0,9,0"]
    render = ["gen", "a cat", "--seed", "3", "--model", str(tiny_folder), "-q", *given]
    assert main([*render, "-o", "a.png"]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(stages, "decoded", lambda *a: (_ for _ in ()).throw(RequestError("stopped")))
        assert main([*render, "-o", "b.png", "--save-state", "state"]) != 0
    assert main(["gen", "--resume", "state", "--mask", "alpha", "-q"]) == 0
    with Image.open("a.png") as one, Image.open("b.png") as other:
        assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("way", WAYS)
def test_a_job_goes_through_json_and_on_from_any_step(pipe, files, way):
    texts = {"image": "start.png", **WAYS[way]}
    numbers = {name: int(texts[name]) for name in ("mask_crop", "mask_blur", "width", "height") if name in texts}
    given = {**texts, **numbers}
    job = pipe.prepare(zimage.Request(["a", "b"], seed=[1, 2], steps=3, batch_size=2, strength=0.9, **given))
    whole = [event.image.tobytes() for event in pipe.run(job) if event.image]
    plain = json.loads(json.dumps(job.to_dict()))
    assert Job.from_dict(plain).to_dict() == plain
    for done in range(5):
        state = RenderState()
        steps = (event for event in pipe.run(job) if state.update(event))
        list(itertools.islice(steps, done))
        again = [event.image.tobytes() for event in pipe.run(Job.from_dict(plain), state) if event.image]
        assert again == whole[len(whole) - len(again) :], done
        assert len(again) == 2 - state.decoded


def test_objects_are_passed_again_by_their_hashes(pipe):
    clear = photo(50, 40).convert("RGBA")
    clear.paste((0, 0, 0, 0), (10, 10, 20, 20))
    job = pipe.prepare(zimage.Request("a", seed=1, steps=1, image=clear, mask="alpha"))
    plain = json.loads(json.dumps(job.to_dict()))
    with pytest.raises(RequestError, match="pass it as attachments"):
        Job.from_dict(plain)
    again = Job.from_dict(plain, {plain["request"]["image"]["hash"]: clear})
    assert again.request.mask.hash == job.request.mask.hash
    with pytest.raises(RequestError, match="not the file that the job was prepared with"):
        Job.from_dict(plain, {plain["request"]["image"]["hash"]: photo(50, 40)})


def test_a_state_of_more_steps_than_a_grey_mask_leaves_is_refused(pipe):
    job = pipe.prepare(zimage.Request("a", seed=1, steps=8, image=photo(64, 48), mask=Image.new("L", (64, 48), 128)))
    with pytest.raises(RequestError, match="5 steps of 4"):
        list(pipe.run(job, RenderState(latents=torch.zeros(1, 16, 6, 8), step=5)))


def test_a_job_whose_region_was_moved_is_not_run(pipe, files):
    job = pipe.prepare(zimage.Request("a", seed=1, image="start.png", mask="spot.png", mask_crop=4))
    plain = json.loads(json.dumps(job.to_dict()))
    plain["frame"][2] += 1
    with pytest.raises(RequestError, match="the job's frame"):
        pipe.run(Job.from_dict(plain))
    plain["frame"][2] = "here"
    with pytest.raises(RequestError, match=r"job\.frame\[2\] should be a whole number"):
        Job.from_dict(plain)


# ------------------------------------------------------------------ what makes no sense


SPOT = ellipse(64, 48)
BLACK = Image.new("L", (64, 48))


@pytest.mark.parametrize(
    ("settings", "words", "fields"),
    [
        ({"mask_crop": 8}, "mask_crop: it has no effect without a mask or extend", ("mask_crop", "mask", "extend")),
        ({"mask_blur": 8.0}, "mask_blur: it has no effect without a mask or extend", ("mask_blur", "mask", "extend")),
        ({"mask_invert": True}, "mask_invert: it has no effect without a mask", ("mask_invert", "mask")),
        ({"mask": SPOT, "mask_crop": -1}, "mask_crop -1 is too small", ("mask_crop",)),
        ({"mask": SPOT, "mask_blur": 1e9}, "mask_blur 1000000000.0 is too large", ("mask_blur",)),
        ({"mask": SPOT, "mask_blur": float("nan")}, "mask_blur is not a number", ("mask_blur",)),
        (
            {"mask": SPOT, "mask_crop": 8, "paste": False},
            "the region that it renders is pasted",
            ("mask_crop", "paste"),
        ),
        ({"mask": BLACK}, "mask: it is black", ("mask",)),
        ({"mask": Image.new("L", (64, 48), 7)}, "mask: it is black", ("mask",)),
        ({"mask": Image.new("L", (64, 48), 255), "mask_invert": True}, "mask: it is black", ("mask",)),
        ({"mask": BLACK, "mask_crop": 8}, "mask: it is black", ("mask",)),
        ({"mask": "alpha"}, "no pixel of the image is transparent", ("mask", "image")),
        ({"mask": "alpha", "image": photo(64, 48).convert("RGBA")}, "no pixel of the image is tra", ("mask", "image")),
        ({"extend": "1,2,3"}, "should be four numbers of pixels", ("extend",)),
        ({"extend": "1,2,3,x"}, "should be four numbers of pixels", ("extend",)),
        ({"extend": "1,2,3,-4"}, "should be four numbers of pixels", ("extend",)),
        ({"extend": "0,0,0,0"}, "should extend one side at least", ("extend",)),
        ({"extend": "0,0,99999,0"}, "none by more than 16,384 px", ("extend",)),
        ({"extend": "0,0,16384,0"}, "the picture would be 16448 × 48 px", ("extend", "image")),
        ({"extend": "0,0,15000,15000"}, "the whole 178,956,970 pixels", ("extend", "image")),
        ({"extend": "0,0,16,0", "image": None}, "extend: it has no effect without an image", ("extend", "image")),
        ({"extend": 16}, "extend 16 is of type int", ("extend",)),
        ({"mask": SPOT, "hires": 2.0}, "does not work with an image to start from", ("hires", "image")),
    ],
)
def test_what_makes_no_sense_is_one_line(pipe, settings, words, fields):
    with pytest.raises(RequestError, match=words) as error:
        pipe.prepare(zimage.Request("a", seed=1, **{"image": photo(64, 48), **settings}))
    assert error.value.fields == fields
    assert "\n" not in str(error.value)


def test_a_white_mask_repaints_everything(pipe):
    """It is a picture from noise, whatever it started from."""
    drawn = render(pipe, image=photo(64, 48), mask=Image.new("L", (64, 48), 255))
    assert drawn.tobytes() == render(pipe, width=64, height=48).tobytes()


def test_a_mask_of_another_size_is_stretched_over_its_image(pipe):
    half = Image.new("L", (8, 4))
    half.paste(255, (0, 0, 4, 4))
    request = pipe.prepare(zimage.Request("a", image=photo(64, 48), mask=half)).request
    mask = np.asarray(mask_of(request))
    assert mask.shape == (48, 64)
    assert (mask[:, :28] == 255).all()
    assert (mask[:, 36:] == 0).all()
