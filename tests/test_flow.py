"""The sampler's formulas against values worked out by hand."""

import itertools

import pytest
import torch

from zimage import flow
from zimage.errors import RequestError


def test_published_turbo_schedule():
    expected = [1, 0.9545, 0.9, 0.8333, 0.75, 0.6429, 0.5, 0.3, 0]
    torch.testing.assert_close(flow.sigmas(8, 3.0), torch.tensor(expected), rtol=0, atol=5e-5)


def test_shift_one_is_linear():
    torch.testing.assert_close(flow.sigmas(4, 1.0), torch.tensor([1, 0.75, 0.5, 0.25, 0]))


@pytest.mark.parametrize(("steps", "shift"), [(0, 3.0), (-1, 3.0), (4, 0.0), (4, -1.0)])
def test_impossible_schedules_are_refused(steps, shift):
    with pytest.raises(RequestError):
        flow.sigmas(steps, shift)


def test_euler_follows_a_straight_path_exactly():
    clean, noise = torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), -1.0)
    x, sigmas = noise, flow.sigmas(3, 3.0)
    for now, after in itertools.pairwise(sigmas):
        x = flow.euler_step(x, noise - clean, now, after)
    torch.testing.assert_close(x, clean)


def test_guidance_counts_from_zero_and_normalises_per_sample():
    positive, negative = torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    torch.testing.assert_close(flow.guide(positive, negative, 1.0), torch.tensor([[6.0, 8.0], [0.0, 1.0]]))
    torch.testing.assert_close(flow.guide(positive, negative, 1.0, 1.0), positive)
    torch.testing.assert_close(flow.guide(positive, negative, 1.0, 3.0), flow.guide(positive, negative, 1.0))


def test_truncation_switches_guidance_off_late():
    assert [flow.guidance_at(sigma, 4.0, 0.5) for sigma in torch.tensor([1.0, 0.5, 0.4999])] == [4.0, 4.0, 0.0]


def test_a_seed_is_the_same_noise_everywhere():
    assert torch.equal(flow.start_noise(1, 16, 4, 4), flow.start_noise(1, 16, 4, 4))
    assert not torch.equal(flow.start_noise(1, 16, 4, 4), flow.start_noise(2, 16, 4, 4))


@pytest.mark.parametrize(
    ("steps", "strength", "expected"),
    [(8, 1.0, 0), (8, 0.6, 3), (8, 0.05, 7), (1, 0.05, 0), (10, 0.3, 7), (50, 0.02, 49), (8, 1e-30, 7)],
)
def test_strength_chooses_the_first_step(steps, strength, expected):
    assert flow.first_step(steps, strength) == expected


def test_any_strength_runs_a_step_and_more_strength_no_fewer():
    for steps in (1, 3, 8, 30, 50, 100):
        starts = [flow.first_step(steps, thousandth / 1000) for thousandth in range(1, 1001)]
        assert starts == sorted(starts, reverse=True)
        assert starts[-1] == 0
        assert max(starts) == steps - 1


@pytest.mark.parametrize("strength", [0.0, -0.1, 1.0001, float("nan"), float("inf")])
def test_impossible_strengths_are_refused(strength):
    with pytest.raises(RequestError, match="strength"):
        flow.first_step(8, strength)


def test_noise_is_mixed_in_exactly_at_the_ends():
    clean, noise = torch.randn(2, 16, 4, 6), torch.randn(2, 16, 4, 6)
    assert torch.equal(flow.noised(clean, noise, torch.tensor(0.0)), clean)
    assert torch.equal(flow.noised(clean, noise, torch.tensor(1.0)), noise)
    torch.testing.assert_close(flow.noised(clean, noise, torch.tensor(0.25)), 0.75 * clean + 0.25 * noise)


def test_outside_the_mask_stands_the_picture():
    latents, clean, noise = torch.randn(2, 16, 4, 6), torch.randn(1, 16, 4, 6), torch.randn(2, 16, 4, 6)
    mask = torch.zeros(1, 1, 4, 6)
    mask[..., :3] = 1
    for sigma in torch.tensor([0.5, 0.0]):
        kept = flow.keep_outside(latents, clean, noise, mask, sigma)
        assert torch.equal(kept[..., :3], latents[..., :3])
        assert torch.equal(kept[..., 3:], flow.noised(clean, noise, sigma)[..., 3:])


def test_a_mask_shrinks_to_each_cells_upper_left_value():
    mask = torch.zeros(1, 1, 32, 48)
    mask[..., 8, 16] = 1  # the upper left pixel of cell (1, 2)
    mask[..., 31, 47] = 1  # the lower right one of the last cell
    expected = torch.zeros(1, 1, 4, 6)
    expected[..., 1, 2] = 1
    assert torch.equal(flow.latent_mask(mask, 4, 6), expected)
