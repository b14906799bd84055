"""Attention: one call for every model here, and the packages that can compute it.

Shapes: B batch, L tokens, H query heads, G key/value heads, D head size.

The attention modules of a transformer call their attribute `attend`; `use_attention` exchanges it. (The single head of
the VAEs, of size 384 or 512, is too large for other packages and stays with PyTorch.) All backends compute
softmax(q·kᵀ/√D)·v up to rounding, except `sage`, which quantises q and k and is used only when it is named.
"""

import importlib
import importlib.util
import logging
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from zimage.errors import RequestError, install_hint, quoted
from zimage.kernels.rms_norm import HALF
from zimage.settings.loading import ATTENTIONS

log = logging.getLogger("zimage")


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


# A Mac's GPU keeps all of q·kᵀ, and PyTorch's process ends there beyond 4 GB: so many bytes are computed at a time.
SCORES = 256 << 20


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    padding: Padding | None = None,
    causal: bool = False,
    bias: Tensor | None = None,
) -> Tensor:
    """softmax(q·kᵀ/√D + bias)·v with q (B, L, H, D) and k, v (B, L, G, D), G dividing H; returns (B, L, H, D).

    A `bias` (1, 1, 1, L) takes the place of the padding.
    """
    mask = bias if padding is None else padding.mask
    if q.device.type == "mps":
        return _by_queries(q, k, v, mask, causal)
    return _attention(q, k, v, mask, causal)


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """`mask` (…, 1 or L, L) is added to the scores, or True where a query sees a key."""
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


