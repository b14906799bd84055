"""PSNR, SSIM and the grid of patches: against formulas in float64, and on pictures whose answer is known."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from zimage.experiments.metrics.patch_grid import patch_grid
from zimage.experiments.metrics.pixels import IDENTICAL, levels, psnr, ssim


def smooth(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A picture whose power falls with frequency as that of photographs does: (H, W, 3), not rounded."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
    frequency[0, 0] = 1
    noise = np.fft.fft2(np.random.default_rng(seed).normal(size=(height, width, 3)), axes=(0, 1))
    values = np.fft.ifft2(noise / frequency[..., None], axes=(0, 1)).real
    return 128 + 40 * values / values.std()


def picture(values: np.ndarray) -> torch.Tensor:
    return levels(Image.fromarray(values.round().clip(0, 255).astype(np.uint8)))


def noisy(values: np.ndarray, sigma: float, seed: int = 9) -> np.ndarray:
    return values + np.random.default_rng(seed).normal(0, sigma, values.shape)


# ------------------------------------------------------------------ PSNR and SSIM


def ssim_by_definition(one: torch.Tensor, other: torch.Tensor) -> float:
    """Each window by itself: a two-dimensional kernel, and variances as weighted squares of distances from means."""
    places = np.arange(-5, 6)
    kernel = np.exp(-(places[:, None] ** 2 + places**2) / (2 * 1.5**2))
    kernel /= kernel.sum()
    c1, c2, found = (0.01 * 255) ** 2, (0.03 * 255) ** 2, []
    for x, y in zip(one.numpy(), other.numpy(), strict=True):
        for i in range(x.shape[0] - 10):
            for j in range(x.shape[1] - 10):
                a, b = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
                mean_a, mean_b = (kernel * a).sum(), (kernel * b).sum()
                var_a, var_b = (kernel * (a - mean_a) ** 2).sum(), (kernel * (b - mean_b) ** 2).sum()
                both = (kernel * (a - mean_a) * (b - mean_b)).sum()
                alike = (2 * mean_a * mean_b + c1) * (2 * both + c2)
                found.append(alike / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)))
    return float(np.mean(found))


@pytest.mark.parametrize("size", [(20, 33), (11, 14)], ids=str)
@pytest.mark.parametrize("sigma", [2, 50])
def test_ssim_is_its_definition(size, sigma):
    one = smooth(*size)
    pair = picture(one), picture(noisy(one, sigma))
    assert ssim(*pair) == pytest.approx(ssim_by_definition(*pair), abs=1e-12)


def test_ssim_of_equal_other_and_small_pictures():
    one, negative = picture(smooth(32, 32)), picture(255 - smooth(32, 32))
    assert ssim(one, one) == pytest.approx(1, abs=1e-12)
    assert ssim(one, negative) < 0
    assert ssim(one[:, :10], negative[:, :10]) is None


def test_psnr():
    grey = torch.full((3, 8, 8), 100.0, dtype=torch.float64)
    assert psnr(grey, grey + 5) == pytest.approx(20 * math.log10(255 / 5))
    assert psnr(grey, grey) == IDENTICAL
    largest = 10 * math.log10(255**2 * 3 * 16384**2)  # one level of one colour of one pixel
    assert largest < IDENTICAL


# ------------------------------------------------------------------ the grid of patches


def tiles(height: int, width: int, period: int, strength: float, seed: int = 3) -> np.ndarray:
    """Each patch a little lighter or darker, by chance: (H, W, 1)."""
    counts = (-(-height // period), -(-width // period), 1)
    values = np.random.default_rng(seed).normal(0, strength, counts)
    return values.repeat(period, 0).repeat(period, 1)[:height, :width]


@pytest.mark.parametrize("size", [(128, 128), (256, 384), (90, 130)], ids=str)
def test_pictures_without_a_grid_score_about_zero(size):
    scores = [patch_grid(picture(smooth(*size, seed))) for seed in range(12)]
    assert abs(np.mean(scores)) < 1.5
    assert max(map(abs, scores)) < 5


@pytest.mark.parametrize("size", [(128, 128), (256, 384)], ids=str)
def test_a_grid_is_found_and_a_stronger_one_scores_more(size):
    scores = [patch_grid(picture(smooth(*size) + tiles(*size, 16, strength))) for strength in (0, 8, 16, 32)]
    assert scores == sorted(scores)
    assert scores[2] > scores[0] + 6


def test_a_grid_is_found_wherever_it_begins_and_only_in_its_period():
    whole = smooth(300, 300) + tiles(300, 300, 16, 24)
    assert min(patch_grid(picture(whole[shift:, 2 * shift :])) for shift in (0, 3, 7)) > 8
    for period in (12, 20, 25):
        assert patch_grid(picture(smooth(300, 300) + tiles(300, 300, period, 24))) < 4


def test_the_same_noise_in_every_patch_is_a_grid():
    pattern = np.random.default_rng(5).normal(0, 10, (16, 16, 3))
    assert patch_grid(picture(smooth(256, 256) + np.tile(pattern, (16, 16, 1)))) > 8


def test_empty_and_small_pictures():
    assert patch_grid(torch.full((3, 128, 128), 77.0, dtype=torch.float64)) == 0
    assert patch_grid(picture(smooth(80, 200))) is None
    assert patch_grid(picture(smooth(81, 200))) is not None
