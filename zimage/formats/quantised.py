"""Quantised weights as files store them: a weight and its companion tensors become one packed matrix.

Everywhere number = stored × scale. Ignoring a companion would give noise, so an unknown one stays a tensor of its own,
which the strict check then reports as unexpected.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from zimage.errors import CheckpointError
from zimage.formats.json_text import json_object
from zimage.formats.stored import FP8, Maps, Stored
from zimage.nn.packed import NVFP4, NVFP4_BLOCK, Packed, Scaled, unswizzled

MARKER = "scaled_fp8"  # an empty tensor that marks Comfy's older form
WEIGHT_SCALES = ("weight_scale", "scale_weight")
INPUT_SCALES = ("input_scale", "scale_input")  # of activations, which are scaled by their own values instead
DESCRIPTION = "comfy_quant"
HEADER = "_quantization_metadata"
Read = Callable[[str], Tensor]
FORMATS = ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise", "nvfp4")


def gathered(file: Path, raw: Mapping[str, Stored], metadata: Mapping[str, str], read: Read) -> dict[str, Stored]:
    """The `raw` tensors of a file, each quantised weight joined with its companions. Raises CheckpointError.

    `read(key)` returns the values of a small tensor at once: descriptions must be known before loading.
    """
    described = _described(file, raw, metadata, read)
    tensors = {key: value for key, value in raw.items() if key.rpartition(".")[2] != MARKER}
    for key in [key for key in raw if key.endswith(".weight")]:
        module = key.removesuffix(".weight")
        scale = next((f"{module}.{name}" for name in WEIGHT_SCALES if f"{module}.{name}" in raw), None)
        about = described.get(module, {})
        if raw[key].dtype not in (*FP8, "I8", "U8") and not about:
            continue
        tensors[key] = _packed(f"{file}: {key}", raw, key, scale, about)
        for name in (*WEIGHT_SCALES, *INPUT_SCALES, DESCRIPTION, "weight_scale_2"):
            tensors.pop(f"{module}.{name}", None)
    return tensors


def _packed(where: str, raw: Mapping[str, Stored], key: str, scale: str | None, about: Mapping[str, object]) -> Stored:
    weight, kind = raw[key], about.get("format")
    if kind is not None and kind not in FORMATS:
        raise CheckpointError(f"{where} has the format {kind!r}; implemented are {', '.join(FORMATS)}")
    if weight.dtype == "U8" and kind == "nvfp4":
        return _nvfp4(where, raw, key)
    if weight.dtype == "I8" and kind == "int8_tensorwise":
        group = about.get("convrot_groupsize", 256) if about.get("convrot") else 0
        if not isinstance(group, int) or (group and not _is_group(group, weight.shape[-1])):
            raise CheckpointError(f"{where}: convrot_groupsize {group!r} does not fit its {weight.shape[-1]} columns")
        if scale is None:
            raise CheckpointError(f"{where} is int8 without a weight_scale; the file is incomplete")
        return _scaled(where, raw, key, scale, f"int8{' ConvRot' if group else ''}", group)
    if weight.dtype in FP8 and kind in (None, "float8_e4m3fn", "float8_e5m2"):
        return _scaled(where, raw, key, scale, "fp8 scaled" if scale else "fp8", 0)
    raise CheckpointError(f"{where} is {weight.dtype} with an unknown meaning ({kind or 'without a description'})")


def _is_group(size: int, columns: int) -> bool:
    """Whether a ConvRot group has this size: a power of 4 that divides the columns."""
    return 0 < size <= columns and columns % size == 0 and size.bit_count() == 1 and size.bit_length() % 2 == 1


def _scaled(where: str, raw: Mapping[str, Stored], key: str, scale: str | None, label: str, rotated: int) -> Stored:
    codes = raw[key]
    if scale is None and len(codes.shape) != 2:
        return codes  # a norm or a bias that was only cast
    factors = raw[scale].count if scale else 1
    if len(codes.shape) != 2 or factors not in (1, codes.shape[0]):
        raise CheckpointError(f"{where} {list(codes.shape)} has {factors} scales; it should have 1, or one per row")

    def read(maps: Maps) -> Packed:
        factor = raw[scale].tensor(maps).float() if scale else torch.ones(())
        return Scaled(codes.tensor(maps), factor.reshape(() if factors == 1 else (-1, 1)), rotated)

    return Stored(codes.shape, label, codes.nbytes + 4 * factors, read, packed=True)


def _nvfp4(where: str, raw: Mapping[str, Stored], key: str) -> Stored:
    module = key.removesuffix(".weight")
    codes, block, scale = raw[key], raw.get(f"{module}.weight_scale"), raw.get(f"{module}.weight_scale_2")
    if block is None or scale is None or block.dtype not in FP8 or scale.count != 1 or len(codes.shape) != 2:
        raise CheckpointError(f"{where} is nvfp4 and needs an fp8 weight_scale and one weight_scale_2")
    rows, columns = codes.shape[0], 2 * codes.shape[1]
    if block.count != (-(-rows // 128) * 128) * (-(-columns // (4 * NVFP4_BLOCK)) * 4):
        raise CheckpointError(f"{where} [{rows}, {columns}] has {block.count} block scales, which do not fit")

    def read(maps: Maps) -> Packed:
        blocks = unswizzled(block.tensor(maps), rows, -(-columns // NVFP4_BLOCK))
        return NVFP4(codes.tensor(maps), blocks, scale.tensor(maps).float().reshape(()))

    return Stored((rows, columns), "nvfp4", codes.nbytes + block.nbytes + 4, read, packed=True)


def _described(
    file: Path, raw: Mapping[str, Stored], metadata: Mapping[str, str], read: Read
) -> dict[str, dict[str, object]]:
    """Module → what the file says about its format, from `comfy_quant` tensors or from the header."""
    found: dict[str, dict[str, object]] = {}
    if HEADER in metadata:
        layers = json_object(f"{file}: {HEADER}", metadata[HEADER]).get("layers")
        if not isinstance(layers, dict) or not all(isinstance(about, dict) for about in layers.values()):
            raise CheckpointError(f"{file}: {HEADER} should map layers to their formats")
        found |= layers
    for key, stored in raw.items():
        module, _, leaf = key.rpartition(".")
        if leaf == DESCRIPTION:
            if stored.dtype != "U8" or stored.count > 4096:
                raise CheckpointError(f"{file}: {key} should be a short JSON text, as bytes")
            found[module] = json_object(f"{file}: {key}", bytes(read(key).tolist()))
    return found
