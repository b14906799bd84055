"""Captions of pictures mixed into a prompt's: each mode against its formula in float64, and nothing lost on the way."""

import math

import numpy as np
import pytest
import torch

from zimage.errors import RequestError
from zimage.text.blend import MODES, Seen, blend, blended_length, describe_blend

WIDTH = 48
LIMIT = 1504


def rows(count, seed, scale=1.0, width=WIDTH):
    """Tokens of unlike sizes; the first is a sink, many times as large in one dimension."""
    generator = torch.Generator().manual_seed(seed)
    found = scale * torch.randn(count, width, generator=generator) * (0.5 + torch.rand(count, 1, generator=generator))
    found[0, 3] += 60 * scale
    return found


TEXT, PICTURE = rows(11, 1), rows(1041, 2, 40.0)

# ------------------------------------------------------------------ the formulas, written out once more


def rms(x):
    return np.sqrt(np.mean(x * x, -1, keepdims=True))


def unit(x):
    return x / rms(x)


def resampled(x, n):
    """Every old row is shared by the two new rows that it lies between, or every new row is between two old ones."""
    count = len(x)
    if n == 1:
        return x.mean(0, keepdims=True)
    if n >= count:
        places = [i * (count - 1) / (n - 1) for i in range(n)]
        lows = [min(int(p), count - 2) if count > 1 else 0 for p in places]
        return np.stack([x[a] + (p - a) * (x[min(a + 1, count - 1)] - x[a]) for a, p in zip(lows, places, strict=True)])
    sums, weights = np.zeros((n, x.shape[1])), np.zeros(n)
    for j in range(count):
        place = j * (n - 1) / (count - 1)
        low = min(math.floor(place), n - 2)
        for row, share in ((low, 1 - (place - low)), (low + 1, place - low)):
            sums[row] += share * x[j]
            weights[row] += share
    return sums / weights[:, None]


def mixed(t, v, alpha):
    return (1 - alpha) * t + alpha * rms(t) * v


def at_the_texts_length(t, p):
    return unit(resampled(unit(p), len(t)))


def interpolate(t, p, alpha):
    return mixed(t, at_the_texts_length(t, p), alpha)


def linear(t, p, alpha):
    n = max(len(t), len(p))
    stretched = resampled(rms(t), n) * unit(resampled(unit(t), n)) if n > len(t) else t
    return mixed(stretched, unit(resampled(unit(p), n)), alpha)


def concat(t, p, alpha):
    added = max(1, round(alpha * len(p)))
    middle = sorted(rms(t)[:, 0])[(len(t) - 1) // 2]
    return np.concatenate([t, middle * unit(resampled(unit(p), added))])


def style_only(t, p, alpha):
    whole, first = interpolate(t, p, alpha), 2 * t.shape[1] // 3
    return np.concatenate([t[:, :first], whole[:, first:]], 1)


def graduated(t, p, alpha):
    share = np.array([min(1.0, 2 * alpha * i / (len(t) - 1)) for i in range(len(t))])
    return mixed(t, at_the_texts_length(t, p), share[:, None])


def attention_weighted(t, p, alpha):
    u = t / np.linalg.norm(t, axis=1, keepdims=True)
    near = [[j for j in range(len(t)) if 0 < abs(i - j) <= 2] for i in range(len(t))]
    score = np.array([1 - np.mean([u[i] @ u[j] for j in n]) for i, n in enumerate(near)])
    weight = score - score.min() + 0.1
    return mixed(t, at_the_texts_length(t, p), (alpha * (1 - 0.8 * weight / weight.max()))[:, None])


def adain(t, p, alpha):
    content, style = unit(t), unit(p)
    plain = (content - content.mean(0)) / (content.std(0) + 1e-6)
    return mixed(t, unit(plain * style.std(0) + style.mean(0)), alpha)


FORMULAS = [interpolate, linear, concat, style_only, graduated, attention_weighted, adain]


def test_every_mode_has_a_formula():
    assert {formula.__name__ for formula in FORMULAS} == MODES.keys()


@pytest.mark.parametrize("lengths", [(11, 1041), (11, 11), (40, 13), (7, 2), (200, 1), (2, 9)])
@pytest.mark.parametrize("formula", FORMULAS)
def test_a_mode_is_its_formula(formula, lengths):
    text, picture = rows(lengths[0], 3), rows(lengths[1], 4, 7.0)
    for alpha in (0.3, 0.75, 1.0):
        expected = formula(text.double().numpy(), picture.double().numpy(), alpha)
        for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
            found = blend(text.to(dtype), [Seen(picture.to(dtype), alpha)], formula.__name__, LIMIT)
            assert found.dtype == dtype
            assert found.shape == expected.shape
            error = np.abs(found.double().numpy() - expected).max(1)
            assert (error <= tolerance * np.abs(expected).max(1)).all()
            assert len(found) == blended_length(formula.__name__, lengths[0], [(lengths[1], alpha)], LIMIT)


# ------------------------------------------------------------------ nothing is lost


@pytest.mark.parametrize("mode", MODES)
def test_each_of_1041_picture_tokens_counts_beside_11_of_text(mode):
    """Any one that is another changes the result: none is cut. (What `graduated` gives its first token is nothing.)"""
    text, picture = TEXT.double(), PICTURE.double()
    before = blend(text, [Seen(picture, 0.3)], mode, LIMIT)
    begin = 1 if mode == "graduated" else 0
    for j in [*range(begin, 1041, 53), 1, 2, 1039, 1040]:
        other = picture.clone()
        other[j] = picture[j].flip(0)
        moved = (blend(text, [Seen(other, 0.3)], mode, LIMIT) - before).abs().max()
        assert moved > 1e-6 * before.abs().max(), f"token {j} has no effect"


@pytest.mark.parametrize("mode", MODES)
def test_each_token_of_the_text_counts(mode):
    before = blend(TEXT, [Seen(PICTURE, 0.3)], mode, LIMIT)
    for i in range(len(TEXT)):
        other = TEXT.clone()
        other[i] = TEXT[i].flip(0)
        assert not torch.equal(blend(other, [Seen(PICTURE, 0.3)], mode, LIMIT), before)


@pytest.mark.parametrize("mode", MODES)
def test_alpha_0_leaves_the_prompts_own_bits(mode):
    text = TEXT.bfloat16()
    assert blend(text, [Seen(PICTURE, 0.0), Seen(PICTURE, 0.0)], mode, LIMIT) is text
    assert blend(text, [], mode, LIMIT) is text
    assert blended_length(mode, 11, [(1041, 0.0)], LIMIT) == 11
    assert describe_blend(mode, 11, [(1041, 0.0)], LIMIT) == ""


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in ("linear", "concat")])
def test_a_small_alpha_is_a_small_change(mode):
    """And the text's own scale stays: also where the picture's is another, and at the sink."""
    near = blend(TEXT, [Seen(PICTURE, 1e-3)], mode, LIMIT)
    assert ((near - TEXT).norm(dim=1) <= 4e-3 * TEXT.norm(dim=1)).all()
    louder = blend(TEXT, [Seen(1000 * PICTURE, 0.3)], mode, LIMIT)
    assert torch.allclose(louder, blend(TEXT, [Seen(PICTURE, 0.3)], mode, LIMIT), rtol=1e-4, atol=1e-4)


