"""Caption embeddings ↔ files, so that a prompt can be encoded once, or on another machine.

A file is safetensors with one tensor `embeddings` (L, C): L tokens, C caption width. The metadata of our files holds
the request that they were made from, as JSON, and the encoder's fingerprint; files of other programs need neither.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from zimage.errors import CheckpointError, OutputError, RequestError, quoted
from zimage.formats.atomic import beside, destination
from zimage.formats.checkpoint import listing
from zimage.formats.json_text import json_object
from zimage.formats.stored import FLOATS, TensorFile
from zimage.settings.fields import Plain

TENSOR = "embeddings"
SAVED = ".safetensors"
FORMAT, VERSION = "zimage-embeddings", "1"
MAX_BYTES = 1 << 30


@dataclass(frozen=True)
class Embeddings:
    """A caption (L, C) on the CPU; `request` and `encoder` are empty if the file does not name them."""

    caption: Tensor = field(repr=False)
    request: dict[str, Plain]  # JSON
    encoder: str
    hash: str
    name: str = "embeddings in memory"
    path: str = ""  # where the file lies

    @classmethod
    def of(cls, given: "Embeddings | Tensor | str | os.PathLike[str]", width: int = 0) -> "Embeddings":
        """From a file's path or a tensor (L, C); `width` is the C that is needed, 0: any.

        Raises RequestError or CheckpointError.
        """
        if isinstance(given, Embeddings):
            return given
        if not isinstance(given, Tensor):
            return load_embeddings(given, width)
        _check_values(given, "embeddings", RequestError)
        _check_width(given, width, "embeddings", RequestError)
        return cls(given.detach().cpu().clone(), {}, "", caption_hash(given))

    def describe(self) -> dict[str, str]:
        """Plain values for a picture's metadata."""
        return {"name": self.name, "hash": self.hash}


def save_embeddings(path: str | os.PathLike[str], caption: Tensor, request: Mapping[str, Plain], encoder: str) -> None:
    """Write a caption (L, C), whole or not at all, and replace any earlier file. Raises RequestError or OutputError."""
    path = Path(path)
    if path.suffix != SAVED:
        raise RequestError(f"embeddings {quoted(path.name)} should end in {SAVED}")
    _check_values(caption, f"the caption for {path.name}", RequestError)
    metadata = {"format": FORMAT, "version": VERSION, "encoder": encoder, "request": json.dumps(dict(request))}
    try:
        write_caption(destination(path), caption, metadata)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error


def load_embeddings(path: str | os.PathLike[str], width: int = 0) -> Embeddings:
    """The caption in a file, for a model whose captions are `width` wide (0: any).

    Raises RequestError if there is no such file, and CheckpointError naming what is wrong with it.
    """
    path = Path(path)
    if not path.is_file():
        raise RequestError(f"{path} is {'not a file' if path.exists() else 'missing'}; pass a file of embeddings")
    caption, metadata = read_caption(path)
    _check_values(caption, str(path), CheckpointError)
    _check_width(caption, width, str(path), CheckpointError)
    request, encoder = _described(path, metadata)
    return Embeddings(caption, request, encoder, caption_hash(caption), path.name, os.path.abspath(path))


def caption_hash(caption: Tensor) -> str:
    """Sixteen hex digits of the SHA-256 of dtype, shape and values."""
    plain = caption.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{plain.dtype} {list(plain.shape)}\n".encode())
    digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def write_caption(path: Path, caption: Tensor, metadata: Mapping[str, str]) -> None:
    """Write a file in one step, so that readers and other writers always see a whole one. Raises OSError."""
    with beside(path) as temporary:
        temporary.write_bytes(save({TENSOR: caption.detach().cpu().contiguous()}, dict(metadata)))
        os.replace(temporary, path)


def read_caption(path: Path) -> tuple[Tensor, dict[str, str]]:
    """The tensor `embeddings` of a floating dtype, and the metadata. Raises CheckpointError.

    Another process may replace the file at any time.
    """
    with TensorFile(path, MAX_BYTES) as file:
        if list(file.slots) != [TENSOR]:
            raise CheckpointError(f"{path} should hold one tensor {TENSOR!r}; it holds {listing(sorted(file.slots))}")
        if (dtype := file.slots[TENSOR].dtype) not in FLOATS:
            raise CheckpointError(f"{path}: embeddings cannot be {dtype}; use {', '.join(FLOATS)}")
        return file.read(TENSOR), file.metadata


def _check_values(caption: Tensor, name: str, kind: type[Exception]) -> None:
    if caption.dtype not in FLOATS.values():
        raise kind(f"{name}: embeddings cannot be {caption.dtype}; use {', '.join(map(str, FLOATS.values()))}")
    if caption.ndim != 2 or 0 in caption.shape:
        raise kind(f"{name}: the embeddings are {list(caption.shape)}; they should be [tokens, width], not empty")
    if not torch.isfinite(caption).all():
        bad = int((~torch.isfinite(caption)).any(-1).sum())
        raise kind(f"{name}: {bad} of {len(caption)} tokens contain NaN or infinity; encode the prompt again")


def _check_width(caption: Tensor, width: int, name: str, kind: type[Exception]) -> None:
    if width not in (0, caption.shape[1]):
        raise kind(f"{name}: the embeddings are {caption.shape[1]} wide; this model takes {width}")


def _described(path: Path, metadata: Mapping[str, str]) -> tuple[dict[str, Plain], str]:
    """(request, encoder) of one of our files; the metadata of other programs is not read."""
    if metadata.get("format") != FORMAT:
        return {}, ""
    if metadata.get("version") != VERSION:
        raise CheckpointError(f"{path} has format version {quoted(metadata.get('version'))}; supported is {VERSION!r}")
    request = json_object(f"{path}: the request in its metadata", metadata.get("request", ""))
    return request, metadata.get("encoder", "")
