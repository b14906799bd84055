"""The metrics by name: in which direction each is better, and how it is made ready."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from PIL import Image
from torch import Tensor

from zimage.errors import RequestError, quoted
from zimage.experiments.metrics import pixels
from zimage.experiments.metrics.clip_folder import load_clip
from zimage.experiments.metrics.lpips import Lpips
from zimage.experiments.metrics.ocr import Reader
from zimage.experiments.metrics.patch_grid import patch_grid
from zimage.experiments.metrics.siglip_folder import load_siglip
from zimage.experiments.metrics.walks import Alone, AmongSeeds, BesideBase, Walk
from zimage.settings.paths import user_path

Given: TypeAlias = Path | None  # what stands behind NAME=
Build: TypeAlias = Callable[[Given, torch.device], Walk]


@dataclass(frozen=True)
class Kind:
    """A metric as it is listed. `path`: what may stand behind NAME=; a model's folder must.

    `against_base`: whether it compares with a base.
    """

    title: str
    higher_is_better: bool
    build: Build
    path: str = ""
    against_base: bool = False


@dataclass(frozen=True)
class Levels:
    """A comparison of two pictures' levels."""

    distance: Callable[[Tensor, Tensor], float | None]

    def prepare(self, picture: Image.Image) -> Tensor:
        return pixels.levels(picture)


PACKAGE, MODEL = "package", "model"
KINDS = {
    "psnr": Kind("PSNR to the base, dB", True, lambda *_: BesideBase(Levels(pixels.psnr)), against_base=True),
    "ssim": Kind("SSIM to the base", True, lambda *_: BesideBase(Levels(pixels.ssim)), against_base=True),
    "lpips": Kind(
        "LPIPS to the base, by AlexNet",
        False,
        lambda *given: BesideBase(Lpips.load("alexnet", *given)),
        PACKAGE,
        against_base=True,
    ),
    "lpips-vgg": Kind(
        "LPIPS to the base, by VGG-16",
        False,
        lambda *given: BesideBase(Lpips.load("vgg16", *given)),
        PACKAGE,
        against_base=True,
    ),
    "diversity": Kind(
        "mean LPIPS between seeds", True, lambda *given: AmongSeeds(Lpips.load("alexnet", *given)), PACKAGE
    ),
    "grid": Kind("power of a grid of 16 pixels, dB", False, lambda *_: Alone(_grid)),
    "ocr": Kind("share of quoted text that can be read", True, lambda *_: Alone(Reader().score)),
    "clip": Kind("cosine of picture and prompt, by CLIP", True, lambda *given: Alone(load_clip(*given).score), MODEL),
    "siglip": Kind(
        "cosine of picture and prompt, by SigLIP", True, lambda *given: Alone(load_siglip(*given).score), MODEL
    ),
}


@dataclass(frozen=True)
class Metric:
    """A metric that was asked for, and the path that was passed with it."""

    name: str
    given: Given = None

    @classmethod
    def parse(cls, text: str) -> "Metric":
        """From NAME or NAME=PATH. Raises RequestError."""
        name, equals, path = text.partition("=")
        if name not in KINDS:
            raise _refused(f"{quoted(name)} is not a metric; known are {', '.join(KINDS)}")
        needs = KINDS[name].path
        if equals and not needs:
            raise _refused(f"{name} takes no path; pass {name} alone")
        if not path and (equals or needs == MODEL):
            raise _refused(f"{name} needs the folder of its model; pass {name}=PATH")
        return cls(name, user_path(path, "metric") if path else None)

    @property
    def kind(self) -> Kind:
        return KINDS[self.name]


def parse_metrics(texts: Sequence[str]) -> list[Metric]:
    """From NAME, NAME=PATH, and NAMEs with commas between them. Raises RequestError, also for one named twice."""
    names = [name.strip() for text in texts for name in ([text] if "=" in text else text.split(","))]
    metrics = [Metric.parse(name) for name in names]
    found = [metric.name for metric in metrics]
    if twice := next((name for name in found if found.count(name) > 1), ""):
        raise _refused(f"the metric {twice} is named twice; name it once")
    return metrics


def _refused(text: str) -> RequestError:
    return RequestError(text, fields=("metric",))


def _grid(picture: Image.Image, prompt: str) -> float | None:
    return patch_grid(pixels.levels(picture))
