"""Attention backends. Packages that need a GPU are stood in for by modules of the same interface in plain PyTorch."""

import importlib.util
import types
from functools import partial

import broken
import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import zimage
from zimage.dit import ZImageDiT
from zimage.errors import RequestError
from zimage.nn import attention as module
from zimage.nn.attention import Padding, attention, choose_attention, head_size, use_attention
from zimage.text.qwen3 import KVCache, Qwen3
from zimage.vae import AutoencoderKL

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
    def from_seqlens(cls, lengths, device):
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
    samples = module._samples
    monkeypatch.setattr(module, "_samples", lambda device, *rest: samples(CPU, *rest))
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


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("how", ["full", "causal", "padded"])
def test_queries_in_pieces_give_the_same(monkeypatch, how, kv_heads):
    """As on a Mac's GPU, which has no kernel that forgets scores."""
    q, k, v = tensors(kv_heads)
    mask, causal = Padding.of(LENGTHS, CPU).mask if how == "padded" else None, how == "causal"
    whole = module._attention(q, k, v, mask, causal)
    for rows in (1, 4, 5, 9):
        monkeypatch.setattr(module, "SCORES", 4 * 3 * 4 * 9 * rows)
        torch.testing.assert_close(module._by_queries(q, k, v, mask, causal), whole)


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

    assert auto() == "sdpa", "FlashAttention 3 is Hopper's, and the others give nothing that PyTorch has not"
    gpu.capability = (9, 0)
    assert auto() == "flash3"
    assert choose_attention("auto", CUDA, torch.bfloat16, compiled=True)[0] == "sdpa"
    gpu.installed = {"flash2", "xformers", "sage"}
    assert auto() == "sdpa"
    gpu.installed = set(FAKES)
    assert choose_attention("auto", CUDA, torch.float32)[0] == "sdpa"
    assert choose_attention("auto", CPU, torch.bfloat16)[0] == "sdpa"


