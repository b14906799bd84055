"""GGUF files, read by the `gguf` package (extra `gguf`), which also unpacks the kinds that nn/ggml.py does not know."""

import importlib.util
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zimage.errors import CheckpointError, install_hint
from zimage.formats.stored import Maps, Stored, plain
from zimage.nn import ggml
from zimage.nn.packed import Blocks

MAGIC = b"GGUF"
PLAIN = ("F64", "F32", "F16", "BF16")  # kinds that go by the same names in safetensors


def is_gguf(file: Path) -> bool:
    """By its first bytes, never by its name."""
    with file.open("rb") as stream:
        return stream.read(len(MAGIC)) == MAGIC


def stored_in(file: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors of a GGUF file, and no metadata. Raises CheckpointError."""
    return {tensor.name: _stored(file, tensor) for tensor in _reader(file).tensors}, {}


def _stored(file: Path, tensor: Any) -> Stored:
    shape = tuple(int(side) for side in reversed(tensor.shape))  # GGUF counts from the innermost axis
    kind, begin, end = tensor.tensor_type.name, int(tensor.data_offset), int(tensor.data_offset + tensor.n_bytes)
    if end > file.stat().st_size:
        raise CheckpointError(f"{file} is not a whole GGUF file: {tensor.name} ends past its end; fetch it again")
    if kind in PLAIN:
        return plain(file, kind, shape, begin, end)
    unpack = partial(_unpacked, tensor.tensor_type)
    if len(shape) != 2 or not _can_unpack(tensor.tensor_type):
        raise CheckpointError(f"{file}: {tensor.name} {list(shape)} is of the type {kind}, which cannot be unpacked")

    def read(maps: Maps) -> Blocks:
        return Blocks(maps(file)[begin:end].view(shape[0], -1), shape[1], unpack)

    return Stored(shape, f"GGUF {kind}", end - begin, read, packed=True)


def _unpacked(kind: Any, codes: Tensor) -> Tensor:
    """uint8 (rows, bytes) → numbers (rows, columns) fp32, on the device of `codes`."""
    if kind.name in ggml.DECODERS:
        return ggml.decode(kind.name, codes)
    import gguf

    return torch.from_numpy(gguf.quants.dequantize(codes.cpu().numpy(), kind)).to(codes.device, torch.float32)


def _can_unpack(kind: Any) -> bool:
    import gguf

    return kind in gguf.quants._type_traits


def _reader(file: Path) -> Any:
    if importlib.util.find_spec("gguf") is None:
        raise CheckpointError(f"{file} is a GGUF file, which needs the extra `gguf`: {install_hint('gguf')}")
    import gguf

    class Bounded(gguf.GGUFReader):
        """The package takes what lies past the end for empty, and counts on to whatever number a bad file declares."""

        def _get(self, offset, dtype, count=1, override_order=None):
            size = int(count) * gguf.gguf_reader.np.dtype(dtype).itemsize
            if int(offset) + size > len(self.data):
                raise ValueError(f"it ends at byte {len(self.data)}, {int(offset) + size - len(self.data)} too early")
            return super()._get(offset, dtype, count, override_order)

    try:
        return Bounded(file)
    except Exception as error:  # it raises bare and NumPy's kinds for damaged files
        raise CheckpointError(f"{file} is not a whole GGUF file ({_line(error)}); fetch it again") from error


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
