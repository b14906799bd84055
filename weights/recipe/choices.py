"""Ties what a prompt leaves open to the noise, so that every seed makes a clean choice.

With independent noise the best guess at σ = 1 is the mean of all allowed pictures, and eight steps leave little room to
decide: colours come out muddy. Here each open attribute is read off the noise itself: its averages are compared, and
the largest, or a sign, says which of the equally likely choices the scene shows. The noise is edited accordingly by
swapping or mirroring these averages, which are independent standard normals; it therefore stays standard normal.
This is a coupling of noise and data as in Pooladian et al. 2023 ("Multisample flow matching"), with a fixed rule.

ε has the shape (C, h, w) = (16, 16, 16). Readings: √(h·w) · mean over (h, w) of ε times 1, or times ±1 for the left and
right, or upper and lower halves.
"""

import torch
from torch import Tensor

from zimage.weights.recipe.captions import Caption
from zimage.weights.recipe.objects import OBJECTS, PALETTE
from zimage.weights.recipe.scenes import LARGE, PAIR_SIZES, SIDE, Scene

COLOURS, NAMES = list(PALETTE), list(OBJECTS)
SIZE_CHANNEL, X_CHANNEL, Y_CHANNEL = 10, 11, 12  # channels 0…9 choose the background
OBJECT_COLUMNS = 16  # the object's number is 16 · row + column, both chosen as the largest reading
# From here down the picture shows through the noise, and any noise may meet any picture (image to image needs that).
COUPLED_ABOVE = 0.8


def noise_for(scene: Scene, caption: Caption, noise: Tensor) -> Tensor:
    """Standard normal noise (16, h, w) edited so that its readings choose `scene` among all that fit `caption`."""
    h, w = noise.shape[1:]
    whole = torch.ones(h, w)
    noise = _edit(noise, whole, lambda reading: _choose_whole(reading, scene, caption))
    if caption.open_object and scene.objects:
        row, column = divmod(NAMES.index(scene.objects[0].name), OBJECT_COLUMNS)
        left_right = torch.where(torch.arange(w) < w // 2, 1.0, -1.0).expand(h, w)
        noise = _edit(noise, left_right, lambda reading: _make_largest(reading, column, OBJECT_COLUMNS))
        noise = _edit(noise, left_right.T, lambda reading: _make_largest(reading, row, len(NAMES) // OBJECT_COLUMNS))
    return noise


def _edit(noise: Tensor, pattern: Tensor, choose) -> Tensor:
    """Replace the readings (16,) of `noise` against a ±1 pattern (h, w) by choose(readings)."""
    reading = (noise * pattern).mean(dim=(1, 2)) * pattern.numel() ** 0.5
    change = (choose(reading.clone()) - reading) / pattern.numel() ** 0.5
    return noise + change[:, None, None] * pattern


def _choose_whole(reading: Tensor, scene: Scene, caption: Caption) -> Tensor:
    if caption.open_background:
        reading = _make_largest(reading, COLOURS.index(scene.background), len(COLOURS))
    if scene.objects:
        first, single = scene.objects[0], len(scene.objects) == 1
        if caption.open_size:
            _set_sign(reading, SIZE_CHANNEL, first.size == (LARGE if single else max(PAIR_SIZES)))
        if first.size != LARGE:
            _set_sign(reading, Y_CHANNEL, first.y > SIDE // 2)
            if single:
                _set_sign(reading, X_CHANNEL, first.x > SIDE // 2)
    return reading


def _make_largest(reading: Tensor, index: int, count: int) -> Tensor:
    """Swap the largest of the first `count` readings with the one at `index`."""
    largest = int(reading[:count].argmax())
    reading[[index, largest]] = reading[[largest, index]]
    return reading


def _set_sign(reading: Tensor, index: int, positive: bool) -> None:
    reading[index] = reading[index].abs() * (1 if positive else -1)
