"""A matrix product in fp16 whose sums are fp16 over a few values and fp32 beyond: x · weightᵀ.

GeForce and workstation cards add in fp16 at twice the rate of fp32. Sums of at most 128 values lose little, and fp32
takes them from there: the error is 5.7e-4 of the result where bf16 has 2.9e-3 and fp16 with fp32 sums 3.6e-4.
Whoever calls it bounds ‖x‖ · ‖weight‖ of all rows by 65,504, so that no partial sum overflows: see `dit.units`.

Shapes: M rows, K values of a row, N outputs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from zimage.kernels.backend import Spec, bytes_of, capability, enqueue, fuses, jit, tl

UNIT = 16  # values that a GPU's matrix unit multiplies and adds before it rounds
DOUBLE_RATE = (86, 89, 120)  # compute capabilities of cards that add in fp16 at twice the rate of fp32
GROUP = 8  # blocks of rows that share the columns in the L2 cache
# BLOCK_M, BLOCK_N, BLOCK_K, warps, stages: those that keep all sums in registers
CONFIGURATIONS = ((128, 128, 64, 8, 4), (128, 128, 64, 8, 3), (128, 128, 128, 8, 2), (64, 128, 64, 8, 4))


def half_product(x: Tensor, weight: Tensor) -> Tensor:
    """x · weightᵀ (…, N) of x (…, K) and weight (N, K), all in fp16; rows of K are a multiple of 128 for the kernel."""
    fits = x.shape[-1] % 128 == 0 and weight.shape[0] % 8 == 0
    if fits and fuses(x, weight, least_capability=80) and capability(x.device) in DOUBLE_RATE:
        return launch(x, weight)
    return F.linear(x, weight)


def reference(x, weight, values: int = 128):
    """Two-level sums as a GPU forms them: rounded to fp16 after every UNIT values, to fp32 after `values`."""
    if x.dtype is not torch.float16:
        return F.linear(x, weight)
    room = (0, -x.shape[-1] % values)
    rows, columns = (F.pad(t.float(), room).unflatten(-1, (-1, values)).flatten(0, -3) for t in (x, weight))
    rows, columns = rows.transpose(0, 1), columns.permute(1, 2, 0)  # (parts, M, values), (parts, values, N)
    partial = rows.new_zeros(len(rows), rows.shape[1], len(weight))
    for a, b in zip(rows.split(UNIT, dim=2), columns.split(UNIT, dim=1), strict=True):
        partial = partial.baddbmm_(a, b).half().float()
    return partial.sum(dim=0).half().view(*x.shape[:-1], len(weight))


@jit
def _kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One block of the result; blocks in groups of GROUP rows, which share their columns in the cache."""
    program = tl.program_id(0)
    rows, columns = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first = program // (GROUP * columns) * GROUP
    height = min(rows - first, GROUP)
    row = first + program % (GROUP * columns) % height
    column = program % (GROUP * columns) // height
    m = row * BLOCK_M + tl.arange(0, BLOCK_M)
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    x = x_ptr + (m % M).to(tl.int64)[:, None] * K + k[None, :]  # rows beyond the last: the first again, not stored
    weight = weight_ptr + (n % N).to(tl.int64)[None, :] * K + k[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for _ in range(0, K, BLOCK_K):
        total += tl.dot(tl.load(x), tl.load(weight), out_dtype=tl.float16).to(tl.float32)
        x += BLOCK_K
        weight += BLOCK_K
    out = out_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out, total.to(tl.float16), mask=(m < M)[:, None] & (n < N)[None, :])


def launch(x, weight, configuration=CONFIGURATIONS[0]):
    block_m, block_n, block_k, warps, stages = configuration
    x, weight = x.contiguous(), weight.contiguous()
    (N, K), M = weight.shape, x.shape[:-1].numel()
    out = torch.empty((*x.shape[:-1], N), dtype=x.dtype, device=x.device)
    grid = (-(-M // block_m) * -(-N // block_n),)
    sizes = (M, N, K, block_m, block_n, block_k, GROUP)
    enqueue(_kernel, grid, x, weight, out, *sizes, num_warps=warps, num_stages=stages)
    return out


SPEC = Spec(
    name="half_product",
    reference=reference,
    launch=launch,
    inputs=lambda make, M, K, N: (make(M, K).half(), make(N, K).half()),
    cases=({"M": 3, "K": 128, "N": 40}, {"M": 130, "K": 256, "N": 136}),
    model={"M": 4128, "K": 3840, "N": 3840},
    least_bytes=lambda x, weight: bytes_of(x, weight) + 2 * len(x) * len(weight),
    least_capability=80,  # Triton uses no matrix units before
)
