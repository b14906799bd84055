"""The two image autoencoders; a checkpoint's `vae/config.json` says which one it uses."""

from zimage.vae.autoencoder import Autoencoder
from zimage.vae.kl import AutoencoderKL
from zimage.vae.wan import AutoencoderKLWan

__all__ = ["Autoencoder", "AutoencoderKL", "AutoencoderKLWan"]
