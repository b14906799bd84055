"""Noise schedules: levels against formulas in float64, exact ones, and what of both a render makes."""

import itertools
import math

import pytest
import torch

import zimage
from zimage import flow
from zimage.errors import RequestError
from zimage.flow.schedules import beta_quantile
from zimage.settings.sampling import SCHEDULES, split_sigmas

SMALL = {"seed": 1, "width": 64, "height": 48}


def test_settings_name_the_rows_of_the_table():
    assert tuple(flow.SCHEDULES) == SCHEDULES


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 9.0, 100.0])
def test_levels_fall_from_one_to_zero(name, shift):
    for steps in (1, 2, 3, 8, 30, 1000):
        levels = flow.sigmas(steps, shift, name)
        assert (levels.dtype, levels.shape) == (torch.float32, (steps + 1,))
        assert (levels[0], levels[-1]) == (1, 0)
        assert (levels[:-1] > levels[1:]).all()


def test_normal_levels_are_even_in_time_down_to_the_last_trained_one():
    levels = flow.sigmas(8, 3.0, "normal")[:-1].double()
    times = levels / (3 - 2 * levels)  # the shift undone
    assert torch.allclose(times, torch.linspace(1, 0.001, 8, dtype=torch.float64), rtol=0, atol=1e-6)
    assert flow.sigmas(1, 3.0, "normal").tolist() == [1, 0]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("shift", [1e-7, 1e-8, 1e-30])
def test_a_shift_that_fp32_cannot_hold_is_refused(name, shift):
    with pytest.raises(RequestError, match="so small that rounding") as caught:
        flow.sigmas(8, shift, name)
    assert caught.value.fields == ("shift",)
    assert abs(flow.sigmas(8, 1e-5, name)[0] - 1) < 0.01


def test_those_between_two_levels_keep_the_ends_of_the_simple_one():
    for name in ("beta", "karras", "exponential", "kl_optimal"):
        assert torch.equal(flow.sigmas(8, 3.0, name)[[0, 7]], flow.sigmas(8, 3.0)[[0, 7]])
        assert not torch.allclose(flow.sigmas(8, 3.0, name), flow.sigmas(8, 3.0), rtol=0, atol=0.05)


def test_exponential_levels_have_equal_ratios_and_kl_optimal_ones_equal_angles():
    ratios = [float(a / b) for a, b in itertools.pairwise(flow.sigmas(9, 3.0, "exponential")[:-1].double())]
    angles = [float(a - b) for a, b in itertools.pairwise(flow.sigmas(9, 3.0, "kl_optimal")[:-1].double().atan())]
    assert max(ratios) - min(ratios) < 1e-6
    assert max(angles) - min(angles) < 1e-6


def test_karras_levels_are_even_in_their_seventh_root():
    roots = flow.sigmas(9, 3.0, "karras")[:-1].double() ** (1 / 7)
    assert (roots[:-1] - roots[1:]).std() < 1e-7


def test_the_first_half_of_linear_quadratic_takes_a_fortieth_of_the_noise():
    levels = flow.sigmas(8, 1.0, "linear_quadratic").double()
    falls = levels[:-1] - levels[1:]
    torch.testing.assert_close(falls[:4], torch.full((4,), 0.025 / 4).double(), rtol=0, atol=1e-7)
    torch.testing.assert_close((falls[5:] - falls[4:-1]).std(), torch.tensor(0.0).double(), rtol=0, atol=1e-7)


def test_quantiles_of_beta_hold_their_share():
    """Against the density, integrated in s = x^0.6, where it is smooth, by Simpson's rule."""
    whole = math.gamma(0.6) ** 2 / math.gamma(1.2)
    for p in (1e-6, 0.01, 0.2, 0.4999, 0.5001, 0.8, 0.99):
        x = beta_quantile(p) if p < 0.5 else 1 - beta_quantile(p)
        s = torch.linspace(0, x**0.6, 20_001, dtype=torch.float64)
        weights = torch.tensor([1.0, *[4.0, 2.0] * 9_999, 4.0, 1.0], dtype=torch.float64)
        share = ((1 - s ** (1 / 0.6)) ** -0.4 / 0.6 * weights).sum() * float(s[1]) / 3 / whole
        assert float(share) == pytest.approx(min(p, 1 - p), rel=1e-9)


def test_the_median_of_beta_is_one_half():
    assert beta_quantile(0.5) == pytest.approx(0.5, abs=2e-16)
    assert beta_quantile(0.0) == 0
    assert beta_quantile(1.0) == 1


# ------------------------------------------------------------------ exact levels


def test_exact_levels_are_a_jobs(pipe):
    job = pipe.prepare(zimage.Request("a cat", sigmas="1, 0.7,0.25,0", **SMALL))
    assert job.sigmas == tuple(torch.tensor([1, 0.7, 0.25, 0]).tolist())
    assert (job.request.steps, job.request.schedule, job.request.shift) == (3, None, None)
    again = zimage.Job.from_dict(job.to_dict())
    assert again.sigmas == job.sigmas
    assert again.request.sigmas == "1, 0.7,0.25,0"


def test_the_levels_of_a_schedule_given_exactly_give_its_picture(pipe):
    listed = ",".join(map(repr, flow.sigmas(3, 3.0, "karras").tolist()))
    one, two = (
        pipe.generate("a cat", **SMALL, **settings)
        for settings in ({"steps": 3, "schedule": "karras"}, {"sigmas": listed})
    )
    assert one.images[0].tobytes() == two.images[0].tobytes()


