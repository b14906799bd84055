"""A matrix product in fp16 whose sums are fp16 over a few values and fp32 beyond: x · weightᵀ.

GeForce and workstation cards add in fp16 at twice the rate of fp32. Sums of DEPTH values lose little, and fp32 takes
them from there: the error is 4.9e-4 of the result where bf16 has 2.9e-3 and fp16 with fp32 sums 3.6e-4.
Whoever calls it bounds ‖x‖ · ‖weight‖ of all rows by 65,504, so that no partial sum overflows: see `dit.units`.

Shapes: M rows, N outputs, K columns; x (M, K), weight (N, K).
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from zimage.kernels.backend import Spec, bytes_of, capability, choose, jit, tl
from zimage.kernels.scaled_product import enqueue_tiles, factors, first_factors, tile_of
from zimage.kernels.tuning import Configuration, quickest

UNIT = 16  # values that a GPU's matrix unit multiplies and adds before it rounds
DEPTH = 64  # values that are summed in fp16
LEAST_CAPABILITY = 80  # of what Triton compiles to tensor cores
DOUBLE_RATE = (86, 89, 120)  # compute capabilities of cards that add in fp16 at twice the rate of fp32
# All of one depth, so that all give the same bits; none spills registers on any GPU that the tests compile for.
CONFIGURATIONS = (
    Configuration(128, 128, DEPTH, warps=8, stages=3),
    Configuration(64, 128, DEPTH, warps=8, stages=4),
    Configuration(64, 64, DEPTH, warps=4, stages=4),
)


def half_product(x: Tensor, weight: Tensor) -> Tensor:
    """x · weightᵀ (…, N) of x (…, K) and weight (N, K), all fp16; in fp32 sums where those cost no more."""
    if not (x.is_cuda and capability(x.device) in DOUBLE_RATE):
        return F.linear(x, weight)
    run = choose(launch, F.linear, x, weight, least_capability=LEAST_CAPABILITY)
    return run(x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])


def reference(x, weight):
    """Sums in two levels as a GPU forms them: rounded to fp16 after every UNIT values, added in fp32 after DEPTH."""
    if x.dtype is not torch.float16:
        return F.linear(x, weight)
    room = (0, -x.shape[-1] % DEPTH)
    rows, columns = (F.pad(t.float(), room).unflatten(-1, (-1, DEPTH)).flatten(0, -3) for t in (x, weight))
    sums = rows.new_zeros(len(rows), len(weight))
    for part in range(rows.shape[1]):
        few = torch.zeros_like(sums)
        for a, b in zip(rows[:, part].split(UNIT, dim=1), columns[:, part].split(UNIT, dim=1), strict=True):
            few = few.addmm_(a, b.t()).half().float()
        sums += few
    return sums.half().view(*x.shape[:-1], len(weight))


@jit
def _kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    M,
    N,
    K,
    WHOLE: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One tile of ROWS × COLUMNS results. WHOLE: DEPTH divides K."""
    row, column = tile_of(tl.program_id(0), M, N, GROUP, ROWS, COLUMNS)
    depth = tl.arange(0, DEPTH)
    x_ptr, weight_ptr = first_factors(x_ptr, weight_ptr, row, column, depth, M, N, K)
    sums = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for k in range(0, K, DEPTH):
        x, weight = factors(x_ptr, weight_ptr, depth, K - k, WHOLE)
        sums += tl.dot(x, weight, out_dtype=tl.float16).to(tl.float32)
        x_ptr += DEPTH
        weight_ptr += DEPTH
    out_ptr += row.to(tl.int64)[:, None] * N + column[None, :]
    tl.store(out_ptr, sums.to(out_ptr.dtype.element_ty), mask=(row < M)[:, None] & (column < N)[None, :])


def launch(x, weight):
    configuration = quickest("fp16 product", x, len(weight), CONFIGURATIONS, lambda c: launch_as(c, x, weight))
    return launch_as(configuration, x, weight)


def launch_as(c: Configuration, x, weight):
    """Launch with one configuration."""
    x, weight = x.contiguous(), weight.contiguous()
    (M, K), N = x.shape, len(weight)
    out = torch.empty((M, N), dtype=x.dtype, device=x.device)
    enqueue_tiles(_kernel, c, (x, weight, out), (M, N, K))
    return out


SPEC = Spec(
    name="fp16_product",
    reference=reference,
    launch=launch,
    variants=tuple(partial(launch_as, c) for c in CONFIGURATIONS[1:]),
    inputs=lambda make, M, N, K: (make(M, K).half(), make(N, K).half()),
    cases=({"M": 70, "N": 96, "K": 128}, {"M": 130, "N": 40, "K": 208}, {"M": 3, "N": 264, "K": 40}),
    model={"M": 4128, "N": 10240, "K": 3840},
    least_bytes=lambda x, weight: bytes_of(x, weight) + x.element_size() * len(x) * len(weight),
    flops=lambda x, weight: 2 * x.numel() * len(weight),
    least_capability=LEAST_CAPABILITY,
)
