"""Renders with ControlNets: against diffusers' two pipelines, step by step, in memory, by their files."""

import dataclasses
import json
import shutil
import sys

import control_nets
import lora_files
import numpy as np
import pytest
import tiny
import torch
from control_nets import DIT, FORMS
from PIL import Image
from safetensors.torch import load_file
from tiny import relative_error

import zimage
from zimage import flow
from zimage.cli import main
from zimage.dit import ZImageDiT
from zimage.errors import CheckpointError, NonFiniteError, RequestError
from zimage.loading import controls
from zimage.loading.controls import ControlFile
from zimage.nn.layers import WideningLinear
from zimage.nn.quant import QuantisedLinear
from zimage.pictures.canny import canny
from zimage.pictures.image import from_pil, mask_tensor
from zimage.render import controlling
from zimage.render.state import RenderState
from zimage.text import Qwen3
from zimage.vae import AutoencoderKL

TOLERANCE = 1e-4  # fp32: latents of a whole run, of the largest value
SEEDS = [11, 12]
PROMPTS = ["a cat", "two dogs in the rain, seen from above by someone who has all day"]
SIZE = (80, 48)
RED = Image.new("RGB", (64, 64), "red")


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    noise = torch.randint(256, (height // 4, width // 4, 3), generator=torch.Generator().manual_seed(width + seed))
    return Image.fromarray(noise.byte().numpy()).resize((width, height), Image.Resampling.BICUBIC)


def grey_mask(width: int, height: int) -> Image.Image:
    """Soft values on both sides of the threshold, and edges inside latent cells."""
    noise = torch.randint(256, (height // 5, width // 5), generator=torch.Generator().manual_seed(height))
    return Image.fromarray(noise.byte().numpy()).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose DiT has five layers."""
    parts = (Qwen3.from_config(tiny.QWEN), ZImageDiT.from_config(DIT), AutoencoderKL.from_config(tiny.KL))
    states = [tiny.randomised(part, seed).state_dict() for seed, part in enumerate(parts)]
    return tiny.write_model(tmp_path_factory.mktemp("models") / "five", *states, tiny.KL, DIT)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Form → a component folder of it."""
    root = tmp_path_factory.mktemp("controls")
    return {form: str(control_nets.write(root / form, form)) for form in FORMS}


@pytest.fixture(scope="module")
def pipe(folder):
    return zimage.ZImage.load(folder, device="cpu", dtype="fp32")


def latents_of(events) -> torch.Tensor:
    """(B, 16, h, w): those that each image ends in."""
    last = [e.latents for e in events if e.stage == "denoise" and e.step == e.total and e.latents is not None]
    return torch.cat(last)


def render(pipe, **settings) -> torch.Tensor:
    common = {"prompt": PROMPTS, "seed": SEEDS, "width": SIZE[0], "height": SIZE[1], "steps": 4}
    return latents_of(pipe.run(zimage.Request(**{**common, **settings})))


# ------------------------------------------------------------------ against diffusers


@pytest.fixture(scope="module")
def theirs(folder, files, pipe):
    """A run through diffusers' own pipeline: form, guidance, picture and mask → latents."""
    references = pytest.importorskip("references")
    diffusers = references.diffusers
    dit = diffusers.ZImageTransformer2DModel(**tiny.arguments(DIT)).eval()
    vae = references.kl(seed=1)
    for model, name in ((dit, "transformer"), (vae, "vae")):
        model.load_state_dict(load_file(folder / name / "diffusion_pytorch_model.safetensors"))
    captions, negative = pipe.encode(PROMPTS), pipe.encode([""] * len(PROMPTS))

    def run(form: str, control, guidance: float, scale: float, **inpainting) -> torch.Tensor:
        net = diffusers.ZImageControlNetModel(**tiny.arguments(FORMS[form])).eval()
        net.load_state_dict(load_file(f"{files[form]}/diffusion_pytorch_model.safetensors"))
        return references.controlled(
            dit,
            vae,
            net,
            control,
            SEEDS,
            captions,
            negative if guidance else None,
            num_inference_steps=4,
            guidance_scale=guidance,
            controlnet_conditioning_scale=scale,
            **inpainting,
        )

    return run


@pytest.mark.parity
@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("guidance", [0.0, 3.0])
@pytest.mark.parametrize("form", FORMS)
def test_whole_runs(pipe, files, theirs, form, guidance, together):
    control = picture(*SIZE)
    reference = theirs(form, control, guidance, 0.9)
    given = [(files[form], control, 0.9)]
    settings = {"guidance": guidance, "batch_size": together, "control_flow": "diffusers"}
    assert relative_error(render(pipe, control=given, **settings), reference) <= TOLERANCE
    assert relative_error(render(pipe, guidance=guidance), reference) > 0.05  # it does something


@pytest.mark.parity
@pytest.mark.parametrize("guidance", [0.0, 3.0])
@pytest.mark.parametrize("form", [form for form in FORMS if form != "1.0"])
def test_whole_inpainting_runs(pipe, files, theirs, form, guidance):
    control, image, mask = picture(*SIZE), picture(*SIZE, seed=1), grey_mask(*SIZE)
    masks = [mask] * len(PROMPTS)  # unlike the pictures, it repeats no mask
    reference = theirs(form, control, guidance, 0.75, image=image, mask_image=masks)
    given = {"image": image, "mask": mask, "control": [(files[form], control)], "control_flow": "diffusers"}
    assert relative_error(render(pipe, guidance=guidance, paste=False, **given), reference) <= TOLERANCE


# ------------------------------------------------------------------ which flow, which steps, which scale


def test_the_publishers_flow_is_the_default(pipe, files):
    for form in FORMS:
        given = {"prompt": "a", "seed": 1, "control": [(files[form], picture(*SIZE))]}
        ours, publisher, diffusers = (render(pipe, **given, control_flow=f) for f in (None, "publisher", "diffusers"))
        assert torch.equal(ours, publisher)
        assert torch.equal(ours, diffusers) == (form == "1.0")


@pytest.mark.parametrize("form", FORMS)
def test_scale_0_gives_the_bits_without(pipe, files, form):
    settings = {"guidance": 2.0, "batch_size": 2}
    assert torch.equal(render(pipe, **settings, control=[(files[form], picture(*SIZE), 0)]), render(pipe, **settings))


@pytest.mark.parametrize(
    ("steps", "start", "end", "strength", "said"),
    [
        (4, 0.0, 1.0, None, [0, 1, 2, 3]),
        (4, 0.0, 0.5, None, [0, 1]),
        (4, 0.25, 0.75, None, [1, 2]),
        (4, 0.26, 1.0, None, [2, 3]),
        (10, 0.3, 0.7, None, [3, 4, 5, 6]),
        (8, 0.0, 0.5, 0.5, [4, 5]),  # of the four that run
    ],
)
def test_steps_with_a_say_lie_wholly_between_start_and_end(pipe, files, steps, start, end, strength, said):
    found = {}

    def watch(evaluate):
        def watched(e):
            found[e.step] = len(e.controls)
            return evaluate(e)

        return watched

    image = None if strength is None else picture(*SIZE, seed=3)
    request = zimage.Request(
        *("a",),
        **{"seed": 1, "steps": steps, "width": SIZE[0], "height": SIZE[1], "image": image, "strength": strength},
        **{"control": [(files["lite"], picture(*SIZE))], "control_start": start, "control_end": end},
    )
    list(pipe.run(request, hooks=[watch]))
    assert [step for step, count in found.items() if count] == said
    assert set(found.values()) <= {0, 1}


def test_a_grey_mask_leaves_fewer_steps_to_have_a_say_in(pipe, files):
    """Of 8 steps a mask of one half leaves 4: none of them lies between 0.3 and 0.5, and one of 8 does."""
    given = {"seed": 1, "steps": 8, "image": picture(*SIZE, seed=3), "mask": Image.new("L", SIZE, 128)}
    window = {"control": [(files["lite"], picture(*SIZE))], "control_start": 0.3, "control_end": 0.5}
    with pytest.raises(RequestError, match="hold none of the 4 steps whole; each is 1/4"):
        pipe.prepare(zimage.Request("a", **given, **window))
    assert not torch.equal(render(pipe, **given), render(pipe, **given, **{**window, "control_end": 0.8}))
    pipe.prepare(zimage.Request("a", **{**given, "mask": Image.new("L", SIZE, 255)}, **window))


def test_a_say_in_no_step_after_the_first_leaves_the_first_steps_as_they_were(pipe, files):
    """Steps before the start and after the end are computed as if there were no control."""
    with_control = zimage.Request("a", seed=1, steps=4, control=[(files["2.1"], picture(*SIZE))], control_start=0.5)
    runs = [pipe.run(r) for r in (with_control, zimage.Request("a", seed=1, steps=4))]
    ours, plain = ([e.latents for e in run if e.latents is not None] for run in runs)
    same = [torch.equal(one, other) for one, other in zip(ours, plain, strict=True)]
    assert same == [True, True, False, False]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"control_start": 0.5, "control_end": 0.5}, "control_start 0.5 must be below the control_end 0.5"),
        ({"control_start": 0.3, "control_end": 0.4}, "hold none of the 4 steps whole; each is 1/4"),
        ({"control_end": 0.2}, "control_start 0 and control_end 0.2 hold none"),
        ({"control": None, "control_end": 0.5}, "control_end: it has no effect without a control file"),
        ({"control": None, "control_flow": "diffusers"}, "control_flow: it has no effect without a control file"),
        ({"control": None, "control_preprocess": "canny"}, "control_preprocess: it has no effect"),
        ({"control": [("nowhere", RED)]}, "it does not exist; pass a ControlNet for Z-Image"),
        ({"control": [(RED, RED)]}, "it should be the path of one"),
    ],
)
def test_what_cannot_be_is_one_line(pipe, files, settings, words):
    given = {"control": [(files["2.1"], picture(*SIZE))], **settings}
    with pytest.raises((RequestError, CheckpointError), match=words) as caught:
        pipe.prepare(zimage.Request("a", seed=1, steps=4, **given))
    assert caught.value.fields


