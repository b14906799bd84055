"""fp16: finite and nearer float64 than bf16 by construction, whatever the activations reach.

Products run as on a GPU that adds in fp16, with sums in two levels (`half_product.reference`), unless a test says so.
"""

import copy
import functools
import shutil

import lora_files
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import zimage
from zimage.dit import blocks, reach
from zimage.dit.blocks import Block
from zimage.dit.rope import Rotation
from zimage.errors import RequestError
from zimage.kernels import half_product
from zimage.loading.devices import choose_dtype
from zimage.nn import layers
from zimage.nn.compile import compile_blocks
from zimage.nn.gain import gain
from zimage.nn.operand import gated_activation
from zimage.nn.packed import PackedLinear, Scaled
from zimage.nn.quant import QuantisedLinear

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
    make_loud(*(block.get_parameter(f"feed_forward.w{i}.weight") for i in (1, 2, 3)), block.ffn_norm2.weight)
    return block


def make_loud(w1: torch.Tensor, w2: torch.Tensor, w3: torch.Tensor, norm: torch.Tensor) -> None:
    """One channel of the branch outweighs the others, always positive, as massive activations do: g · silu(g) is."""
    w1[:8] *= 1024
    w3[:8] = w1[:8]
    w2[3, :8] = 64 * w2[3, :8].abs()
    norm[3] = LOUD / len(norm) ** 0.5


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
    return block(
        x.to(dtype), turned(x.shape[1], block.attention.head_dim), None, reach.unmodulated(block, torch.device("cpu"))
    )


def run_in_units(block: Block, x: torch.Tensor) -> torch.Tensor:
    """As a DiT with `in_half` runs it."""
    block = copy.deepcopy(block).half()
    neutral = reach.unmodulated(block, torch.device("cpu"))
    units = reach.units([block], [neutral], LOUD)
    modulation = reach.in_units(neutral, units)
    return units.leave(block(units.enter(x), turned(x.shape[1], block.attention.head_dim), None, modulation, units))


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
    rows = zip(*(y.double().sub(x)[0] for y in (ours, coarse, exact)), strict=True)
    pairs = torch.tensor([(relative(fine, truth), relative(rough, truth)) for fine, rough, truth in rows])
    ratios = pairs[:, 1] / pairs[:, 0]
    print(f"bf16's error over ours: {ratios.log().mean().exp():.1f}, least {ratios.min():.1f}")
    assert relative(ours - x, exact - x) * BETTER < relative(coarse - x, exact - x)
    assert ratios.log().mean().exp() > BETTER


def test_a_plain_cast_overflows():
    block, x = loud_block(384, 3), stream(384)
    assert not run(block, x, torch.float16).isfinite().all()


