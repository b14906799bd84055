"""The order of the work: what is costly to change changes least often.

    model and how it is loaded  >  LoRAs  >  captions  >  noise

Cells that are loaded alike share a pipeline; within one, those with the same LoRAs follow one another, and each caption
is encoded once. All else keeps the order in which it was asked for.
"""

import json
from collections.abc import Callable, Iterable
from typing import NamedTuple

from zimage.experiments.cells import Cell
from zimage.settings.captions import CaptionSettings
from zimage.settings.fields import Plain

# What a caption is made from, the negative prompt's among them, which only guidance and NAG ask for.
OF_CAPTIONS = ("prompt", "embeddings", "negative", *CaptionSettings.names())


class Adapted(NamedTuple):
    """Cells that share LoRAs."""

    loras: list[str]
    cells: list[Cell]


class Loaded(NamedTuple):
    """Cells that share a pipeline, those of each set of LoRAs together."""

    load: dict[str, Plain]
    parts: list[Adapted]

    @property
    def cells(self) -> list[Cell]:
        return [cell for part in self.parts for cell in part.cells]


def ordered(cells: Iterable[Cell]) -> list[Loaded]:
    """Cells in the order in which they are drawn."""
    return [Loaded(_without_loras(group[0]), _by_loras(group)) for group in grouped(cells, _without_loras)]


def by_caption(cells: Iterable[Cell]) -> list[list[Cell]]:
    """Groups of cells that share all captions."""
    return grouped(cells, lambda cell: [*map(cell.request.get, OF_CAPTIONS), _steers(cell)])


def _steers(cell: Cell) -> bool:
    """Whether it has a use for a negative caption."""
    return bool(cell.request.get("guidance")) or cell.request.get("nag", 1.0) > 1


def grouped(cells: Iterable[Cell], key: Callable[[Cell], Plain]) -> list[list[Cell]]:
    """Groups of one key, in the order of their first cells."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(json.dumps(key(cell), sort_keys=True), []).append(cell)
    return list(groups.values())


def _by_loras(cells: list[Cell]) -> list[Adapted]:
    return [
        Adapted(loras(group[0]), [cell for same in by_caption(group) for cell in same])
        for group in grouped(cells, loras)
    ]


def loras(cell: Cell) -> list[str]:
    """The LoRAs of a cell, each with its scale."""
    return list(cell.load.get("lora") or [])


def _without_loras(cell: Cell) -> dict[str, Plain]:
    return {name: value for name, value in cell.load.items() if name != "lora"}
