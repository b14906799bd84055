"""LPIPS: how different two pictures look, by the features of a network that was trained to recognise objects.

Source: Zhang, Isola, Efros, Shechtman, Wang, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric",
2018, version 0.1: AlexNet or VGG-16, the features of five layers and one learned weight per channel.

Shapes: pictures (1, 3, H, W) fp32 in [−1, 1]; features (1, C, h, w) of each layer that counts.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from zimage.experiments.metrics.lpips_package import Source
from zimage.experiments.metrics.lpips_weights import lpips_weights
from zimage.pictures.image import from_pil

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # the networks' own normalisation, of [−1, 1]
EPS = 1e-10

Features = tuple[Tensor, ...]


class Layer(NamedTuple):
    """A convolution and its ReLU, behind a pooling of `pool` places where that is not 0; `counts`: LPIPS reads it."""

    width: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1
    pool: int = 0
    counts: bool = True


class Network(NamedTuple):
    """`smallest`: the side from which every pooling has a place."""

    layers: tuple[Layer, ...]
    smallest: int


def _vgg(*groups: tuple[int, int]) -> tuple[Layer, ...]:
    """Groups of `count` layers of a width; each but the first begins with a pooling, and the last of each counts."""
    return tuple(
        Layer(width, pool=2 if number and not i else 0, counts=i == count - 1)
        for number, (width, count) in enumerate(groups)
        for i in range(count)
    )


ALEXNET = (Layer(64, 11, 4, 2), Layer(192, 5, 1, 2, pool=3), Layer(384, pool=3), Layer(256), Layer(256))
NETWORKS = {
    "alexnet": Network(ALEXNET, 31),
    "vgg16": Network(_vgg((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)), 16),
}


class Lpips(nn.Module):
    """Of pictures the features, of two pictures' features the distance, 0 for equal ones."""

    def __init__(self, network: str):
        super().__init__()
        self.network = NETWORKS[network]
        widths = [3, *(layer.width for layer in self.network.layers)]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(inputs, layer.width, layer.kernel, layer.stride, layer.padding)
            for inputs, layer in zip(widths[:-1], self.network.layers, strict=True)
        )
        counting = [layer.width for layer in self.network.layers if layer.counts]
        self.weights = nn.ParameterList(torch.empty(width) for width in counting)

    @classmethod
    def load(cls, network: str, source: Source = None, device: torch.device | str = "cpu") -> "Lpips":
        """With the published weights; see `lpips_weights`. Raises RequestError or CheckpointError."""
        with torch.device("meta"):
            model = cls(network)
        shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        model.load_state_dict(lpips_weights(network, shapes, source), assign=True)
        return model.requires_grad_(False).to(device)

    def prepare(self, picture: Image.Image) -> Features | None:
        """The features of an "RGB" picture; None where a side is too small for the network."""
        if min(picture.size) < self.network.smallest:
            return None
        return self.features(from_pil(picture).to(self.weights[0].device))

    @torch.no_grad()
    def features(self, picture: Tensor) -> Features:
        """Of each layer that counts, every place's channels at length 1."""
        shift, scale = (picture.new_tensor(values)[:, None, None] for values in (SHIFT, SCALE))
        x, found = (picture - shift) / scale, list[Tensor]()
        for layer, convolution in zip(self.network.layers, self.convolutions, strict=True):
            if layer.pool:
                x = F.max_pool2d(x, layer.pool, 2)
            x = convolution(x).relu_()
            if layer.counts:
                found.append(x / (x.norm(dim=1, keepdim=True) + EPS))
        return tuple(found)

    @torch.no_grad()
    def distance(self, one: Features, other: Features) -> float:
        """Σ over layers of the mean over places of Σ over channels of weight · difference²."""
        layers = zip(self.weights, one, other, strict=True)
        return float(sum(_mean_distance(weight, a, b) for weight, a, b in layers))


def _mean_distance(weight: Tensor, one: Tensor, other: Tensor) -> Tensor:
    return weight @ (one - other).square().mean(dim=(2, 3))[0]
