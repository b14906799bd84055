"""Latents ↔ patch tokens. Shapes: B batch, C channels, h × w latents, p patch side; channels run fastest in a patch."""

from torch import Tensor


def patchify(latents: Tensor, p: int) -> Tensor:
    """(B, C, h, w) → (B, (h/p)·(w/p), p·p·C), rows first."""
    B, C, h, w = latents.shape
    x = latents.reshape(B, C, h // p, p, w // p, p)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(B, (h // p) * (w // p), p * p * C)


def unpatchify(tokens: Tensor, h: int, w: int, p: int) -> Tensor:
    """(B, (h/p)·(w/p), p·p·C) → (B, C, h, w): the inverse of `patchify`."""
    x = tokens.unflatten(1, (h // p, w // p)).unflatten(-1, (p, p, -1))  # (B, h/p, w/p, p, p, C)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(tokens.shape[0], -1, h, w)
