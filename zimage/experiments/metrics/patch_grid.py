"""How much of a picture repeats every 16 pixels: the patches of the DiT (2 latents × 8 pixels) show as a grid.

Shapes: levels (3, H, W) float64, as `pixels.levels` gives them.
"""

import math

import torch
from torch import Tensor

PATCH = 16  # pixels
SMALLEST = 81  # pixels of a side: five patches' differences, so that there is something between the peaks
NOTHING = 1e-12  # against a division by zero: the power of rounding alone


def patch_grid(picture: Tensor) -> float | None:
    """The power that returns every 16 pixels over that around it, in dB: 0 without a grid; None for small pictures.

    Mean differences between neighbours, along rows and columns, are looked at as a signal: what repeats every 16 pixels
    has its power at the multiples of the frequency 1/16, whatever its sign and its place within a patch.
    Source: Wang, Bovik, Evans, "Blind measurement of blocking artifacts in images", 2000, with 16 instead of 8.
    """
    if min(picture.shape[1:]) < SMALLEST:
        return None
    grey = picture.mean(dim=0)
    peaks, around = torch.stack([_powers(grey), _powers(grey.t())]).sum(dim=0).tolist()
    return 10 * math.log10((peaks + NOTHING) / (around + NOTHING))


def _powers(grey: Tensor) -> Tensor:
    """The mean power at the multiples of 1/16, and halfway between them, of differences along the last axis: (2,).

    A Hann window keeps what does not return from leaking further than one place.
    """
    changes = grey.diff(dim=1).abs().mean(dim=0)
    patches = len(changes) // PATCH
    changes = changes[: patches * PATCH]
    window = torch.hann_window(len(changes), dtype=grey.dtype)
    power = torch.fft.rfft((changes - changes.mean()) * window).abs().square()
    harmonics = power[patches : patches * (PATCH // 2) : patches]  # 1/16 … 7/16
    places = torch.arange(len(power))
    distance = (places % patches).minimum(patches - places % patches)
    between = power[(distance >= 2) & (places > patches // 2) & (places < patches * (PATCH // 2))]
    return torch.stack([harmonics.mean(), between.mean()])
