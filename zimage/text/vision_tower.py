"""Qwen3-VL's vision tower: patches of a picture → image tokens for a text stack, and features for its first layers.

Shapes: N = R·Q patches of one picture in groups of m × m, C hidden width, H heads, D head size, M = N/m² image tokens
of width T. Module names are the checkpoint's. Source: Qwen3-VL Technical Report (2025) and the published configuration.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zimage.kernels.qk_norm_rope import rotate_halves
from zimage.nn.attention import attention
from zimage.nn.config import (
    Between,
    Colours,
    Depth,
    Heads,
    Positive,
    Width,
    check_divides,
    check_implemented,
    fault,
    read_architecture,
    section,
)
from zimage.nn.layers import TokenEmbedding
from zimage.text.sight import Grid
from zimage.text.vision_input import MergeSide, PatchSide, Pixels, grouped

EPS = 1e-6  # of every norm; no config states it
FRAMES = 2  # moments of a patch: a still picture fills both


@dataclass(frozen=True)
class VisionTowerConfig:
    depth: Depth
    hidden_size: Width
    intermediate_size: Annotated[int, Between(1, 1 << 22)]
    num_heads: Heads
    out_hidden_size: Width
    num_position_embeddings: Annotated[int, Between(1, 1 << 20)]
    deepstack_visual_indexes: Annotated[tuple[int, ...], Between(0, 16)]
    patch_size: PatchSide
    spatial_merge_size: MergeSide
    in_channels: Colours = 3
    rope_theta: Positive = 10_000.0

    IMPLEMENTED: ClassVar = {
        "model_type": ("qwen3_vl", "qwen3_vl_vision"),
        "hidden_act": ("gelu_pytorch_tanh",),
        "temporal_patch_size": (FRAMES,),
    }

    def __post_init__(self):
        check_divides(type(self), "num_heads", "hidden_size", self)
        if self.head_dim % 4:
            raise fault(type(self), f"hidden_size / num_heads = {self.head_dim} must be a multiple of 4")
        if self.side**2 != self.num_position_embeddings:
            raise fault(type(self), f"num_position_embeddings = {self.num_position_embeddings} must be a square")
        found = self.deepstack_visual_indexes
        if any(not 0 <= i < self.depth for i in found) or list(found) != sorted(set(found)):
            raise fault(type(self), f"deepstack_visual_indexes = {list(found)} must rise within depth = {self.depth}")

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> "VisionTowerConfig":
        """From the object `vision_config` of a published `config.json`. Raises ConfigError."""
        rope = section(cls, config, "rope_parameters")
        check_implemented(cls, rope, {"rope_type": ("axial",)})
        if "rope_theta" in rope:
            config = {**config, "rope_theta": rope["rope_theta"]}
        return read_architecture(cls, config, cls.IMPLEMENTED)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def side(self) -> int:
        """Rows, and columns, of the learned positions."""
        return round(self.num_position_embeddings**0.5)


class VisionTower(nn.Module):
    """One picture → its image tokens (M, T), and one (M, T) of features from each layer in deepstack_visual_indexes."""

    def __init__(self, config: VisionTowerConfig):
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbedding(config)
        self.pos_embed = TokenEmbedding(config.num_position_embeddings, config.hidden_size)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.merger = Merger(config, norm_width=config.hidden_size)
        merged = config.hidden_size * config.spatial_merge_size**2
        self.deepstack_merger_list = nn.ModuleList(
            Merger(config, norm_width=merged) for _ in config.deepstack_visual_indexes
        )

    def forward(self, pixels: Pixels) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Patches attend to all of their picture."""
        x, features = self._embedded(pixels), list[Tensor]()
        turn = axial_rotation(pixels.grid, self.config, x.device)
        for i, block in enumerate(self.blocks):
            x = block(x, turn)
            if i in self.config.deepstack_visual_indexes:
                features.append(self.deepstack_merger_list[len(features)](x))
        return self.merger(x), tuple(features)

    def _embedded(self, pixels: Pixels) -> Tensor:
        """Patches with their learned positions, (N, C)."""
        x, config = self.patch_embed(pixels), self.config
        table = self.pos_embed(torch.arange(config.num_position_embeddings, device=x.device)).float()
        places = resampled(table.unflatten(0, (config.side, -1)), pixels.grid).to(x.dtype)
        return x + grouped(places, config.spatial_merge_size)


