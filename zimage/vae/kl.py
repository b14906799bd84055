"""AutoencoderKL of the FLUX.1 family: the VAE that Z-Image-Turbo and Z-Image ship.

Shapes: B batch, C channels, H × W pixels, h × w = H/8 × W/8 latents.
Module names are the checkpoint's (diffusers naming), so weights load without a table.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zimage.nn.attention import attention
from zimage.nn.config import read_architecture
from zimage.settings.declared import TILE_OVERLAP
from zimage.vae.tiling import OFF, Tiling

NORM_EPS = 1e-6


@dataclass(frozen=True)
class AutoencoderKLConfig:
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    latent_channels: int
    norm_num_groups: int
    scaling_factor: float
    shift_factor: float
    in_channels: int = 3
    out_channels: int = 3
    sample_size: int = 1024

    IMPLEMENTED: ClassVar = {
        "_class_name": ("AutoencoderKL",),
        "act_fn": ("silu",),
        "use_quant_conv": (False,),
        "use_post_quant_conv": (False,),
        "mid_block_add_attention": (True,),
    }


class AutoencoderKL(nn.Module):
    """Images (B, 3, H, W) in [−1, 1] ↔ scaled latents (B, 16, H/8, W/8)."""

    def __init__(self, config: AutoencoderKLConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "AutoencoderKL":
        """Build from the contents of `vae/config.json`; raises ConfigError."""
        return cls(read_architecture(AutoencoderKLConfig, config, AutoencoderKLConfig.IMPLEMENTED))

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent along one side."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    def moments(self, images: Tensor, tiling: Tiling = OFF) -> tuple[Tensor, Tensor]:
        """Posterior mean and log-variance, each (B, 16, h, w), unscaled."""
        mean, logvar = tiling.encode(self.encoder, self._input(images), self.spatial_factor).chunk(2, dim=1)
        return mean, logvar

    def encode(
        self, images: Tensor, tile_size: int | None = None, tile_overlap: int = TILE_OVERLAP, tile_mode: str = "off"
    ) -> Tensor:
        """Scaled latents (B, 16, h, w) fp32 of images (B, 3, H, W) in [−1, 1]: the posterior's mode, not a draw.

        Tiles as `Tiling` describes them.
        """
        mean, _ = self.moments(images, Tiling(tile_mode, tile_size, tile_overlap))
        return (mean.float() - self.config.shift_factor) * self.config.scaling_factor

    def decode(
        self, latents: Tensor, tile_size: int | None = None, tile_overlap: int = TILE_OVERLAP, tile_mode: str = "off"
    ) -> Tensor:
        """Images (B, 3, H, W) fp32, clamped to [−1, 1], of scaled latents (B, 16, h, w); tiles as in `Tiling`."""
        tiling = Tiling(tile_mode, tile_size, tile_overlap)
        z = self._input(latents.float() / self.config.scaling_factor + self.config.shift_factor)
        return tiling.decode(self.decoder, z, self.spatial_factor).float().clamp(-1, 1)

    def _input(self, x: Tensor) -> Tensor:
        # Convolutions and GroupNorm are about a quarter faster on a CPU (and on tensor cores) with channels innermost.
        return x.to(self.decoder.conv_in.weight.dtype).contiguous(memory_format=torch.channels_last)


class Encoder(nn.Module):
    def __init__(self, config: AutoencoderKLConfig):
        super().__init__()
        widths = config.block_out_channels
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownBlock(config, widths[max(i - 1, 0)], width, downsample=i < len(widths) - 1)
            for i, width in enumerate(widths)
        )
        self.mid_block = MidBlock(config, widths[-1])
        self.conv_norm_out = group_norm(config, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    @property
    def norm_out(self) -> nn.GroupNorm:
        return self.conv_norm_out

    def layers(self) -> Iterator[nn.Module]:
        """Residual blocks and downsamplers, before the mid block."""
        for block in self.down_blocks:
            yield from (*block.resnets, *block.downsamplers)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for layer in self.layers():
            x = layer(x)
        x = self.mid_block(x)
        return self.conv_out(F.silu(self.norm_out(x)))  # (B, 2·16, h, w)


class Decoder(nn.Module):
    def __init__(self, config: AutoencoderKLConfig):
        super().__init__()
        widths = config.block_out_channels[::-1]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(config, widths[0])
        self.up_blocks = nn.ModuleList(
            UpBlock(config, widths[max(i - 1, 0)], width, upsample=i < len(widths) - 1)
            for i, width in enumerate(widths)
        )
        self.conv_norm_out = group_norm(config, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    @property
    def norm_out(self) -> nn.GroupNorm:
        return self.conv_norm_out

    def layers(self) -> Iterator[nn.Module]:
        """Residual blocks and upsamplers, after the mid block."""
        for block in self.up_blocks:
            yield from (*block.resnets, *block.upsamplers)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))
        for layer in self.layers():
            x = layer(x)
        return self.conv_out(F.silu(self.norm_out(x)))  # (B, 3, H, W)


class DownBlock(nn.Module):
    def __init__(self, config: AutoencoderKLConfig, c_in: int, c_out: int, downsample: bool):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(config, c_in if j == 0 else c_out, c_out) for j in range(config.layers_per_block)
        )
        self.downsamplers = nn.ModuleList([Downsample(c_out)] if downsample else [])


class UpBlock(nn.Module):
    def __init__(self, config: AutoencoderKLConfig, c_in: int, c_out: int, upsample: bool):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(config, c_in if j == 0 else c_out, c_out) for j in range(config.layers_per_block + 1)
        )
        self.upsamplers = nn.ModuleList([Upsample(c_out)] if upsample else [])


class MidBlock(nn.Module):
    def __init__(self, config: AutoencoderKLConfig, width: int):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(config, width, width) for _ in range(2))
        self.attentions = nn.ModuleList([SpatialAttention(config, width)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class ResnetBlock(nn.Module):
    def __init__(self, config: AutoencoderKLConfig, c_in: int, c_out: int):
        super().__init__()
        self.norm1 = group_norm(config, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = group_norm(config, c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class SpatialAttention(nn.Module):
    """One head over all h·w positions, residual."""

    def __init__(self, config: AutoencoderKLConfig, width: int):
        super().__init__()
        self.group_norm = group_norm(config, width)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.group_norm(x).permute(0, 2, 3, 1).flatten(1, 2)  # (B, h·w, C)
        q, k, v = (project(tokens).unsqueeze(2) for project in (self.to_q, self.to_k, self.to_v))  # (B, h·w, 1, C)
        out = self.to_out[0](attention(q, k, v).flatten(2))
        return x + out.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


class Downsample(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # one-sided padding, as the reference was trained


class Upsample(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def group_norm(config: AutoencoderKLConfig, width: int) -> nn.GroupNorm:
    return nn.GroupNorm(config.norm_num_groups, width, eps=NORM_EPS)
