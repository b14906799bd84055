"""Faults that were planted in the kernels to see whether their tests find them."""

from typing import NamedTuple


class Fault(NamedTuple):
    """A replacement in a file of kernels, and a pattern that the failure's text holds (None: whatever it says)."""

    file: str
    old: str
    new: str
    says: str | None


NUMBERS = {  # what the interpreter finds: wrong numbers, foreign memory, programs that collide
    "wrong number": Fault("norm", "/ channels + EPS", "/ BLOCK + EPS", "the reference's"),
    "past the end": Fault("norm", "present & (first + i < length)", "present", "outside|address"),
    "two programs, one place": Fault("norm", "tl.program_id(0) * ROWS,", "tl.program_id(0) * 9,", "address|read"),
    "never written": Fault("swiglu", "-(-C // BLOCK))", "C // BLOCK)", None),
    "bf16 as integers": Fault("swiglu", "other=0.0).to(tl.float32)", "other=0.0)", "bf16|bit patterns"),
    "a sign that is lost": Fault("decode_scaled", "((bits & 128) << 8)", "((bits & 128) << 7)", None),
    "a group too far": Fault("decode_scaled", "scale_ptr + row * scale_row + g", "scale_ptr + g", "bits"),
    "the other half first": Fault(
        "decode_nvfp4", "code >> 4), _e2m1_number(code & 15", "code & 15), _e2m1_number(code >> 4", "bits"
    ),
    "a block past the end": Fault(
        "decode_nvfp4", "mask=place < count * 8, other=0", "mask=place >= 0, other=0", "outside"
    ),
    "fifth bits of others": Fault("decode_blocks", "bits >> (2 * at + 1)", "bits >> (2 * at)", "bits"),
    "scales without a sign": Fault("decode_k_blocks", "& 255) ^ 128) - 128", "& 255))", "bits"),
    "two bits too few": Fault("decode_k_blocks", "(third & 15) | ((first >> 6) & 3) << 4", "(third & 15)", "bits"),
    "groups that meet": Fault("rotate", "differ < GROUP, 1", "differ < 2 * GROUP, 1", "the reference's"),
    "a sum never stored": Fault("rms_norm", "tl.store(sum_ptr + place, rounded, mask=there)", "", None),
    "the sum's last token": Fault("rms_norm", "(first + i < tokens)", "(first + i < tokens - 1)", None),
    "turned backwards": Fault("qk_norm_rope", "first * sin + second", "-first * sin + second", "reference's"),
    "one angle for all tokens": Fault("qk_norm_rope", "+ token * (D // 2)", "+ batch * (D // 2)", "reference's"),
    "a head too many": Fault("qk_norm_rope", "[:, None] < heads", "[:, None] < BLOCK_H", "outside|reads"),
    "half a mean": Fault("qk_norm_rope", "axis=1) / D", "axis=1) / (D // 2)", "the reference's"),
    "between a view's rows": Fault("group_norm", "width, x_row, x_stride", "width, out_row, x_stride", "outside"),
    "a mean of squares": Fault("group_norm", "value - of_channel[None, :]", "value", "the reference's"),
    "blocks of one mean": Fault("group_norm", " + shift * shift * count * share", "", "the reference's"),
    "a whole block at the end": Fault(
        "group_norm", "tl.minimum(positions - first, STEP)", "(first * 0 + STEP)", "the reference's"
    ),
    "past the end of K": Fault("scaled_product", "mask=depth[None, :] < left", "mask=depth[None, :] >= 0", "outside"),
    "past the last row": Fault("scaled_product", "(row % M)", "row", "outside"),
    "another column's scale": Fault("scaled_product", "scale_ptr + column,", "scale_ptr + column % ROWS,", "reference"),
    "a bias left out": Fault("scaled_product", "if BIAS:", "if BIAS and WHOLE:", "the reference's"),
    "two tiles, one place": Fault("scaled_product", "* COLUMNS + tl.arange", "* 9 + tl.arange", "write one"),
    "tiles never written": Fault("scaled_product", "-(-M // c.rows)", "(M // c.rows)", None),
    "cut off, not rounded": Fault("quantise", "(x + 12582912.0) - 12582912.0", "x + 0.0", None),
    "the largest, of any sign": Fault("quantise", "tl.abs(x).to(tl.int32", "x.to(tl.int32", None),
    "the next sample's scale": Fault("norm", "row_scale, mask=first + i < length", "row_scale", "write|outside|read"),
    "the gate's sigmoid": Fault("swiglu", "tl.sigmoid(gate * UNIT)", "tl.sigmoid(up)", None),
}

_LOADED = "x, weight = factors(x_ptr, weight_ptr, depth, K - k, WHOLE)"
MACHINE = {  # what the machine code shows
    "tiles that do not fit in registers": Fault(
        "scaled_product", "(128, 128, 128, warps=8", "(128, 256, 128, warps=4", None
    ),
    "fp8 multiplied as fp16": Fault(
        "scaled_product",
        _LOADED,
        f"{_LOADED}\n        if not INTEGER:\n            x, weight = x.to(tl.float16), weight.to(tl.float16)",
        None,
    ),
    "slow sine": Fault(
        "qk_norm_rope", "tl.load(cos_ptr + row)[None, :]", "tl.cos(tl.load(cos_ptr + row))[None, :]", None
    ),
    "strided pairs": Fault("swiglu", "tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)", "2 * tl.arange(0, BLOCK)", None),
}
