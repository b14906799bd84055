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
