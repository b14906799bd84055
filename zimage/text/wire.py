"""Captions between two machines: safetensors, one tensor for each text, whose metadata say what they are.

    "0", "1", …                         (L, C): L tokens, C caption width, in the order of the texts
    format, version                     zimage-captions, 1
    encoder, dtype                      the text encoder's fingerprint, and what it computed in
    layers, tokens, shape               as JSON: {"-2": 1.0}, [12, 9], [[12, 2560], [9, 2560]]

The bits are those that the text encoder computed. Also here: hidden states as other servers send them, in JSON.
"""

import base64
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from zimage.errors import CheckpointError, quoted
from zimage.formats.headers import Header, read_header
from zimage.formats.json_text import json_object, json_value
from zimage.formats.stored import FLOATS
from zimage.settings.fields import Plain, Weights, as_plain

FORMAT, VERSION = "zimage-captions", "1"
ROOM = 1 << 16  # bytes of an answer beside its values: headers, metadata, names


@dataclass(frozen=True)
class Wanted:
    """What captions have to be: one (L, width) for each L of `tokens`, of these layers.

    `encoder` is the fingerprint of their text encoder, "" where it is not known; `dtype` what that computes in.
    """

    tokens: tuple[int, ...]
    width: int
    layers: Weights
    dtype: torch.dtype
    encoder: str = ""

    @property
    def values(self) -> int:
        return sum(self.tokens) * self.width


def ids_hash(ids: Sequence[int]) -> str:
    """Hex digits that two machines compare, so that both read a text as the same tokens."""
    return hashlib.sha256(json.dumps(list(ids)).encode()).hexdigest()[:32]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---------------------------------------------------------------------- safetensors


def packed(captions: Sequence[Tensor], layers: Weights, encoder: str) -> bytes:
    """Captions (L, C) of one dtype as they travel."""
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "encoder": encoder,
        "dtype": dtype_name(captions[0].dtype),
        "layers": json.dumps(as_plain(layers)),
        "tokens": json.dumps([len(caption) for caption in captions]),
        "shape": json.dumps([list(caption.shape) for caption in captions]),
    }
    return save({str(i): caption.detach().cpu().contiguous() for i, caption in enumerate(captions)}, metadata)


def unpacked(body: bytes, wanted: Wanted) -> tuple[list[Tensor], str]:
    """The captions in a body, and the fingerprint of their text encoder. Raises CheckpointError unless as wanted."""
    header = read_header(io.BytesIO(body), len(body))
    if header.problems:
        raise CheckpointError(f"sent something other than captions ({header.problems[0]})")
    _check_metadata(header.metadata, wanted)
    names = [str(i) for i in range(len(wanted.tokens))]
    if sorted(header.slots) != sorted(names):
        raise CheckpointError(f"sent {len(header.slots)} captions; {len(names)} were asked for")
    captions = [_tensor(header, name, body) for name in names]
    for caption, tokens in zip(captions, wanted.tokens, strict=True):
        check_caption(caption, tokens, wanted)
    return captions, header.metadata["encoder"]


def _check_metadata(told: Mapping[str, str], wanted: Wanted) -> None:
    if (told.get("format"), told.get("version")) != (FORMAT, VERSION):
        kind = f"{quoted(told.get('format'))} version {quoted(told.get('version'))}"
        raise CheckpointError(
            f"sent {kind} instead of {FORMAT} version {VERSION}; use the same version of zimage there"
        )
    check_encoder(told.get("encoder", ""), wanted.encoder)
    layers = json_value("its metadata's layers", told.get("layers", ""))
    if layers != as_plain(wanted.layers):
        raise CheckpointError(f"sent the layers {quoted(layers)} instead of {quoted(as_plain(wanted.layers))}")
    if told.get("dtype") != dtype_name(wanted.dtype):
        raise CheckpointError(
            f"computed in {quoted(told.get('dtype'))} instead of {dtype_name(wanted.dtype)}; set encoder_dtype here or "
            "dtype there"
        )
    tokens = json_value("its metadata's tokens", told.get("tokens", ""))
    if tokens != list(wanted.tokens):
        raise CheckpointError(
            f"encoded {quoted(tokens)} tokens instead of {list(wanted.tokens)}; is its tokenizer the same?"
        )


