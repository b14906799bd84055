"""Ring 2: live comparison with diffusers and transformers on random weights, and key lists at full size."""

import pytest
import torch
from tiny import DIT, KL, QWEN, VOCAB, WAN, arguments, randomised, relative_error
from torch import Tensor, nn

from bench import weights as full_weights
from zimage import flow
from zimage.dit import ZImageDiT
from zimage.text import Qwen3
from zimage.vae import AutoencoderKL, AutoencoderKLWan

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
import references

pytestmark = pytest.mark.parity

TOLERANCE = 1e-5  # fp32, of the largest value
BF16_RATIO = 1.1  # our RMS error against float64 over the reference's own
SEEDS = range(8)
VAES = {"kl": (AutoencoderKL, KL, references.kl), "wan": (AutoencoderKLWan, WAN, references.wan)}


def ours_like(reference: nn.Module, name: str) -> nn.Module:
    """Our module with the reference's weights, strictly loaded, in its dtype."""
    build, config = {"text": (Qwen3, QWEN), "dit": (ZImageDiT, DIT), **{k: v[:2] for k, v in VAES.items()}}[name]
    model = build.from_config(config)
    weights = {key: value for key, value in reference.state_dict().items() if key != "lm_head.weight"}
    if hasattr(model, "fold"):
        assert {key: tuple(value.shape) for key, value in weights.items()} == model.published_shapes()
        weights = dict(filter(None, (model.fold(key, value) for key, value in weights.items())))
    model.load_state_dict(weights)
    return model.to(reference.dtype).eval().requires_grad_(False)


def token_ids(seed: int, length: int = 23) -> Tensor:
    return torch.randint(VOCAB, (2, length), generator=torch.Generator().manual_seed(seed))


def dit_inputs(seed: int, lengths=(7, 37, 64), size=(6, 10)) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Latents, σ and captions, exact in bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    captions = [3 * torch.randn(n, DIT["cap_feat_dim"], generator=generator).bfloat16().float() for n in lengths]
    latents = torch.randn(len(lengths), 16, *size, generator=generator).bfloat16().float()
    sigma = torch.randint(1, 9, (len(lengths),), generator=generator) / 8
    return latents, sigma, captions


