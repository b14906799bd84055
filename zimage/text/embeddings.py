"""Caption embeddings ↔ files, so that a prompt is encoded once, or on another machine.

A file is safetensors with one tensor `embeddings` (L, C): L tokens, C caption width. Ours carry in their metadata the
request they were made from, as JSON, and the fingerprint of the encoder; files of other programs need neither.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from zimage.errors import CheckpointError, RequestError
from zimage.formats.atomic import beside

TENSOR = "embeddings"
FORMAT, VERSION = "zimage-embeddings", "1"
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
LISTED = 5  # how many names an error lists before it only counts
SHOWN = 60  # characters of a name in an error


@dataclass(frozen=True)
class Embeddings:
    """A caption (L, C) on the CPU; `request` and `encoder` are empty where the file does not tell them."""

    caption: Tensor = field(repr=False)
    request: dict[str, Any]
    encoder: str
    hash: str
    name: str = "embeddings in memory"
    path: str = ""  # where the file lies

    @classmethod
    def of(cls, given: Any, width: int = 0) -> "Embeddings":
        """From a file's path or a tensor (L, C); `width` is the C that is needed, 0: any.

        Raises RequestError or CheckpointError.
        """
        if isinstance(given, cls):
            return given
        if not isinstance(given, Tensor):
            return load_embeddings(given, width)
        _check_values(given, "embeddings", RequestError)
        _check_width(given, width, "embeddings", RequestError)
        return cls(given.detach().cpu().clone(), {}, "", caption_hash(given))

    def describe(self) -> dict[str, str]:
        """Plain values for a picture's metadata."""
        return {"name": self.name, "hash": self.hash}


def save_embeddings(path: str | os.PathLike, caption: Tensor, request: Mapping[str, Any], encoder: str) -> None:
    """Write a caption (L, C) whole or not at all, in the place of what was there. Raises RequestError."""
    path = Path(path)
    if path.suffix != ".safetensors":
        raise RequestError(f"embeddings {path.name!r} should end in .safetensors")
    _check_values(caption, f"the caption for {path.name}", RequestError)
    metadata = {"format": FORMAT, "version": VERSION, "encoder": encoder, "request": json.dumps(dict(request))}
    try:
        write_caption(path, caption, metadata)
    except OSError as error:
        raise RequestError(f"{path} cannot be written: {error.strerror or error}") from error


def load_embeddings(path: str | os.PathLike, width: int = 0) -> Embeddings:
    """The caption in a file, for a model whose captions are `width` wide (0: any).

    Raises RequestError where there is no file, and CheckpointError naming what is wrong with what is there.
    """
    path = Path(path)
    if not path.is_file():
        raise RequestError(f"{path} is {'not a file' if path.exists() else 'missing'}; give a file of embeddings")
    caption, metadata = read_caption(path)
    _check_values(caption, str(path), CheckpointError)
    _check_width(caption, width, str(path), CheckpointError)
    request, encoder = _described(path, metadata)
    return Embeddings(caption, request, encoder, caption_hash(caption), path.name, os.path.abspath(path))


def caption_hash(caption: Tensor) -> str:
    """Sixteen hex digits of SHA-256 over dtype, shape and values."""
    plain = caption.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{plain.dtype} {list(plain.shape)}\n".encode())
    digest.update(plain.view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def write_caption(path: Path, caption: Tensor, metadata: Mapping[str, str]) -> None:
    """In one step: readers and other writers see a whole file. Raises OSError."""
    with beside(path) as temporary:
        temporary.write_bytes(save({TENSOR: caption.detach().cpu().contiguous()}, dict(metadata)))
        os.replace(temporary, path)


def read_caption(path: Path) -> tuple[Tensor, dict[str, str]]:
    """The tensor `embeddings` of a floating dtype, free of the file, and the metadata. Raises CheckpointError."""
    try:
        _refuse_pickles(path)
        with safe_open(path, framework="pt") as file:
            names, metadata = list(file.keys()), file.metadata() or {}
            if names != [TENSOR]:
                raise CheckpointError(f"{path} should hold one tensor {TENSOR!r}; it holds {_listing(names)}")
            if (dtype := file.get_slice(TENSOR).get_dtype()) not in DTYPES:
                raise CheckpointError(f"{path}: embeddings of dtype {dtype} are not known; use {', '.join(DTYPES)}")
            return file.get_tensor(TENSOR).clone(), metadata
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {str(error).splitlines()[0]}") from error


def _refuse_pickles(path: Path) -> None:
    with path.open("rb") as stream:
        begins = stream.read(9)
    if begins[8:] != b"{" and re.match(rb"PK|\x80[\x02-\x05]", begins):
        raise CheckpointError(f"{path} is a pickle, which can run code when opened; use a safetensors file")


def _check_values(caption: Tensor, name: str, kind: type[Exception]) -> None:
    if caption.dtype not in DTYPES.values():
        raise kind(f"{name}: embeddings of {caption.dtype} are not known; use {', '.join(map(str, DTYPES.values()))}")
    if caption.ndim != 2 or 0 in caption.shape:
        raise kind(f"{name}: the embeddings are {list(caption.shape)}; they should be [tokens, width], at least one")
    if not torch.isfinite(caption).all():
        bad = int((~torch.isfinite(caption)).any(-1).sum())
        raise kind(f"{name}: {bad} of {len(caption)} tokens hold NaN or infinity; encode the prompt again")


def _check_width(caption: Tensor, width: int, name: str, kind: type[Exception]) -> None:
    if width not in (0, caption.shape[1]):
        raise kind(f"{name}: the embeddings are {caption.shape[1]} wide; this model takes {width}")


def _described(path: Path, metadata: Mapping[str, str]) -> tuple[dict[str, Any], str]:
    """(request, encoder) of a file of ours; what other programs write is not read."""
    if metadata.get("format") != FORMAT:
        return {}, ""
    if metadata.get("version") != VERSION:
        raise CheckpointError(f"{path} has version {metadata.get('version')!r} of the format; {VERSION!r} is known")
    try:
        request = json.loads(metadata.get("request", ""))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the request in its metadata is no JSON: {error}") from error
    if not isinstance(request, dict):
        raise CheckpointError(f"{path}: the request in its metadata should be an object, not {type(request).__name__}")
    return request, metadata.get("encoder", "")


def _listing(names: list[str]) -> str:
    shown = [n if n.isprintable() and 0 < len(n) <= SHOWN else ascii(n[:SHOWN]) for n in names[:LISTED]]
    rest = len(names) - LISTED
    return (", ".join(shown) or "none") + (f" and {rest} more" if rest > 0 else "")
