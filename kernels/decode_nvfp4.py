"""nvfp4: matrices of 4-bit floats, an e4m3 scale for every 16 of a row and one for all.

Shapes: codes (O, I / 2), block scales (O, I / 16), scale ().
"""

import torch
from torch import Tensor

from zimage.kernels.backend import Spec, any_bytes, bytes_of, choose, enqueue, jit, tl
from zimage.kernels.decode_scaled import number

BLOCK = 16  # columns that share a scale
BLOCKS = 256  # per program: 16 bytes of codes for each of 128 threads


def decode_nvfp4(codes: Tensor, block_scale: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """number · (block scale · scale) (O, I), multiplied in fp32 and rounded once to `dtype`.

    A byte of `codes` (uint8) holds two numbers of the kind e2m1, the first in its high half.
    """
    return choose(launch, reference, codes)(codes, block_scale, scale, dtype)


def reference(codes, block_scale, scale, dtype):
    halves = torch.stack((codes >> 4, codes & 15), dim=-1)  # (O, I/2, 2)
    numbers = _e2m1(codes.device)[halves.flatten(1).int()].unflatten(1, (-1, BLOCK))  # (O, I/16, 16)
    return (numbers * (block_scale.float() * scale)[..., None]).flatten(1).to(dtype)


def _e2m1(device: torch.device) -> Tensor:
    """The sixteen numbers, fp32: ±0, 0.5, 1, 1.5, 2, 3, 4, 6. Sign, exponent and mantissa stand in the places of
    fp16's, whose exponents count from 2⁻¹⁴ on. Made where they are used: a copy to a GPU would wait for it.
    """
    code = torch.arange(16, dtype=torch.int16, device=device)
    return (((code & 8) << 12) | ((code & 7) << 9)).view(torch.float16).float() * 16384


@jit
def _e2m1_number(code):
    half = ((code & 8) << 12) | ((code & 7) << 9)
    return half.to(tl.float16, bitcast=True).to(tl.float32) * 16384.0


@jit
def _kernel(codes_ptr, block_ptr, scale_ptr, out_ptr, count, BLOCKS: tl.constexpr):
    """BLOCKS blocks of 16 numbers, of `count` in all rows together."""
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    block = first + tl.arange(0, BLOCKS)
    scale = number(tl.load(block_ptr + block, mask=block < count, other=0), "e4m3") * tl.load(scale_ptr)
    place = first * 8 + tl.arange(0, BLOCKS * 8)
    code = tl.load(codes_ptr + place, mask=place < count * 8, other=0).to(tl.uint16)
    numbers = tl.reshape(tl.join(_e2m1_number(code >> 4), _e2m1_number(code & 15)), (BLOCKS, 16))
    place = block[:, None] * 16 + tl.arange(0, 16)[None, :]
    decoded = (numbers * scale[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + place, decoded, mask=(block < count)[:, None])


def launch(codes, block_scale, scale, dtype):
    codes, blocks = codes.contiguous(), block_scale.contiguous().view(torch.uint8)
    out = torch.empty((len(codes), 2 * codes.shape[1]), dtype=dtype, device=codes.device)
    count = blocks.numel()
    enqueue(_kernel, (-(-count // BLOCKS),), codes, blocks, scale, out, count, BLOCKS, num_warps=4)
    return out


def _inputs(make, rows: int, columns: int) -> tuple:
    scales = (any_bytes(make, rows, columns // BLOCK) & 0xFE).view(torch.float8_e4m3fn)  # no NaN
    return any_bytes(make, rows, columns // 2), scales, make(1).float()[0], make(1).dtype


SPEC = Spec(
    name="decode_nvfp4",
    reference=reference,
    launch=launch,
    inputs=_inputs,
    cases=({"rows": 3, "columns": 48}, {"rows": 9, "columns": 512}, {"rows": 1, "columns": 16}),
    model={"rows": 10240, "columns": 3840},
    least_bytes=lambda codes, block_scale, scale, dtype: (
        bytes_of(codes, block_scale, scale) + 2 * codes.numel() * dtype.itemsize
    ),
    exact=True,
)
