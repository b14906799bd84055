"""Renders with ControlNets: against diffusers' two pipelines, step by step, in memory, by their files."""

import json

import control_nets
import pytest
import tiny
import torch
from control_nets import DIT, FORMS
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import relative_error

import zimage
from zimage.dit import ZImageDiT
from zimage.text import Qwen3
from zimage.vae import AutoencoderKL

TOLERANCE = 1e-4  # fp32: latents of a whole run, of the largest value
SEEDS = [11, 12]
PROMPTS = ["a cat", "two dogs in the rain, seen from above by someone who has all day"]
SIZE = (80, 48)


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
    for form, config in FORMS.items():
        (root / form).mkdir()
        (root / form / "config.json").write_text(json.dumps(config))
        save_file(control_nets.net(form).state_dict(), root / form / "diffusion_pytorch_model.safetensors")
    return {form: str(root / form) for form in FORMS}


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
    assert relative_error(render(pipe, guidance=guidance, **given), reference) <= TOLERANCE
