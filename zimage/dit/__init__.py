"""The diffusion transformer: refined captions and noisy latents in, velocity out."""

from zimage.dit.control import ControlNet
from zimage.dit.model import ContextRefiner, ZImageDiT

__all__ = ["ContextRefiner", "ControlNet", "ZImageDiT"]
