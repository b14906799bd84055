"""Quantised weights as files store them: a weight and its companion tensors become one packed matrix.

What a weight is follows from the dtypes and shapes of its codes and their companions; a description may say more, and
must agree. Everywhere number = stored × scale. Ignoring a companion would give noise, so an unknown one stays a tensor
of its own, which the strict check then reports as unexpected.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zimage.errors import CheckpointError
from zimage.formats.json_text import json_object
from zimage.formats.stored import FLOATS, FP8, Maps, Stored
from zimage.nn.packed import MXFP8_BLOCK, NVFP4, Grouped, Int4, Packed, Scaled, unswizzled

MARKER = "scaled_fp8"  # an empty tensor that marks Comfy's older form
WEIGHT_SCALES = ("weight_scale", "scale_weight", "weight_scale_inv")  # all multiply, whatever their names say
SECOND_SCALE = "weight_scale_2"
INPUT_SCALES = ("input_scale", "scale_input")  # of activations, which are scaled by their own values instead
DESCRIPTION = "comfy_quant"
COMPANIONS = frozenset((MARKER, *WEIGHT_SCALES, SECOND_SCALE, *INPUT_SCALES, DESCRIPTION))
HEADER = "_quantization_metadata"
USUAL_BLOCK = 128  # rows and columns; of those who write blocks, most
Read = Callable[[str], Tensor]
# What a description may call the format → the kind that codes and companions must show.
FORMATS = {
    **dict.fromkeys(("float8_e4m3fn", "float8_e5m2", "float8_e4m3fn_rowwise", "float8_e4m3fn_blockwise"), "fp8"),
    **dict.fromkeys(("int8", "int8_tensorwise", "int8_rowwise", "int8_blockwise"), "int8"),
    "mxfp8": "mxfp8",
    "nvfp4": "nvfp4",
    "convrot_w4a4": "convrot_w4a4",
}


def gathered(file: Path, raw: Mapping[str, Stored], metadata: Mapping[str, str], read: Read) -> dict[str, Stored]:
    """The `raw` tensors of a file, each quantised weight joined with its companions. Raises CheckpointError.

    `read(key)` returns the values of a small tensor at once: descriptions must be known before loading.
    """
    described = _described(file, raw, metadata, read)
    tensors = {key: value for key, value in raw.items() if key.rpartition(".")[2] != MARKER}
    for key in [key for key in raw if key.endswith(".weight")]:
        module = key.removesuffix(".weight")
        about = described.get(module, {})
        if raw[key].dtype not in (*FP8, "I8", "U8") and not about:
            continue
        found = _Weight.find(f"{file}: {key}", raw, module, about)
        tensors[key] = found.packed()
        for name in (*found.used, *INPUT_SCALES, DESCRIPTION):
            tensors.pop(f"{module}.{name}", None)
    return tensors


@dataclass(frozen=True)
class _Weight:
    """A weight's codes and what turns them into numbers, as they lie in a file."""

    where: str  # the file and the key, for messages
    codes: Stored
    scale: Stored | None
    second: Stored | None
    about: Mapping[str, object]
    used: tuple[str, ...]  # the names of the companions that it takes

    @classmethod
    def find(cls, where: str, raw: Mapping[str, Stored], module: str, about: Mapping[str, object]) -> "_Weight":
        named = next((name for name in WEIGHT_SCALES if f"{module}.{name}" in raw), "")
        codes, scale = raw[f"{module}.weight"], raw[f"{module}.{named}"] if named else None
        second = raw.get(f"{module}.{SECOND_SCALE}") if codes.dtype == "U8" else None
        return cls(where, codes, scale, second, about, (named, SECOND_SCALE) if second else (named,))

    def packed(self) -> Stored:
        """The matrix, or the codes themselves where they are numbers. Raises CheckpointError."""
        kind = self._kind()
        if kind == "fp8" and self.scale is None and len(self.codes.shape) != 2:
            return self.codes  # a norm or a bias that was only cast
        if len(self.codes.shape) != 2 or not self.codes.count:
            raise CheckpointError(f"{self.where} {list(self.codes.shape)} is {kind}; it should be a matrix")
        if kind == "fp8":
            return self._scaled("fp8 scaled" if self.scale else "fp8", 0)
        if kind == "int8":
            group = self._rotated()
            return self._scaled(f"int8{' ConvRot' if group else ''}", group)
        return {"mxfp8": self._mxfp8, "nvfp4": self._nvfp4, "convrot_w4a4": self._int4}[kind]()

    def _kind(self) -> str:
        stated = self.about.get("format")
        if stated is not None and (not isinstance(stated, str) or stated not in FORMATS):
            names = ", ".join(FORMATS)
            raise CheckpointError(f"{self.where} has the format {str(stated)[:80]!r}; implemented are {names}")
        shown = self._shown(stated)
        if not shown or (stated is not None and FORMATS[stated] != shown):
            companions = " and ".join(f"{name} {of.dtype}" for name, of in self._companions()) or "no scale"
            said = f"the format {stated!r} in its description" if stated else "without a description"
            raise CheckpointError(f"{self.where} is {self.codes.dtype} with {companions}, {said}: they do not fit")
        return shown

    def _shown(self, stated: str | None) -> str:
        """The kind that the tensors show, or "" for none. Two numbers in a byte look like one: that must be stated."""
        scale = self.scale.dtype if self.scale else ""
        if self.codes.dtype in FP8:
            return "mxfp8" if scale in ("F8_E8M0", "U8") else "fp8" if scale in ("", *FLOATS) else ""
        if self.codes.dtype == "I8" and scale in FLOATS:
            return "convrot_w4a4" if stated == "convrot_w4a4" else "int8"
        return "nvfp4" if self.codes.dtype == "U8" and scale in FP8 and self.second else ""

    def _companions(self) -> list[tuple[str, Stored]]:
        found = zip(self.used, (self.scale, self.second)[: len(self.used)], strict=True)
        return [(name, stored) for name, stored in found if stored is not None]

    def _rotated(self) -> int:
        """The columns that are rotated together (0: none)."""
        group = self.about.get("convrot_groupsize", 256) if self.about.get("convrot") else 0
        return self._fitting(group, self.codes.shape[-1]) if group != 0 else 0

    def _fitting(self, group: Any, columns: int) -> int:
        """The size of ConvRot groups: a power of 4 that divides the columns."""
        fits = type(group) is int and 0 < group <= columns and columns % group == 0
        if not fits or group.bit_count() != 1 or group.bit_length() % 2 == 0:
            shown = str(group)[:80]
            raise CheckpointError(f"{self.where}: convrot_groupsize {shown!r} does not fit its {columns} columns")
        return group

    def _scaled(self, label: str, rotated: int) -> Stored:
        """One scale for all rows or one for each, else one for each block of rows and columns."""
        codes, scale, rows = self.codes, self.scale, self.codes.shape[0]
        factors = scale.count if scale else 1
        per_row = scale is not None and scale.shape in ((rows,), (rows, 1), (1, rows), (rows, 1, 1))
        if factors != 1 and not per_row:
            return self._blocks(f"{label} in blocks", rotated)

        def read(maps: Maps) -> Packed:
            factor = scale.tensor(maps).float() if scale else torch.ones(())
            return Scaled(codes.tensor(maps), factor.reshape(() if factors == 1 else (-1, 1)), rotated)

        return Stored(codes.shape, label, codes.nbytes + 4 * factors, read, packed=True)

    def _blocks(self, label: str, rotated: int) -> Stored:
        codes, (rows, columns), scale = self.codes, self.codes.shape, self.scale
        assert scale is not None
        count = scale.shape[:2] if scale.shape[2:] in ((), (1,)) and len(scale.shape) > 1 else (0, 0)
        height, width = self._block(rows, count[0]), self._block(columns, count[1])
        if not height or not width or rotated:
            raise CheckpointError(
                f"{self.where} {list(codes.shape)} has {scale.count} scales {list(scale.shape)}; it should have 1, one "
                f"per row, or {'no rotation' if rotated else 'one per block of rows and columns'}"
            )

        def read(maps: Maps) -> Packed:
            blocks = scale.tensor(maps).float().reshape(count).repeat_interleave(height, dim=0)[:rows]
            return Grouped(codes.tensor(maps), blocks, width)

        return Stored(codes.shape, label, codes.nbytes + 4 * rows * count[1], read, packed=True)

    def _block(self, side: int, count: int) -> int:
        """The rows or columns of a block, or 0 where this many blocks do not fit."""
        stated = self.about.get("group_size") or self.about.get("block_size")
        exact = side // count if count and side % count == 0 else 0
        sizes = (stated if type(stated) is int and stated > 0 else 0, exact, USUAL_BLOCK)
        return next((size for size in sizes if size and -(-side // size) == count), 0)

    def _mxfp8(self) -> Stored:
        codes, (rows, columns), scale = self.codes, self.codes.shape, self.scale
        assert scale is not None
        if columns % MXFP8_BLOCK or scale.count != _swizzled_count(rows, columns // MXFP8_BLOCK):
            raise self._misfit(scale, rows, columns)

        def read(maps: Maps) -> Packed:
            exponents = scale.tensor(maps).view(torch.uint8)
            return Grouped(codes.tensor(maps), unswizzled(exponents, rows, columns // MXFP8_BLOCK), MXFP8_BLOCK)

        return Stored(codes.shape, "mxfp8", codes.nbytes + rows * columns // MXFP8_BLOCK, read, packed=True)

    def _nvfp4(self) -> Stored:
        codes, block, second = self.codes, self.scale, self.second
        assert block is not None
        assert second is not None
        rows, columns = codes.shape[0], 2 * codes.shape[1]
        if second.count != 1 or second.dtype not in FLOATS:
            raise CheckpointError(f"{self.where} is nvfp4 and needs an fp8 weight_scale and one weight_scale_2")
        if columns % NVFP4.block or block.count != _swizzled_count(rows, columns // NVFP4.block):
            raise self._misfit(block, rows, columns)

        def read(maps: Maps) -> Packed:
            blocks = unswizzled(block.tensor(maps), rows, columns // NVFP4.block)
            return NVFP4(codes.tensor(maps), blocks, second.tensor(maps).float().reshape(()))

        return Stored((rows, columns), "nvfp4", codes.nbytes + rows * columns // NVFP4.block + 4, read, packed=True)

    def _misfit(self, scale: Stored, rows: int, columns: int) -> CheckpointError:
        return CheckpointError(f"{self.where} [{rows}, {columns}] has {scale.count} block scales, which do not fit")

    def _int4(self) -> Stored:
        codes, scale, rows = self.codes, self.scale, self.codes.shape[0]
        assert scale is not None
        columns = 2 * codes.shape[1]
        group = self._fitting(self.about.get("convrot_groupsize", 256), columns)
        if scale.count != rows:
            raise CheckpointError(
                f"{self.where} [{rows}, {columns}] has {scale.count} scales; it should have one per row"
            )

        def read(maps: Maps) -> Packed:
            return Int4(codes.tensor(maps).view(torch.uint8), scale.tensor(maps).float().reshape(-1, 1), group)

        return Stored((rows, columns), "int4 ConvRot", codes.nbytes + 4 * rows, read, packed=True)


def _swizzled_count(rows: int, columns: int) -> int:
    """How many block scales cuBLAS's tiles of 128 × 4 hold for a matrix of that many scales."""
    return (-(-rows // 128) * 128) * (-(-columns // 4) * 4)


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
            found[module] = json_object(f"{file}: {key}", bytes(read(key).flatten().tolist()))
    return found
