"""The position of every token on three axes (sequence, row, column), and the rotations that follow from it.

Rotations are computed from positions on demand. Without a table that ends, long captions and large images only leave
the trained range (`axes_lens`) and do not fail.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Rotation(NamedTuple):
    """cos and sin of each pair's angle, each (B or 1, L, D/2) fp32."""

    cos: Tensor
    sin: Tensor


def caption_positions(padded_length: int, shift: int = 0) -> Tensor:
    """(Lp, 3): caption token i at (1 + i + shift, 0, 0); the learned pads continue the count."""
    positions = torch.zeros(padded_length, 3, dtype=torch.int64)
    positions[:, 0] = torch.arange(1, padded_length + 1) + shift
    return positions


def image_positions(rows: int, columns: int, padded_length: int, caption_length: int) -> Tensor:
    """(padded_length, 3): token (y, x) at (caption_length + 1, y, x), pads at (0, 0, 0)."""
    positions = torch.zeros(padded_length, 3, dtype=torch.int64)
    grid = positions[: rows * columns].view(rows, columns, 3)
    grid[..., 0] = caption_length + 1
    grid[..., 1] = torch.arange(rows)[:, None]
    grid[..., 2] = torch.arange(columns)
    return positions


def rotation(positions: Tensor, axes_dims: tuple[int, ...], theta: float) -> Rotation:
    """Rotations of positions (B, L, 3): pair k of an axis of size d turns by position · θ^(−2k/d).

    Frequencies in float64, angles rounded to float32, as the reference computes them (RoPE: Su et al. 2021).
    """
    angles = []
    for axis, d in enumerate(axes_dims):
        frequencies = 1.0 / theta ** (torch.arange(0, d, 2, dtype=torch.float64) / d)
        angles.append(positions[..., axis, None].double() * frequencies)
    angle = torch.cat(angles, dim=-1).float()  # (B, L, D/2)
    return Rotation(angle.cos(), angle.sin())
