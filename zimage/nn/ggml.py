"""Matrices of those block-quantised kinds of llama.cpp that are decoded here; the package `gguf` unpacks the others."""

from dataclasses import dataclass

import torch
from torch import Tensor

from zimage.kernels import decode_blocks, decode_k_blocks
from zimage.nn.packed import Packed

_SMALL, _LARGE = decode_blocks.BYTES, decode_k_blocks.BYTES
BYTES = _SMALL | _LARGE  # kind → bytes of a block
NUMBERS = dict.fromkeys(_SMALL, decode_blocks.BLOCK) | dict.fromkeys(_LARGE, decode_k_blocks.BLOCK)  # in a block
_DECODERS = dict.fromkeys(_SMALL, decode_blocks.decode_blocks) | dict.fromkeys(_LARGE, decode_k_blocks.decode_k_blocks)


@dataclass(frozen=True)
class GGML(Packed):
    """Rows of whole blocks of one kind, uint8 (out, bytes)."""

    kind: str

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1] // BYTES[self.kind] * NUMBERS[self.kind]

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return _DECODERS[self.kind](self.codes, self.kind, dtype)
