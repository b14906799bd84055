"""How a picture is cut for the VAE: not at all, into strips (`zimage.vae.walk`) or into tiles (`zimage.vae.blend`)."""

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from zimage.errors import RequestError, quoted
from zimage.kernels.backend import fuses
from zimage.settings.declared import BLEND_TILE, TILE_MODES, TILE_OVERLAP
from zimage.vae.blend import blend
from zimage.vae.layers import DecoderStack, EncoderStack, Stack
from zimage.vae.walk import StripWalk, Walk

WHOLE = 1 << 30  # values of a strip that holds a whole map, up to what 32 bits can index


@dataclass(frozen=True)
class Tiling:
    """How a picture is cut for the VAE; `size` and `overlap` in pixels. Raises RequestError.

    "off" runs the VAE on the whole, "exact" on strips of `size` rows, "blend" on overlapping tiles of `size` × `size`.
    """

    mode: str = "off"
    size: int | None = None
    overlap: int = TILE_OVERLAP

    def __post_init__(self):
        if self.mode not in TILE_MODES:
            raise RequestError(f"tile_mode {quoted(self.mode)} is not known; use {', '.join(TILE_MODES)}")
        if self.size is not None and self.size < 8:
            raise RequestError(f"tile_size {self.size} is too small; it must be at least 8")
        tile = self.size or BLEND_TILE
        if self.mode == "blend" and not 0 <= self.overlap < tile:
            raise RequestError(f"tile_overlap {self.overlap} must be at least 0 and below the tile_size {tile}")

    def decode(self, decoder: DecoderStack, z: Tensor, factor: int, walk: Walk = StripWalk) -> Tensor:
        """decoder(z) of unscaled latents (B, 16, h, w) at `factor` pixels per latent; `walk` runs strips."""
        if self.mode == "off":
            return run_whole(decoder, z)
        if self.mode == "blend":
            return blend(partial(run_whole, decoder), z, *self._in_steps_of(factor))
        return walk(decoder, z.shape[2] * factor, self.size).run(z)

    def encode(self, encoder: EncoderStack, images: Tensor, factor: int, walk: Walk = StripWalk) -> Tensor:
        """encoder(images) of pictures (B, 3, H, W)."""
        if self.mode == "off":
            return run_whole(encoder, images)
        if self.mode == "blend":
            tile, overlap = self._in_steps_of(factor)
            return blend(partial(run_whole, encoder), images, tile * factor, overlap * factor)
        return walk(encoder, images.shape[2], self.size).run(images)

    def _in_steps_of(self, factor: int) -> tuple[int, int]:
        """Tile and overlap in latents; at least one latent of every tile lies outside the overlap."""
        tile = max((self.size or BLEND_TILE) // factor, 2)
        return tile, min(self.overlap // factor, tile - 1)


OFF = Tiling()


def run_whole(stack: Stack, x: Tensor) -> Tensor:
    """stack(x). Where kernels run, each sample is one strip: fewer passes over the maps, in half the memory."""
    if not fuses(x, stack.conv_in.weight):
        return stack(x)
    return StripWalk(stack, x.shape[2], None, WHOLE).run(x)