def test_the_sink_of_the_text_does_not_spread_over_what_it_is_stretched_to():
    """Resampled as it is, its direction would outweigh all tokens between the first and the second."""
    stretched = blend(TEXT.double(), [Seen(PICTURE.double(), 1e-9)], "linear", LIMIT)
    halfway = stretched[52]  # of 104 rows between two tokens
    assert torch.cosine_similarity(halfway, TEXT[1].double(), dim=0) > 0.5


def test_concat_appends_the_share_and_stays_within_the_limit():
    assert blended_length("concat", 11, [(1041, 0.3)], LIMIT) == 11 + 312
    assert blended_length("concat", 11, [(1041, 1.0)], LIMIT) == 11 + 1041
    assert blended_length("concat", 500, [(1041, 1.0), (1041, 0.5)], LIMIT) in range(LIMIT - 2, LIMIT + 1)
    assert blended_length("concat", 1503, [(1041, 1.0)], LIMIT) == LIMIT
    assert blended_length("linear", 11, [(4000, 0.3)], LIMIT) == LIMIT
    assert blended_length("linear", 2000, [(4000, 0.3)], LIMIT) == 2000
    found = blend(TEXT, [Seen(PICTURE, 1.0), Seen(PICTURE.flip(0), 1.0)], "concat", 100)
    assert len(found) in (99, 100)
    assert torch.equal(found[:11], TEXT)
    with pytest.raises(RequestError, match="vision_blend: the text has 1,504 of at most 1,504 tokens") as caught:
        blended_length("concat", 1504, [(1041, 0.3)], LIMIT)
    assert caught.value.fields == ("vision_blend",)


@pytest.mark.parametrize("mode", MODES)
def test_several_pictures_are_mixed_in_one_after_another(mode):
    text, other = TEXT.double(), rows(300, 5).double()
    pictures = [Seen(PICTURE.double(), 0.3), Seen(other, 0.0), Seen(other, 0.6)]
    apart = blend(blend(text, pictures[:1], mode, LIMIT), pictures[2:], mode, LIMIT)
    together = blend(text, pictures, mode, LIMIT)
    assert torch.allclose(together, apart, rtol=1e-12, atol=1e-12)
    assert len(together) == blended_length(mode, 11, [(1041, 0.3), (300, 0.0), (300, 0.6)], LIMIT)


def test_bf16_is_fp32_rounded_once():
    for mode in MODES:
        text, picture = TEXT.bfloat16(), PICTURE.bfloat16()
        exact = blend(text.float(), [Seen(picture.float(), 0.3), Seen(picture.float(), 0.2)], mode, LIMIT)
        assert torch.equal(blend(text, [Seen(picture, 0.3), Seen(picture, 0.2)], mode, LIMIT), exact.bfloat16())


def test_one_line_says_what_happened():
    line = describe_blend("interpolate", 11, [(1041, 0.3)], LIMIT)
    assert line == (
        "interpolate: the picture is resampled to the text's length (1,041 tokens seen, 11 of text: 11 in all)"
    )
    assert "1,041 and 300 tokens seen, 11 of text: 413 in all" in describe_blend(
        "concat", 11, [(1041, 0.3), (300, 0.3)], LIMIT
    )


def test_an_unknown_mode_is_refused():
    with pytest.raises(RequestError, match="blend mode 'average' does not exist; use one of interpolate"):
        blend(TEXT, [Seen(PICTURE, 0.3)], "average", LIMIT)