@pytest.mark.parametrize(
    ("name", "capability", "installed", "says"),
    [
        ("flash2", (8, 9), (), r'pip install "zimage-torch\[flash-attn\]" --no-build'),
        ("xformers", (8, 9), (), "pip install xformers"),
        ("sage", (8, 9), (), "version 2 of github.com/thu-ml/SageAttention"),
        ("flash3", (8, 9), FAKES, "8.9; use auto"),
        ("flash2", (7, 5), FAKES, "7.5; use auto"),
        ("sdpa-flash", (7, 5), (), "7.5; use auto"),
        ("sdpa-cudnn", (7, 5), (), "7.5; use auto"),
        ("sdpa-efficient", (7, 5), (), "7.5; use auto"),
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


@pytest.mark.parametrize("name", ["flash2", "xformers", "sage", "sdpa-flash", "sdpa-cudnn"])
def test_what_computes_in_16_bits_says_so(gpu, name):
    with pytest.raises(RequestError, match="16 bits only, not in float32; use sdpa"):
        choose_attention(name, CUDA, torch.float32)


@pytest.mark.parametrize("name", ["xformers", "sage"])
def test_what_cannot_be_compiled_says_so(gpu, name):
    with pytest.raises(RequestError, match="cannot be compiled; use sdpa, or leave out --compile"):
        choose_attention(name, CUDA, torch.bfloat16, compiled=True)
    assert choose_attention("flash2", CUDA, torch.bfloat16, compiled=True)[0] == "flash2"


class Strict:
    """PyTorch's attention as its kernels for GPUs are: flash and cuDNN without a mask, efficient without groups."""

    def __init__(self, kind):
        self.kind = kind

    def __call__(self, q, k, v, attn_mask=None, is_causal=False, enable_gqa=False):
        if (enable_gqa and "efficient" in self.kind) or (attn_mask is not None and "efficient" not in self.kind):
            raise RuntimeError("No available kernel. Aborting execution.")
        with sdpa_kernel(SDPBackend.MATH):
            return REAL(q, k, v, attn_mask=attn_mask, is_causal=is_causal, enable_gqa=enable_gqa)


REAL = F.scaled_dot_product_attention


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("name", ["sdpa-flash", "sdpa-cudnn", "sdpa-efficient"])
def test_pytorchs_own_kernels_are_asked_only_for_what_they_have(gpu, monkeypatch, name, kv_heads):
    """They once ended a batch of unequal captions, and grouped heads, with "No available kernel"."""
    monkeypatch.setattr(Tensor, "is_cuda", True)
    monkeypatch.setattr(module, "_tried", lambda name, *_: partial(module._torch_only, module._TORCH[name]))
    _, attend = choose_attention(name, CUDA, torch.bfloat16)
    q, k, v = tensors(kv_heads)
    padding = Padding.of(LENGTHS, CPU)
    expected = attention(q, k, v, padding), attention(q, k, v, causal=True)
    monkeypatch.setattr(F, "scaled_dot_product_attention", Strict(name))
    found = attend(q, k, v, padding), attend(q, k, v, causal=True)
    torch.testing.assert_close(found[1], expected[1])
    for i, n in enumerate(LENGTHS):
        torch.testing.assert_close(found[0][i, :n], expected[0][i, :n])


def test_a_kernel_of_pytorchs_own_that_does_not_run_is_refused(gpu, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("No available kernel. Aborting execution.\nand more")

    monkeypatch.setattr(module, "_torch_only", fail)
    with pytest.raises(
        RequestError, match=r"sdpa-cudnn does not work here \(RuntimeError: No available.*; or use sdpa"
    ):
        choose_attention("sdpa-cudnn", CUDA, torch.bfloat16)


@pytest.fixture
def hopper(monkeypatch, tmp_path):
    """A GPU for FlashAttention 3, as far as choosing goes, and a folder for packages."""
    samples = module._samples
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(module, "_samples", lambda device, *rest: samples(CPU, *rest))
    monkeypatch.setattr(module, "FAILED", set())
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    broken.forget(*(package.module.split(".")[0] for package in module._PACKAGES.values()))


@pytest.mark.parametrize("kind", broken.KINDS)
@pytest.mark.parametrize("name", FAKES)
def test_a_package_that_is_here_and_fails(hopper, caplog, name, kind):
    """Named, it is refused in one line; nothing that `auto` finds on a machine can end a render."""
    package = module._PACKAGES[name].module
    source, tells = broken.KINDS[kind]
    broken.write(hopper, package.split(".")[0], source)
    if "." in package and source is not None:
        (hopper / package.replace(".", "/")).with_suffix(".py").write_text(source)
        tells = tells if source else "AttributeError"
    with pytest.raises(RequestError) as refused:
        choose_attention(name, CUDA, torch.bfloat16)
    assert tells in str(refused.value) or "ModuleNotFoundError" in str(refused.value)
    assert "install" in str(refused.value)
    assert str(refused.value).endswith("; or use sdpa")
    caplog.clear()
    assert choose_attention("auto", CUDA, torch.bfloat16) == ("sdpa", attention)
    assert len(caplog.messages) == (1 if name == "flash3" else 0)
    assert all("\n" not in line and tells in line for line in caplog.messages)


def test_it_is_tried_with_the_models_own_heads(hopper, tiny_folder):
    """SageAttention takes heads of 64, 96 or 128 only, and said so at the first block."""
    source = """def sageattn(q, k, v, tensor_layout, is_causal):
    from zimage.nn.attention import attention
    assert q.shape[-1] in (64, 96, 128), "headdim should be in [64, 96, 128]"
    return attention(q, k, v, causal=is_causal)"""
    broken.write(hopper, "sageattention", source)
    assert choose_attention("sage", CUDA, torch.bfloat16, head=96)[0] == "sage"
    with pytest.raises(RequestError, match=r"sage does not work here \(AssertionError: headdim should be in"):
        choose_attention("sage", CUDA, torch.bfloat16, head=32)
    assert head_size(ZImageDiT.from_config(tiny.DIT)) == sum(tiny.DIT["axes_dims"])
    assert head_size(AutoencoderKL.from_config(tiny.KL)) == 0


def test_a_gpu_that_fails_in_the_trial_is_not_a_broken_package(hopper, monkeypatch):
    def lost(device):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    broken.write(hopper, "flash_attn_interface", "")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(torch.AcceleratorError):
        choose_attention("auto", CUDA, torch.bfloat16)


def test_the_whole_reason_is_told_on_request(hopper, caplog):
    broken.write(hopper, "flash_attn_interface", "raise RuntimeError('first\\nsecond')")
    caplog.set_level("INFO", "zimage")
    choose_attention("auto", CUDA, torch.bfloat16)
    assert any("Traceback" in line and "second" in line for line in caplog.messages)


def test_writing_is_safe_from_packages_that_write_over_their_inputs():
    """SageAttention 1 subtracts the mean from k in place; with a cache k is the cache, and the text went wrong."""
    model = tiny.randomised(Qwen3.from_config(tiny.QWEN), seed=74).eval()
    ids = torch.tensor([[5, 3, 9, 2]])

    def logits():
        cache = KVCache(model.config, 8, model.model.norm.weight)
        with torch.no_grad():
            return [model.next_logits(part, cache) for part in (ids, ids[:, :1], ids[:, 1:2])]

    def careless(q, k, v, padding=None, causal=False):
        result = attention(q, k, v, padding, causal)
        for x in (q, k, v):
            x.sub_(7)
        return result

    plain = logits()
    use_attention(model, careless)
    for found, expected in zip(logits(), plain, strict=True):
        assert torch.equal(found, expected)


def test_a_render_is_safe_from_packages_that_write_over_their_inputs():
    model = tiny.randomised(ZImageDiT.from_config(tiny.DIT), seed=72).eval()
    generator = torch.Generator().manual_seed(73)
    captions = [torch.randn(n, tiny.DIT["cap_feat_dim"], generator=generator) for n in (7, 40)]
    inputs = torch.randn(2, 16, 4, 6, generator=generator), torch.tensor([0.9, 0.4]), captions

    def careless(q, k, v, padding=None, causal=False):
        result = attention(q, k, v, padding, causal)
        for x in (q, k, v):
            x.fill_(float("nan"))
        return result

    with torch.no_grad():
        plain = model(*inputs)
        use_attention(model, careless)
        assert torch.equal(model(*inputs), plain)


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
