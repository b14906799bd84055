"""RMS norm of every query and key head, then rotary position embedding on halves: the text encoder's form.

(The DiT rotates interleaved pairs: see `qk_norm_rope.py`.)
Shapes: B batch, L tokens, H query heads, G key heads, D head size.
"""

import torch
from torch import Tensor

from zimage.kernels.backend import Spec, bytes_of, choose, enqueue, jit, power_of_two, tl
from zimage.kernels.rms_norm import plain


def qk_norm_rope_halves(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Normalise and rotate q (B, L, H, D) and k (B, L, G, D), which may be overwritten.

    Weights (D,); `cos`, `sin` (L, D/2) fp32. The norm (Zhang & Sennrich 2019) is weight · x / √(mean(x²) + eps) per
    head; each pair (xₖ, xₖ₊D/₂) then turns by its angle (Su et al. 2021, in the order of GPT-NeoX). fp32 inside.
    """
    even_blocks = q.shape[-1] == power_of_two(q.shape[-1])  # the kernel loads the halves of a head without a mask
    run = choose(launch, reference, q, k, q_weight, k_weight) if even_blocks else reference
    return run(q, k, q_weight, k_weight, cos, sin, eps)


def reference(q, k, q_weight, k_weight, cos, sin, eps):
    return tuple(rotate_halves(plain(x, w, eps), cos, sin) for x, w in ((q, q_weight), (k, k_weight)))


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (xₖ, xₖ₊D/₂) of x (B, L, H, D) by its angle, in fp32, cast back."""
    (first, second), cos, sin = x.float().chunk(2, dim=-1), cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


@jit
def _norm_rope(
    x_ptr, weight_ptr, cos, sin, head_stride, heads, EPS: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr
):
    """All heads of one token, in place."""
    head, dim = tl.arange(0, BLOCK_H), tl.arange(0, D // 2)
    place = x_ptr + head[:, None] * head_stride + dim[None, :]
    present = head[:, None] < heads
    first = tl.load(place, mask=present, other=0.0).to(tl.float32)
    second = tl.load(place + D // 2, mask=present, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(first * first + second * second, axis=1) / D + EPS)[:, None]
    first *= scale * tl.load(weight_ptr + dim).to(tl.float32)[None, :]
    second *= scale * tl.load(weight_ptr + D // 2 + dim).to(tl.float32)[None, :]
    tl.store(place, (first * cos - second * sin).to(x_ptr.dtype.element_ty), mask=present)
    tl.store(place + D // 2, (second * cos + first * sin).to(x_ptr.dtype.element_ty), mask=present)


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
    q_heads,
    k_heads,
    EPS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program per token, whose row of the table is read once for all heads of q and k."""
    token, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row = token * (D // 2) + tl.arange(0, D // 2)
    cos, sin = tl.load(cos_ptr + row)[None, :], tl.load(sin_ptr + row)[None, :]
    q_place = q_ptr + batch * q_batch_stride + token * q_token_stride
    k_place = k_ptr + batch * k_batch_stride + token * k_token_stride
    _norm_rope(q_place, q_weight_ptr, cos, sin, q_head_stride, q_heads, EPS, D, BLOCK_Q)
    _norm_rope(k_place, k_weight_ptr, cos, sin, k_head_stride, k_heads, EPS, D, BLOCK_K)


def launch(q, k, q_weight, k_weight, cos, sin, eps):
    B, L, _, D = q.shape
    cos, sin = cos.contiguous(), sin.contiguous()
    heads = q.shape[2], k.shape[2]
    strides, blocks = (*q.stride()[:3], *k.stride()[:3]), map(power_of_two, heads)
    enqueue(_kernel, (L, B), q, k, q_weight, k_weight, cos, sin, *strides, *heads, eps, D, *blocks, num_warps=4)
    return q, k


def _inputs(make, B: int, L: int, H: int, G: int, D: int) -> tuple:
    angle = make(L, D // 2).float() * 3
    return make(B, L, H, D), make(B, L, G, D), make(D), make(D), angle.cos(), angle.sin(), 1e-6


SPEC = Spec(
    name="qk_norm_rope_halves",
    reference=reference,
    launch=launch,
    inputs=_inputs,
    cases=(
        {"B": 1, "L": 5, "H": 6, "G": 3, "D": 16},
        {"B": 2, "L": 3, "H": 4, "G": 1, "D": 64},
        {"B": 1, "L": 1, "H": 32, "G": 8, "D": 128},
    ),
    model={"B": 1, "L": 4096, "H": 32, "G": 8, "D": 128},
    least_bytes=lambda q, k, wq, wk, cos, sin, eps: 2 * bytes_of(q, k) + bytes_of(wq, wk, cos, sin),
    in_place=(0, 1),
)