# ------------------------------------------------------------------ what it goes with


def test_several_files_add_up_and_one_file_takes_several_pictures(pipe, files, monkeypatch):
    loaded = []
    load = ControlFile.load
    monkeypatch.setattr(ControlFile, "load", lambda file, sizes: loaded.append(file.name) or load(file, sizes))
    one, other = picture(*SIZE), picture(*SIZE, seed=1)
    events = list(
        pipe.run(
            zimage.Request(
                "a",
                seed=1,
                steps=2,
                control=[(files["lite"], one), (files["lite"], other, 0.5), (files["1.0"], one, 0.4)],
            )
        )
    )
    assert sorted(loaded) == ["1.0", "lite"], "weights once"
    assert [e.count for e in events if e.stage == "encode control"] == [2] * 4, "pictures once"
    alone = [render(pipe, steps=2, control=[(files["lite"], p, s)]) for p, s in ((one, 0.75), (other, 0.5))]
    both = render(pipe, steps=2, control=[(files["lite"], one), (files["lite"], other, 0.5)])
    assert not any(torch.equal(both, each) for each in alone)


def test_control_pictures_are_encoded_before_the_dit_is_loaded(folder, files):
    pipe = zimage.ZImage.load(folder, device="cpu", dtype="fp32", residency="stage")
    request = zimage.Request("a", seed=1, steps=2, control=[(files["2.1"], picture(*SIZE))], image=picture(*SIZE))
    stages = [(e.stage, e.detail) for e in pipe.run(request) if e.step == 0]
    assert stages == [
        *[("load", "text_encoder"), ("encode", "")],
        *[("load", "vae"), ("encode image", ""), ("encode control", "")],
        *[("load", "dit"), ("denoise", "")],
        *[("load", "vae"), ("decode", "")],
    ]
    assert pipe.loaded == ()