@pytest.mark.parametrize("matrices", [1.0, 2.0**-9, 2.0**5], ids=["usual", "quiet", "loud"])
def test_no_sum_passes_the_limit(matrices):
    """Not the results alone, which cancel: every factor and every partial sum of every product, in fp64."""
    block, x = loud_block(384, 3), stream(384)
    for layer in (m for m in block.modules() if isinstance(m, layers.BlockLinear)):
        layer.weight *= matrices
    largest = {}

    def watch(layer: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        rows, weight = inputs[0].double().flatten(0, -2), layer.weight.double()
        sums = (rows[:, None] * weight).cumsum(dim=-1)  # (rows, O, I)
        largest[layer] = max(float(values.abs().max()) for values in (rows, sums, output))

    with torch.nn.modules.module.register_module_forward_hook(
        lambda layer, *given: watch(layer, *given) if isinstance(layer, layers.BlockLinear) else None
    ):
        run_in_units(block, x)
    assert len(largest) == 7
    assert 0.1 < min(largest.values()) <= max(largest.values()) <= reach.LIMIT * 1.01


def test_weights_that_fp16_would_round_away_are_refused():
    block = loud_block(384, 3).half()
    block.attention.to_k.weight *= 2.0**-12
    with pytest.raises(RequestError, match="use bf16"):
        reach.units([block], [reach.unmodulated(block, torch.device("cpu"))], 1.0)


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
    for block in {name.rpartition(".ffn_norm2")[0] for name in tensors if ".ffn_norm2" in name}:
        names = [f"feed_forward.w{i}" for i in (1, 2, 3)]
        make_loud(*(tensors[f"{block}.{name}.weight"] for name in (*names, "ffn_norm2")))
    save_file(tensors, file)
    return folder


REQUESTS = {
    "plain": {},
    "guidance": {"guidance": 3.0, "negative": "a dog"},
    "NAG": {"nag": 12.0, "negative": "a dog"},
    "unequal captions": {"prompt": ["a cat", "a dog and a bird and many, many other animals " * 3], "batch_size": 2},
    "img2img": {"image": Image.new("RGB", (64, 48), "teal"), "strength": 0.7},
}


@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
def test_requests_of_every_kind(loud_folder, request_):
    """Finite, and nearer the fp32 picture than bf16's."""

    def pixels(dtype: str) -> torch.Tensor:
        pipe = zimage.ZImage.load(loud_folder, device="cpu", dtype=dtype)
        return tensors(pipe.generate(**{"prompt": "a cat", **SMALL, **request_}))

    exact = pixels("fp32")
    assert (pixels("fp16") - exact).norm() * BETTER < (pixels("bf16") - exact).norm()


# ------------------------------------------------------------------ with all else


def tensors(result) -> torch.Tensor:
    return torch.stack([torch.from_numpy(np.array(image)) for image in result.images]).double()


def test_int8_products(loud_folder):
    """Their results are held in units as well: what quantising costs, fp16 does not add to."""

    def picture(dtype: str, precision: str) -> torch.Tensor:
        pipe = zimage.ZImage.load(loud_folder, device="cpu", dtype=dtype, precision=precision)
        return tensors(pipe.generate("a cat", **SMALL))

    exact = picture("fp32", "bf16")
    assert (picture("fp16", "int8") - exact).norm() < 1.1 * (picture("fp32", "int8") - exact).norm()
    with pytest.raises(RequestError, match="fp8 gives results in bf16"):
        picture("fp16", "fp8")


@pytest.fixture(scope="module")
def style(tmp_path_factory):
    paths = [f"layers.{i}.attention.{name}" for i in (0, 1) for name in ("to_q", "to_v", "to_out.0")]
    paths += [f"layers.{i}.feed_forward.w{n}" for i in (0, 1) for n in (1, 2, 3)]
    file = tmp_path_factory.mktemp("lora") / "style.safetensors"
    return lora_files.write(file, lora_files.NAMINGS["kohya"](lora_files.factors(paths)))


@pytest.mark.parametrize("streamed", [False, True], ids=["merged", "beside streamed layers"])
def test_adapters(loud_folder, style, streamed, monkeypatch):
    monkeypatch.setattr("zimage.loading.planner._base_bytes", lambda device: 0)

    def picture(dtype: str, **settings) -> torch.Tensor:
        pipe = zimage.ZImage.load(loud_folder, device="cpu", dtype=dtype, **settings)
        assert bool(pipe.prepare(zimage.Request("a cat", **SMALL)).plan.stages["dit"].streamed) == bool(settings)
        plain = tensors(pipe.generate("a cat", **SMALL))
        handle = pipe.lora.add(style, 0.5)
        changed = tensors(pipe.generate("a cat", **SMALL))
        pipe.lora.remove(handle)
        assert torch.equal(tensors(pipe.generate("a cat", **SMALL)), plain)
        assert not torch.equal(changed, plain)
        return changed

    low = zimage.ZImage.load(loud_folder, device="cpu", dtype="fp16", memory=1e-9)
    low.lora.add(style, 0.5)
    plan = low.prepare(zimage.Request("a cat", **SMALL), must_fit=False).plan
    exact = picture("fp32")
    ours = picture("fp16", **({"memory": plan.tightest.peak / 1e9} if streamed else {}))
    assert (ours - exact).norm() * BETTER < (picture("bf16") - exact).norm()


def test_compiled_blocks(loud_folder, monkeypatch):
    """The units are constants of the compiled code, and others compile again."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    plain, compiled = (zimage.load_component(loud_folder, "dit", dtype="fp16") for _ in range(2))
    compile_blocks(compiled)
    torch._dynamo.utils.counters.clear()
    generator = torch.Generator().manual_seed(31)
    latents, captions = torch.randn(1, 16, 4, 4, generator=generator), [torch.randn(5, 64, generator=generator)]
    for loudness in (1.0, 0.01):
        for dit in (plain, compiled):
            dit.layers[1].ffn_norm2.weight *= loudness
        expected, found = (dit(latents, torch.tensor([0.5]), captions) for dit in (plain, compiled))
        torch.testing.assert_close(found, expected, rtol=0, atol=3e-3)
    assert not torch._dynamo.utils.counters["graph_break"]


# ------------------------------------------------------------------ bounds of layers


@pytest.mark.parametrize("kind", ["plain", "streamed", "packed", "int8"])
def test_gain_is_that_of_the_numbers_that_are_multiplied(kind):
    weight = torch.randn(40, 48, generator=torch.Generator().manual_seed(41))
    plain = layers.BlockLinear(48, 40).requires_grad_(False)
    plain.weight.data = weight
    if kind == "streamed":
        plain.weight.wanted = torch.float16
    codes = Scaled((weight * 16).to(torch.float8_e4m3fn), torch.tensor(1 / 16))
    int8 = QuantisedLinear(plain, torch.int8)
    layer, used = {
        "plain": (plain, weight),
        "streamed": (plain, weight.half()),
        "packed": (PackedLinear(codes), codes.decode(torch.float32)),
        "int8": (int8, int8.weight * int8.scale.t()),
    }[kind]
    rows = used.double().norm(dim=1)
    row, whole = gain(layer, torch.device("cpu"))
    assert (row, whole) == pytest.approx((float(rows.max()), float(rows.norm())), rel=1e-6)


# ------------------------------------------------------------------ where it is chosen


@pytest.mark.parametrize(
    ("capability", "dit", "vae"),
    [((7, 5), torch.float16, torch.float32), ((8, 0), torch.bfloat16, torch.bfloat16)],
    ids=["RTX 20", "A100"],
)
def test_a_gpu_without_bf16_takes_fp16(monkeypatch, capability, dit, vae):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    gpu = torch.device("cuda", 0)
    assert (choose_dtype(None, gpu, in_half=True), choose_dtype(None, gpu)) == (dit, vae)


@pytest.mark.parametrize("name", ["fp16", "float16", torch.float16])
def test_the_other_components_compute_in_fp32(tiny_folder, name):
    pipe = zimage.ZImage.load(tiny_folder, device="cpu", dtype=name)
    dtypes = {component: place.dtype for component, place in pipe.residency.places.items()}
    assert dtypes == {"text_encoder": torch.float32, "dit": torch.float16, "vae": torch.float32}
    assert pipe.encode(["a"])[0].dtype == torch.float32
    held = {weight.dtype for name, weight in pipe.dit.named_parameters() if name.endswith(("to_q.weight", "w2.weight"))}
    assert held == {torch.float16}
    assert pipe.dit.x_pad_token.dtype == pipe.dit.layers[0].adaLN_modulation[0].weight.dtype == torch.float32


def test_the_context_refiner_gives_what_it_gives_in_fp32(loud_folder):
    captions = [torch.randn(n, 64, generator=torch.Generator().manual_seed(n)) for n in (5, 40)]
    exact, ours = (zimage.load_component(loud_folder, "context_refiner", dtype=d)(captions) for d in ("fp32", "fp16"))
    for found, wanted in zip(ours, exact, strict=True):
        assert wanted.abs().max() > 65_504 > wanted.abs().median()
        assert found.dtype == torch.float32
        assert relative(found, wanted.double()) < 1e-3