def vae_inputs(seed: int, h: int = 4, w: int = 6) -> tuple[Tensor, Tensor]:
    """Images in [−1, 1] and scaled latents, exact in bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(1, 3, 8 * h, 8 * w, generator=generator) * 2 - 1
    return images.bfloat16().float(), torch.randn(1, 16, h, w, generator=generator).bfloat16().float()


# ------------------------------------------------------------------ fp32


@pytest.mark.parametrize("length", [1, 23, 130])
def test_every_hidden_state(length):
    reference = references.text_encoder(seed=11)
    ids = token_ids(12, length)
    ours, theirs = list(ours_like(reference, "text").hidden_states(ids)), references.hidden_states(reference, ids)
    assert len(ours) == len(theirs) == QWEN["num_hidden_layers"] + 1
    for i, pair in enumerate(zip(ours, theirs, strict=True)):
        assert relative_error(*pair) <= TOLERANCE, f"hidden state {i}"


@pytest.mark.parametrize("lengths", [(9,), (32, 64), (1, 33, 100)], ids=str)
@pytest.mark.parametrize("size", [(8, 8), (2, 22), (14, 6)], ids=str)
def test_dit(size, lengths):
    """Unequal prompts in one batch, square and not, each sample at its own σ."""
    reference = references.dit(seed=21)
    inputs = dit_inputs(22, lengths, size)
    assert relative_error(ours_like(reference, "dit")(*inputs), references.velocity(reference, *inputs)) <= TOLERANCE


@pytest.mark.parametrize("sigma", [1.0, 0.9545, 0.3, 0.01])
def test_dit_at_noise_levels(sigma):
    reference = references.dit(seed=23)
    latents, _, captions = dit_inputs(24)
    inputs = (latents, torch.full((len(captions),), sigma), captions)
    assert relative_error(ours_like(reference, "dit")(*inputs), references.velocity(reference, *inputs)) <= TOLERANCE


def test_dit_past_the_reference_table():
    """A caption longer than axes_lens: what the reference gives with a longer table."""
    reference = references.dit(seed=25)
    longer = references.diffusers.ZImageTransformer2DModel(**{**arguments(DIT), "axes_lens": [1024, 64, 64]})
    longer.load_state_dict(reference.state_dict())
    inputs = dit_inputs(26, (600,))
    assert relative_error(ours_like(reference, "dit")(*inputs), references.velocity(longer, *inputs)) <= TOLERANCE


@pytest.mark.parametrize("size", [(4, 4), (2, 7)], ids=str)
@pytest.mark.parametrize("name", VAES)
def test_vae(name, size):
    reference = VAES[name][2](seed=31)
    ours = ours_like(reference, name)
    images, latents = vae_inputs(32, *size)
    assert relative_error(ours.encode(images), references.encode(reference, images)) <= TOLERANCE
    assert relative_error(ours.decode(latents), references.decode(reference, latents)) <= TOLERANCE


def test_a_still_image_sees_only_the_last_temporal_tap():
    """What folding rests on: in the reference the other taps and every time_conv change no bit of a still image."""
    reference = references.wan(seed=33)
    images, latents = vae_inputs(34)
    before = references.encode(reference, images), references.decode(reference, latents)
    for name, weight in reference.named_parameters():
        if ".time_conv." in name:
            weight.data.fill_(float("nan"))
        elif weight.ndim == 5:
            weight.data[:, :, :-1] = 0
    after = references.encode(reference, images), references.decode(reference, latents)
    assert all(map(torch.equal, before, after))


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
@pytest.mark.parametrize("steps", [1, 8, 30, 50])
def test_schedule_and_truncation(steps, shift):
    """The bits of σ of every step, and the same steps guided, ties included."""
    scheduler = references.diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist())
    sigmas = flow.sigmas(steps, shift)
    torch.testing.assert_close(sigmas, scheduler.sigmas, rtol=0, atol=0)
    theirs = ((1000 - scheduler.timesteps.float()) / 1000).tolist()  # as in its pipeline
    for limit in [0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0]:
        ours = [flow.guidance_at(sigma, 2.0, limit) > 0 for sigma in sigmas[:-1]]
        assert ours == [time <= limit for time in theirs], f"truncation {limit}"


# ------------------------------------------------------------------ bf16


def text_cases(seed: int):
    reference = references.text_encoder(seed)
    ids = token_ids(seed + 100)
    yield reference, "text", lambda model: model(ids), lambda model: references.hidden_states(model, ids)[-2]


def dit_cases(seed: int):
    reference = references.dit(seed)
    latents, sigma, captions = dit_inputs(seed + 100)

    def theirs(model):
        typed = [caption.to(model.dtype) for caption in captions]
        return references.velocity(model, latents.to(model.dtype), sigma.double(), typed)

    yield reference, "dit", lambda model: model(latents, sigma, captions), theirs


def vae_cases(seed: int, name: str, encode: bool):
    reference = VAES[name][2](seed)
    images, latents = vae_inputs(seed + 100, 6, 8)
    if encode:
        yield reference, name, lambda m: m.encode(images), lambda m: references.encode(m, images.to(m.dtype))
    else:
        yield reference, name, lambda m: m.decode(latents), lambda m: references.decode(m, latents.to(m.dtype))


BF16 = {
    "text_encoder": text_cases,
    "dit": dit_cases,
    "kl_encode": lambda seed: vae_cases(seed, "kl", True),
    "kl_decode": lambda seed: vae_cases(seed, "kl", False),
    "wan_encode": lambda seed: vae_cases(seed, "wan", True),
    "wan_decode": lambda seed: vae_cases(seed, "wan", False),
}


@pytest.mark.parametrize("part", BF16)
@torch.no_grad()
def test_bf16_is_no_less_exact_than_the_reference(part):
    """RMS error against the reference in float64 (same bf16 weights and inputs), over eight models."""
    squares = torch.zeros(2, dtype=torch.float64)
    for seed in SEEDS:
        for reference, name, ours, theirs in BF16[part](seed):
            truth = theirs(reference.double())
            reference.bfloat16()
            results = ours(ours_like(reference, name)), theirs(reference)
            squares += torch.stack([(result.double() - truth).square().mean() for result in results])
    ratio = float((squares[0] / squares[1]).sqrt())
    print(f"{part}: {ratio:.3f} of the reference's own error")
    assert ratio <= BF16_RATIO, f"{part}: our bf16 RMS error is {ratio:.3f} times the reference's own"


# ------------------------------------------------------------------ full-size keys, without weights


def full_size() -> dict:
    """name → (reference on meta, our model on meta, tensors in a published file)."""
    diffusers, transformers = references.diffusers, references.transformers
    qwen, dit, kl = full_weights.TEXT_ENCODER, full_weights.TRANSFORMER, full_weights.VAE
    wan = {**WAN, "base_dim": 96, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2}
    with torch.device("meta"):
        return {
            "text": (transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**qwen)), Qwen3.from_config(qwen), 398),
            "dit": (diffusers.ZImageTransformer2DModel.from_config(dit), ZImageDiT.from_config(dit), 521),
            "kl": (diffusers.AutoencoderKL.from_config(kl), AutoencoderKL.from_config(kl), 244),
            "wan": (diffusers.AutoencoderKLWan.from_config(wan), AutoencoderKLWan.from_config(wan), 194),
        }


@pytest.mark.parametrize("name", ["text", "dit", "kl", "wan"])
def test_full_size_keys_and_shapes(name):
    """The published keys load strictly into ours: none missing, unexpected or misshapen."""
    reference, ours, count = full_size()[name]
    published = {key: value for key, value in reference.state_dict().items() if key != "lm_head.weight"}
    assert len(published) == count
    if hasattr(ours, "fold"):
        assert {key: tuple(value.shape) for key, value in published.items()} == ours.published_shapes()
        published = dict(filter(None, (ours.fold(key, value) for key, value in published.items())))
    ours.load_state_dict(published, strict=True, assign=True)


def test_randomised_weights_hide_nothing():
    """No parameter of a reference is left at zero or one, where a bug could not be seen."""
    for build in (references.text_encoder, references.dit, references.kl, references.wan):
        for name, weight in build(seed=1).named_parameters():
            assert weight.std() > 0.01, name
    assert randomised(nn.Linear(4, 4), 1).weight.equal(randomised(nn.Linear(4, 4), 1).weight)