class PatchEmbedding(nn.Module):
    def __init__(self, config: VisionTowerConfig):
        super().__init__()
        P = config.patch_size
        self.proj = nn.Conv3d(config.in_channels, config.hidden_size, (FRAMES, P, P), (FRAMES, P, P))

    def forward(self, pixels: Pixels) -> Tensor:
        """(N, C). Kernels as large as their stride are one product, which is faster than convolving."""
        weight = self.proj.weight
        twice = pixels.values(weight.device).to(weight.dtype).unsqueeze(2).expand(-1, -1, FRAMES, -1, -1)
        return F.linear(twice.flatten(1), weight.flatten(1), self.proj.bias)


class VisionBlock(nn.Module):
    def __init__(self, config: VisionTowerConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, EPS)
        self.norm2 = nn.LayerNorm(config.hidden_size, EPS)
        self.attn = VisionAttention(config)
        self.mlp = VisionMLP(config)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attn(self.norm1(x), turn)
        return x + self.mlp(self.norm2(x))


class VisionAttention(nn.Module):
    def __init__(self, config: VisionTowerConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.attend = attention

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = self.qkv(x)[None].unflatten(-1, (3, -1, self.head_dim)).unbind(2)  # each (1, N, H, D)
        q, k = rotate_halves(q, *turn), rotate_halves(k, *turn)
        return self.proj(self.attend(q, k, v)[0].flatten(1))


class VisionMLP(nn.Module):
    def __init__(self, config: VisionTowerConfig):
        super().__init__()
        self.linear_fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.linear_fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_fc2(F.gelu(self.linear_fc1(x), approximate="tanh"))


class Merger(nn.Module):
    """m × m neighbours side by side → one image token: (N, C) → (M, T). The norm sees patches, or whole groups."""

    def __init__(self, config: VisionTowerConfig, norm_width: int):
        super().__init__()
        self.width = config.hidden_size * config.spatial_merge_size**2
        self.norm = nn.LayerNorm(norm_width, EPS)
        self.linear_fc1 = nn.Linear(self.width, self.width)
        self.linear_fc2 = nn.Linear(self.width, config.out_hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x.view(-1, *self.norm.normalized_shape)).view(-1, self.width)
        return self.linear_fc2(F.gelu(self.linear_fc1(normed)))


def resampled(table: Tensor, grid: Grid) -> Tensor:
    """A table of positions (S, S, C) at R × Q places, bilinearly, its corners in the corners: (R, Q, C).

    In fp32 like the reference, whose places follow from a division: i · (S − 1) / (R − 1).
    """
    (top, bottom, down), (left, right, across) = (_taps(size, len(table), table.device) for size in grid)
    rows = torch.lerp(table[top], table[bottom], down[:, None, None])  # (R, S, C)
    return torch.lerp(rows[:, left], rows[:, right], across[:, None])


def _taps(size: int, side: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For each of `size` places on an axis of `side` values the two next to it, and how far it lies between them."""
    place = torch.arange(size, dtype=torch.float32, device=device) * (side - 1) / max(size - 1, 1)
    before = place.floor()
    low = before.long()
    return low, (low + 1).clamp(max=side - 1), place - before


def axial_rotation(grid: Grid, config: VisionTowerConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin (N, D/2) of the patches, fp32: the first half of the pairs turns by the row, the rest by the column.

    Pair k of either half turns by position · θ^(−4k/D). Source: 2-D rotary embedding as in Qwen2-VL (Wang et al. 2024).
    """
    half = config.head_dim // 2
    frequencies = 1.0 / config.rope_theta ** (torch.arange(0, half, 2, dtype=torch.float32, device=device) / half)
    row, column = (torch.arange(size, device=device)[:, None] * frequencies for size in grid)  # (R, D/4), (Q, D/4)
    rows, columns = len(row), len(column)
    angle = torch.cat((row[:, None].expand(-1, columns, -1), column[None].expand(rows, -1, -1)), dim=-1)
    angle = grouped(angle, config.spatial_merge_size)
    return angle.cos(), angle.sin()