def _by_queries(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """The same for as many queries at a time as SCORES allows; a causal piece sees the keys up to its end."""
    (B, L, H, _), keys = q.shape, k.shape[1]
    step = max(SCORES // (4 * B * H * keys), 1)  # they are summed in fp32
    if step >= L:
        return _attention(q, k, v, mask, causal)
    parts = []
    for begin in range(0, L, step):
        end = min(begin + step, L)
        if causal:
            mask = torch.ones(end - begin, end, dtype=torch.bool, device=q.device).tril(begin)
        seen = slice(None, end if causal else None)
        parts.append(_attention(q[:, begin:end], k[:, seen], v[:, seen], mask, causal=False))
    return torch.cat(parts, dim=1)


def use_attention(model: nn.Module, attend: Attend) -> None:
    """Exchange the function that the model's attention modules call."""
    for module in model.modules():
        if "attend" in vars(module):
            vars(module)["attend"] = attend


def head_size(model: nn.Module) -> int:
    """The size of the heads of the model's attention modules; 0 where none of them can be given a backend."""
    return next((vars(module)["head_dim"] for module in model.modules() if "attend" in vars(module)), 0)


# ------------------------------------------------------------------ backends


def _torch_only(kind: SDPBackend, q, k, v, padding=None, causal=False):
    """One of PyTorch's own kernels. On GPUs some know no mask (flash) or no grouped heads (efficient)."""
    with sdpa_kernel(kind):
        if q.is_cuda and kind in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            return _one_by_one(attention, q, k, v, padding, causal)
        if q.is_cuda and kind is SDPBackend.EFFICIENT_ATTENTION:
            k, v = _repeated(q, k, v)
        return attention(q, k, v, padding, causal)


def _flash(module: ModuleType, q, k, v, padding=None, causal=False):
    """FlashAttention 2 and 3 (Dao 2023, Shah et al. 2024): unequal sequences are packed, not masked."""
    if padding is None:
        return _first(module.flash_attn_func(q, k, v, causal=causal))
    packed = (padding.pack(x) for x in (q, k, v))
    ends = (padding.bounds, padding.bounds, padding.longest, padding.longest)
    return padding.unpack(_first(module.flash_attn_varlen_func(*packed, *ends, causal=causal)))


def _xformers(module: ModuleType, q, k, v, padding=None, causal=False):
    k, v = _repeated(q, k, v)  # it groups queries on an axis of its own
    if padding is None:
        return module.memory_efficient_attention(q, k, v, attn_bias=module.LowerTriangularMask() if causal else None)
    bias = module.fmha.attn_bias.BlockDiagonalMask.from_seqlens(padding.lengths, device=q.device)
    bias = bias.make_causal() if causal else bias
    packed = (padding.pack(x)[None] for x in (q, k, v))
    return padding.unpack(module.memory_efficient_attention(*packed, attn_bias=bias)[0])


def _sage(module: ModuleType, q, k, v, padding=None, causal=False):
    """SageAttention (Zhang et al. 2024) has no mask, and writes over k."""

    def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        return module.sageattn(q, k, v, tensor_layout="NHD", is_causal=causal)

    return _one_by_one(attend, q, k, v, padding, causal)


def _one_by_one(attend: Attend, q, k, v, padding, causal):
    """Sequences of unequal length, each by itself, where there is no mask."""
    if padding is None:
        return attend(q, k, v, causal=causal)
    parts = [attend(*(x[i : i + 1, :n] for x in (q, k, v)), causal=causal) for i, n in enumerate(padding.lengths)]
    return torch.cat([F.pad(part, (0, 0, 0, 0, 0, padding.longest - part.shape[1])) for part in parts])


def _repeated(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values for each query head of its own, where heads cannot be grouped: the result is the same."""
    groups = q.shape[2] // k.shape[2]
    return (k, v) if groups == 1 else (k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2))


def _first(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    """FlashAttention 3 returned (out, log-sum-exp) at first."""
    return result[0] if isinstance(result, tuple) else result


NEWEST = (99, 0)


class _Package(NamedTuple):
    module: str
    install: str
    capability: tuple[int, int]  # the least that the GPU needs
    below: tuple[int, int]  # the first on which it does not run
    run: Attend
    compiles: bool = True  # whether PyTorch's compiler can look into its calls, or has them as one operation


_PACKAGES = {
    "flash3": _Package(
        "flash_attn_interface", "FlashAttention's `hopper` folder: python setup.py install", (9, 0), (10, 0), _flash
    ),
    "flash2": _Package("flash_attn", install_hint("flash-attn", " --no-build-isolation"), (8, 0), NEWEST, _flash),
    "xformers": _Package("xformers.ops", "pip install xformers", (7, 0), NEWEST, _xformers, compiles=False),
    # The trial refuses PyPI's 1.0.6: its kernel masks keys beyond the last one out of the sum, but not of the divisor.
    "sage": _Package(
        "sageattention", "version 2 of github.com/thu-ml/SageAttention", (8, 0), NEWEST, _sage, compiles=False
    ),
}
_TORCH = {
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-math": SDPBackend.MATH,
}
AMPERE = (8, 0)  # the first with units for bf16
# Then PyTorch's own choice. That contains FlashAttention 2 already, also as xformers has it: these two would add ways
# to fail and no speed, so they are used only when they are named.
AUTOMATIC = ("flash3",)
FAILED: set[str] = set()  # those that did in this process: told once, and not tried again
TOLERANCE = 0.1  # of a trial's results, as a share of their size: sage quantises


def choose_attention(
    name: str, device: torch.device, dtype: torch.dtype, head: int = 128, compiled: bool = False
) -> tuple[str, Attend]:
    """The backend `name` as (name, function); "auto" takes the first of AUTOMATIC that runs here, else sdpa.

    It is tried on small tensors with heads of the size `head`: a package may be installed and not work. `compiled`: it
    is used in compiled blocks. Raises RequestError for a backend that was named, with what would help.
    """
    if name not in ATTENTIONS:
        raise RequestError(f"attention {quoted(name)} is not known; use {', '.join(ATTENTIONS)}", fields=("attention",))
    if name == "auto":
        return _automatic(device, dtype, head, compiled)
    if name == "sdpa":
        return name, attention
    if obstacle := _obstacle(name, device, dtype, compiled):
        raise RequestError(f"attention {quoted(name)} {obstacle}", fields=("attention",))
    try:
        return name, _tried(name, device, dtype, head)
    except BackendError as error:
        raise RequestError(f"attention {error}; or use sdpa", fields=("attention",)) from error


def _automatic(device: torch.device, dtype: torch.dtype, head: int, compiled: bool) -> tuple[str, Attend]:
    for name in AUTOMATIC if not compiled else ():  # compilers are at home with PyTorch's own
        if name not in FAILED and _obstacle(name, device, dtype, compiled) is None:
            try:
                return name, _tried(name, device, dtype, head)
            except BackendError as error:
                FAILED.add(name)
                log.warning("attention: PyTorch's own runs, since %s", error)
    return "sdpa", attention


def _obstacle(name: str, device: torch.device, dtype: torch.dtype, compiled: bool) -> str | None:
    """Why a backend cannot be used here, as far as that can be told without trying it, or None."""
    package = _PACKAGES.get(name)
    if name == "sdpa-math" or (name == "sdpa-flash" and device.type == "cpu"):
        return None
    if device.type != "cuda":
        return f"runs on NVIDIA GPUs only, not on {device.type}; use sdpa"
    if dtype not in HALF and name != "sdpa-efficient":
        return f"computes in 16 bits only, not in {str(dtype).removeprefix('torch.')}; use sdpa"
    capability, (least, below) = torch.cuda.get_device_capability(device), _capabilities(name, dtype)
    if not least <= capability < below:
        return f"does not run on a GPU of compute capability {capability[0]}.{capability[1]}; use auto"
    if package and compiled and not package.compiles:
        return "cannot be compiled; use sdpa, or leave out --compile"
    if package and not _is_installed(package.module.split(".")[0]):
        return f"is not installed: {package.install}"
    return None


def _capabilities(name: str, dtype: torch.dtype) -> tuple[tuple[int, int], tuple[int, int]]:
    """The least that a GPU must have, and the first on which a backend does not run."""
    if package := _PACKAGES.get(name):
        return package.capability, package.below
    return AMPERE if name != "sdpa-efficient" or dtype is torch.bfloat16 else (0, 0), NEWEST


def _is_installed(package: str) -> bool:
    """Whether there is something of this name to import."""
    return package in sys.modules or importlib.util.find_spec(package) is not None


class BackendError(RuntimeError):
    """A backend that is here and fails; says how, and what would help."""


def _tried(name: str, device: torch.device, dtype: torch.dtype, head: int) -> Attend:
    """A backend that has given right results. Raises BackendError, or whatever is wrong with the GPU."""
    package = _PACKAGES.get(name)
    try:
        run: Attend = (
            partial(package.run, importlib.import_module(package.module))
            if package
            else partial(_torch_only, _TORCH[name])
        )
        if device.type == "cuda":
            _try(run, *_samples(device, dtype, head))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a broken package raises errors of any kind
        if torch.cuda.is_initialized():
            torch.cuda.synchronize(device)  # raises where the GPU has failed: every call does from then on
        log.info("%s", "".join(traceback.format_exception(error)).rstrip())
        reason = (str(error).strip().splitlines() or [""])[0]
        mend = f"; install it for PyTorch {torch.__version__}: {package.install}" if package else ""
        raise BackendError(f"{name} does not work here ({type(error).__name__}: {reason}){mend}") from error
    return run


def _samples(device: torch.device, dtype: torch.dtype, head: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of two sequences, with grouped heads."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 16, heads, head, generator=generator).to(device, dtype) for heads in (2, 1, 1))
    return q, k, v


def _try(attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Call it in each way that models do, and compare. Raises whatever it raises, or ValueError."""
    unequal = Padding.of((16, 9), q.device)
    for padding, causal in ((None, False), (None, True), (unequal, False)):
        found, expected = (call(q.clone(), k.clone(), v.clone(), padding, causal) for call in (attend, attention))
        real = slice(None, 9 if padding else None)
        off, size = (x[:, real].float().norm() for x in (found - expected, expected))
        if not off <= TOLERANCE * size:  # also where it is not finite
            raise ValueError("its results differ from those of PyTorch")
