"""AutoencoderKLWan: the image half of the Wan 2.1 video VAE.

A still image meets only the last temporal tap of each causal 3-D kernel (the frames before it are zero padding) and
no temporal resampling. So every module here is 2-D, and published weights are folded while they are loaded.

Shapes: B batch, C channels, H × W pixels, h × w = H/8 × W/8 latents, T temporal taps.
Module names are the checkpoint's (diffusers naming).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from zimage.errors import CheckpointError
from zimage.nn.config import Between, Channels, Colours, GroupDepth, Offset, Positive, fault, read_architecture
from zimage.vae.autoencoder import Autoencoder, Levels, Side
from zimage.vae.layers import (
    ChannelNorm,
    Conv2d,
    DecoderStack,
    EncoderStack,
    MapAttention,
    MidBlock,
    ResnetBlock,
    layers_of,
)
from zimage.vae.tiling import OFF, Tiling


@dataclass(frozen=True)
class AutoencoderKLWanConfig:
    base_dim: Annotated[int, Between(2, 1 << 16, multiple=2)]  # the decoder halves it
    z_dim: Channels
    dim_mult: Annotated[tuple[Annotated[int, Between(1, 64)], ...], Levels]
    num_res_blocks: GroupDepth
    # The checkpoint's spelling; decides only which time_conv keys a file holds.
    temperal_downsample: Annotated[tuple[bool, ...], Between(0, Levels.high)]
    latents_mean: Annotated[tuple[Offset, ...], Between(1, 1 << 16)]
    latents_std: Annotated[tuple[Positive, ...], Between(1, 1 << 16)]
    in_channels: Colours = 3
    out_channels: Colours = 3
    sample_size: Side = 1024

    IMPLEMENTED: ClassVar[Mapping[str, tuple]] = {
        "_class_name": ("AutoencoderKLWan",),
        "attn_scales": ([], ()),
        "decoder_base_dim": (None,),
        "dropout": (0.0,),
        "is_residual": (False,),  # True in Wan 2.2, another architecture
        "patch_size": (None,),
    }

    def __post_init__(self):
        lengths = {"latents_mean": self.z_dim, "latents_std": self.z_dim, "temperal_downsample": len(self.dim_mult) - 1}
        for key, length in lengths.items():
            if len(getattr(self, key)) != length:
                raise fault(type(self), f"{key} should hold {length} values")

    @property
    def latent_channels(self) -> int:
        return self.z_dim


class AutoencoderKLWan(Autoencoder):
    """Images (B, 3, H, W) in [−1, 1] ↔ standardised latents (B, 16, H/8, W/8)."""

    def __init__(self, config: AutoencoderKLWanConfig):
        super().__init__()
        self.config, self.spatial_factor = config, 2 ** (len(config.dim_mult) - 1)
        self.encoder = Encoder(config)
        self.quant_conv = CausalConv(2 * config.z_dim, 2 * config.z_dim, 1)
        self.post_quant_conv = CausalConv(config.z_dim, config.z_dim, 1)
        self.decoder = Decoder(config)
        self._published = self._published_shapes()

    @classmethod
    def from_config(cls, config: Mapping[str, object]) -> "AutoencoderKLWan":
        """Build from the contents of `vae/config.json`. Raises ConfigError."""
        return cls(read_architecture(AutoencoderKLWanConfig, config, AutoencoderKLWanConfig.IMPLEMENTED))

    def moments(self, images: Tensor, tiling: Tiling = OFF) -> tuple[Tensor, Tensor]:
        encoded = tiling.encode(self.encoder, self._input(images), self.spatial_factor, self.walk)
        mean, logvar = self.quant_conv(encoded.to(self.quant_conv.weight.dtype)).chunk(2, dim=1)
        return mean, logvar

    def _scaled(self, mean: Tensor) -> Tensor:
        center, spread = self._statistics(mean)
        return (mean - center) / spread

    def _unscaled(self, latents: Tensor) -> Tensor:
        center, spread = self._statistics(latents)
        return self.post_quant_conv(self._input(latents * spread + center))

    def published_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every key of a published file with its 3-D shape, including the unused time_conv."""
        return dict(self._published)

    def fold(self, key: str, tensor: Tensor) -> tuple[str, Tensor] | None:
        """One published tensor as (own name, view of it), or None for a key that is not used. Raises CheckpointError.

        Keeps the last tap of a causal kernel (O, I, T, k, k) and drops the empty axes of a norm's gamma (C, 1, 1, 1).
        """
        if tuple(tensor.shape) != self._published.get(key):
            wanted = list(self._published[key]) if key in self._published else "absent"
            raise CheckpointError(f"AutoencoderKLWan: {key} {list(tensor.shape)} should be {wanted}")
        if ".time_conv." in key:
            return None  # resamples between frames: a still image has one
        if tensor.ndim == 5:
            return key, tensor[:, :, -1]
        return key, tensor.flatten() if key.endswith(".gamma") else tensor

    def _published_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for name, module in self.named_modules():
            if isinstance(module, CausalConv | ChannelNorm | Resample):
                shapes |= {f"{name}.{leaf}": shape for leaf, shape in module.published_shapes().items()}
        return shapes | {key: tuple(weight.shape) for key, weight in self.named_parameters() if key not in shapes}

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each latent channel, (16, 1, 1) fp32."""
        stats = torch.tensor((self.config.latents_mean, self.config.latents_std), dtype=torch.float32)
        # Nothing waits for a GPU of NVIDIA's; a Mac's might read the memory after its release (PyTorch issue 189690).
        center, spread = stats.to(like.device, non_blocking=like.is_cuda)[:, :, None, None]
        return center, spread


class CausalConv(Conv2d):
    """What a causal 3-D convolution of k × k × k taps does to the first frame: its last temporal tap, zeros around."""

    def __init__(self, c_in: int, c_out: int, kernel: int):
        super().__init__(c_in, c_out, kernel, padding=kernel // 2)

    def published_shapes(self) -> dict[str, tuple[int, ...]]:
        O, I, k, _ = self.weight.shape  # noqa: E741
        return {"weight": (O, I, k, k, k), "bias": (O,)}


class Resample(nn.Module):
    """Halve (`stride` 2) or double a map; `resample[0]` holds no weights, as in the checkpoint."""

    def __init__(self, first: nn.Module, conv: Conv2d, time_conv: tuple[int, int] | None):
        super().__init__()
        self.resample = nn.Sequential(first, conv)
        self.time_conv_widths = time_conv  # (in, out) of the file's temporal convolution, which is not built

    @classmethod
    def down(cls, width: int, temporal: bool) -> "Resample":
        conv = Conv2d(width, width, 3, stride=2)
        return cls(nn.ZeroPad2d((0, 1, 0, 1)), conv, (width, width) if temporal else None)

    @classmethod
    def up(cls, width: int, temporal: bool) -> "Resample":
        """Double the map and halve the channels."""
        conv = Conv2d(width, width // 2, 3, padding=1)
        return cls(nn.Upsample(scale_factor=2.0, mode="nearest"), conv, (width, 2 * width) if temporal else None)

    def forward(self, x: Tensor) -> Tensor:
        return self.resample(x)

    def published_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the temporal convolution only; the weights of `resample` are stored as they are."""
        if self.time_conv_widths is None:
            return {}
        c_in, c_out = self.time_conv_widths
        return {"time_conv.weight": (c_out, c_in, 3, 1, 1), "time_conv.bias": (c_out,)}


