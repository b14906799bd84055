"""The transformer block of the DiT and its modulation by the noise level.

Shapes: B batch, L tokens, H heads, D head size, `dim` = H·D. Module names are the checkpoint's.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from zimage.dit.nag import Nag, Seen
from zimage.dit.rope import Rotation
from zimage.dit.units import PLAIN, Units
from zimage.kernels.gated_residual import gated_residual
from zimage.kernels.layer_norm import layer_norm_scale
from zimage.kernels.qk_norm_rope import qk_norm_rope
from zimage.kernels.swiglu_scaled import swiglu_scaled
from zimage.nn.attention import attention
from zimage.nn.layers import BlockLinear, RMSNorm
from zimage.nn.operand import Form, Input, common_form, gated_activation, operand, scaled_norm

MODULATION_WIDTH = 256


class BlockModulation(NamedTuple):
    """What the noise level does to one block, each (B, 1, dim)."""

    scale_msa: Tensor
    gate_msa: Tensor
    scale_mlp: Tensor
    gate_mlp: Tensor

    def level(self, i: int) -> "BlockModulation":
        """That of the i-th noise level alone."""
        return BlockModulation(*(part[i : i + 1] for part in self))


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, eps: float):
        super().__init__()
        self.head_dim = dim // heads
        self.to_q, self.to_k, self.to_v = (BlockLinear(dim, dim) for _ in range(3))
        self.to_out = nn.ModuleList([BlockLinear(dim, dim)])
        self.norm_q = RMSNorm(self.head_dim, eps)
        self.norm_k = RMSNorm(self.head_dim, eps)
        self.attend = attention

    @property
    def form(self) -> Form | None:
        """How x is best passed."""
        return common_form(self.to_q, self.to_k, self.to_v)

    def forward(self, x: Input, rotation: Rotation, seen: Seen, unit: float = 1.0) -> Tensor:
        """Of the input x · unit, the output / unit, and / `seen.unit` with guidance."""
        x, heads, eps = operand(x, self.form), (-1, self.head_dim), self.norm_q.eps / unit**2
        q, k, v = (project(x).unflatten(-1, heads) for project in (self.to_q, self.to_k, self.to_v))  # (B, L, H, D)
        q, k = qk_norm_rope(q, k, self.norm_q.weight, self.norm_k.weight, *rotation, eps)
        if isinstance(seen, Nag):
            return self.to_out[0](seen.attend(self.attend, q, k, v))
        return self.to_out[0](self.attend(q, k, v, seen).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.w1 = BlockLinear(dim, hidden)
        self.w2 = BlockLinear(hidden, dim)
        self.w3 = BlockLinear(dim, hidden)

    @property
    def form(self) -> Form | None:
        """How x is best passed."""
        return common_form(self.w1, self.w3)

    def forward(self, x: Input, units: Units = PLAIN) -> tuple[Tensor, Tensor | None]:
        """The output, and the scale (B, L, 1) that it lacks where values are held in units."""
        x = operand(x, self.form)
        if units.hidden is None:
            return self.w2(gated_activation(self.w1(x), self.w3(x), common_form(self.w2))), None
        hidden, scale = swiglu_scaled(self.w1(x), self.w3(x), units.input, units.hidden)
        return self.w2(hidden), scale


class Block(nn.Module):
    """x += gate · norm₂(f(norm₁(x) · scale)), once with attention and once with the feed-forward network for f.

    Without modulation (the context refiner) gate = scale = 1.
    """

    def __init__(self, dim: int, heads: int, eps: float, modulated: bool):
        super().__init__()
        self.attention = Attention(dim, heads, eps)
        self.feed_forward = FeedForward(dim, int(dim / 3 * 8))
        self.attention_norm1 = RMSNorm(dim, eps)
        self.attention_norm2 = RMSNorm(dim, eps)
        self.ffn_norm1 = RMSNorm(dim, eps)
        self.ffn_norm2 = RMSNorm(dim, eps)
        if modulated:
            self.adaLN_modulation = nn.ModuleList([nn.Linear(min(dim, MODULATION_WIDTH), 4 * dim)])

    def modulate(self, time: Tensor) -> BlockModulation:
        """The modulation at time embeddings (B, 256): scale = 1 + s, gate = tanh(g)."""
        scale_msa, gate_msa, scale_mlp, gate_mlp = self.adaLN_modulation[0](time).unsqueeze(1).chunk(4, dim=-1)
        return BlockModulation(1 + scale_msa, gate_msa.tanh(), 1 + scale_mlp, gate_mlp.tanh())

    def forward(
        self,
        x: Tensor,
        rotation: Rotation,
        seen: Seen = None,
        modulation: BlockModulation | None = None,
        units: Units = PLAIN,
    ) -> Tensor:
        """x (B, L, dim), a stream in `units`, which the modulation is in as well."""
        if modulation is None:
            x = x + self.attention_norm2(self.attention(self.attention_norm1(x), rotation, seen))
            return x + self.ffn_norm2(self.feed_forward(self.ffn_norm1(x))[0])
        m = modulation
        normed = scaled_norm(self.attention_norm1, x, m.scale_msa, self.attention.form, units.stream)
        attended = self.attention(normed, rotation, seen, units.input)
        unit = units.input * seen.unit if isinstance(seen, Nag) else units.input
        x = gated(self.attention_norm2, x, attended, m.gate_msa, unit)
        normed = scaled_norm(self.ffn_norm1, x, m.scale_mlp, self.feed_forward.form, units.stream)
        changed, scale = self.feed_forward(normed, units)
        return gated(self.ffn_norm2, x, changed, m.gate_mlp, 1.0, scale)


def blocks_of(modules: nn.ModuleList) -> list[Block]:
    return [block for block in modules if isinstance(block, Block)]


def modulations(blocks: nn.ModuleList, time: Tensor) -> list[BlockModulation]:
    """Those of a group of blocks at time embeddings (B, 256)."""
    return [block.modulate(time) for block in blocks_of(blocks)]


def gated(
    norm: RMSNorm, x: Tensor, branch: Tensor, gate: Tensor, unit: float = 1.0, scale: Tensor | None = None
) -> Tensor:
    """x + gate · norm(branch · unit · scale) in one pass."""
    return gated_residual(x, branch, norm.weight, gate, norm.eps / unit**2, scale)


class TimeEmbedder(nn.Module):
    """Sinusoid of the time (cosines first, maximal period 10,000, fp32) through a two-layer network."""

    def __init__(self, width: int, scale: float):
        super().__init__()
        self.scale = scale
        self.mlp = nn.Sequential(nn.Linear(MODULATION_WIDTH, 1024), nn.SiLU(), nn.Linear(1024, width))

    def forward(self, time: Tensor) -> Tensor:
        """(B,) in [0, 1] → (B, 256)."""
        half = MODULATION_WIDTH // 2
        exponent = torch.arange(half, dtype=torch.float32, device=time.device) / half
        frequencies = torch.exp(-torch.log(torch.tensor(10_000.0)).to(time.device) * exponent)
        angle = (time.float() * self.scale)[:, None] * frequencies
        sinusoid = torch.cat((angle.cos(), angle.sin()), dim=-1)
        return self.mlp(sinusoid.to(self.mlp[0].get_parameter("bias").dtype))


class FinalLayer(nn.Module):
    """LayerNorm(x) · (1 + Linear(SiLU(time))) → Linear to patch values. A scale only, no shift."""

    def __init__(self, dim: int, patch_values: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, patch_values)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(min(dim, MODULATION_WIDTH), dim))

    def modulate(self, time: Tensor) -> Tensor:
        """(B, 256) → scale (B, 1, dim)."""
        return 1 + self.adaLN_modulation(time).unsqueeze(1)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.linear(layer_norm_scale(x, scale, self.norm_final.eps))
