"""Latents ↔ patch tokens. Shapes: B batch, C channels, h × w latents, p patch side; channels run fastest in a patch.

N image tokens, Np = N padded to a multiple of 32.
"""

import torch
from torch import Tensor, nn

from zimage.errors import RequestError

SEQUENCE_MULTIPLE = 32  # the learned pad tokens fill every sequence up to a multiple of this, and are attended
PATCH = 2


def patchify(latents: Tensor, p: int) -> Tensor:
    """(B, C, h, w) → (B, (h/p)·(w/p), p·p·C), rows first."""
    B, C, h, w = latents.shape
    x = latents.reshape(B, C, h // p, p, w // p, p)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(B, (h // p) * (w // p), p * p * C)


def unpatchify(tokens: Tensor, h: int, w: int, p: int) -> Tensor:
    """(B, (h/p)·(w/p), p·p·C) → (B, C, h, w): the inverse of `patchify`."""
    x = tokens.unflatten(1, (h // p, w // p)).unflatten(-1, (p, p, -1))  # (B, h/p, w/p, p, p, C)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(tokens.shape[0], -1, h, w)


def embed_patches(
    latents: Tensor, channels: int, embedder: nn.Module, pad: Tensor, part: slice = slice(None)
) -> Tensor:
    """(B, C, h, w) → (B, Np, dim): the learned `pad` (1, dim) follows the image tokens and is attended like any token.

    Of the Np tokens only a `part`. Raises RequestError for latents of other than `channels` channels, or of odd sides.
    """
    C, h, w = latents.shape[1:]
    if channels != C or h % PATCH or w % PATCH:
        raise RequestError(
            f"latents of shape {tuple(latents.shape)} do not fit; they must have {channels} channels and even sides"
        )
    patches = patchify(latents.to(pad), PATCH)
    tokens, every = embedder(patches[:, part]), range(padded_length(patches.shape[1]))
    pads = pad.expand(len(tokens), len(every[part]) - tokens.shape[1], -1)
    return torch.cat((tokens, pads), dim=1)


def padded_length(length: int) -> int:
    """The length to which a sequence is padded."""
    return -(-length // SEQUENCE_MULTIPLE) * SEQUENCE_MULTIPLE
