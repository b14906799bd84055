"""The table of solvers against the names that can be asked for, and what its rows say of their steps."""

import dataclasses

import pytest
import torch
from torch import Tensor

from zimage import flow
from zimage.flow.steps import Evaluate
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


def neighbours(top: float) -> Tensor:
    """Three levels below one, as near to each other as fp32 has them."""
    levels = [torch.tensor(top)]
    for _ in range(3):
        levels.append(torch.nextafter(levels[-1], torch.tensor(0.0)))
    return torch.stack(levels[1:])


@pytest.mark.parametrize("begins", [1.0, 0.999])
@pytest.mark.parametrize("top", [1.0, 0.5, 1e-3, 1e-30])
@pytest.mark.parametrize("name", SAMPLERS)
def test_any_falling_levels_give_finite_values(name, top, begins):
    """Also levels that are neighbours in fp32; on a model that changes in jumps of a hundredth."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        levels = torch.cat(
            (begins * torch.rand(6, generator=generator), begins * neighbours(top), torch.tensor([begins]))
        )
        sigmas = torch.cat((levels.unique().flip(0), torch.zeros(1)))
        x, *noises = torch.randn(len(sigmas), 1, 2, 3, 4, generator=generator)
        evaluate, past = jumping(sigmas), ()
        for i, noise in enumerate(noises):
            x, past = flow.SOLVERS[name].step(x, i, sigmas, evaluate, lambda: noise, past)  # noqa: B023
        assert x.isfinite().all(), sigmas


def jumping(sigmas: Tensor) -> Evaluate:
    return lambda x, level: (x - torch.tanh(x).round(decimals=2)) / sigmas[level].clamp(min=1e-3)
