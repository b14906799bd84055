"""Attention backends. Packages that need a GPU are stood in for by modules of the same interface in plain PyTorch."""

import importlib.util
import types

import pytest
import tiny
import torch
from torch import Tensor

import zimage
from zimage.dit import ZImageDiT
from zimage.errors import RequestError
from zimage.nn import attention as module
from zimage.nn.attention import Padding, attention, choose_attention, use_attention

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
LENGTHS = (5, 9, 2)


def tensors(kv_heads: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(71)
    return tuple(torch.randn(3, 9, heads, 16, generator=generator) for heads in (4, kv_heads, kv_heads))


def varlen(q, k, v, q_bounds, k_bounds, q_longest, k_longest, causal=False) -> Tensor:
    """Packed attention as the flash-attn package defines it: (total, H, D) and where each sequence begins."""
    assert q_bounds.dtype == torch.int32
    assert q_longest == max(q_bounds.diff()).item()
    spans = list(zip(q_bounds[:-1].tolist(), q_bounds[1:].tolist(), strict=True))
    return torch.cat([attention(q[a:b][None], k[a:b][None], v[a:b][None], causal=causal)[0] for a, b in spans])


class FakeBias(list):
    """xformers' block-diagonal bias: the lengths of the packed sequences, and whether each is causal."""

    causal = False

    @classmethod
    def from_seqlens(cls, lengths):
        return cls(lengths)

    def make_causal(self):
        self.causal = True
        return self


def memory_efficient_attention(q, k, v, attn_bias=None) -> Tensor:
    assert q.shape == k.shape
    if not isinstance(attn_bias, FakeBias):
        return attention(q, k, v, causal=attn_bias is not None)
    parts = zip(*(x.split(list(attn_bias), dim=1) for x in (q, k, v)), strict=True)
    return torch.cat([attention(*part, causal=attn_bias.causal) for part in parts], dim=1)


def sageattn(q, k, v, tensor_layout="HND", is_causal=False) -> Tensor:
    assert tensor_layout == "NHD"
    return attention(q, k, v, causal=is_causal)


FAKES = {
    "flash3": types.SimpleNamespace(
        flash_attn_func=lambda q, k, v, causal: (attention(q, k, v, causal=causal), None), flash_attn_varlen_func=varlen
    ),
    "flash2": types.SimpleNamespace(
        flash_attn_func=lambda q, k, v, causal: attention(q, k, v, causal=causal), flash_attn_varlen_func=varlen
    ),
    "xformers": types.SimpleNamespace(
        memory_efficient_attention=memory_efficient_attention,
        LowerTriangularMask=object,
        fmha=types.SimpleNamespace(attn_bias=types.SimpleNamespace(BlockDiagonalMask=FakeBias)),
    ),
    "sage": types.SimpleNamespace(sageattn=sageattn),
}


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of a settable capability with settable packages, as far as choosing goes."""
    state = types.SimpleNamespace(capability=(8, 9), installed=set(FAKES))
    packages = {package.module: name for name, package in module._PACKAGES.items()}

    def find_spec(root: str) -> str | None:
        return next((p for p, name in packages.items() if p.split(".")[0] == root and name in state.installed), None)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: state.capability)
    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    monkeypatch.setattr(importlib, "import_module", lambda path: FAKES[packages[path]])
    return state


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("name", FAKES)
def test_packages_give_what_the_plain_call_gives(gpu, name, kv_heads, causal):
    """Layout, causality, grouped queries and, packed, unequal lengths."""
    gpu.capability = (9, 0)
    chosen, attend = choose_attention(name, CUDA, torch.bfloat16)
    assert chosen == name
    q, k, v = tensors(kv_heads)
    torch.testing.assert_close(attend(q, k, v, causal=causal), attention(q, k, v, causal=causal))
    padding = Padding.of(LENGTHS, CPU)
    out = attend(q, k, v, padding, causal=causal)
    assert out.shape == q.shape
    for i, n in enumerate(LENGTHS):
        alone = attention(*(x[i : i + 1, :n] for x in (q, k, v)), causal=causal)
        torch.testing.assert_close(out[i, :n], alone[0])


@pytest.mark.parametrize("name", ["sdpa", "sdpa-math", "sdpa-flash"])
def test_torch_backends(name):
    _, attend = choose_attention(name, CPU, torch.float32)
    q, k, v = tensors()
    torch.testing.assert_close(attend(q, k, v), attention(q, k, v))


def test_padding_hides_what_follows_a_sequence():
    q, k, v = tensors()
    padding = Padding.of(LENGTHS, CPU)
    before = attention(q, k, v, padding)
    for i, n in enumerate(LENGTHS):
        k[i, n:], v[i, n:] = 1e4, float("inf")
        v[i, n:] = 7e3
    after = attention(q, k, v, padding)
    for i, n in enumerate(LENGTHS):
        torch.testing.assert_close(after[i, :n], before[i, :n])
    assert Padding.of((4, 4), CPU) is None


def test_automatic_choice_goes_by_card_and_packages(gpu):
    def auto():
        return choose_attention("auto", CUDA, torch.bfloat16)[0]

    assert auto() == "flash2", "FlashAttention 3 is Hopper's"
    gpu.capability = (9, 0)
    assert auto() == "flash3"
    gpu.capability = (8, 9)
    gpu.installed = {"xformers", "sage"}
    assert auto() == "xformers"
    gpu.installed = {"sage"}
    assert auto() == "sdpa", "sage is lossy: only when named"
    gpu.installed = set(FAKES)
    assert choose_attention("auto", CUDA, torch.float32)[0] == "sdpa"
    assert choose_attention("auto", CPU, torch.bfloat16)[0] == "sdpa"


@pytest.mark.parametrize(
    ("name", "capability", "installed", "says"),
    [
        ("flash2", (8, 9), (), r'pip install "zimage-torch\[flash-attn\]" --no-build'),
        ("xformers", (8, 9), (), "pip install xformers"),
        ("sage", (8, 9), (), "pip install sageattention"),
        ("flash3", (8, 9), FAKES, "8.9; use auto"),
        ("flash2", (7, 5), FAKES, "7.5; use auto"),
    ],
)
def test_what_cannot_be_used_says_why(gpu, name, capability, installed, says):
    gpu.capability, gpu.installed = capability, set(installed)
    with pytest.raises(RequestError, match=says):
        choose_attention(name, CUDA, torch.bfloat16)


def test_named_for_the_wrong_device():
    for name in ("flash2", "sage", "sdpa-cudnn"):
        with pytest.raises(RequestError, match="NVIDIA GPUs only, not on cpu; use sdpa"):
            choose_attention(name, CPU, torch.float32)


def test_a_transformer_calls_what_it_was_given():
    """Every block, and unequal captions reach it as packed sequences."""
    model = tiny.randomised(ZImageDiT.from_config(tiny.DIT), seed=72).eval()
    generator = torch.Generator().manual_seed(73)
    captions = [torch.randn(n, tiny.DIT["cap_feat_dim"], generator=generator) for n in (7, 40)]
    inputs = torch.randn(2, 16, 4, 6, generator=generator), torch.tensor([0.9, 0.4]), captions
    with torch.no_grad():
        plain = model(*inputs)
        calls = []

        def counted(q, k, v, padding=None, causal=False):
            calls.append(padding)
            return module._flash(FAKES["flash2"], q, k, v, padding, causal)

        use_attention(model, counted)
        packed = model(*inputs)
    assert len(calls) == len(model.context_refiner) + len(model.noise_refiner) + len(model.layers)
    assert sum(padding is not None for padding in calls) == len(model.context_refiner) + len(model.layers)
    torch.testing.assert_close(packed, plain, rtol=0, atol=1e-5)


def test_the_environment_names_a_default(tiny_folder, monkeypatch):
    monkeypatch.setenv("ZIMAGE_ATTENTION", "sdpa-math")
    assert zimage.ZImage.load(tiny_folder, device="cpu", dtype="fp32").residency.attention == "sdpa-math"
    assert zimage.ZImage.load(tiny_folder, device="cpu", dtype="fp32", attention="sdpa").residency.attention == "sdpa"
    monkeypatch.setenv("ZIMAGE_ATTENTION", "flash9")
    with pytest.raises(RequestError, match="flash9"):
        zimage.ZImage.load(tiny_folder, device="cpu", dtype="fp32")
