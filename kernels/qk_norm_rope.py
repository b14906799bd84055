"""RMS norm of every query and key head, then rotary position embedding: on interleaved pairs, the DiT's form, and on
halves, the text encoder's.

Shapes: B batch, L tokens, H query heads, G key heads, D head size.
"""

import torch
from torch import Tensor

from zimage.kernels.backend import Spec, bytes_of, choose, enqueue, jit, power_of_two, tl
from zimage.kernels.rms_norm import HALF, plain, scaled_by_rms


def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Normalise and rotate q (B, L, H, D) and k (B, L, G, D), which may be views of a packed tensor and overwritten.

    Weights (D,); `cos`, `sin` (B or 1, L, D/2) fp32. The norm (Zhang & Sennrich 2019) is weight · x / √(mean(x²) + eps)
    per head; each pair (x₂ₖ, x₂ₖ₊₁) then turns by its angle (Su et al. 2021). fp32 inside.
    """
    run = choose(launch, reference, q, k, q_weight, k_weight) if _is_even(q) else reference
    return run(q, k, q_weight, k_weight, cos, sin, eps)


def qk_norm_rope_halves(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """As `qk_norm_rope` with cos, sin (L, D/2) for the pairs (xₖ, xₖ₊D/₂): GPT-NeoX's order, which Qwen3 has."""
    run = choose(launch_halves, reference_halves, q, k, q_weight, k_weight) if _is_even(q) else reference_halves
    return run(q, k, q_weight, k_weight, cos, sin, eps)


def _is_even(q: Tensor) -> bool:
    """Whether a head has a size that the kernel takes: it reads both members of all pairs without a mask."""
    return q.shape[-1] == power_of_two(q.shape[-1])


def reference(q, k, q_weight, k_weight, cos, sin, eps):
    return tuple(_norm_turned(x, w, cos, sin, eps) for x, w in ((q, q_weight), (k, k_weight)))


def reference_halves(q, k, q_weight, k_weight, cos, sin, eps):
    return tuple(rotate_halves(plain(x, w, eps), cos, sin) for x, w in ((q, q_weight), (k, k_weight)))


def _norm_turned(x, weight, cos, sin, eps):
    normed = scaled_by_rms(x, weight.float(), eps) if x.dtype in HALF else plain(x, weight, eps)
    return rotate_pairs(normed, cos, sin).to(x.dtype)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of `x` (B, L, H, D) by its angle, in fp32 as the official code does."""
    pairs, cos, sin = x.float().unflatten(-1, (-1, 2)), cos.unsqueeze(2), sin.unsqueeze(2)
    if not torch.compiler.is_compiling():  # one pass; compilers optimise the plain form only
        return torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin)).flatten(-2)
    even, odd = pairs.unbind(-1)  # each (B, L, H, D/2)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (xₖ, xₖ₊D/₂) of x (B, L, H, D) by its angle, in fp32, cast back."""
    (first, second), cos, sin = x.float().chunk(2, dim=-1), cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


