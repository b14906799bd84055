"""codes × scale: matrices of int8 or fp8 codes with a scale for all, for each row, or for each group of a row.

Shapes: codes (O, I), scale (), (O, 1) or (O, groups).
"""

import torch
from torch import Tensor

from zimage.kernels.backend import Spec, any_bytes, bytes_of, choose, enqueue, jit, power_of_two, tl

VALUES = 2048  # per program: 16 for each of 128 threads, one read of 128 bits
FP8 = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}


def decode_scaled(codes: Tensor, scale: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """codes · scale (O, I), multiplied in fp32 and rounded once to `dtype`.

    scale is fp32, or uint8 for e8m0 exponents, whose number is 2^(byte − 127). Where it has a column for every `group`
    columns of the codes, the last group may be shorter.
    """
    return choose(launch, reference, codes)(codes, scale, group, dtype)


def reference(codes, scale, group, dtype):
    scale = powers_of_two(scale) if scale.dtype == torch.uint8 else scale
    if scale.ndim and scale.shape[1] > 1:
        scale = scale.repeat_interleave(group, dim=1)[:, : codes.shape[1]]
    return (codes.float() * scale).to(dtype)


def powers_of_two(exponents: Tensor) -> Tensor:
    """The fp32 numbers of e8m0 bytes: the exponent of a float without its sign and mantissa, and 0 for 0."""
    return (exponents.int() << 23).view(torch.float32)


@jit
def number(code, KIND: tl.constexpr):
    """The fp32 number of an int8 code, or of the byte of an fp8 one: GPUs before 8.9 do not know e4m3.

    e5m2 is the upper byte of an fp16 number. The exponent of e4m3 has one bit less: in fp16's place, its numbers are
    2⁻⁸ as large, and 127 stands for NaN.
    """
    if KIND == "int8":
        return code.to(tl.float32)
    bits = code.to(tl.uint16)
    if KIND == "e5m2":
        return (bits << 8).to(tl.float16, bitcast=True).to(tl.float32)
    half = tl.where((bits & 127) == 127, 0x7FFF, ((bits & 128) << 8) | ((bits & 127) << 7)).to(tl.uint16)
    return half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0


@jit
def _kernel(
    codes_ptr,
    scale_ptr,
    out_ptr,
    columns,
    group,
    scale_row,
    scale_group,
    KIND: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """GROUPS groups of one row, of `group` columns each in WIDTH lanes."""
    row = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    within = tl.arange(0, WIDTH)
    column = g[:, None] * group + within[None, :]
    present = (within < group)[None, :] & (column < columns)
    scale = tl.load(scale_ptr + row * scale_row + g * scale_group, mask=g * group < columns, other=0)
    if scale_ptr.dtype.element_ty == tl.uint8:
        scale = (scale.to(tl.int32) << 23).to(tl.float32, bitcast=True)
    code = tl.load(codes_ptr + row * columns + column, mask=present, other=0)
    decoded = (number(code, KIND) * scale[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * columns + column, decoded, mask=present)


def launch(codes, scale, group, dtype):
    codes, scale = codes.contiguous(), scale.contiguous()
    rows, columns = codes.shape
    out = torch.empty((rows, columns), dtype=dtype, device=codes.device)
    grouped = scale.ndim > 0 and scale.shape[1] > 1
    group = group if grouped else min(columns, VALUES)  # pieces of a row that share its scale
    steps = (scale.shape[1] if scale.ndim else 0), int(grouped)  # from scale to scale, by rows and groups
    kind = FP8.get(codes.dtype, "int8")
    codes = codes.view(torch.uint8) if kind != "int8" else codes
    width = power_of_two(group)
    groups = max(1, VALUES // width)
    grid = rows, -(-columns // (group * groups))
    enqueue(_kernel, grid, codes, scale, out, columns, group, *steps, kind, groups, width, num_warps=4)
    return out


def _spec(name: str, codes_dtype: torch.dtype, cases: tuple, model: dict, exponents: bool = False) -> Spec:
    def inputs(make, rows: int, columns: int, group: int = 0, scales: int = 1):
        """`scales`: 0 for one in all, 1 for one per row; with `group`, one per group of columns."""
        codes = (any_bytes(make, rows, columns) & 0xFE).view(codes_dtype)  # no NaN
        shape = (rows, -(-columns // group)) if group else (rows, 1) if scales else ()
        scale = make(*shape).float()
        scale = (scale.abs() * 8 + 118).to(torch.uint8) if exponents else scale
        return codes, scale, group, make(1).dtype

    return Spec(
        name=name,
        reference=reference,
        launch=launch,
        inputs=inputs,
        cases=cases,
        model=model,
        least_bytes=lambda codes, scale, group, dtype: bytes_of(codes, scale) + codes.numel() * dtype.itemsize,
        exact=True,
    )


INT8_SPEC = _spec(
    "decode_int8",
    torch.int8,
    (
        {"rows": 5, "columns": 40},
        {"rows": 3, "columns": 2064},
        {"rows": 2, "columns": 40, "scales": 0},
        {"rows": 2, "columns": 200, "group": 80},
    ),
    {"rows": 10240, "columns": 3840},
)
FP8_SPEC = _spec(
    "decode_fp8",
    torch.float8_e4m3fn,
    (
        {"rows": 5, "columns": 40, "scales": 0},
        {"rows": 3, "columns": 2064},
        {"rows": 2, "columns": 300, "group": 128},
        {"rows": 2, "columns": 7},
    ),
    {"rows": 10240, "columns": 3840, "group": 128},
)
MXFP8_SPEC = _spec(
    "decode_mxfp8",
    torch.float8_e4m3fn,
    ({"rows": 3, "columns": 96, "group": 32}, {"rows": 2, "columns": 2112, "group": 32}),
    {"rows": 10240, "columns": 3840, "group": 32},
    exponents=True,
)