def test_two_passes_are_a_small_render_enlarged_and_refined(pipe, files):
    """Each with the control picture in its own size."""
    settings = {"seed": 1, "steps": 4, "control": [(files["2.1"], picture(200, 150))], "control_end": 0.5}
    result = pipe.generate("a", hires=2, strength=0.5, width=96, height=64, **settings)
    small = pipe.generate("a", width=48, height=32, **settings).images[0]
    large = zimage.pictures.image.fit(small, 96, 64)
    by_hand = pipe.generate("a", image=large, strength=0.5, **settings)
    assert result.images[0].tobytes() == by_hand.images[0].tobytes()
    assert result.images[0].tobytes() != pipe.generate("a", seed=1, steps=4, hires=2).images[0].tobytes()


def test_inpainting_in_the_publishers_flow_keeps_the_outside(pipe, files):
    image, mask = picture(*SIZE, seed=1), Image.new("L", SIZE)
    mask.paste(255, (40, 0, *SIZE))
    given = {"prompt": "a", "seed": 1, "image": image, "mask": mask}
    latents = render(pipe, **given, control=[(files["2.1"], picture(*SIZE))])
    clean = pipe.vae.encode(from_pil(image))
    assert torch.equal(latents[..., :5], clean[..., :5])
    assert not torch.equal(latents, render(pipe, **given))


