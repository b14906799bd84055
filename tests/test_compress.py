"""Long prompts: every mode against its formula written out slowly, in every dtype, at every awkward length."""

import time

import pytest
import torch
from torch import Tensor

from zimage.errors import RequestError
from zimage.text.compress import MODES, compress, describe, importance

CASES = [(2, 1), (3, 1), (3, 2), (5, 4), (40, 7), (33, 32), (64, 32), (100, 33), (101, 100)]
SHORTENING = ["truncate", "interpolate", "pool", "attention_pool"]


def rows(length: int, width: int = 12, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(length, width, generator=torch.Generator().manual_seed(length), dtype=torch.float64).to(dtype)


def slow_truncate(x, limit):
    return x[:limit]


def slow_interpolate(x, limit):
    out = []
    for i in range(limit):
        place = i * (len(x) - 1) / (limit - 1) if limit > 1 else 0.0
        low = min(int(place), len(x) - 2)
        out.append(x[low] + (place - low) * (x[low + 1] - x[low]))
    return torch.stack(out)


def slow_pool(x, limit):
    length = len(x)
    return torch.stack([x[i * length // limit : -((i + 1) * length // -limit)].mean(0) for i in range(limit)])


def slow_importance(x):
    scores = []
    for i, row in enumerate(x):
        near = [x[j] for j in range(max(i - 2, 0), min(i + 3, len(x))) if j != i]
        norms = [(row.norm() * other.norm()).clamp(min=1e-300) for other in near]
        scores.append(1 - sum(row @ other / norm for other, norm in zip(near, norms, strict=True)) / len(near))
    scores = torch.stack(scores)
    return scores - scores.min() + 0.1


def slow_attention_pool(x, limit):
    scores, ratio, out = slow_importance(x), len(x) / limit, []
    for i in range(limit):
        region = slice(int(i * ratio), min(int((i + 1) * ratio) + 1, len(x)))
        weights = scores[region].exp() / scores[region].exp().sum()
        out.append(sum(weight * row for weight, row in zip(weights, x[region], strict=True)))
    return torch.stack(out)


SLOW = {
    "truncate": slow_truncate,
    "interpolate": slow_interpolate,
    "pool": slow_pool,
    "attention_pool": slow_attention_pool,
}


@pytest.mark.parametrize(("length", "limit"), CASES)
@pytest.mark.parametrize("mode", SHORTENING)
def test_formulas(mode, length, limit):
    x = rows(length)
    shorter = compress(x, limit, mode)
    assert shorter.shape == (limit, 12)
    torch.testing.assert_close(shorter, SLOW[mode](x, limit), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("mode", SHORTENING)
def test_every_dtype_is_rounded_once(mode, dtype):
    x = rows(40, dtype=dtype)
    shorter = compress(x, 7, mode)
    wide = SLOW[mode](x.double(), 7)
    assert shorter.dtype == dtype
    torch.testing.assert_close(shorter.double(), wide, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_what_fits_is_left_alone(mode):
    for length, limit in [(0, 1), (1, 1), (7, 7), (7, 1504)]:
        x = rows(length)
        assert compress(x, limit, mode) is x


def test_none_keeps_everything():
    x = rows(40)
    assert compress(x, 7, "none") is x


def test_ends_stay_when_resampled():
    shorter = compress(rows(40), 7, "interpolate")
    torch.testing.assert_close(shorter[[0, -1]], rows(40)[[0, -1]])


def test_a_token_unlike_its_neighbours_weighs_most():
    x = torch.ones(20, 8)
    x[10] = -1
    scores = importance(x)
    assert scores.argmax() == 10
    assert float(scores.min()) == pytest.approx(0.1)


@pytest.mark.parametrize("mode", SHORTENING)
def test_rows_of_zeros_and_of_one_kind_are_harmless(mode):
    for x in (torch.zeros(9, 4), torch.ones(9, 4), torch.cat((torch.zeros(5, 4), torch.ones(4, 4)))):
        assert torch.isfinite(compress(x, 4, mode)).all()
    torch.testing.assert_close(compress(torch.ones(9, 4), 4, mode), torch.ones(4, 4))


@pytest.mark.parametrize("mode", ["interpolate", "pool", "attention_pool"])
def test_long_captions_take_well_below_a_second(mode):
    x = torch.randn(3000, 2560, dtype=torch.bfloat16)
    start = time.perf_counter()
    assert compress(x, 1504, mode).shape == (1504, 2560)
    assert time.perf_counter() - start < 1


def test_unknown_modes_and_limits_are_refused():
    for use in (lambda *a: compress(rows(4), *a), lambda *a: describe(4, *a)):
        with pytest.raises(RequestError, match="'squeeze' does not exist; use one of none, truncate"):
            use(3, "squeeze")
        with pytest.raises(RequestError, match="the minimum is 1"):
            use(0, "pool")


@pytest.mark.parametrize("mode", MODES)
def test_one_line_says_what_will_happen(mode):
    line = describe(1700, 1504, mode)
    assert line.startswith("1700 tokens, 196 past the limit: ")
    assert "\n" not in line
    assert ("1504" in line) == (mode != "none")
    assert describe(17, 1504, mode) == "17 of at most 1504 tokens"


def test_lines_differ():
    assert len({describe(1700, 1504, mode) for mode in MODES}) == len(MODES)
    assert describe(1700, 1504, "truncate").endswith("the first 1504 are kept and the last 196 dropped")
