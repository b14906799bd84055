"""Rank tables on known cases: ties, directions, pairs of prompts, coverage of the intervals."""

import numpy as np
import pytest

from zimage.errors import RequestError
from zimage.experiments.ranking import rank_table, ranked, scores_of
from zimage.experiments.record import Record

A, B, C = ((("steps", n),) for n in (4, 8, 16))


def by_prompt(*values: float) -> dict[str, float]:
    return {f"prompt {i}": value for i, value in enumerate(values)}


def test_a_setting_that_is_better_on_every_prompt_is_best_in_every_resample():
    """However much more the prompts differ: alone, the intervals of the two means overlap nearly wholly."""
    hard = [1.0, 50.0, 7.0, 90.0, 33.0, 12.0]
    best, worse = ranked({A: by_prompt(*hard), B: by_prompt(*(x + 0.1 for x in hard))}, higher_is_better=True)
    assert (best.setting, best.rank, best.rank_interval, best.best) == (B, 1, (1, 1), 1)
    assert (worse.setting, worse.rank, worse.rank_interval, worse.best) == (A, 2, (2, 2), 0)
    assert worse.behind == pytest.approx(0.1)
    assert worse.behind_interval == pytest.approx((0.1, 0.1))
    assert (best.behind, best.behind_interval) == (0, (0, 0))
    assert best.mean_interval.low < worse.mean < best.mean_interval.high


def test_lower_can_be_better():
    scores = {A: by_prompt(3, 4), B: by_prompt(1, 2), C: by_prompt(2, 3)}
    assert [row.setting for row in ranked(scores, higher_is_better=False)] == [B, C, A]
    assert [row.setting for row in ranked(scores, higher_is_better=True)] == [A, C, B]
    low = ranked(scores, higher_is_better=False)[-1]
    assert (low.mean, low.behind) == (3.5, 2)
    assert low.mean_interval == (3, 4)


def test_equal_settings_share_ranks_and_the_best_place():
    values = [0.1, 0.7, 0.3333, 0.9]  # whose sums depend on their order
    rows = ranked({A: by_prompt(*values), B: by_prompt(*values), C: by_prompt(0, 0, 0, 0)}, higher_is_better=True)
    assert [(row.rank, row.best) for row in rows] == [(1.5, 0.5), (1.5, 0.5), (3, 0)]
    assert rows[0].rank_interval == (1.5, 1.5)
    values = [0.1, 0.2, 0.3]
    assert sum(values) != sum(reversed(values))
    rows = ranked({A: by_prompt(*values), B: by_prompt(*reversed(values))}, higher_is_better=True)
    assert [row.rank for row in rows] == [1.5, 1.5]


def test_an_uncertain_order_is_told():
    """B is better on the mean by one prompt only: without that prompt, in (3/4)⁴ of the draws, A is."""
    rows = ranked({A: by_prompt(1, 1, 1, 0), B: by_prompt(0.9, 0.9, 0.9, 1)}, higher_is_better=True, resamples=40_000)
    assert [row.setting for row in rows] == [B, A]
    assert rows[1].best == pytest.approx((3 / 4) ** 4, abs=0.01)
    assert rows[0].rank_interval == (1, 2)
    assert rows[1].behind_interval.low < 0 < rows[1].behind < rows[1].behind_interval.high


def test_only_prompts_that_all_settings_have_count():
    rows = ranked({A: by_prompt(1, 2, 3), B: by_prompt(1.5, 2.5)}, higher_is_better=True)
    assert [(row.setting, row.mean, row.prompts) for row in rows] == [(B, 2, 2), (A, 1.5, 2)]
    assert ranked({A: {"a": 1}, B: {"b": 1}}, higher_is_better=True) == []


def test_one_prompt_has_no_intervals():
    (row, _) = ranked({A: by_prompt(1), B: by_prompt(2)}, higher_is_better=True)
    assert (row.mean, row.mean_interval, row.rank_interval, row.behind_interval) == (2, None, None, None)


def test_the_same_seed_gives_the_same_table():
    scores = {s: by_prompt(*np.random.default_rng(i).random(8)) for i, s in enumerate((A, B, C))}
    assert ranked(scores, True, 200, seed=3) == ranked(scores, True, 200, seed=3)
    assert ranked(scores, True, 200, seed=3) != ranked(scores, True, 200, seed=4)


def test_intervals_hold_the_true_difference_as_often_as_they_say():
    """With 30 prompts it lies within in about 95 of 100 experiments; of percentile intervals, in slightly fewer."""
    random, held = np.random.default_rng(0), 0
    for _ in range(200):
        level, gain = random.normal(0, 5, 30), random.normal(3, 1, 30)
        rows = ranked({A: by_prompt(*level), B: by_prompt(*(level + gain))}, True, resamples=300)
        low, high = rows[1].behind_interval
        held += low <= 3 <= high
    assert 0.90 <= held / 200 <= 0.98


def cells():
    for steps in (4, 8):
        for prompt in ("a cat", "a dog"):
            for seed in (1, 2):
                score = steps + (prompt == "a dog") + seed / 10
                axes = {"steps": steps, "size": [64, 64], "seed": seed, "prompt": prompt}
                yield Record(f"{steps}{prompt}{seed}", axes=axes, prompt=prompt, seed=seed, scores={"clip": score})


def test_records_are_grouped_by_axes_and_seeds_averaged():
    found = scores_of(cells(), "clip")
    assert found == {
        (("steps", n), ("size", (64, 64))): {"a cat": pytest.approx(n + 0.15), "a dog": pytest.approx(n + 1.15)}
        for n in (4, 8)
    }
    table = rank_table(cells(), "clip", higher_is_better=True, axes=["steps"])
    assert [row.setting for row in table] == [(("steps", 8),), (("steps", 4),)]
    assert table[1].behind == pytest.approx(4)


def test_records_without_a_score_and_unknown_axes():
    assert rank_table([*cells()], "psnr", higher_is_better=True) == []
    with pytest.raises(RequestError, match="no axis 'shift'; the records have steps, size, seed, prompt") as raised:
        rank_table(cells(), "clip", higher_is_better=True, axes=["shift"])
    assert raised.value.fields == ("by",)
