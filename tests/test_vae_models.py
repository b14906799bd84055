"""The two autoencoders alone, without a reference."""

import pytest
import torch
from tiny import KL, WAN, randomised, relative_error
from torch import Tensor

from zimage.errors import CheckpointError, ConfigError
from zimage.vae import AutoencoderKL, AutoencoderKLWan

MODELS = {"kl": (AutoencoderKL, KL), "wan": (AutoencoderKLWan, WAN)}


def build(name: str):
    cls, config = MODELS[name]
    return randomised(cls.from_config(config), seed=1).eval().requires_grad_(False)


@pytest.fixture(scope="module", params=MODELS)
def vae(request):
    return build(request.param)


def images(batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, 32, 48, generator=torch.Generator().manual_seed(2)) * 2 - 1


def test_shapes_and_dtypes(vae):
    assert vae.spatial_factor == 8
    latents = vae.encode(images())
    assert latents.shape == (2, 16, 4, 6)
    assert latents.dtype == torch.float32
    decoded = vae.decode(latents)
    assert decoded.shape == (2, 3, 32, 48)
    assert decoded.dtype == torch.float32


def test_half_precision_gives_fp32_results(vae):
    half = build("kl" if isinstance(vae, AutoencoderKL) else "wan").bfloat16()
    latents = vae.encode(images(1))
    assert half.encode(images(1)).dtype == half.decode(latents).dtype == torch.float32
    exact = vae.decode(latents)
    assert (half.decode(latents) - exact).square().mean() < 0.05**2 * exact.square().mean()


def test_decoded_images_are_clamped(vae):
    """Far latents reach ±1 and stay there."""
    decoded = vae.decode(50 * torch.randn(1, 16, 4, 6, generator=torch.Generator().manual_seed(3)))
    assert decoded.abs().max() == 1


def test_encode_is_the_posterior_mode(vae):
    """Deterministic, and scaled from the mean alone."""
    mean, logvar = vae.moments(images(1))
    assert mean.shape == logvar.shape == (1, 16, 4, 6)
    config = vae.config
    if isinstance(vae, AutoencoderKL):
        expected = (mean - config.shift_factor) * config.scaling_factor
    else:
        center, spread = (torch.tensor(values).view(16, 1, 1) for values in (config.latents_mean, config.latents_std))
        expected = (mean - center) / spread
    assert relative_error(vae.encode(images(1)), expected) <= 1e-6
    assert torch.equal(vae.encode(images(1)), vae.encode(images(1)))


# ------------------------------------------------------------------ folding of published Wan weights


def published(model: AutoencoderKLWan) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return {key: torch.randn(shape, generator=generator) for key, shape in model.published_shapes().items()}


def test_folding_fills_every_parameter_once_without_a_copy():
    """Each tensor by itself: a view of the last temporal tap, or None for the unused time_conv alone."""
    model = build("wan")
    folded = {}
    for key, tensor in published(model).items():
        result = model.fold(key, tensor)
        if result is None:
            assert ".time_conv." in key
            continue
        own, view = result
        assert own not in folded
        assert view.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
        if tensor.ndim == 5:
            assert torch.equal(view, tensor[:, :, tensor.shape[2] - 1])
        folded[own] = view
    model.load_state_dict(folded, strict=True)


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("encoder.conv_in.weight", (8, 3, 1, 3, 3)),
        ("encoder.conv_in.weights", (8, 3, 3, 3, 3)),
        ("encoder.mid_block.resnets.0.norm1.gamma", (17, 1, 1, 1)),
        ("decoder.nowhere.weight", (8, 8)),
        ("stray", (1,)),
    ],
    ids=["shape", "leaf", "gamma", "module", "no module"],
)
def test_folding_refuses_what_does_not_fit(key, shape):
    with pytest.raises(CheckpointError, match=key):
        build("wan").fold(key, torch.zeros(shape))


# ------------------------------------------------------------------ configs


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("wan", {"is_residual": True}),
        ("wan", {"attn_scales": [0.5]}),
        ("wan", {"patch_size": 2}),
        ("wan", {"decoder_base_dim": 256}),
        ("wan", {"latents_mean": [0.0] * 15}),
        ("wan", {"temperal_downsample": [False, True]}),
        ("wan", {"_class_name": "AutoencoderKL"}),
        ("kl", {"use_quant_conv": True}),
        ("kl", {"mid_block_add_attention": False}),
        ("kl", {"act_fn": "gelu"}),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_what_is_not_implemented_is_refused(name, change):
    cls, config = MODELS[name]
    with pytest.raises(ConfigError, match=next(iter(change))):
        cls.from_config({**config, **change})


@pytest.mark.parametrize(
    ("name", "key"), [("wan", "latents_std"), ("wan", "base_dim"), ("kl", "scaling_factor"), ("kl", "shift_factor")]
)
def test_a_missing_key_is_named(name, key):
    cls, config = MODELS[name]
    with pytest.raises(ConfigError, match=f"the key '{key}' is missing"):
        cls.from_config({other: value for other, value in config.items() if other != key})