@jit
def _norm_rope(
    x_ptr,
    weight_ptr,
    cos,
    sin,
    head_stride,
    heads,
    EPS: tl.constexpr,
    HALVES: tl.constexpr,
    D: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """All heads of one token, in place."""
    head, pair, dim = tl.arange(0, BLOCK_H), tl.arange(0, D // 2), tl.arange(0, D)
    row, present = x_ptr + head[:, None] * head_stride, head[:, None] < heads
    if HALVES:
        first = tl.load(row + pair[None, :], mask=present, other=0.0).to(tl.float32)
        second = tl.load(row + D // 2 + pair[None, :], mask=present, other=0.0).to(tl.float32)
        first_weight, second_weight = tl.load(weight_ptr + pair), tl.load(weight_ptr + D // 2 + pair)
    else:  # pairs by split and join, not by strided loads: global accesses stay 128 bits wide
        x = tl.load(row + dim[None, :], mask=present, other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(x, (BLOCK_H, D // 2, 2)))
        first_weight, second_weight = tl.split(tl.reshape(tl.load(weight_ptr + dim), (D // 2, 2)))
    scale = tl.rsqrt(tl.sum(first * first + second * second, axis=1) / D + EPS)[:, None]
    first = first * scale * first_weight.to(tl.float32)[None, :]
    second = second * scale * second_weight.to(tl.float32)[None, :]
    turned, other = first * cos - second * sin, first * sin + second * cos
    if HALVES:
        tl.store(row + pair[None, :], turned.to(x_ptr.dtype.element_ty), mask=present)
        tl.store(row + D // 2 + pair[None, :], other.to(x_ptr.dtype.element_ty), mask=present)
    else:
        joined = tl.reshape(tl.join(turned, other), (BLOCK_H, D))
        tl.store(row + dim[None, :], joined.to(x_ptr.dtype.element_ty), mask=present)


@jit
def _kernel(
    q_ptr,
    k_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    q_batch_stride,
    q_token_stride,
    q_head_stride,
    k_batch_stride,
    k_token_stride,
    k_head_stride,
    table_batch_stride,
    q_heads,
    k_heads,
    EPS: tl.constexpr,
    HALVES: tl.constexpr,
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program per token, whose row of the table is read once for all heads of q and k."""
    token, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row = batch * table_batch_stride + token * (D // 2) + tl.arange(0, D // 2)
    cos, sin = tl.load(cos_ptr + row)[None, :], tl.load(sin_ptr + row)[None, :]
    q_place = q_ptr + batch * q_batch_stride + token * q_token_stride
    k_place = k_ptr + batch * k_batch_stride + token * k_token_stride
    _norm_rope(q_place, q_weight_ptr, cos, sin, q_head_stride, q_heads, EPS, HALVES, D, BLOCK_Q)
    _norm_rope(k_place, k_weight_ptr, cos, sin, k_head_stride, k_heads, EPS, HALVES, D, BLOCK_K)


def launch(q, k, q_weight, k_weight, cos, sin, eps):
    return _launched(q, k, q_weight, k_weight, cos, sin, eps, False)


def launch_halves(q, k, q_weight, k_weight, cos, sin, eps):
    return _launched(q, k, q_weight, k_weight, cos[None], sin[None], eps, True)


def _launched(q, k, q_weight, k_weight, cos, sin, eps, halves):
    B, L, _, D = q.shape
    cos, sin = cos.contiguous(), sin.contiguous()
    strides = *q.stride()[:3], *k.stride()[:3], cos.stride(0) if len(cos) > 1 else 0
    heads = q.shape[2], k.shape[2]
    constants = eps, halves, D, *map(power_of_two, heads)
    enqueue(_kernel, (L, B), q, k, q_weight, k_weight, cos, sin, *strides, *heads, *constants, num_warps=4)
    return q, k


def _inputs(make, B: int, L: int, H: int, D: int, packed: int = 0, tables: int = 1) -> tuple:
    qkv = make(B, L, 3, H, D)
    q, k = (qkv[:, :, 0], qkv[:, :, 1]) if packed else (make(B, L, H, D), make(B, L, H, D))
    angle = make(tables, L, D // 2).float() * 3
    return q, k, make(D), make(D), angle.cos(), angle.sin(), 1e-5


def _halves_inputs(make, B: int, L: int, H: int, G: int, D: int) -> tuple:
    angle = make(L, D // 2).float() * 3
    return make(B, L, H, D), make(B, L, G, D), make(D), make(D), angle.cos(), angle.sin(), 1e-6


SPEC = Spec(
    name="qk_norm_rope",
    reference=reference,
    launch=launch,
    inputs=_inputs,
    cases=(
        {"B": 1, "L": 5, "H": 3, "D": 16, "packed": 1},
        {"B": 2, "L": 3, "H": 4, "D": 64, "tables": 2},
        {"B": 1, "L": 2, "H": 30, "D": 128},
    ),
    model={"B": 1, "L": 4128, "H": 30, "D": 128},
    least_bytes=lambda q, k, wq, wk, cos, sin, eps: 2 * bytes_of(q, k) + bytes_of(wq, wk, cos, sin),
    in_place=(0, 1),
)
HALVES_SPEC = Spec(
    name="qk_norm_rope_halves",
    reference=reference_halves,
    launch=launch_halves,
    inputs=_halves_inputs,
    cases=(
        {"B": 1, "L": 5, "H": 6, "G": 3, "D": 16},
        {"B": 2, "L": 3, "H": 4, "G": 1, "D": 64},
        {"B": 1, "L": 1, "H": 32, "G": 8, "D": 128},
    ),
    model={"B": 1, "L": 4096, "H": 32, "G": 8, "D": 128},
    least_bytes=lambda q, k, wq, wk, cos, sin, eps: 2 * bytes_of(q, k) + bytes_of(wq, wk, cos, sin),
    in_place=(0, 1),
)