def test_the_mask_is_read_by_all_but_the_first_version(pipe, files):
    """What it adds inside is told by the channels of mask and picture; in 1.0 there are none."""
    image, mask = picture(*SIZE, seed=1), grey_mask(*SIZE)
    for form in ("1.0", "2.1"):
        file = ControlFile.of(files[form])
        given = {"image": image, "mask": mask, "paste": False, "control": [(files[form], picture(*SIZE))]}
        job = pipe.prepare(zimage.Request("a", seed=1, **given))
        rendered = job.rendered()
        found = controlling.pictures(job, rendered)
        assert len(found) == 1 + file.reads_mask
        (one,) = controlling.inputs(job, [pipe.vae.encode(x) for x in found], rendered)
        assert one.latents.shape == (1, file.config.control_in_dim, 6, 10)
    pixel_mask = mask_tensor(mask, *SIZE)
    assert torch.equal(one.latents[:, 16:17], 1 - flow.latent_mask(pixel_mask, 6, 10)), "1 is keep"
    assert torch.equal(found[1][0][:, pixel_mask[0, 0] > 0], torch.zeros(3, int(pixel_mask.sum())))


def test_a_region_that_is_rendered_alone_has_its_part_of_the_control_picture(pipe, files):
    image, control = picture(160, 96), picture(320, 192, seed=2)
    mask = Image.new("L", image.size)
    mask.paste(255, (16, 16, 48, 48))
    given = {"image": image, "mask": mask, "mask_crop": 0, "width": 64, "height": 64}
    job = pipe.prepare(zimage.Request("a", seed=1, steps=1, **given, control=[(files["2.1"], control)]))
    shown, masked = controlling.pictures(job, job.rendered())
    region = control.resize(image.size, Image.Resampling.LANCZOS).crop(job.frame.box)
    assert torch.equal(shown, from_pil(region.resize((64, 64), Image.Resampling.LANCZOS)))
    assert shown.shape == masked.shape == (1, 3, 64, 64)
    assert [event.image.size for event in pipe.run(job) if event.image is not None] == [(160, 96)]


def test_strength_has_no_place_in_diffusers_inpainting(pipe, files):
    given = {"image": picture(*SIZE), "mask": grey_mask(*SIZE), "control_flow": "diffusers", "strength": 0.5}
    with pytest.raises(RequestError, match="inpaints from noise alone") as caught:
        pipe.prepare(zimage.Request("a", **given, control=[(files["2.1"], picture(*SIZE))]))
    assert caught.value.fields == ("strength", "control_flow")
    pipe.prepare(zimage.Request("a", **given, control=[(files["1.0"], picture(*SIZE))]))  # which reads no mask


def test_interleaved_jobs_with_other_controls_keep_their_bits(pipe, files):
    jobs = [
        pipe.prepare(zimage.Request("a", seed=1, steps=3, control=control))
        for control in (None, [(files["lite"], picture(*SIZE))], [(files["2.0"], picture(*SIZE)), (files["1.0"], RED)])
    ]
    alone = [[e.latents for e in pipe.run(job) if e.latents is not None][-1] for job in jobs]
    runs, found, seen = [pipe.run(job) for job in jobs], [None] * len(jobs), set()
    under_way = list(range(len(jobs)))
    while under_way:
        for i in list(under_way):
            event = next(runs[i], None)
            if event is None:
                under_way.remove(i)
            elif event.latents is not None:
                found[i] = event.latents
                seen.add(tuple(sorted(file.name for file in pipe.residency._held["dit"].controls)))
    assert all(torch.equal(one, other) for one, other in zip(found, alone, strict=True))
    assert seen == {(), ("lite",), ("1.0", "2.0")}, "each with exactly its own"


