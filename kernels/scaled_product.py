"""The product of an int8 or fp8 operand and a matrix of the same dtype, with both scales and the bias at its end.

What every product in tiles does is here as well: `tile_of`, `first_factors`, `factors` and `enqueue_tiles`.

Shapes: M rows, N outputs, K columns; x (M, K), weight (N, K), scales (M, 1) and (1, N), bias (N,).
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zimage.kernels.backend import Spec, bytes_of, choose, enqueue, jit, tl
from zimage.kernels.quantise import Operand
from zimage.kernels.tuning import Configuration, quickest

FP8 = torch.float8_e4m3fn
LEAST_CAPABILITY = {torch.int8: 80, FP8: 89}  # of what Triton compiles to tensor cores
LEAST_ROWS = 17  # that PyTorch's int8 product takes on a GPU
GROUP = 8  # rows of tiles that are computed side by side, so that they share what the cache holds
# All give the same bits in int8, whose sums are exact; none spills registers on any GPU that these tests compile for.
CONFIGURATIONS = (
    Configuration(128, 128, 128, warps=8, stages=3),
    Configuration(128, 256, 64, warps=8, stages=3),
    Configuration(128, 128, 64, warps=8, stages=4),
    Configuration(64, 128, 128, warps=4, stages=3),
    Configuration(64, 64, 128, warps=4, stages=3),
)


def scaled_product(x: Operand, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """(x.values · x.scale) · (weight · scaleᵀ)ᵀ + bias in x.dtype, for x (…, K), rounded once."""
    rows, row_scale = x.values.flatten(0, -2), x.scale.flatten(0, -2)
    if rows.is_cuda and rows.dtype == FP8 and fits_library(weight, x.dtype):
        run = library
    else:
        run = choose(launch, reference, rows, least_capability=LEAST_CAPABILITY[rows.dtype])
    return run(rows, row_scale, weight, scale, bias, x.dtype).unflatten(0, x.values.shape[:-1])


def fits_library(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether PyTorch's row-wise fp8 product takes these: sizes in units of 16, bf16 results."""
    return dtype == torch.bfloat16 and not any(n % 16 for n in weight.shape)


def library(rows, row_scale, weight, scale, bias, dtype):
    out = torch._scaled_mm(rows, weight.t(), row_scale, scale, out_dtype=dtype)
    return out if bias is None else out + bias


def reference(rows, row_scale, weight, scale, bias, dtype):
    """fp8 values are multiplied in `dtype`: e4m3 fits in bf16 without loss."""
    if rows.dtype is torch.int8:
        few = rows.is_cuda and len(rows) < LEAST_ROWS
        padded = F.pad(rows, (0, 0, 0, LEAST_ROWS - len(rows))) if few else rows
        sums = torch._int_mm(padded, weight.t())[: len(rows)].float()
    else:
        sums = rows.to(dtype) @ weight.to(dtype).t()
    out = sums * row_scale * scale
    return (out if bias is None else out + bias).to(dtype)


