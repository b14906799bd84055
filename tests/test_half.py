"""fp16: finite and nearer float64 than bf16 by construction, whatever the activations reach.

Products run as on a GPU that adds in fp16, with sums in two levels (`half_product.reference`), unless a test says so.
"""

import copy
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import zimage
from zimage.dit import ZImageDiT, blocks, reach
from zimage.dit.blocks import Block
from zimage.dit.rope import Rotation
from zimage.errors import RequestError
from zimage.kernels import half_product
from zimage.nn import layers
from zimage.nn.gain import gain
from zimage.nn.operand import gated_activation

LOUD = 300_000.0
BETTER = 3  # times nearer float64 than bf16


@pytest.fixture
def two_levels(monkeypatch):
    monkeypatch.setattr(layers, "half_product", half_product.reference)


def relative(ours, exact) -> float:
    return float((ours.double() - exact).norm() / exact.norm())


# ------------------------------------------------------------------ one block of full width


def loud_block(dim: int, heads: int) -> Block:
    """A bf16 block whose hidden rows and branches reach ±LOUD for a stream that does."""
    torch.manual_seed(21)
    with torch.device("meta"):
        block = Block(dim, heads, 1e-5, modulated=False).requires_grad_(False)
    block = block.bfloat16().to_empty(device="cpu")
    drawn = torch.rand(1_000_003)  # the same numbers over and over: drawing 177 million takes seconds
    for weight in block.parameters():
        values = drawn.repeat(-(-weight.numel() // len(drawn)))[: weight.numel()].view_as(weight)
        weight.copy_(0.5 + values if weight.ndim == 1 else (2 * values - 1) / weight.shape[1] ** 0.5)
    feed_forward = block.feed_forward
    for layer in (feed_forward.w1, feed_forward.w3):
        layer.weight[:8] *= 1024
    feed_forward.w2.weight[3] *= 64  # what the norm of the branch then makes loud
    block.ffn_norm2.weight[3] = LOUD / dim**0.5
    return block


def stream(dim: int, tokens: int = 16) -> torch.Tensor:
    """(1, tokens, dim): rows of very different sizes, and channels of ±LOUD."""
    x = torch.randn(1, tokens, dim, generator=torch.Generator().manual_seed(22)).double()
    x *= torch.logspace(-1, 2, tokens).double()[:, None]
    x[:, ::3, 5] = LOUD
    x[:, 1::3, 7] = -LOUD
    return x


def turned(tokens: int, dim: int) -> Rotation:
    angle = torch.rand(1, tokens, dim // 2, generator=torch.Generator().manual_seed(23))
    return Rotation(angle.cos(), angle.sin())


def run(block: Block, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A block with a neutral modulation in a dtype; fp16 without units, as a plain cast has it."""
    block = copy.deepcopy(block).to(dtype)
    return block(x.to(dtype), turned(x.shape[1], block.attention.head_dim), None, reach.unmodulated(block))


def run_in_units(block: Block, x: torch.Tensor) -> torch.Tensor:
    """As a DiT with `in_half` runs it."""
    block = copy.deepcopy(block).half()
    neutral = reach.unmodulated(block)
    units = reach.units([block], [neutral], LOUD)
    modulation = reach.in_units(neutral, units)
    return units.leave(
        block(units.enter(x), turned(x.shape[1], block.attention.head_dim), None, modulation, units)
    )


@pytest.mark.parametrize("dim", [384, 3840], ids=["small", "full width"])
def test_a_loud_block_is_finite_and_near(dim, two_levels, monkeypatch):
    """Where a plain cast overflows. Each row is judged by itself: a loud one must not drown the others."""
    block, x = loud_block(dim, dim // 128), stream(dim)
    hidden = []
    with monkeypatch.context() as watching:
        watching.setattr(blocks, "gated_activation", lambda *a: hidden.append(gated_activation(*a)) or hidden[-1])
        exact = run(block, x, torch.float64)
    assert hidden[0].abs().max() > LOUD
    assert (exact - x).abs().max() > LOUD / 2
    coarse, ours = run(block, x, torch.bfloat16), run_in_units(block, x)
    assert ours.isfinite().all()
    pairs = torch.tensor([[relative(y[:, i] - x[:, i], (exact - x)[:, i]) for y in (ours, coarse)] for i in range(len(x[0]))])
    ratios = pairs[:, 1] / pairs[:, 0]
    print(f"bf16's error over ours: {ratios.log().mean().exp():.1f}, least {ratios.min():.1f}")
    assert relative(ours - x, exact - x) * BETTER < relative(coarse - x, exact - x)
    assert ratios.log().mean().exp() > BETTER


def test_a_plain_cast_overflows():
    block, x = loud_block(384, 3), stream(384)
    assert not run(block, x, torch.float16).isfinite().all()


def test_no_sum_passes_the_limit():
    """Not the results alone, which cancel: every partial sum of every product, in fp64."""
    block, x = loud_block(384, 3), stream(384)
    largest = {}

    def watch(layer: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        rows, weight = inputs[0].double().flatten(0, -2), layer.weight.double()
        sums = (rows[:, None] * weight).cumsum(dim=-1)  # (rows, O, I)
        largest[layer] = max(largest.get(layer, 0.0), float(sums.abs().max()), float(output.abs().max()))

    with torch.nn.modules.module.register_module_forward_hook(
        lambda layer, *given: watch(layer, *given) if isinstance(layer, layers.BlockLinear) else None
    ):
        run_in_units(block, x)
    assert len(largest) == 7
    assert 1 < min(largest.values()) <= max(largest.values()) <= reach.LIMIT


def test_weights_that_fp16_would_round_away_are_refused():
    block = loud_block(384, 3).half()
    block.attention.to_k.weight *= 2.0**-12
    with pytest.raises(RequestError, match="use bf16"):
        reach.units([block], [reach.unmodulated(block)], 1.0)


# ------------------------------------------------------------------ whole runs


def test_a_run_of_the_demo_is_nearer_than_bf16(two_levels):
    """Captions, latents and picture against a run in fp64."""
    noise = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(3))

    def run(dtype) -> tuple[torch.Tensor, ...]:
        pipe = zimage.ZImage.load(device="cpu", dtype=dtype)
        captions = pipe.encode(["a red cube and a blue ball"])
        latents = pipe.denoise(captions, noise, steps=2)
        return captions[0], latents, pipe.decode(latents)

    exact, coarse, ours = run(torch.float64), run("bf16"), run("fp16")
    for truth, theirs, found in zip(exact, coarse, ours, strict=True):
        print(f"bf16 {relative(theirs, truth):.1e}, fp16 {relative(found, truth):.1e}")
        assert relative(found, truth) * BETTER < relative(theirs, truth)


SMALL = {"seed": 5, "steps": 2, "width": 64, "height": 48}


@pytest.fixture(scope="module")
def loud_folder(tiny_folder, tmp_path_factory):
    """The tiny model with hidden rows and branches of up to ±LOUD, whose plain cast overflows."""
    folder = tmp_path_factory.mktemp("loud") / "model"
    shutil.copytree(tiny_folder, folder)
    (file,) = folder.glob("transformer/*.safetensors")
    tensors = load_file(file)
    for name, weight in tensors.items():
        if name.endswith(("w1.weight", "w3.weight")):
            weight[:4] *= 600
        elif name.endswith("ffn_norm2.weight"):
            weight[3] = LOUD / 8
    save_file(tensors, file)
    return folder


REQUESTS = {
    "plain": {},
    "guidance": {"guidance": 3.0, "negative": "a dog"},
    "unequal captions": {"prompt": ["a cat", "a dog and a bird and many, many other animals " * 3], "batch_size": 2},
    "img2img": {"image": Image.new("RGB", (64, 48), "teal"), "strength": 0.7},
}


@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
def test_requests_of_every_kind(loud_folder, request_):
    """Finite, and nearer the fp32 picture than bf16's."""

    def pixels(dtype: str) -> torch.Tensor:
        pipe = zimage.ZImage.load(loud_folder, device="cpu", dtype=dtype)
        result = pipe.generate(**{"prompt": "a cat", **SMALL, **request_})
        return torch.stack([torch.from_numpy(np.array(image)) for image in result.images]).double()

    exact = pixels("fp32")
    assert (pixels("fp16") - exact).norm() * BETTER < (pixels("bf16") - exact).norm()