def test_what_stays_in_memory_is_what_the_next_plan_counts(folder, files):
    """Beside a DiT that stays; it goes before another stage of a job without it, and the weights of two are counted."""
    pipe = zimage.ZImage.load(folder, device="cpu", dtype="fp32", residency="keep")

    def held() -> list[str]:
        return [file.name for file in pipe.residency._held["dit"].controls]

    one, other = ((files[form], RED) for form in ("lite", "2.1"))
    plain, single, both = (
        pipe.prepare(zimage.Request(prompt, seed=1, steps=1, control=control))
        for prompt, control in (("a", None), ("b", [one]), ("c", [one, other, one]))
    )
    counted = [job.plan.stages["vae"].weights - plain.plan.stages["vae"].weights for job in (plain, single, both)]
    sizes = [ControlFile.of(file).sizes(pipe.planner.sizes["dit"]).resident for file, _ in (one, other)]
    assert counted == [0, sizes[0], sum(sizes)]
    list(pipe.run(both))
    assert held() == ["lite", "2.1"]
    assert pipe.residency.copies["dit"] == 0, "views of files"
    for event in pipe.run(single):
        assert event.stage != "encode control" or not held(), "more than this plan counts"
    assert held() == ["lite"]
    for event in pipe.run(plain):
        assert event.stage != "encode" or event.step == 0 or not held()
    pipe.release()
    assert pipe.loaded == ()


def test_a_render_that_goes_on_ends_in_the_same_bits(pipe, files):
    given = {"control": [(files["2.1"], picture(*SIZE))], "control_end": 0.75, "hires": 1.5, "width": 96, "height": 64}
    job = pipe.prepare(zimage.Request(["a", "b"], seed=[1, 2], steps=4, strength=0.8, **given))
    events = list(pipe.run(job))
    for stop in range(0, len(events), 7):
        state = RenderState()
        for event in events[:stop]:
            state.update(event)
        again = [e.image for e in pipe.run(job, state) if e.image is not None]
        rest = [e.image for e in events if e.image is not None][state.decoded :]
        assert [image.tobytes() for image in again] == [image.tobytes() for image in rest]


def test_a_job_survives_as_json(pipe, files, tmp_path):
    picture(*SIZE).save(tmp_path / "pose.png")
    job = pipe.prepare(zimage.Request("a", seed=1, steps=2, control=[f"{files['lite']}:{tmp_path / 'pose.png'}:0.6"]))
    plain = json.loads(json.dumps(job.to_dict()))
    again = zimage.Job.from_dict(plain)
    assert again.request.control == job.request.control
    assert latents_of(pipe.run(again)).equal(latents_of(pipe.run(job)))


def test_a_lora_and_a_control_at_once(folder, files, tmp_path):
    pipe = zimage.ZImage.load(folder, device="cpu", dtype="fp32")
    control = [(files["2.1"], picture(*SIZE))]
    before, plain = render(pipe, control=control), render(pipe)
    style = lora_files.NAMINGS["kohya"](lora_files.factors([lora_files.ONE]))
    handle = pipe.lora.add(lora_files.write(tmp_path / "style.safetensors", style))
    both, styled = render(pipe, control=control), render(pipe)
    assert len({latents.numpy().tobytes() for latents in (before, plain, both, styled)}) == 4
    pipe.lora.remove(handle)
    assert torch.equal(render(pipe, control=control), before)


# ------------------------------------------------------------------ with tensors


@pytest.mark.parametrize("form", FORMS)
def test_denoising_with_tensors_is_the_render(pipe, files, form):
    control = picture(*SIZE)
    want = render(pipe, control=[(files[form], control, 0.6)], control_end=0.75, batch_size=2)
    noise = torch.cat([flow.start_noise(seed, 16, 6, 10) for seed in SEEDS])
    given = {"controls": [(files[form], pipe.vae.encode(from_pil(control)), 0.6)], "control_end": 0.75}
    assert torch.equal(pipe.denoise(pipe.encode(PROMPTS), noise, steps=4, **given), want)