@jit
def tile_of(program, M, N, GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The rows and columns of the results of one program: tiles go down GROUP tiles, then to the next columns."""
    down, across = tl.cdiv(M, ROWS), tl.cdiv(N, COLUMNS)
    first = program // (GROUP * across) * GROUP
    height = min(down - first, GROUP)
    row = (first + program % (GROUP * across) % height) * ROWS + tl.arange(0, ROWS)
    return row, program % (GROUP * across) // height * COLUMNS + tl.arange(0, COLUMNS)


@jit
def first_factors(x_ptr, weight_ptr, row, column, depth, M, N, K):
    """Where the first columns of both factors are, for some rows of x and of the weight."""
    x_ptr += (row % M).to(tl.int64)[:, None] * K + depth[None, :]  # beyond the end: rows that are not stored
    return x_ptr, weight_ptr + (column % N).to(tl.int64)[None, :] * K + depth[:, None]


@jit
def factors(x_ptr, weight_ptr, depth, left, WHOLE: tl.constexpr):
    """Columns of both factors, zeros beyond the `left` that remain. WHOLE: as many are always left."""
    if WHOLE:
        x, weight = tl.load(x_ptr), tl.load(weight_ptr)
    else:
        x = tl.load(x_ptr, mask=depth[None, :] < left, other=0.0)
        weight = tl.load(weight_ptr, mask=depth[:, None] < left, other=0.0)
    return x, weight


@jit
def _kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    row_scale_ptr,
    scale_ptr,
    bias_ptr,
    M,
    N,
    K,
    BIAS: tl.constexpr,
    INTEGER: tl.constexpr,
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
    sums = tl.zeros((ROWS, COLUMNS), dtype=tl.int32 if INTEGER else tl.float32)
    for k in range(0, K, DEPTH):
        x, weight = factors(x_ptr, weight_ptr, depth, K - k, WHOLE)
        # On sm_90, fp8 sums have 14 bits until they are added to others: at most DEPTH products are added up so.
        sums = tl.dot(
            x,
            weight,
            sums,
            max_num_imprecise_acc=None if INTEGER else DEPTH,
            out_dtype=tl.int32 if INTEGER else tl.float32,
        )
        x_ptr += DEPTH
        weight_ptr += DEPTH
    present, there = row < M, column < N
    out = sums.to(tl.float32) * tl.load(row_scale_ptr + row, mask=present, other=0.0)[:, None]
    out = out * tl.load(scale_ptr + column, mask=there, other=0.0)[None, :]
    if BIAS:
        out += tl.load(bias_ptr + column, mask=there, other=0.0).to(tl.float32)[None, :]
    out_ptr += row.to(tl.int64)[:, None] * N + column[None, :]
    tl.store(out_ptr, out.to(out_ptr.dtype.element_ty), mask=present[:, None] & there[None, :])


def launch(*arguments):
    rows, _, weight, *_ = arguments
    configuration = CONFIGURATIONS[0]  # in fp8 always, since the order of fp32 sums depends on it
    if rows.dtype is torch.int8:
        configuration = quickest("int8 product", rows, len(weight), CONFIGURATIONS, lambda c: launch_as(c, *arguments))
    return launch_as(configuration, *arguments)


def launch_as(c: Configuration, rows, row_scale, weight, scale, bias, dtype):
    """Launch with one configuration."""
    (M, K), N = rows.shape, len(weight)
    out = torch.empty((M, N), dtype=dtype, device=rows.device)
    pointers = rows, weight, out, row_scale, scale, scale if bias is None else bias
    enqueue_tiles(_kernel, c, pointers, (M, N, K), bias is not None, rows.dtype is torch.int8)
    return out


def enqueue_tiles(
    kernel: Any, c: Configuration, pointers: tuple[Tensor, ...], sizes: tuple[int, int, int], *constants: bool
) -> None:
    """Launch a product's kernel, a program for every tile of its M × N results; sizes are M, N and K."""
    M, N, K = sizes
    tiles = -(-M // c.rows) * -(-N // c.columns)
    cut = K % c.depth == 0, GROUP, c.rows, c.columns, c.depth
    enqueue(kernel, (tiles,), *pointers, *sizes, *constants, *cut, num_warps=c.warps, num_stages=c.stages)


def _spec(name: str, dtype: torch.dtype, configurations: tuple[Configuration, ...]) -> Spec:
    def inputs(make, M: int, N: int, K: int, bias: int = 0) -> tuple:
        x, weight = ((make(n, K) * 40).clamp(-127, 127).to(dtype) for n in (M, N))
        scales = make(M, 1).float().abs() / 100, make(1, N).float().abs() / 100
        return x, scales[0], weight, scales[1], make(N) if bias else None, make(1).dtype

    return Spec(
        name=name,
        reference=reference,
        launch=launch,
        variants=tuple(partial(launch_as, c) for c in configurations),
        inputs=inputs,
        cases=({"M": 70, "N": 96, "K": 128}, {"M": 130, "N": 40, "K": 208, "bias": 1}, {"M": 3, "N": 264, "K": 40}),
        model={"M": 4128, "N": 10240, "K": 3840},
        least_bytes=lambda x, a, weight, b, bias, dtype: (
            bytes_of(x, a, weight, b) + len(x) * len(weight) * dtype.itemsize
        ),
        flops=lambda x, a, weight, *rest: 2 * x.numel() * len(weight),
        least_capability=LEAST_CAPABILITY[dtype],
    )


INT8_SPEC = _spec("int8_product", torch.int8, CONFIGURATIONS[1:])
FP8_SPEC = _spec("fp8_product", FP8, ())
