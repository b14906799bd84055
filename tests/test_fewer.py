"""Candidates for fewer evaluations: their formulas, and the scenario that sets them beside plain steps."""

import json
from itertools import pairwise

import pytest
import torch
from click.testing import CliRunner

from bench import fewer
from bench.__main__ import main
from bench.fewer import Method
from bench.shortcuts import EVALUATED, LOOKS_BACK, STEPS, HalfSize, MeanCache, dct_matrix, extrapolated, resized
from zimage import flow


def test_the_lists_are_whole():
    """A gap looks back where a step is left out, and only there; ends are evaluated."""
    for budget, steps in EVALUATED.items():
        assert len(steps) == budget
        assert (steps[0], steps[-1]) == (0, STEPS - 1)
        assert [k > 0 for k in LOOKS_BACK[budget]] == [b - a > 1 for a, b in pairwise(steps)]
        assert sorted({*steps, *extrapolated(budget)}) == list(range(STEPS))


def test_mean_cache_extrapolates_as_worked_out_by_hand():
    """Steps of 0.1 from 1 on; v = 3, then 5. Over both, u = 4, J = (3 − 4) / −0.2 = 5, and v̂ = 5 + 5 · 0.1."""
    sigmas = torch.tensor([1.0, 0.9, 0.8, 0.7, 0.0])
    cached = MeanCache(lambda x, i: torch.full_like(x, [3.0, 5.0][i]), sigmas, {2: 2, 3: 1})
    x = torch.ones(1, 1, 1, 1)
    for i in range(2):
        x = flow.euler_step(x, cached(x, i), sigmas[i], sigmas[i + 1])
    assert float(x) == pytest.approx(1 - 0.3 - 0.5, abs=1e-6)
    mean = cached(x, 2)
    assert float(mean) == pytest.approx(5.5, abs=1e-5)
    again = cached(flow.euler_step(x, mean, sigmas[2], sigmas[3]), 3)  # looks one step back
    assert float(again) == pytest.approx(5.5, abs=1e-5)


def test_looking_one_step_back_is_eulers_step_over_a_longer_way():
    sigmas, x0 = flow.sigmas(STEPS, 6.0), torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))

    def over(sigmas):
        return lambda x, i: torch.tanh(2 * x) + torch.cos(3 * sigmas[i])

    class Field:
        at = staticmethod(over)

    skipped = dict.fromkeys(extrapolated(13), 1)
    found = Method("", sigmas, evaluates=lambda model, at: MeanCache(over(at), at, skipped)).run(Field(), x0)
    levels = torch.cat((sigmas[list(EVALUATED[13])], torch.zeros(1)))
    expected = Method("", levels, evaluates=lambda model, at: over(at)).run(Field(), x0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_smaller_latent_has_the_same_low_frequencies_and_unit_noise():
    torch.testing.assert_close(dct_matrix(12) @ dct_matrix(12).T, torch.eye(12), rtol=0, atol=1e-6)
    small = torch.randn(1, 2, 6, 10, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(resized(resized(small, 12, 20), 6, 10), small, rtol=0, atol=1e-5)
    torch.testing.assert_close(resized(torch.full((1, 1, 8, 8), 3.0), 4, 4) / 2, torch.full((1, 1, 4, 4), 3.0))
    noise = torch.randn(64, 16, 16, 16, generator=torch.Generator().manual_seed(2))
    assert float(resized(noise, 8, 8).std()) == pytest.approx(1, abs=0.01)


def test_half_size_is_exact_where_the_picture_has_low_frequencies_only():
    """The model that knows one picture c gives v = (x − c) / σ, at half size with c's own half."""
    generator = torch.Generator().manual_seed(3)
    half = torch.randn(1, 3, 4, 6, generator=generator)
    picture, sigmas = 2 * resized(half, 8, 12), torch.tensor([0.9, 0.4, 0.0])
    halved = HalfSize(lambda x, i: (x - picture) / sigmas[i], lambda y, level: (y - half) / level, sigmas, steps=1)
    x = flow.noised(picture, torch.randn(1, 3, 8, 12, generator=generator), sigmas[0])
    torch.testing.assert_close(halved(x, 0), (x - picture) / sigmas[0], rtol=0, atol=1e-5)
    assert torch.equal(halved(x, 1), (x - picture) / sigmas[1])


def test_the_scenario_counts_what_each_row_costs(tiny_folder, monkeypatch):
    monkeypatch.setattr(fewer, "PROMPTS", ("a cat",))
    monkeypatch.setattr(fewer, "FINE", 2)
    arguments = ["fewer", "--json", "--model", str(tiny_folder), "--size", "64", "--budget", "13", "--no-halves"]
    ran = CliRunner().invoke(main, arguments, catch_exceptions=False)
    rows = json.loads(ran.output.splitlines()[-1])["rows"]
    assert {row["cost"] for row in rows} == {13.0}
    assert all(row["50 steps, median"] > 0 for row in rows)
    assert rows[0]["method"] == "MeanCache"