def test_a_batch_may_have_a_control_for_each_image(pipe, files):
    captions, noise = pipe.encode(["a", "a"]), flow.start_noise(1, 16, 6, 10).repeat(2, 1, 1, 1)
    latents = torch.cat([pipe.vae.encode(from_pil(picture(*SIZE, seed=i))) for i in range(2)])
    both = pipe.denoise(captions, noise, steps=2, controls=[(files["lite"], latents)])
    assert not torch.equal(*both)
    alone = pipe.denoise(captions[:1], noise[:1], steps=2, controls=[(files["lite"], latents[:1])])
    assert relative_error(both[:1], alone) <= 1e-5


@pytest.mark.parametrize(
    ("form", "shape", "words"),
    [
        ("1.0", (1, 33, 6, 10), "which reads 16 channels"),
        ("2.1", (1, 17, 6, 10), "which reads 33 channels"),
        ("2.1", (1, 16, 6, 8), r"should be \(1 or 2, channels, 6, 10\)"),
        ("2.1", (3, 16, 6, 10), "should be"),
        ("2.1", (16, 6, 10), "should be"),
    ],
)
def test_latents_that_do_not_fit(pipe, files, form, shape, words):
    with pytest.raises(RequestError, match=words):
        pipe.denoise(pipe.encode(PROMPTS), torch.zeros(2, 16, 6, 10), controls=[(files[form], torch.zeros(shape))])


# ------------------------------------------------------------------ files


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"dim": 96, "n_heads": 3, "n_kv_heads": 3}, "for a DiT of width 96; this one has 64"),
        ({"n_heads": 4, "n_kv_heads": 4}, "heads 4; this one has 2"),
        ({"control_layers_places": [0, 5]}, "at least 6 layers; this one has 5"),
        ({"control_refiner_layers_places": [0, 3], "n_refiner_layers": 4}, "at least 4 noise refiner layers"),
        ({"control_in_dim": 20}, r"it reads 20 channels; 16 \(the control latents\) or 33"),
    ],
)
def test_a_file_for_another_dit_is_refused(pipe, tmp_path, config, words):
    path = str(control_nets.write(tmp_path, "2.1", **config))
    with pytest.raises(CheckpointError, match=words) as caught:
        pipe.prepare(zimage.Request("a", control=[(path, RED)]))
    assert caught.value.fields == ("control",)
    assert path in str(caught.value)


def test_another_component_is_refused_by_what_it_holds(pipe, folder):
    with pytest.raises(CheckpointError, match=r"control: .*holds no control; it holds dit"):
        pipe.prepare(
            zimage.Request("a", control=[(folder / "transformer" / "diffusion_pytorch_model.safetensors", RED)])
        )


def test_other_folders_and_pictures_are_told_by_their_option(pipe, folder, files, tmp_path):
    (tmp_path / "text.txt").write_text("hello")
    for given, words in (
        ((folder, RED), "holds no ControlNet; pass a ControlNet for Z-Image"),
        ((folder / "text_encoder", RED), "control: .*; pass a ControlNet for Z-Image"),
        ((files["2.1"], "nowhere.png"), "control: nowhere.png is missing; pass the path of a picture"),
        ((files["2.1"], str(tmp_path / "text.txt")), "control: .*text.txt cannot be read as a picture"),
    ):
        with pytest.raises((RequestError, CheckpointError), match=words) as caught:
            pipe.prepare(zimage.Request("a", control=[given]))
        assert caught.value.fields == ("control",)


def test_a_file_is_hashed_again_only_when_it_has_changed(pipe, files, tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    shutil.copytree(files["2.1"], copy)
    hashed = []
    content = controls.content_hash
    monkeypatch.setattr(controls, "content_hash", lambda file: hashed.append(file) or content(file))
    first, second = (ControlFile.of(copy) for _ in range(2))
    assert first is second
    assert len(hashed) == 1
    assert first == ControlFile.of(files["2.1"]), "the same content"
    job = pipe.prepare(zimage.Request("a", seed=1, steps=1, control=[(copy, RED)]))
    control_nets.write(copy, "2.1", seed=9)
    assert ControlFile.of(copy) != first
    with pytest.raises(RequestError, match="not the file that the job was prepared with"):
        zimage.Job.from_dict(job.to_dict(), {job.request.control[0].picture.hash: RED})


def test_a_file_is_known_by_its_config_too(pipe, files, tmp_path):
    """Two folders of the same weights, of which one adds its hints elsewhere; then one whose config is edited."""
    one, other = (tmp_path / name for name in ("one", "other"))
    for copy in (one, other):
        shutil.copytree(files["2.1"], copy)

    def moved(folder) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "control_layers_places": [0, 1, 2]}))

    moved(other)
    drawn = [render(pipe, control=[(str(copy), RED)]) for copy in (one, other)]
    assert not torch.equal(*drawn)
    assert ControlFile.of(one).hash != ControlFile.of(other).hash
    moved(one)
    assert torch.equal(render(pipe, control=[(str(one), RED)]), drawn[1])
    assert ControlFile.of(one) == ControlFile.of(other)


