"""GGUF files, read with the package gguf (extra `gguf`), which also unpacks the kinds that nn/ggml.py does not know."""

import importlib.util
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from zimage.errors import CheckpointError, install_hint
from zimage.formats.stored import FLOATS, Maps, Stored, plain
from zimage.nn import ggml
from zimage.nn.packed import Blocks

if TYPE_CHECKING:
    import numpy.typing as npt
    from gguf import GGMLQuantizationType, GGUFReader, ReaderTensor

MAGIC = b"GGUF"


def is_gguf(file: Path) -> bool:
    """Whether a file is GGUF by its first bytes, never by its name."""
    with file.open("rb") as stream:
        return stream.read(len(MAGIC)) == MAGIC


def stored_in(file: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors of a GGUF file, and no metadata. Raises CheckpointError."""
    return {tensor.name: _stored(file, tensor) for tensor in _reader(file).tensors}, {}


def _stored(file: Path, tensor: "ReaderTensor") -> Stored:
    shape = tuple(int(side) for side in reversed(tensor.shape))  # GGUF lists the innermost axis first
    kind, begin, end = tensor.tensor_type.name, int(tensor.data_offset), int(tensor.data_offset + tensor.n_bytes)
    if end > file.stat().st_size:
        raise CheckpointError(f"{file} is not a whole GGUF file: {tensor.name} lies past its end; fetch it again")
    if kind in FLOATS:
        return plain(file, kind, shape, begin, end)
    unpack = partial(_unpacked, tensor.tensor_type)
    if len(shape) != 2 or not _can_unpack(tensor.tensor_type):
        raise CheckpointError(f"{file}: {tensor.name} {list(shape)} has the type {kind}, which cannot be unpacked")

    def read(maps: Maps) -> Blocks:
        return Blocks(maps(file)[begin:end].view(shape[0], -1), shape[1], unpack)

    return Stored(shape, f"GGUF {kind}", end - begin, read, packed=True)


def _unpacked(kind: "GGMLQuantizationType", codes: Tensor) -> Tensor:
    """uint8 codes (rows, bytes) → numbers (rows, columns), fp32, on the device of the codes."""
    if kind.name in ggml.DECODERS:
        return ggml.decode(kind.name, codes)
    import gguf

    return torch.from_numpy(gguf.quants.dequantize(codes.cpu().numpy(), kind)).to(codes.device, torch.float32)


def _can_unpack(kind: "GGMLQuantizationType") -> bool:
    import gguf

    return kind in gguf.quants._type_traits


def _reader(file: Path) -> "GGUFReader":
    if importlib.util.find_spec("gguf") is None:
        raise CheckpointError(f"{file} is a GGUF file, which needs the extra `gguf`: {install_hint('gguf')}")
    import gguf

    class Bounded(gguf.GGUFReader):
        """The package reads past a file's end without an error, for as long as the numbers in a bad file tell it to."""

        def _get(self, offset: int, dtype: "npt.DTypeLike", count: int = 1, override_order=None):
            size = int(count) * gguf.gguf_reader.np.dtype(dtype).itemsize
            if int(offset) + size > len(self.data):
                raise ValueError(f"it ends at byte {len(self.data)}, {int(offset) + size - len(self.data)} too early")
            return super()._get(offset, dtype, count, override_order)

    try:
        return Bounded(file)
    except Exception as error:  # damaged files make it raise plain exceptions and NumPy's
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"{file} is not a whole GGUF file ({reason}); fetch it again") from error
