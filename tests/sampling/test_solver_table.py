"""The table of solvers against the names that can be asked for, and what its rows say of their steps."""

import dataclasses

import pytest
import torch

from zimage import flow
from zimage.settings.sampling import SAMPLERS, SamplingSettings

SIGMAS = flow.sigmas(5, 3.0)


def test_what_can_be_asked_for_is_what_there_is():
    assert tuple(flow.SOLVERS) == SAMPLERS
    field = next(field for field in dataclasses.fields(SamplingSettings) if field.name == "sampler")
    assert field.metadata["choices"] == SAMPLERS


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("first", [0, 2])
def test_a_row_says_where_a_step_evaluates_what_it_leaves_and_whether_it_draws(name, first):
    solver, x, past = flow.SOLVERS[name], torch.randn(2, 3, 4, 5), ()
    drawn = 0

    def noise():
        nonlocal drawn
        drawn += 1
        return torch.randn_like(x)

    for i in range(first, 5):
        asked = []
        x, past = solver.step(x, i, SIGMAS, lambda x, level: asked.append(level) or torch.tanh(x), noise, past)  # noqa: B023
        assert tuple(asked) == solver.levels(i, 5)
        if i < 4:
            assert len(past) == solver.leaves(i + 1 - first)
            assert all(one.shape == x.shape and one.isfinite().all() for one in (x, *past))
    assert drawn == (4 - first if solver.draws else 0), "the last step adds no noise"


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_straight_path_is_followed_to_its_end(name):
    """Where D is always the same picture, every solver ends in it; without noise it stays on the line there."""
    generator = torch.Generator().manual_seed(1)
    clean, noise = torch.randn(2, 2, 3, 4, 5, generator=generator)
    x, past = noise, ()
    for i in range(5):
        x, past = flow.SOLVERS[name].step(
            x, i, SIGMAS, lambda x, level: (x - clean) / SIGMAS[level], lambda: torch.randn(clean.shape), past
        )
        if not flow.SOLVERS[name].draws:
            torch.testing.assert_close(x, flow.noised(clean, noise, SIGMAS[i + 1]))
    torch.testing.assert_close(x, clean)
