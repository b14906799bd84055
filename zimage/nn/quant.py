"""int8 and fp8 matrix products in place of a plain model's Linear layers, while it is loaded or afterwards.

Weights get one scale per output channel once, activations one per token at every call (W8A8, dynamic):

    x ≈ s_x · q_x,  W ≈ s_W · q_W  ⇒  x·Wᵀ ≈ s_x · s_Wᵀ · (q_x·q_Wᵀ), the product in int32 or fp32
"""

import logging
import re
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from zimage.errors import RequestError
from zimage.kernels.quantise import Operand, quantise_rows
from zimage.kernels.scaled_product import scaled_product
from zimage.nn.layers import PIECE
from zimage.nn.operand import Form, Input, operand
from zimage.nn.packed import PackedLinear, Scaled

log = logging.getLogger("zimage")

DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
# Small, sensitive to error, or both; names of modules in the DiT and in ControlNets. The projections of a ControlNet
# multiply a stream that was not normed: beside its largest values the others would be rounded to zero.
SKIPPED = r"x_embedder|cap_embedder|t_embedder|adaLN_modulation|final_layer|before_proj|after_proj"
UNITS = {"int8": 8, "fp8": 16}  # PyTorch's products on GPUs take sizes that are multiples of these
ENDS_KEPT = {"int8": 0, "fp8": 2}  # joint blocks at either end that are not quantised: e4m3 has three bits of mantissa
FP8_CAPABILITY = (8, 9)


class QuantisedLinear(nn.Module):
    """A Linear with an int8 or fp8 weight (out, in); inference only.

    The codes of a packed weight of the same dtype are used as they are, so nothing is rounded twice.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear | PackedLinear, dtype: torch.dtype):
        super().__init__()
        weight, scale, rotated = _codes(linear, dtype)
        self.form = Form(dtype, rotated)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("weight", weight)
        # (1, out) fp32; contiguous even if one scale serves all rows: row-wise fp8 products refuse strides of 0.
        self.register_buffer("scale", scale.expand(self.out_features, 1).reshape(1, -1).contiguous())
        self.bias = linear.bias

    def forward(self, x: Input) -> Tensor:
        made = operand(x, self.form)
        assert isinstance(made, Operand)
        return scaled_product(made, self.weight, self.scale, self.bias)


def _codes(linear: nn.Linear | PackedLinear, dtype: torch.dtype) -> tuple[Tensor, Tensor, int]:
    """Codes (out, in), scale () or (out, 1), and the columns that are rotated together (0: none)."""
    stored = linear.weight.detach() if isinstance(linear, nn.Linear) else linear.packed
    if isinstance(stored, Scaled) and stored.codes.dtype == dtype:
        return stored.codes, stored.scale, stored.rotated
    device = stored.device if isinstance(stored, Tensor) else stored.codes.device
    codes = torch.empty(linear.out_features, linear.in_features, dtype=dtype, device=device)
    scale = torch.empty(linear.out_features, 1, device=device)
    step = max(1, PIECE // linear.in_features)  # whole matrices in fp32 left holes in the heap: 24 GB at full size
    for i in range(0, linear.out_features, step):
        end = min(i + step, linear.out_features)
        rows = stored[i:end] if isinstance(stored, Tensor) else stored.rows(i, end).decode()
        codes[i:end], scale[i:end], _ = quantise_rows(rows, dtype)
    return codes, scale, 0


def quantise(dit: nn.Module, precision: str, discard: Callable[[Tensor], None] = lambda weight: None) -> None:
    """Replace the large Linear layers of a DiT in memory, one after another, so that memory never holds both models.

    One that comes from a file is quantised while it is loaded: see `loading.weights`. `discard` is called with each
    plain weight that is no longer needed.
    """
    layers = list(quantisable(dit, precision))
    while layers:
        owner, name, linear = layers.pop(0)
        setattr(owner, name, QuantisedLinear(linear, DTYPES[precision]))
        if not isinstance(linear, PackedLinear):
            discard(linear.weight)


def quantisable(dit: nn.Module, precision: str) -> Iterator[tuple[nn.Module, str, nn.Linear | PackedLinear]]:
    """(owner, attribute, layer) of every Linear that is replaced: large ones whose sizes fit, whatever the device."""
    kept = _kept_blocks(dit, precision)
    for path, module in dit.named_modules():
        if re.search(SKIPPED, path) or any(path == block or path.startswith(block + ".") for block in kept):
            continue
        for name, child in module.named_children():
            if re.search(SKIPPED, f"{path}.{name}") or not isinstance(child, nn.Linear | PackedLinear):
                continue
            if not (child.in_features % UNITS[precision] or child.out_features % UNITS[precision]):
                yield module, name, child


def check_precision(precision: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raise RequestError if the device cannot compute in `precision` with activations in `dtype`.

    Warns if it only emulates it.
    """
    if precision != "bf16" and device.type == "mps":
        text = f"precision {precision} does not run on a Mac's GPU: PyTorch has no such products there; use bf16"
        raise RequestError(text, fields=("precision",))
    if precision != "fp8":
        return
    if dtype is torch.float16:
        text = "precision fp8 gives results in bf16, not in fp16; use dtype bf16, or precision int8"
        raise RequestError(text, fields=("precision", "dtype"))
    if device.type == "cuda" and sys.platform == "win32":
        text = "precision fp8 does not run on Windows: PyTorch leaves its row-wise products out there; use int8 or bf16"
        raise RequestError(text, fields=("precision",))
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        text = "precision fp8 needs a GPU of compute capability 8.9 (RTX 4090) or newer; use int8 or bf16"
        raise RequestError(text, fields=("precision",))
    if device.type != "cuda":
        log.warning(
            "precision fp8 on %s: rounded to fp8 but multiplied as before; no faster, only for judging quality", device
        )


def _kept_blocks(dit: nn.Module, precision: str) -> list[str]:
    layers = dict(dit.named_children()).get("layers")  # a ControlNet has none, and its ends are none of the DiT's
    ends, count = ENDS_KEPT[precision], len(list(layers.children())) if layers else 0
    return [f"layers.{i}" for i in range(count) if i < ends or i >= count - ends]
