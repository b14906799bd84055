"""Noise schedules against diffusers, to the bit: 1 to 60, 100 and 300 steps, seven shifts."""

import pytest
import torch

from zimage import flow

pytest.importorskip("diffusers")
pytest.importorskip("scipy")

pytestmark = pytest.mark.parity
STEPS = (*range(1, 61), 100, 300)
SHIFTS = (0.5, 1.0, 2.7, 3.0, 6.0, 9.0, 12.0)


def theirs(given: list[float], **settings) -> torch.Tensor:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(**settings)
    scheduler.set_timesteps(sigmas=given)
    return scheduler.sigmas


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("name", ["simple", "beta", "karras", "exponential"])
def test_levels_of_a_schedule(name, shift):
    switch = {} if name == "simple" else {f"use_{name}_sigmas": True}
    for steps in STEPS:
        given = torch.linspace(1, 1 / steps, steps).tolist()
        assert torch.equal(flow.sigmas(steps, shift, name), theirs(given, shift=shift, **switch)), steps


@pytest.mark.parametrize("shift", SHIFTS)
def test_levels_that_fall_linearly_and_then_quadratically(shift):
    from diffusers.pipelines.mochi.pipeline_mochi import linear_quadratic_schedule

    for steps in STEPS[1:]:  # the reference divides by 0 for a single step
        expected = theirs(linear_quadratic_schedule(steps, 0.025), shift=shift)
        assert torch.equal(flow.sigmas(steps, shift, "linear_quadratic"), expected), steps


@pytest.mark.parametrize("shift", SHIFTS)
def test_beta_quantiles_as_times(shift):
    """ComfyUI's and Forge's formula, whose times are thousandths: ours are within half of one."""
    from scipy.stats import beta

    for steps in (1, 2, 8, 9, 30):
        times = torch.tensor(beta.ppf(1 - torch.arange(steps, dtype=torch.float64) / steps, 0.6, 0.6))
        expected = shift * times / (1 + (shift - 1) * times)
        ours = flow.sigmas(steps, shift, "beta_shifted")[:-1].double()
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)
        back = ours / (shift + (1 - shift) * ours)
        assert (back - (times * 1000).round() / 1000).abs().max() <= 0.5001e-3


@pytest.mark.parametrize("steps", [1, 8, 30])
def test_exact_levels(steps):
    given = flow.sigmas(steps, 6.0, "karras").tolist()
    assert torch.equal(flow.exact(given), theirs(given[:-1], shift=1.0))
