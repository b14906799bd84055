"""Folders of cells made by hand: records and pictures as a sweep leaves them, without a model."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from zimage.experiments.record import Record, write_records

VARIED = {"steps": [4, 8, 16], "shift": [1.0, 3.0]}


def picture(seed: int, size: tuple[int, int] = (48, 32)) -> Image.Image:
    """Noise: no two places of it are alike."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def records(
    varied: Mapping[str, Sequence[Any]] = VARIED, prompts: Sequence[str] = ("a fox",), seeds: Sequence[int] = (0,)
) -> list[Record]:
    """One per combination; ids count from c000."""
    found = []
    for prompt, seed, *values in itertools.product(prompts, seeds, *varied.values()):
        axes, id = dict(zip(varied, values, strict=True)), f"c{len(found):03d}"
        request = {"prompt": prompt, "seed": seed, "width": 48, "height": 32, **axes}
        found.append(Record(id, axes=axes, prompt=prompt, seed=seed, request=request, path=f"{id}.png"))
    return found


def folder_of(folder: Path, made: Sequence[Record]) -> Path:
    """The folder with these records, and a picture of its own for each that has a path."""
    folder.mkdir(parents=True, exist_ok=True)
    write_records(folder, list(made))
    for number, record in enumerate(made):
        if record.path is not None:
            picture(number).save(folder / record.path)
    return folder
