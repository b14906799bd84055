"""Ring 2 for pictures as a start: image to image and inpainting through diffusers' pipelines on a tiny random model."""

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import relative_error

import zimage
from zimage import flow
from zimage.pictures.image import from_pil, mask_tensor

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
import references

pytestmark = pytest.mark.parity

TOLERANCE = 1e-4  # fp32: latents of the largest value, pictures of the range of a channel
SEEDS = [11, 12]
STRENGTHS = [0.05, 0.3, 0.6, 1.0]
PROMPTS = ["a cat", "two dogs in the rain, seen from above by someone who has all day"]


@pytest.fixture(scope="module")
def reference(tiny_folder):
    """diffusers' DiT and VAE with the weights of the tiny folder."""
    parts = {"transformer": references.dit(seed=1), "vae": references.kl(seed=1)}
    for name, model in parts.items():
        model.load_state_dict(load_file(tiny_folder / name / "diffusion_pytorch_model.safetensors"))
    return tuple(parts.values())


@pytest.fixture(scope="module")
def captions(pipe):
    """(prompts, empty negatives)."""
    return pipe.encode(PROMPTS), pipe.encode([""] * len(PROMPTS))


def picture(width: int, height: int) -> Image.Image:
    noise = torch.randint(256, (height // 4, width // 4, 3), generator=torch.Generator().manual_seed(width))
    return Image.fromarray(noise.byte().numpy()).resize((width, height), Image.Resampling.BICUBIC)


def grey_mask(width: int, height: int) -> Image.Image:
    """Soft values on both sides of the threshold, and edges inside latent cells."""
    noise = torch.randint(256, (height // 5, width // 5), generator=torch.Generator().manual_seed(height))
    return Image.fromarray(noise.byte().numpy()).resize((width, height), Image.Resampling.BICUBIC)


def render(pipe, image, mask, steps, strength, guidance):
    """Latents (B, 16, h, w) and pictures (B, 3, H, W) in [0, 1] of our whole pipeline."""
    request = zimage.Request(
        prompt=PROMPTS,
        seed=SEEDS,
        image=image,
        mask=mask,
        paste=False,
        steps=steps,
        strength=strength,
        guidance=guidance,
    )
    events = list(pipe.run(request))
    latents = [e.latents for e in events if e.stage == "denoise" and e.step == e.total]
    pictures = [from_pil(e.image) for e in events if e.image is not None]
    return torch.cat(latents), (torch.cat(pictures) + 1) / 2


@pytest.mark.parametrize("guidance", [0.0, 3.0])
@pytest.mark.parametrize("steps", [1, 3, 8])
@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("masked", [False, True], ids=["image", "inpaint"])
def test_latents(pipe, reference, captions, masked, strength, steps, guidance):
    size = (80, 48) if steps == 3 else (32, 96)
    image, mask = picture(*size), grey_mask(*size) if masked else None
    theirs = references.from_picture(
        *reference,
        image,
        mask,
        SEEDS,
        captions[0],
        captions[1] if guidance > 0 else None,
        strength=strength,
        num_inference_steps=steps,
        guidance_scale=guidance,
    )
    latents, _ = render(pipe, image, mask, steps, strength, guidance)
    assert relative_error(latents, theirs) <= TOLERANCE


@pytest.mark.parametrize("masked", [False, True], ids=["image", "inpaint"])
def test_pictures(pipe, reference, captions, masked):
    image, mask = picture(80, 48), grey_mask(80, 48) if masked else None
    settings = {"strength": 0.6, "num_inference_steps": 4, "guidance_scale": 0.0}
    theirs = references.from_picture(*reference, image, mask, SEEDS, captions[0], None, output_type="pt", **settings)
    latents, pictures = render(pipe, image, mask, 4, 0.6, 0.0)
    torch.testing.assert_close((pipe.decode(latents) + 1) / 2, theirs, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(pictures, theirs, rtol=0, atol=TOLERANCE + 0.5 / 255)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 8, 9, 10, 28, 30, 50, 100])
def test_first_step(steps):
    """Every hundredth, and thirds and sevenths, which fall between; where the reference runs nothing, we run one."""
    pipe = references.diffusers.ZImageImg2ImgPipeline
    stub = references.mock.Mock(**{"scheduler.order": 1, "scheduler.timesteps": list(range(steps))})
    for strength in [*(i / 100 for i in range(1, 101)), 1 / 3, 2 / 3, *(i / 7 for i in range(1, 7)), 1e-12]:
        _, left = pipe.get_timesteps(stub, steps, strength, "cpu")
        assert flow.first_step(steps, strength) == steps - max(left, 1), strength


def test_pixels_are_read_alike():
    """All 256 levels to the bit; masks around the threshold."""
    levels = torch.arange(256, dtype=torch.uint8)
    image = Image.fromarray(torch.stack((levels, levels.flip(0), levels), dim=1).reshape(16, 16, 3).numpy())
    assert torch.equal(from_pil(image), references.pixels(image))
    mask = Image.fromarray(levels.reshape(16, 16).numpy())
    assert torch.equal(mask_tensor(mask, 16, 16), references.mask_pixels(mask, 16, 16))
    soft = grey_mask(80, 48)
    assert torch.equal(mask_tensor(soft, 80, 48), references.mask_pixels(soft, 80, 48))
    assert torch.equal(mask_tensor(soft, 160, 96), references.mask_pixels(soft, 160, 96))
