"""Attention: one call for every model here, and the packages that can compute it.

Shapes: B batch, L tokens, H query heads, G key/value heads, D head size.

The attention modules of a transformer call their attribute `attend`; `use_attention` exchanges it. (The single head of
the VAEs, of size 384 or 512, is too large for other packages and stays with PyTorch.) All backends compute
softmax(q·kᵀ/√D)·v up to rounding, except `sage`, which quantises q and k and is used only when it is named.
"""

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from zimage.errors import RequestError, install_hint, quoted
from zimage.settings.declared import ATTENTIONS


class Padding(NamedTuple):
    """Sequences of unequal length in one batch: each is real up to its length, and nothing may attend to the rest."""

    mask: Tensor  # (B, 1, 1, L), True on real keys
    indices: Tensor  # (total,), positions of the real tokens in the flattened batch
    bounds: Tensor  # (B + 1,) int32, where each sequence begins and ends among them
    longest: int
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> "Padding | None":
        """None when all lengths are equal: the unmasked kernels are much faster."""
        longest = max(lengths)
        if min(lengths) == longest:
            return None
        real = torch.arange(longest) < torch.tensor(lengths)[:, None]
        bounds = torch.tensor([0, *lengths]).cumsum(0).int()
        mask, indices = real[:, None, None].to(device), real.flatten().nonzero()[:, 0].to(device)
        return cls(mask, indices, bounds.to(device), longest, tuple(lengths))

    def pack(self, x: Tensor) -> Tensor:
        """(B, L, H, D) → (total, H, D), real tokens only."""
        return x.flatten(0, 1)[self.indices]

    def unpack(self, packed: Tensor) -> Tensor:
        """(total, H, D) → (B, L, H, D), zeros on padding."""
        B = len(self.lengths)
        out = packed.new_zeros(B * self.longest, *packed.shape[1:])
        out[self.indices] = packed
        return out.unflatten(0, (B, self.longest))


Attend = Callable[..., Tensor]


def attention(q: Tensor, k: Tensor, v: Tensor, padding: Padding | None = None, causal: bool = False) -> Tensor:
    """softmax(q·kᵀ/√D)·v with q (B, L, H, D) and k, v (B, L, G, D), G dividing H; returns (B, L, H, D)."""
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=None if padding is None else padding.mask,
        is_causal=causal,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


def use_attention(model: nn.Module, attend: Attend) -> None:
    """Exchange the function that the model's attention modules call."""
    for module in model.modules():
        if "attend" in vars(module):
            vars(module)["attend"] = attend


# ------------------------------------------------------------------ backends


def _torch_only(kind: SDPBackend, q, k, v, padding=None, causal=False):
    with sdpa_kernel(kind):
        return attention(q, k, v, padding, causal)


def _flash(module: ModuleType, q, k, v, padding=None, causal=False):
    """FlashAttention 2 and 3 (Dao 2023, Shah et al. 2024): unequal sequences are packed, not masked."""
    if padding is None:
        return _first(module.flash_attn_func(q, k, v, causal=causal))
    packed = (padding.pack(x) for x in (q, k, v))
    ends = (padding.bounds, padding.bounds, padding.longest, padding.longest)
    return padding.unpack(_first(module.flash_attn_varlen_func(*packed, *ends, causal=causal)))


def _xformers(module: ModuleType, q, k, v, padding=None, causal=False):
    if q.shape[2] != k.shape[2]:  # it groups queries on an axis of its own; repeated keys give the same result
        k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    if padding is None:
        return module.memory_efficient_attention(q, k, v, attn_bias=module.LowerTriangularMask() if causal else None)
    bias = module.fmha.attn_bias.BlockDiagonalMask.from_seqlens(padding.lengths)
    bias = bias.make_causal() if causal else bias
    packed = (padding.pack(x)[None] for x in (q, k, v))
    return padding.unpack(module.memory_efficient_attention(*packed, attn_bias=bias)[0])


def _sage(module: ModuleType, q, k, v, padding=None, causal=False):
    """SageAttention (Zhang et al. 2024) has no mask: unequal sequences run one by one."""
    if padding is None:
        return module.sageattn(q, k, v, tensor_layout="NHD", is_causal=causal)
    parts = [
        module.sageattn(*(x[i : i + 1, :n] for x in (q, k, v)), tensor_layout="NHD", is_causal=causal)
        for i, n in enumerate(padding.lengths)
    ]
    return torch.cat([F.pad(part, (0, 0, 0, 0, 0, padding.longest - part.shape[1])) for part in parts])


def _first(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    """FlashAttention 3 returned (out, log-sum-exp) at first."""
    return result[0] if isinstance(result, tuple) else result


class _Package(NamedTuple):
    module: str
    install: str
    capability: tuple[int, int]  # the least that the GPU needs
    below: tuple[int, int]  # the first on which it does not run
    run: Attend


_PACKAGES = {
    "flash3": _Package(
        "flash_attn_interface", "FlashAttention's `hopper` folder: python setup.py install", (9, 0), (10, 0), _flash
    ),
    "flash2": _Package("flash_attn", install_hint("flash-attn", " --no-build-isolation"), (8, 0), (99, 0), _flash),
    "xformers": _Package("xformers.ops", "pip install xformers", (7, 0), (99, 0), _xformers),
    "sage": _Package("sageattention", "pip install sageattention", (8, 0), (99, 0), _sage),
}
_TORCH = {
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-math": SDPBackend.MATH,
}
AUTOMATIC = ("flash3", "flash2", "xformers")  # in this order, then PyTorch's own choice


def choose_attention(name: str, device: torch.device, dtype: torch.dtype) -> tuple[str, Attend]:
    """The backend `name` as (name, function); "auto" takes the first of AUTOMATIC that runs here, else sdpa.

    Raises RequestError, with the command that installs a missing package.
    """
    if name not in ATTENTIONS:
        raise RequestError(f"attention {quoted(name)} is not known; use {', '.join(ATTENTIONS)}", fields=("attention",))
    if name == "auto":
        runs = [name for name in AUTOMATIC if _obstacle(name, device, dtype) is None]
        name = runs[0] if runs else "sdpa"
    if name == "sdpa":
        return name, attention
    if name in _TORCH:
        if device.type != "cuda" and name in ("sdpa-cudnn", "sdpa-efficient"):
            text = f"attention {quoted(name)} runs on NVIDIA GPUs only, not on {device.type}; use sdpa"
            raise RequestError(text, fields=("attention",))
        return name, partial(_torch_only, _TORCH[name])
    obstacle = _obstacle(name, device, dtype)
    if obstacle:
        raise RequestError(f"attention {quoted(name)} {obstacle}", fields=("attention",))
    package = _PACKAGES[name]
    return name, partial(package.run, importlib.import_module(package.module))


def _obstacle(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a package cannot be used here, or None."""
    package = _PACKAGES[name]
    if device.type != "cuda":
        return f"runs on NVIDIA GPUs only, not on {device.type}; use sdpa"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"computes in 16 bits only, not in {str(dtype).removeprefix('torch.')}; use sdpa"
    capability = torch.cuda.get_device_capability(device)
    if not package.capability <= capability < package.below:
        return f"does not run on a GPU of compute capability {capability[0]}.{capability[1]}; use auto"
    if importlib.util.find_spec(package.module.split(".")[0]) is None:
        return f"is not installed: {package.install}"
    return None
