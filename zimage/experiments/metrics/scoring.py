"""Scores of the cells in a folder: a metric over all of them, then written into their records."""

import math
from collections.abc import Mapping, Sequence

import torch

from zimage.errors import NonFiniteError, RequestError
from zimage.experiments.folder import Experiment
from zimage.experiments.metrics.catalogue import Metric
from zimage.experiments.metrics.walks import Base, Scored
from zimage.experiments.record import Journal

OWN = ("prompt", "seed")  # axes that a cell shares with its base, whichever cell was named


def base_of(experiment: Experiment, texts: Sequence[str]) -> Base:
    """What --base names: values of axes, AXIS=VALUE, or a cell, whose values it takes but for prompt and seed.

    Raises RequestError.
    """
    if len(texts) == 1 and "=" not in texts[0]:
        values = experiment.cell(texts[0]).values
        return {axis: value for axis, value in values.items() if axis not in OWN}
    return dict(map(experiment.value, texts))


def need_base(metrics: Sequence[Metric], base: Base) -> None:
    """Raise RequestError where one of these compares with a base, and there is none."""
    for metric in metrics:
        if metric.kind.against_base and not base:
            text = f"{metric.name} compares with a base; pass --base CELL or --base AXIS=VALUE"
            raise RequestError(text, fields=("base",))


def score(experiment: Experiment, metric: Metric, base: Base, device: torch.device) -> Scored:
    """The cells that have pictures, one by one, with their scores.

    Raises RequestError where the metric lacks a base, a package or a model, and NonFiniteError for NaN and infinity.
    """
    need_base([metric], base)
    walk = metric.kind.build(metric.given, device)
    for cell, value in walk([cell for cell in experiment.cells if not cell.fault], base):
        if value is not None and not math.isfinite(value):
            raise NonFiniteError(f"{metric.name} of the cell {cell.id} is {value}")
        yield cell, value


def store(journal: Journal, scores: Mapping[str, Mapping[str, float]]) -> None:
    """Put scores {metric: {id of a cell: score}} into the records, replacing all earlier ones of these metrics.

    What was scored against another base must not stand beside it. Raises OSError.
    """
    records = []
    for record in journal.records.values():
        kept = {name: value for name, value in record.scores.items() if name not in scores}
        own = {name: values[record.id] for name, values in scores.items() if record.id in values}
        records.append(record.replaced(scores={**kept, **own}))
    journal.replace(records)
