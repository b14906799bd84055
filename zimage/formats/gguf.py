"""GGUF files: their tensors, and the tokenizer that lies in their metadata.

The kinds that image models use are unpacked here; the package gguf (extra `gguf`) unpacks the others.
"""

import importlib.util
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from zimage.errors import CheckpointError, install_hint
from zimage.formats import gguf_header
from zimage.formats.gguf_header import Header, is_gguf, read_header
from zimage.formats.stored import FLOATS, Maps, Stored, plain
from zimage.nn import ggml
from zimage.nn.packed import Blocks, Packed

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

__all__ = ["Vocabulary", "has_tokenizer", "is_gguf", "stored_in"]

# ggml's numbers of its types; plain ones are called as safetensors calls them.
PLAIN = {0: "F32", 1: "F16", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 30: "BF16"}
BYTES = {"I8": 1, "I16": 2, "I32": 4, "I64": 8, **{name: dtype.itemsize for name, dtype in FLOATS.items()}}
BLOCKS = {
    2: "Q4_0",
    3: "Q4_1",
    6: "Q5_0",
    7: "Q5_1",
    8: "Q8_0",
    10: "Q2_K",
    11: "Q3_K",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
}
PADS = ("x_pad_token", "cap_pad_token")  # [1, dim]: ggml drops leading sides of 1
TOKENS, KINDS, MERGES = (f"tokenizer.ggml.{name}" for name in ("tokens", "token_type", "merges"))
CONTROL, USER, UNUSED = 3, 4, 5  # llama.cpp's kinds of tokens that are not pieces of words


@dataclass(frozen=True)
class Vocabulary:
    """A byte-level BPE as llama.cpp keeps it: tokens in the order of their ids, their kinds, merges as "left right"."""

    tokens: list[str]
    kinds: list[int]
    merges: list[str]

    @classmethod
    def read(cls, file: Path) -> "Vocabulary":
        """From a GGUF file's metadata. Raises CheckpointError where it lacks one, or has one that is not Qwen's."""
        header = read_header(file)
        form = tuple(header.metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
        if form != ("gpt2", "qwen2"):
            text = f"{file} holds {f'a tokenizer of the kind {form}' if TOKENS in header.metadata else 'no tokenizer'}"
            raise CheckpointError(f"{text}; use --tokenizer with the folder or tokenizer.json of Qwen/Qwen3-4B")
        tokens, kinds, merges = header.strings(TOKENS), header.integers(KINDS), header.strings(MERGES)
        if len(kinds) != len(tokens) or len(set(tokens)) != len(tokens):
            raise CheckpointError(f"{file}: its {len(tokens)} tokens should be distinct, each with a kind")
        return cls(tokens, kinds, merges)


def stored_in(file: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors of a GGUF file, and its metadata as texts. Raises CheckpointError."""
    header, size = read_header(file), file.stat().st_size
    texts = {key: _text(value) for key, value in header.metadata.items()}
    return {tensor.name: _stored(header, tensor, size) for tensor in header.tensors}, texts


def _text(value: gguf_header.Value) -> str:
    return f"array of {value.count:,}" if isinstance(value, gguf_header.Array) else str(value)


def has_tokenizer(file: Path) -> bool:
    """Whether a file is GGUF with a vocabulary in its metadata."""
    return is_gguf(file) and TOKENS in read_header(file).metadata


def _stored(header: Header, tensor: gguf_header.Tensor, size: int) -> Stored:
    shape, where = tuple(reversed(tensor.axes)), f"{header.file}: {tensor.name} {list(reversed(tensor.axes))}"
    if tensor.name.rpartition(".")[2] in PADS and len(shape) == 1:
        shape = (1, *shape)
    name, numbers, nbytes = _kind(where, tensor.kind)
    count, columns = math.prod(shape), shape[-1] if shape else 1
    if columns % numbers:
        raise CheckpointError(f"{where} is {name}, whose rows are of {numbers} numbers or multiples of that")
    begin = header.begin + tensor.offset
    end = begin + count // numbers * nbytes
    if end > size:
        raise CheckpointError(
            f"{header.file} is not a whole GGUF file: {tensor.name} lies past its end; fetch it again"
        )
    if tensor.kind in PLAIN:
        return plain(header.file, name, shape, begin, end)
    matrix = _packed(header.file, name, (count // columns if columns else 0, columns), tensor.kind, begin, end)
    return matrix if len(shape) == 2 and shape[0] > 1 else _widened(matrix, shape)


def _kind(where: str, kind: int) -> tuple[str, int, int]:
    """A type's name, the numbers in one of its blocks and the bytes that they take."""
    if kind in PLAIN:
        return PLAIN[kind], 1, BYTES[PLAIN[kind]]
    if kind in BLOCKS:
        return BLOCKS[kind], ggml.NUMBERS[BLOCKS[kind]], ggml.BYTES[BLOCKS[kind]]
    if importlib.util.find_spec("gguf") is None:
        raise CheckpointError(f"{where} has ggml's type {kind}, which needs the extra `gguf`: {install_hint('gguf')}")
    import gguf

    known = {int(each): each for each in gguf.quants._type_traits}
    if kind not in known:
        raise CheckpointError(f"{where} has ggml's type {kind}, which cannot be unpacked")
    return known[kind].name, *gguf.GGML_QUANT_SIZES[known[kind]]


def _packed(file: Path, name: str, shape: tuple[int, int], kind: int, begin: int, end: int) -> Stored:
    own = name in ggml.BYTES

    def read(maps: Maps) -> Packed:
        codes = maps(file)[begin:end].view(shape[0], -1)
        return ggml.GGML(codes, name) if own else Blocks(codes, shape[1], partial(_unpacked, kind))

    return Stored(shape, f"GGUF {name}", end - begin, read, packed=True, has_kernel=own)


def _widened(matrix: Stored, shape: tuple[int, ...]) -> Stored:
    """A quantised tensor that is not the weight of a product: small, and plain once read."""

    def read(maps: Maps) -> Tensor:
        value = matrix.read(maps)
        return (value if isinstance(value, Tensor) else value.decode()).reshape(shape)

    return Stored(shape, "F32", 4 * math.prod(shape), read, aligned=False)


def _unpacked(kind: "int | GGMLQuantizationType", codes: Tensor) -> Tensor:
    """uint8 codes (rows, bytes) → numbers (rows, columns), fp32, on a CPU."""
    import gguf

    numbers = gguf.quants.dequantize(codes.numpy(), gguf.GGMLQuantizationType(kind))
    return torch.from_numpy(numbers).float()