class Encoder(EncoderStack):
    def __init__(self, config: AutoencoderKLWanConfig):
        super().__init__()
        widths = [config.base_dim * factor for factor in config.dim_mult]
        self.conv_in = CausalConv(config.in_channels, config.base_dim, 3)
        self.down_blocks = nn.ModuleList()  # flat, as in the checkpoint: residual blocks and resamplers in one list
        c_in = config.base_dim
        for i, width in enumerate(widths):
            for j in range(config.num_res_blocks):
                self.down_blocks.append(resnet_block(c_in if j == 0 else width, width))
            c_in = width
            if i < len(widths) - 1:
                self.down_blocks.append(Resample.down(width, config.temperal_downsample[i]))
        self.mid_block = mid_block(widths[-1])
        self.norm_out = ChannelNorm(widths[-1])
        self.conv_out = CausalConv(widths[-1], 2 * config.z_dim, 3)

    def layers(self) -> Iterator[nn.Module]:
        return iter(self.down_blocks)


class Decoder(DecoderStack):
    def __init__(self, config: AutoencoderKLWanConfig):
        super().__init__()
        widths = [config.base_dim * factor for factor in config.dim_mult[::-1]]
        temporal = (*config.temperal_downsample[::-1], None)  # None: no upsampling
        self.conv_in = CausalConv(config.z_dim, widths[0], 3)
        self.mid_block = mid_block(widths[0])
        self.up_blocks = nn.ModuleList(
            UpBlock(config.num_res_blocks, widths[0] if i == 0 else widths[i - 1] // 2, width, temporal[i])
            for i, width in enumerate(widths)
        )
        self.norm_out = ChannelNorm(widths[-1])
        self.conv_out = CausalConv(widths[-1], config.out_channels, 3)

    def layers(self) -> Iterator[nn.Module]:
        return layers_of(self.up_blocks)


class UpBlock(nn.Module):
    def __init__(self, layers: int, c_in: int, c_out: int, temporal: bool | None):
        super().__init__()
        self.resnets = nn.ModuleList(resnet_block(c_in if j == 0 else c_out, c_out) for j in range(layers + 1))
        self.upsamplers = nn.ModuleList([] if temporal is None else [Resample.up(c_out, temporal)])


def resnet_block(c_in: int, c_out: int) -> ResnetBlock:
    return ResnetBlock(c_in, c_out, ChannelNorm, CausalConv)


def mid_block(width: int) -> MidBlock:
    return MidBlock(resnet_block(width, width), SpatialAttention(width), resnet_block(width, width))


class SpatialAttention(MapAttention):
    def __init__(self, width: int):
        super().__init__()
        self.norm = ChannelNorm(width, published_axes=2)
        self.to_qkv = Conv2d(width, 3 * width, 1)
        self.proj = Conv2d(width, width, 1)

    def enter(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv = self.to_qkv(self.norm(x)).permute(0, 2, 3, 1).flatten(1, 2).unsqueeze(2)  # (B, L, 1, 3C)
        q, k, v = qkv.chunk(3, dim=-1)
        return q, k, v

    def leave(self, x: Tensor, out: Tensor) -> Tensor:
        projected: Tensor = self.proj(out.flatten(2).unflatten(1, x.shape[2:]).permute(0, 3, 1, 2))
        return x + projected