def test_a_schedule_is_its_own_in_the_stages_too(pipe):
    caption, noise = pipe.encode(["a cat"]), flow.start_noise(1, 16, 6, 8)
    given = flow.sigmas(3, 3.0, "beta").tolist()
    one = pipe.denoise(caption, noise, steps=3, shift=3.0, schedule="beta")
    assert torch.equal(one, pipe.denoise(caption, noise, sigmas=given))
    assert not torch.equal(one, pipe.denoise(caption, noise, steps=3, shift=3.0))


@pytest.mark.parametrize("levels", [[0.5, 0.7, 0], [], [1, 0.5], [[1, 0], [1, 0]], [1, math.nan, 0]], ids=str)
def test_levels_given_to_the_stage_fall_too(pipe, levels):
    with pytest.raises(RequestError, match=r"should fall from 1 or less to 0") as caught:
        pipe.denoise(pipe.encode(["a cat"]), flow.start_noise(1, 16, 6, 8), sigmas=levels)
    assert caught.value.fields == ("sigmas",)


@pytest.mark.parametrize("levels", ["1,0.5,0", ["1", "0"], [1, None]], ids=str)
def test_levels_given_to_the_stage_are_numbers(pipe, levels):
    with pytest.raises(RequestError, match=r"should be numbers"):
        pipe.denoise(pipe.encode(["a cat"]), flow.start_noise(1, 16, 6, 8), sigmas=levels)


def test_a_run_that_begins_below_one_begins_with_so_much_noise():
    noise = flow.start_noise(1, 16, 4, 4)
    begun = flow.start(noise, flow.exact([0.75, 0.5, 0.0]))
    assert torch.equal(begun.latents, 0.75 * noise)
    assert torch.equal(begun.noise, noise)
    for shift in (0.01, 0.1, 3.0):  # whose first level is 1 but for roundings
        assert flow.start(noise, flow.sigmas(4, shift)).latents is noise


def test_a_picture_is_mixed_in_at_the_level_where_it_begins(pipe):
    noise, clean = flow.start_noise(1, 16, 4, 4), flow.start_noise(2, 16, 4, 4)
    begun = flow.start(noise, flow.exact([0.75, 0.5, 0.25, 0.0]), 0.7, clean)
    assert begun.step == 0
    assert torch.equal(begun.latents, 0.25 * clean + 0.75 * noise)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "cannot be read; write numbers"),
        ("1,a,0", "cannot be read; write numbers"),
        ("0", "pass 2 to 1001 numbers"),
        (",".join(str(1 - k / 2000) for k in range(1002)), "pass 2 to 1001 numbers"),
        ("1.5,0", "the first, 1.5, should be above 0 and at most 1"),
        ("-1e300,0", "the first, -1e+300, should be above 0"),
        ("nan,0", "the first, nan,"),
        ("1,0.5", "the last, 0.5, should be 0"),
        ("1,0.5,0.7,0", "0.7 stands after 0.5"),
        ("1,nan,0", "nan stands after 1"),
        ("1,-1e300,0", "none below 0"),
        ("1,0.50000001,0.5,0", "0.5 stands after 0.50000001; each should be below the one before it, in fp32"),
        ("1,1e-50,0", "0 stands after 1e-50"),
    ],
)
def test_levels_that_do_not_fall_are_refused(text, told):
    with pytest.raises(RequestError, match=r".") as caught:
        zimage.Request("a cat", sigmas=text)
    assert told in str(caught.value)
    assert caught.value.fields == ("sigmas",)


@pytest.mark.parametrize(
    ("beside", "told"),
    [
        ({"steps": 3}, "these are 2 steps, and steps is 3"),
        ({"schedule": "beta"}, "leave out schedule, or the sigmas"),
        ({"shift": 3.0, "schedule": "beta"}, "leave out schedule and shift, or the sigmas"),
    ],
)
def test_levels_and_what_makes_levels_are_not_passed_together(beside, told):
    with pytest.raises(RequestError, match=told) as caught:
        zimage.Request("a cat", sigmas="1,0.5,0", **beside)
    assert caught.value.fields == ("sigmas", *sorted(beside))
    assert zimage.Request("a cat", sigmas="1,0.5,0", steps=2).sigmas


def test_exact_levels_need_no_checkpoints_schedule(pipe, monkeypatch):
    monkeypatch.setattr(pipe.model, "shift", None)
    assert pipe.prepare(zimage.Request("a cat", sigmas="1,0.5,0", **SMALL)).sigmas == (1.0, 0.5, 0.0)
    with pytest.raises(RequestError, match="no schedule"):
        pipe.prepare(zimage.Request("a cat", **SMALL))


def test_a_file_that_sets_the_schedule_gives_way_to_exact_levels():
    from zimage.settings.merging import laid_over

    defaults = {"steps": 20, "schedule": "beta", "shift": 2.0, "guidance": 1.0}
    assert laid_over(defaults, {"sigmas": "1,0.5,0"}) == {"guidance": 1.0, "sigmas": "1,0.5,0"}
    assert split_sigmas("1,0.5,0") == [1.0, 0.5, 0.0]
