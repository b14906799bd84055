"""Captions as bytes in the object store: safetensors, so that every dtype keeps its bits."""

from safetensors.torch import load, save

from zimage.render.captioning import Conditions


def pack(conditions: Conditions) -> bytes:
    """The caption (L, C) of a row's prompt, and of its negative prompt where there is guidance or NAG."""
    (prompt,), negative = conditions
    found = {"prompt": prompt} if negative is None else {"prompt": prompt, "negative": negative}
    return save({name: caption.detach().cpu().contiguous() for name, caption in found.items()})


def unpack(body: bytes) -> Conditions:
    """The inverse of `pack`."""
    found = load(body)
    return Conditions([found["prompt"]], found.get("negative"))
