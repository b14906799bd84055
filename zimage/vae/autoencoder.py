"""What an autoencoder does for a render, whichever of the two it is.

It computes in bf16 or fp32. fp16 has the digits but not the range: the published config.json says `force_upcast`, so
its maps may pass 65,504. A GPU without convolutions in bf16 (compute capability below 8.0) therefore takes fp32.

Shapes: B batch, H × W pixels, h × w = H/8 × W/8 latents.
"""

from typing import Annotated

import torch
from torch import Tensor, nn

from zimage.nn.config import Between
from zimage.settings.declared import SIZE_MULTIPLE, TILE_OVERLAP
from zimage.vae.layers import DecoderStack, EncoderStack
from zimage.vae.tiling import OFF, Tiling
from zimage.vae.walk import StripWalk, Walk

Levels = Between(1, 4)  # how many an autoencoder has: each but the last halves a picture's sides, multiples of 16
Side = Annotated[int, Between(SIZE_MULTIPLE, 1 << 16, multiple=SIZE_MULTIPLE)]  # pixels of a picture


class Autoencoder(nn.Module):
    """Images (B, 3, H, W) in [−1, 1] ↔ scaled latents (B, 16, h, w)."""

    encoder: EncoderStack
    decoder: DecoderStack
    spatial_factor: int  # pixels per latent along one side
    walk: Walk = StripWalk  # what runs exact strips

    def moments(self, images: Tensor, tiling: Tiling = OFF) -> tuple[Tensor, Tensor]:
        """Posterior mean and log-variance, each (B, 16, h, w), unscaled."""
        raise NotImplementedError

    def encode(
        self, images: Tensor, tile_size: int | None = None, tile_overlap: int = TILE_OVERLAP, tile_mode: str = "off"
    ) -> Tensor:
        """Scaled latents (B, 16, h, w) fp32 of images (B, 3, H, W) in [−1, 1]: the posterior's mode, not a sample.

        `Tiling` describes the tiles.
        """
        mean, _ = self.moments(images, Tiling(tile_mode, tile_size, tile_overlap))
        return self._scaled(mean.float())

    def decode(
        self, latents: Tensor, tile_size: int | None = None, tile_overlap: int = TILE_OVERLAP, tile_mode: str = "off"
    ) -> Tensor:
        """Images (B, 3, H, W) fp32, clamped to [−1, 1], of scaled latents (B, 16, h, w); tiles as in `Tiling`."""
        tiling = Tiling(tile_mode, tile_size, tile_overlap)
        z = self._unscaled(latents.float())
        return tiling.decode(self.decoder, z, self.spatial_factor, self.walk).float().clamp(-1, 1)

    def _scaled(self, mean: Tensor) -> Tensor:
        raise NotImplementedError

    def _unscaled(self, latents: Tensor) -> Tensor:
        """What the decoder takes."""
        raise NotImplementedError

    def _input(self, x: Tensor) -> Tensor:
        # With channels innermost, convolutions and norms are about a quarter faster on a CPU.
        if x.is_cuda:
            self._lay_out_weights()
        return x.to(self.decoder.conv_in.weight.dtype).contiguous(memory_format=torch.channels_last)

    def _lay_out_weights(self) -> None:
        """Put the channels innermost, as tensor cores want them; PyTorch would copy them for each convolution."""
        if self.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last):
            return
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.data = module.weight.contiguous(memory_format=torch.channels_last)
