"""The two image autoencoders; which one a checkpoint uses stands in its `vae/config.json`."""

from zimage.vae.kl import AutoencoderKL
from zimage.vae.wan import AutoencoderKLWan

__all__ = ["AutoencoderKL", "AutoencoderKLWan"]
