"""The diffusion transformer alone, without a reference."""

import pytest
import torch
from tiny import DIT, randomised, relative_error
from torch import Tensor

from zimage.dit import ContextRefiner, ZImageDiT
from zimage.dit.patch import patchify, unpatchify
from zimage.dit.rope import caption_positions, image_positions
from zimage.errors import ConfigError, RequestError


def build(seed: int = 1, cls=ZImageDiT, **changes):
    return randomised(cls.from_config({**DIT, **changes}), seed)


@pytest.fixture(scope="module")
def dit():
    return build().eval().requires_grad_(False)


def inputs(lengths=(7, 40), size=(6, 10), seed: int = 2) -> tuple[Tensor, Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    captions = [torch.randn(n, DIT["cap_feat_dim"], generator=generator) for n in lengths]
    return torch.randn(len(lengths), 16, *size, generator=generator), torch.linspace(1, 0.5, len(lengths)), captions


# ------------------------------------------------------------------ context refiner


def test_refined_captions_do_not_depend_on_their_neighbours(dit):
    """Bit-equal alone and in any list, since each runs by itself at its own padded length."""
    captions = inputs((7, 40, 32, 1))[2]
    seen = []
    hook = dit.context_refiner[0].register_forward_hook(lambda *call: seen.append(tuple(call[-1].shape)))
    together = dit.refine(captions)
    hook.remove()
    assert seen == [(1, 32, 64), (1, 64, 64), (1, 32, 64), (1, 32, 64)]
    assert [tuple(tokens.shape) for tokens in together] == [(32, 64), (64, 64), (32, 64), (32, 64)]
    for caption, tokens in zip(captions, together, strict=True):
        assert torch.equal(dit.refine([caption])[0], tokens)


@pytest.mark.parametrize("size", [(8, 8), (4, 14)], ids=str)
@pytest.mark.parametrize("sigma", [1.0, 0.3])
def test_refined_captions_do_not_depend_on_time_or_size(dit, sigma, size):
    """Inside a whole evaluation the refiner's output is, to the bit, what `refine` gives beforehand."""
    latents, _, captions = inputs((7,), size)
    seen = []
    hook = dit.context_refiner[-1].register_forward_hook(lambda *call: seen.append(call[-1]))
    dit(latents, torch.tensor([sigma]), captions)
    hook.remove()
    assert torch.equal(seen[0][0], dit.refine(captions)[0])


def test_the_context_refiner_alone_gives_the_same(dit):
    """It takes its share of the DiT's weights, under the same names."""
    refiner = ContextRefiner.from_config(DIT)
    refiner.load_state_dict({key: dit.state_dict()[key] for key in refiner.state_dict()})
    captions = inputs()[2]
    assert all(map(torch.equal, refiner(captions), dit.refine(captions)))


# ------------------------------------------------------------------ velocity


def test_a_batch_gives_what_each_sample_gives_alone(dit):
    """Batch padding is masked, and every image stands behind its own caption."""
    latents, sigma, captions = inputs((7, 40, 90))
    together = dit(latents, sigma, captions)
    for i in range(3):
        alone = dit(latents[i : i + 1], sigma[i : i + 1], captions[i : i + 1])
        assert relative_error(together[i : i + 1], alone) <= 1e-5


def test_prepared_parts_give_the_whole(dit):
    """refine → context → modulate → velocity is forward, cut where nothing changes between steps."""
    latents, sigma, captions = inputs()
    context = dit.context(dit.refine(captions), *latents.shape[-2:])
    assert relative_error(dit.velocity(latents, dit.modulate(sigma), context), dit(latents, sigma, captions)) <= 1e-5


def test_captions_of_one_padded_length_need_no_mask(dit):
    captions = inputs((33, 64))[2]
    assert dit.context(dit.refine(captions), 4, 4).seen is None
    assert dit.context(dit.refine(inputs((32, 33))[2]), 4, 4).seen is not None


@pytest.mark.parametrize("token", ["x_pad_token", "cap_pad_token"])
def test_learned_pads_are_attended(token):
    """They take part in attention: another pad token gives another picture."""
    model = build().requires_grad_(False)
    latents, sigma, captions = inputs()
    before = model(latents, sigma, captions)
    getattr(model, token).add_(1)
    assert relative_error(model(latents, sigma, captions), before) > 1e-3


def test_positions_past_axes_lens_work(dit):
    """A caption of 3,000 tokens where axes_lens says 256: finite, and what a model with a longer table gives."""
    latents, sigma, captions = inputs((3000,))
    velocity = dit(latents, sigma, captions)
    longer = build(axes_lens=[8192, 64, 64]).requires_grad_(False)
    assert velocity.isfinite().all()
    assert torch.equal(velocity, longer(latents, sigma, captions))


def test_order_of_caption_tokens_counts(dit):
    latents, sigma, captions = inputs((40,))
    assert relative_error(dit(latents, sigma, [captions[0].flip(0)]), dit(latents, sigma, captions)) > 1e-3


@pytest.mark.parametrize(("axes_len", "tokens"), [(1536, 1504), (1024, 992), (1538, 1536), (1537, 1504)])
def test_longest_trained_caption(axes_len, tokens):
    with torch.device("meta"):
        model = ZImageDiT.from_config({**DIT, "axes_lens": [axes_len, 64, 64]})
    assert model.config.max_caption_tokens == tokens


# ------------------------------------------------------------------ pure parts


def test_patches_hold_channels_last():
    latents = torch.arange(2 * 16 * 4 * 6.0).reshape(2, 16, 4, 6)
    tokens = patchify(latents, 2)
    assert tokens.shape == (2, 6, 64)
    corners = [latents[0, :, y, x] for y in (2, 3) for x in (4, 5)]
    assert torch.equal(tokens[0, 5], torch.cat(corners))
    assert torch.equal(unpatchify(tokens, 4, 6, 2), latents)


def test_positions():
    """Caption tokens count from 1; the image stands behind the padded caption; image pads at the origin."""
    assert caption_positions(64)[[0, 63]].tolist() == [[1, 0, 0], [64, 0, 0]]
    image = image_positions(rows=2, columns=3, padded_length=32, caption_length=64)
    assert image[:6].tolist() == [[65, y, x] for y in range(2) for x in range(3)]
    assert not image[6:].any()


# ------------------------------------------------------------------ training


def gradients(model: ZImageDiT) -> dict[str, Tensor | None]:
    model(*inputs()).square().mean().backward()
    return {name: weight.grad for name, weight in model.named_parameters()}


def test_every_parameter_gets_a_finite_gradient():
    for name, gradient in gradients(build()).items():
        assert gradient is not None, name
        assert gradient.isfinite().all(), name
        assert gradient.any(), name


def test_gradient_checkpointing_changes_no_gradient():
    checkpointed, calls = build(), []
    checkpointed.gradient_checkpointing = True
    checkpointed.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    ours, plain = gradients(checkpointed), gradients(build())
    assert len(calls) == 2, "the block should run again in the backward pass"
    assert all(torch.equal(ours[name], plain[name]) for name in plain)


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("latents", "caption"),
    [((1, 16, 5, 4), (3, 64)), ((1, 4, 4, 4), (3, 64)), ((1, 16, 4, 4), (3, 63)), ((1, 16, 4, 4), (0, 64))],
    ids=["odd side", "channels", "caption width", "empty caption"],
)
def test_inputs_that_do_not_fit_are_refused(dit, latents, caption):
    with pytest.raises(RequestError, match=r"does not fit|do not fit"):
        dit(torch.zeros(latents), torch.ones(1), [torch.zeros(caption)])


@pytest.mark.parametrize(
    "change",
    [
        {"all_patch_size": [2, 4]},
        {"qk_norm": False},
        {"siglip_feat_dim": 1152},
        {"n_kv_heads": 1},
        {"axes_dims": [8, 12, 16]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_is_not_implemented_is_refused(change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        ZImageDiT.from_config({**DIT, **change})


@pytest.mark.parametrize("key", ["dim", "axes_lens", "norm_eps", "t_scale"])
def test_a_missing_key_is_named(key):
    with pytest.raises(ConfigError, match=f"the key '{key}' is missing"):
        ZImageDiT.from_config({name: value for name, value in DIT.items() if name != key})
