"""Transformations of the plain DiT: int8 and fp8 products, regional compilation."""

from collections import Counter
from collections.abc import Callable
from functools import partial

import pytest
import tiny
import torch
from torch import nn

import zimage
from zimage.dit import ZImageDiT, blocks
from zimage.dit.blocks import Block
from zimage.dit.rope import Rotation
from zimage.errors import RequestError
from zimage.kernels import quantise as quantise_kernel
from zimage.nn import operand as operands
from zimage.nn.adapters import AdaptedLinear
from zimage.nn.branches import Beside
from zimage.nn.compile import compile_blocks
from zimage.nn.packed import PackedLinear, Scaled
from zimage.nn.quant import QuantisedLinear, quantisable, quantise

LAYERS_OF_A_BLOCK = 7


def build(layers: int = 6, dim: int = 96) -> ZImageDiT:
    """Heads of 32 channels; 256 channels in the feed-forward networks of 96."""
    config = {**tiny.DIT, "n_layers": layers, "dim": dim, "n_heads": dim // 32, "n_kv_heads": dim // 32}
    return tiny.randomised(ZImageDiT.from_config(config), seed=81).eval().requires_grad_(False)


def inputs(captions=(7,), size=(4, 6)):
    generator = torch.Generator().manual_seed(82)
    texts = [torch.randn(n, tiny.DIT["cap_feat_dim"], generator=generator) for n in captions]
    return torch.randn(len(captions), 16, *size, generator=generator), torch.full((len(captions),), 0.7), texts


def relative(ours, exact) -> float:
    return float((ours - exact).square().mean().sqrt() / exact.square().mean().sqrt())


@pytest.mark.parametrize(("dtype", "limit"), [(torch.int8, 0.015), (torch.float8_e4m3fn, 0.05)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_one_layer(dtype, limit, bias):
    """Near the plain product, per token: a token with huge values does not spoil the others'."""
    torch.manual_seed(83)
    linear = nn.Linear(96, 64, bias=bias)
    x = torch.randn(2, 5, 96)
    x[0, 0] *= 1000
    with torch.no_grad():
        exact, ours = linear(x), QuantisedLinear(linear, dtype)(x)
    assert ours.shape == exact.shape
    assert relative(ours, exact) < limit
    assert relative(ours[1], exact[1]) < limit


@pytest.mark.parametrize("scale", [torch.tensor(0.01), torch.ones(8, 1)], ids=["one", "per row"])
def test_scales_are_laid_out_as_row_wise_products_need_them(scale):
    """A GPU's `_scaled_mm` refused the strides (0, 0) of one scale that was expanded over all rows."""
    codes = torch.ones(8, 16).to(torch.float8_e4m3fn)
    layer = QuantisedLinear(PackedLinear(Scaled(codes, scale)), torch.float8_e4m3fn)
    assert layer.scale.shape == (1, 8)
    assert layer.scale.stride()[1] == 1


def test_a_row_of_zeros_stays_zero():
    with torch.no_grad():
        out = QuantisedLinear(nn.Linear(16, 8, bias=False), torch.int8)(torch.zeros(3, 16))
    assert out.abs().max() == 0


@pytest.mark.parametrize(("precision", "blocks", "limit"), [("int8", 8, 0.06), ("fp8", 4, 0.2)])
def test_a_whole_model(precision, blocks, limit):
    """All block products but those kept at the ends for fp8; no embedder, modulation or final layer."""
    model = build()
    exact = model(*inputs())
    rows = {id(linear.weight): linear.out_features for _, _, linear in quantisable(model, precision)}
    expected = sum(p.numel() + 4 * rows[id(p)] if id(p) in rows else 4 * p.numel() for p in model.parameters())
    quantise(model, precision)
    replaced = [name for name, m in model.named_modules() if isinstance(m, QuantisedLinear)]
    assert len(replaced) == blocks * LAYERS_OF_A_BLOCK
    assert all(name.startswith(("layers.", "noise_refiner.", "context_refiner.")) for name in replaced)
    assert not any("adaLN" in name for name in replaced)
    held = [*model.parameters(), *(b for m in model.modules() if isinstance(m, QuantisedLinear) for b in m.buffers())]
    assert sum(t.numel() * t.element_size() for t in held) == expected
    assert 0 < relative(model(*inputs()), exact) < limit
    assert not list(quantisable(model, precision))


@pytest.fixture
def counted(monkeypatch):
    """How often inputs were quantised and rotated."""
    counts = Counter()

    def counting(owner, name):
        inner = getattr(owner, name)

        def call(*arguments):
            counts[name] += 1
            return inner(*arguments)

        monkeypatch.setattr(owner, name, call)

    counting(quantise_kernel, "reference")
    counting(operands, "rotate")
    return counts


def block(kind: Callable[[nn.Linear], nn.Module] = lambda linear: QuantisedLinear(linear, torch.int8)) -> Block:
    """A modulated block of 32 channels whose products are of a kind."""
    made = tiny.randomised(Block(32, 2, 1e-5, modulated=True), seed=84).eval().requires_grad_(False)
    linears = [path for path, m in made.named_modules() if isinstance(m, nn.Linear) and "adaLN" not in path]
    for path in linears:
        made.set_submodule(path, kind(made.get_submodule(path)))
    return made


def run(made: Block, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(85)
    x, time = torch.randn(2, 5, 32, generator=generator), torch.randn(2, 32, generator=generator)
    angles = torch.randn(1, 5, 8, generator=generator)
    turn = Rotation(angles.cos(), angles.sin())
    return made.to(dtype)(x.to(dtype), turn, None, made.modulate(time.to(dtype)))


def test_an_input_is_quantised_once_for_all_its_products(counted):
    """q, k and v; to_out; w1 and w3; w2."""
    made = block()
    counted.clear()
    run(made)
    assert counted == {"reference": 4}


def rotated(linear: nn.Linear) -> QuantisedLinear:
    codes, scale, _ = quantise_kernel.quantise_rows(linear.weight, torch.int8)
    return QuantisedLinear(PackedLinear(Scaled(codes, scale, rotated=4)), torch.int8)


def test_an_input_is_rotated_once_for_all_its_products(counted):
    made = block(lambda linear: rotated(linear) if linear.in_features % 4 == 0 else linear)
    counted.clear()
    run(made)
    assert counted == {"reference": 3, "rotate": 3}  # w2 has 85 columns


def test_layers_with_adapters_beside_them_take_plain_inputs(counted):
    """Of q, k and v, one that differs makes all three round for themselves."""
    made = block()
    made.attention.to_k = AdaptedLinear(made.attention.to_k, Beside())
    counted.clear()
    out = run(made)
    assert counted == {"reference": 6}
    assert torch.equal(out, run(block()))


@pytest.mark.parametrize("precision", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_shared_inputs_keep_the_bits_in_fp32_and_round_once_in_bf16(precision, monkeypatch):
    made = partial(block, lambda linear: QuantisedLinear(linear, precision))
    shared = [run(made(), dtype) for dtype in (torch.float32, torch.bfloat16)]
    monkeypatch.setattr(blocks, "common_form", lambda *layers: None)
    alone = [run(made(), dtype) for dtype in (torch.float32, torch.bfloat16)]
    assert torch.equal(shared[0], alone[0])
    assert relative(shared[1], shared[0]) <= 1.02 * relative(alone[1], shared[0])


@pytest.mark.parametrize(("precision", "blocks"), [("int8", 8), ("fp8", 4)])
def test_layers_whose_sizes_no_product_takes_stay_as_they_are(precision, blocks):
    """64 channels, and 170 in the feed-forward networks."""
    model = build(dim=64)
    names = [name for _, name, _ in quantisable(model, precision)]
    assert Counter(names) == dict.fromkeys(("to_q", "to_k", "to_v", "0"), blocks)
    quantise(model, precision)
    assert model(*inputs()).isfinite().all()


def test_through_the_pipeline(tiny_folder):
    plain = zimage.ZImage.load(tiny_folder, device="cpu", dtype="fp32")
    coarse = zimage.ZImage.load(tiny_folder, device="cpu", dtype="fp32", precision="int8")
    assert coarse.planner.sizes["dit"].weights < plain.planner.sizes["dit"].weights
    settings = {"seed": 1, "width": 64, "height": 64, "steps": 2}
    result = coarse.generate("a", **settings)
    assert result.metadata[0]["precision"] == "int8"
    assert result.images[0].tobytes() != plain.generate("a", **settings).images[0].tobytes()


def test_fp8_needs_a_card_that_has_it(tiny_folder, monkeypatch, caplog):
    zimage.ZImage.load(tiny_folder, device="cpu", dtype="fp32", precision="fp8")
    assert "no faster" in caplog.text
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 6))
    from zimage.nn.quant import check_precision

    with pytest.raises(RequestError, match=r"8\.9"):
        check_precision("fp8", torch.device("cuda"), torch.bfloat16)


def test_compiled_blocks_serve_every_length():
    """One compilation per kind of block; a prompt of another length or another size adds none."""
    model, compiled = build(layers=3), build(layers=3)
    compile_blocks(compiled)
    counters = torch._dynamo.utils.counters
    counters.clear()
    torch.testing.assert_close(compiled(*inputs()), model(*inputs()), rtol=0, atol=1e-5)
    first = counters["stats"]["unique_graphs"]
    for other in (inputs((40,)), inputs((70,)), inputs((7,), (8, 10)), inputs((100,), (2, 4))):
        torch.testing.assert_close(compiled(*other), model(*other), rtol=0, atol=1e-5)
    assert first <= 3
    assert counters["stats"]["unique_graphs"] == first
    assert not counters["graph_break"]