def check_encoder(found: str, wanted: str) -> None:
    """Raise CheckpointError for captions of another text encoder than the known one."""
    if not found or found != (wanted or found):
        told = f"fingerprint {quoted(found)} instead of {wanted}" if found else "without a fingerprint"
        raise CheckpointError(f"encoded with another model ({told}); open the same text encoder there")


def check_caption(caption: Tensor, tokens: int, wanted: Wanted) -> None:
    """Raise CheckpointError for a caption of another shape or dtype, or one that is not finite."""
    if caption.dtype != wanted.dtype:
        raise CheckpointError(f"sent {dtype_name(caption.dtype)} instead of {dtype_name(wanted.dtype)}")
    if caption.shape != (tokens, wanted.width):
        raise CheckpointError(
            f"sent a caption of {list(caption.shape)} instead of [{tokens}, {wanted.width}]; is it the same model?"
        )
    if not torch.isfinite(caption).all():
        raise CheckpointError("sent a caption with NaN or infinity")


def _tensor(header: Header, name: str, body: bytes) -> Tensor:
    slot = header.slots[name]
    if slot.dtype not in FLOATS:
        raise CheckpointError(f"sent captions of the kind {slot.dtype}; use {', '.join(FLOATS)}")
    values = bytearray(body[slot.begin : slot.end])
    return torch.frombuffer(values, dtype=FLOATS[slot.dtype]).view(slot.shape) if values else torch.empty(slot.shape)


# ---------------------------------------------------------------------- hidden states in JSON


def to_base64(caption: Tensor) -> str:
    """The values (L, C) as little-endian float32."""
    return base64.b64encode(caption.detach().cpu().float().numpy().astype("<f4").tobytes()).decode()


def hidden_states(body: bytes, wanted: Wanted, limit: int) -> Tensor:
    """The caption (L, C) in an answer of hidden states. Raises CheckpointError unless as wanted.

    Their values are float32 whatever was computed; what computed in bfloat16 comes back as that bit by bit.
    """
    answer = json_object("the answer", body, limit)
    (layer,), (tokens,) = wanted.layers, wanted.tokens
    if (found := answer.get("layer", layer)) != layer:
        raise CheckpointError(f"sent the hidden layer {quoted(found)} instead of {layer}")
    check_encoder(str(answer.get("fingerprint", wanted.encoder or "unknown")), wanted.encoder)
    if (kind := answer.get("dtype")) not in ("float32", "bfloat16", "float16"):
        raise CheckpointError(f"sent the dtype {quoted(kind)} instead of float32")
    if (shape := answer.get("shape")) != [tokens, wanted.width]:
        raise CheckpointError(
            f"sent hidden states of {quoted(shape)} instead of [{tokens}, {wanted.width}]; is it the same model, and "
            "its tokenizer the same?"
        )
    caption = _from_base64(answer.get("hidden_states"), tokens, wanted).to(wanted.dtype)
    check_caption(caption, tokens, wanted)
    return caption


def _from_base64(text: Plain, tokens: int, wanted: Wanted) -> Tensor:
    try:
        values = base64.b64decode(text, validate=True)
    except (ValueError, TypeError):
        raise CheckpointError("sent hidden_states that are not base64") from None
    if len(values) != 4 * wanted.values:
        raise CheckpointError(f"sent {len(values):,} bytes of values; float32 would have {4 * wanted.values:,}")
    return torch.from_numpy(np.frombuffer(values, "<f4").astype(np.float32)).view(tokens, wanted.width)
