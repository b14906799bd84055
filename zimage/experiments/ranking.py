"""Rank tables: which of several settings scores best, and how sure that is, by resampling the prompts.

Scores differ more between prompts than between settings. So settings are compared on the same prompts, and a resample
draws prompts with replacement, the same ones for all settings: a paired bootstrap. An interval holds what came out in
95 of 100 resamples. Source: Efron, "Bootstrap methods: another look at the jackknife", 1979 (percentile intervals).

Shapes: M settings, N prompts, R resamples.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from zimage.errors import RequestError, quoted
from zimage.experiments.axes import shown
from zimage.experiments.record import Record
from zimage.settings.fields import Plain

if TYPE_CHECKING:
    import numpy as np

RESAMPLES, SEED = 5000, 0
TAIL = 0.025  # outside an interval, on either side
DIGITS = 12  # of means, so that equal settings stay equal whatever the order of their sums
APART = ("prompt", "seed")  # axes that tell no settings apart: prompts are resampled, seeds averaged

Setting: TypeAlias = tuple[tuple[str, Plain], ...]  # (axis, value) pairs
Scores: TypeAlias = Mapping[Setting, Mapping[str, float]]  # by prompt
Array: TypeAlias = "np.ndarray"


class Interval(NamedTuple):
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    """One setting in a table. With one prompt there are no intervals.

    `rank` is that of its mean, 1 the best; settings with equal means share the middle of their places. `behind` is how
    far its mean is behind that of the table's first row, whichever direction is better: an interval that holds 0 shows
    no difference. `best` is the share of resamples in which no other setting was better, divided among equal ones.
    """

    setting: Setting
    prompts: int
    mean: float
    rank: float
    behind: float
    best: float
    mean_interval: Interval | None
    rank_interval: Interval | None
    behind_interval: Interval | None


def rank_table(
    records: Iterable[Record], metric: str, higher_is_better: bool, axes: Sequence[str] | None = None
) -> list[Row]:
    """The settings of records by their scores in a metric, the best first; empty without a prompt that all have.

    Settings are told apart by `axes`, by default all axes of the records; what else differs, seeds as a rule, is
    averaged for each prompt. Raises RequestError as `scores_of` does.
    """
    return ranked(scores_of(records, metric, axes), higher_is_better)


def scores_of(records: Iterable[Record], metric: str, axes: Sequence[str] | None = None) -> Scores:
    """{setting: {prompt: mean score}} of the records that have a score. Raises RequestError for an unknown axis."""
    records = list(records)
    told = telling_axes(records, axes)
    found: dict[Setting, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        if metric in record.scores:
            found[_setting(record, told)][record.prompt].append(record.scores[metric])
    return {setting: {p: sum(s) / len(s) for p, s in by_prompt.items()} for setting, by_prompt in found.items()}


def telling_axes(records: Iterable[Record], axes: Sequence[str] | None) -> Sequence[str]:
    """The axes that tell settings apart: these, or all that records have. Raises RequestError for one they have not."""
    known = list(dict.fromkeys(axis for record in records for axis in record.axes))
    for axis in axes or ():
        if axis not in known:
            text = f"there is no axis {quoted(axis)}; the records have {', '.join(known) or 'none'}"
            raise RequestError(text, fields=("by",))
    return [axis for axis in known if axis not in APART] if axes is None else axes


def ranked(scores: Scores, higher_is_better: bool, resamples: int = RESAMPLES, seed: int = SEED) -> list[Row]:
    """Settings on the prompts that all of them have, the best first; empty where there are none."""
    import numpy as np

    first = next(iter(scores.values()), {})
    shared = [prompt for prompt in first if all(prompt in mine for mine in scores.values())]
    if not shared:
        return []
    values = np.array([[mine[prompt] for prompt in shared] for mine in scores.values()])  # (M, N)
    sign = 1 if higher_is_better else -1
    draws = np.random.default_rng(seed).multinomial(len(shared), [1 / len(shared)] * len(shared), resamples)  # (R, N)
    whole = _Figures.of(sign * values.mean(axis=1)[None])
    drawn = _Figures.of(sign * (draws @ values.T) / len(shared))
    order, settings = np.argsort(whole.ranks[0], kind="stable").tolist(), list(scores)
    return [_row(settings[i], i, order[0], len(shared), sign, whole, drawn) for i in order]


class _Figures(NamedTuple):
    """Of each resample: means, the higher the better; ranks; shares of being the best. Each (R, M)."""

    means: Array
    ranks: Array
    best: Array

    @classmethod
    def of(cls, means: Array) -> "_Figures":
        import numpy as np

        rounded = np.round(means / (np.abs(means).max() or 1.0), DIGITS)
        columns = [rounded[:, i : i + 1] for i in range(means.shape[1])]
        better = np.stack([(rounded > column).sum(axis=1) for column in columns], axis=1)
        equal = np.stack([(rounded == column).sum(axis=1) for column in columns], axis=1)  # itself included
        return cls(means, better + (equal + 1) / 2, (better == 0) / equal)

    def behind(self, i: int, first: int) -> Array:
        """How far setting `i` is behind `first`, on the same prompts: (R,)."""
        return self.means[:, first] - self.means[:, i]


def _row(setting: Setting, i: int, first: int, prompts: int, sign: int, whole: _Figures, drawn: _Figures) -> Row:
    def interval(values: Array) -> Interval | None:
        return _interval(values) if prompts > 1 else None

    return Row(
        setting,
        prompts,
        mean=float(sign * whole.means[0, i]),
        rank=float(whole.ranks[0, i]),
        behind=float(whole.behind(i, first)[0]),
        best=float(drawn.best[:, i].mean()),
        mean_interval=interval(sign * drawn.means[:, i]),
        rank_interval=interval(drawn.ranks[:, i]),
        behind_interval=interval(drawn.behind(i, first)),
    )


def _interval(values: Array) -> Interval:
    """Of values (R,)."""
    import numpy as np

    low, high = np.quantile(values, (TAIL, 1 - TAIL)).tolist()
    return Interval(low, high)


def _setting(record: Record, axes: Sequence[str]) -> Setting:
    """The record's place on these axes; lists become tuples and blends their text, which can be keys."""
    return tuple((axis, _key(record.axes.get(axis))) for axis in axes)


def _key(value: Plain) -> Plain:
    return tuple(map(_key, value)) if isinstance(value, list) else shown(value) if isinstance(value, dict) else value