def test_metadata_names_no_folders(pipe, files, tmp_path):
    result = pipe.generate("a", seed=1, steps=2, control=[(files["2.1"], RED, 0.6)], control_end=0.5)
    request = result.metadata[0]["request"]
    file = ControlFile.of(files["2.1"])
    assert request["control"][0].items() >= {"model_name": "2.1", "model_hash": file.hash, "scale": 0.6}.items()
    assert (request["control_end"], request["control_flow"]) == (0.5, "publisher")
    assert files["2.1"] not in str(result.metadata)


# ------------------------------------------------------------------ forms of weights


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_its_matrices_are_quantised_as_the_dits(folder, files, precision):
    plain, quantised = (zimage.ZImage.load(folder, device="cpu", precision=p) for p in ("bf16", precision))
    control = [(files["2.1"], picture(*SIZE))]
    found = [render(pipe, control=control, steps=2) for pipe in (plain, quantised)]
    assert 0 < relative_error(*found) < 0.5
    (net,) = quantised.residency._held["dit"].controls.values()
    assert (
        sum(isinstance(module, QuantisedLinear) for module in net.modules()) == 4 * 5
    )  # w1 to w3 are no multiples of 8
    sizes, plan = ControlFile.of(files["2.1"]).sizes(quantised.planner.sizes["dit"]), quantised.prepare
    assert sizes.precision == precision
    assert (
        plan(zimage.Request("a", control=control)).plan.work.controls
        < plain.prepare(zimage.Request("a", control=control)).plan.work.controls
    )


def test_widened_late_as_the_dit_is(folder, files, monkeypatch):
    """Where casting the DiT would take too much room, the control file is not cast either; the bits stay."""
    pipe = zimage.ZImage.load(folder, device="cpu", dtype="fp32")
    control = [(files["2.1"], picture(*SIZE))]
    want = render(pipe, control=control)
    sizes = dataclasses.replace(pipe.planner.sizes["dit"], widen_late=True)
    net = ControlFile.of(files["2.1"]).load(sizes)
    assert any(isinstance(module, WideningLinear) for module in net.modules())
    monkeypatch.setattr(ControlFile, "load", lambda file, dit: net)
    pipe.release()
    assert torch.equal(render(pipe, control=control), want)


def test_blocks_are_compiled_with_the_dits(folder, files, monkeypatch):
    compiled = []
    monkeypatch.setattr("zimage.loading.residency.compile_blocks", lambda module: compiled.append(type(module)))
    pipe = zimage.ZImage.load(folder, device="cpu", dtype="fp32", compile=True)
    render(pipe, control=[(files["lite"], RED)], steps=1)
    assert compiled == [ZImageDiT, control_nets.ControlNet]


@pytest.mark.full
def test_compiled_blocks_compute_the_same(folder, files):
    control = [(files["lite"], picture(*SIZE))]
    pipes = [zimage.ZImage.load(folder, device="cpu", dtype="fp32", compile=compiled) for compiled in (True, False)]
    assert relative_error(*(render(pipe, control=control, steps=2) for pipe in pipes)) <= 1e-5


def test_fp16_is_refused_before_anything_is_loaded(folder, files):
    pipe = zimage.ZImage.load(folder, device="cpu", dtype="fp16")
    with pytest.raises(RequestError, match="does not run in dtype fp16; use bf16 or fp32"):
        pipe.prepare(zimage.Request("a", control=[(files["2.1"], RED)]))
    assert pipe.loaded == ()


# ------------------------------------------------------------------ edges


