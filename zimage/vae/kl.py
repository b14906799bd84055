"""AutoencoderKL of the FLUX.1 family: the VAE that Z-Image-Turbo and Z-Image ship.

Shapes: B batch, C channels, H × W pixels, h × w = H/8 × W/8 latents.
Module names are the checkpoint's (diffusers naming), so weights load without a table.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from zimage.nn.config import Channels, Colours, GroupDepth, Offset, Positive, check_divides, read_architecture
from zimage.vae.autoencoder import Autoencoder, Levels, Side
from zimage.vae.layers import Conv2d, DecoderStack, EncoderStack, MapAttention, MidBlock, ResnetBlock, layers_of
from zimage.vae.tiling import OFF, Tiling

NORM_EPS = 1e-6


@dataclass(frozen=True)
class AutoencoderKLConfig:
    block_out_channels: Annotated[tuple[Channels, ...], Levels]
    layers_per_block: GroupDepth
    latent_channels: Channels
    norm_num_groups: Channels
    scaling_factor: Positive
    shift_factor: Offset
    in_channels: Colours = 3
    out_channels: Colours = 3
    sample_size: Side = 1024

    IMPLEMENTED: ClassVar[Mapping[str, tuple]] = {
        "_class_name": ("AutoencoderKL",),
        "act_fn": ("silu",),
        "use_quant_conv": (False,),
        "use_post_quant_conv": (False,),
        "mid_block_add_attention": (True,),
    }

    def __post_init__(self):
        check_divides(type(self), "norm_num_groups", "block_out_channels", self)


class AutoencoderKL(Autoencoder):
    """Images (B, 3, H, W) in [−1, 1] ↔ scaled latents (B, 16, H/8, W/8)."""

    def __init__(self, config: AutoencoderKLConfig):
        super().__init__()
        self.config, self.spatial_factor = config, 2 ** (len(config.block_out_channels) - 1)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    @classmethod
    def from_config(cls, config: Mapping[str, object]) -> "AutoencoderKL":
        """Build from the contents of `vae/config.json`. Raises ConfigError."""
        return cls(read_architecture(AutoencoderKLConfig, config, AutoencoderKLConfig.IMPLEMENTED))

    def moments(self, images: Tensor, tiling: Tiling = OFF) -> tuple[Tensor, Tensor]:
        mean, logvar = tiling.encode(self.encoder, self._input(images), self.spatial_factor, self.walk).chunk(2, dim=1)
        return mean, logvar

    def _scaled(self, mean: Tensor) -> Tensor:
        return (mean - self.config.shift_factor) * self.config.scaling_factor

    def _unscaled(self, latents: Tensor) -> Tensor:
        return self._input(latents / self.config.scaling_factor + self.config.shift_factor)


class Encoder(EncoderStack):
    last_norm_name = "conv_norm_out"

    def __init__(self, config: AutoencoderKLConfig):
        super().__init__()
        widths = config.block_out_channels
        self.conv_in = conv(config.in_channels, widths[0], 3)
        self.down_blocks = nn.ModuleList(
            DownBlock(config, widths[max(i - 1, 0)], width, downsample=i < len(widths) - 1)
            for i, width in enumerate(widths)
        )
        self.mid_block = mid_block(config, widths[-1])
        self.conv_norm_out = group_norm(config, widths[-1])
        self.conv_out = conv(widths[-1], 2 * config.latent_channels, 3)

    def layers(self) -> Iterator[nn.Module]:
        return layers_of(self.down_blocks)


class Decoder(DecoderStack):
    last_norm_name = "conv_norm_out"

    def __init__(self, config: AutoencoderKLConfig):
        super().__init__()
        widths = config.block_out_channels[::-1]
        self.conv_in = conv(config.latent_channels, widths[0], 3)
        self.mid_block = mid_block(config, widths[0])
        self.up_blocks = nn.ModuleList(
            UpBlock(config, widths[max(i - 1, 0)], width, upsample=i < len(widths) - 1)
            for i, width in enumerate(widths)
        )
        self.conv_norm_out = group_norm(config, widths[-1])
        self.conv_out = conv(widths[-1], config.out_channels, 3)

    def layers(self) -> Iterator[nn.Module]:
        return layers_of(self.up_blocks)


class DownBlock(nn.Module):
    def __init__(self, config: AutoencoderKLConfig, c_in: int, c_out: int, downsample: bool):
        super().__init__()
        self.resnets = nn.ModuleList(
            resnet_block(config, c_in if j == 0 else c_out, c_out) for j in range(config.layers_per_block)
        )
        self.downsamplers = nn.ModuleList([Downsample(c_out)] if downsample else [])


class UpBlock(nn.Module):
    def __init__(self, config: AutoencoderKLConfig, c_in: int, c_out: int, upsample: bool):
        super().__init__()
        self.resnets = nn.ModuleList(
            resnet_block(config, c_in if j == 0 else c_out, c_out) for j in range(config.layers_per_block + 1)
        )
        self.upsamplers = nn.ModuleList([Upsample(c_out)] if upsample else [])


class SpatialAttention(MapAttention):
    def __init__(self, config: AutoencoderKLConfig, width: int):
        super().__init__()
        self.group_norm = group_norm(config, width)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def enter(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tokens = self.group_norm(x).permute(0, 2, 3, 1).flatten(1, 2)  # (B, L, C)
        q, k, v = (project(tokens).unsqueeze(2) for project in (self.to_q, self.to_k, self.to_v))
        return q, k, v

    def leave(self, x: Tensor, out: Tensor) -> Tensor:
        projected: Tensor = self.to_out[0](out.flatten(2))
        return x + projected.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


class Downsample(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # one-sided padding, as the reference was trained


class Upsample(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = conv(width, width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def group_norm(config: AutoencoderKLConfig, width: int) -> nn.GroupNorm:
    return nn.GroupNorm(config.norm_num_groups, width, eps=NORM_EPS)


def conv(c_in: int, c_out: int, kernel: int) -> Conv2d:
    return Conv2d(c_in, c_out, kernel, padding=kernel // 2)


def resnet_block(config: AutoencoderKLConfig, c_in: int, c_out: int) -> ResnetBlock:
    return ResnetBlock(c_in, c_out, partial(group_norm, config), conv)


def mid_block(config: AutoencoderKLConfig, width: int) -> MidBlock:
    middle = SpatialAttention(config, width)
    return MidBlock(resnet_block(config, width, width), middle, resnet_block(config, width, width))