def test_edges_are_drawn_in_the_size_of_the_pass(pipe, files):
    pytest.importorskip("cv2")
    large = picture(160, 96)
    edges = canny(zimage.pictures.image.fit(large, *SIZE))
    assert set(np.unique(np.asarray(edges))) == {0, 255}
    drawn, by_hand = (
        render(pipe, control=[(files["2.1"], given)], control_preprocess=how)
        for given, how in ((large, "canny"), (edges, None))
    )
    assert torch.equal(drawn, by_hand)
    assert not torch.equal(drawn, render(pipe, control=[(files["2.1"], large)]))


def test_without_opencv_the_error_names_the_extra(pipe, files, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    request = zimage.Request("a", control=[(files["2.1"], RED)], control_preprocess="canny")
    with pytest.raises(RequestError, match=r"needs OpenCV .*zimage-torch\[canny\]") as caught:
        pipe.prepare(request)
    assert caught.value.fields == ("control_preprocess",)


# ------------------------------------------------------------------ on the command line


@pytest.fixture
def command(folder, files, tmp_path, monkeypatch, capsys):
    """`gen` with the model, in a folder with a control picture; returns status and what it said."""
    monkeypatch.chdir(tmp_path)
    picture(*SIZE).save("pose.png")

    def run(*arguments: str) -> tuple[int, str]:
        given = ["--model", str(folder), "--device", "cpu", "--dtype", "fp32"]
        status = main(["gen", *given, *arguments])
        return status, capsys.readouterr().err

    return run


def test_a_picture_is_drawn_again_with_its_control_file(command, files, tmp_path):
    settings = ["a cat", "--seed", "1", "--steps", "2", "--width", "80", "--height", "48", "--control-end", "0.5"]
    assert command(*settings, "--control", f"{files['2.1']}:pose.png:0.6", "-o", "first.png")[0] == 0
    status, said = command("--from", "first.png", "-o", "again.png")
    assert status == 2
    assert "was made from the control" in said
    assert "pass it with --control" in said
    shutil.copytree(files["2.1"], "renamed")
    status, said = command("--from", "first.png", "--control", "renamed:pose.png:0.6", "-o", "again.png")
    assert (status, "pixels may differ" in said) == (0, False), said
    assert Image.open("first.png").tobytes() == Image.open("again.png").tobytes()
    control = f"{files['lite']}:pose.png:0.6"
    status, said = command("--from", "first.png", "--control", control, "-o", "other.png")
    assert (status, "control was" in said) == (0, True), said


def test_a_render_is_resumed_with_its_control_file(command, files):
    given = ["a cat", "--seed", "1", "--steps", "3", "--control", f"{files['2.1']}:pose.png", "-v"]
    status, said = command(*given, "-o", "whole.png")
    assert status == 0
    assert f"control       2.1 at 0.75 ({ControlFile.of(files['2.1']).hash}): reads 33 channels" in said
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("zimage.render.denoising.finite", failing_after(1))
        assert command(*given, "--save-state", "state", "-o", "half.png")[0] != 0
    status, said = command("--resume", "state", "-o", "half.png")
    assert status == 0, said
    assert Image.open("half.png").tobytes() == Image.open("whole.png").tobytes()


def failing_after(count: int):
    """A check of a stage's values that breaks off the render at this call."""
    left = iter(range(count))

    def finite(values, source, model):
        if next(left, None) is None:
            raise NonFiniteError("broken off")
        return values

    return finite


@pytest.mark.parametrize("form", FORMS)
def test_info_describes_a_control_file(form, tmp_path, capsys):
    size = {"dim": 256, "n_heads": 2, "n_kv_heads": 2}  # heads as published
    places = {"1.0": [0, 5, 10, 15, 20, 25], "lite": [0, 10, 20]}.get(form, list(range(0, 30, 2)))
    control_nets.write(tmp_path, form, **size, control_layers_places=places)
    assert main(["info", str(tmp_path / "diffusion_pytorch_model.safetensors")]) == 0
    said = capsys.readouterr().out
    assert f"reads {FORMS[form]['control_in_dim']} channels, adds after layers {', '.join(map(str, places))}" in said
    assert ("of the noise refiner" in said) == (form != "1.0")
    assert "use it with --control" in said
