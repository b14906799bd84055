"""The settings that PEFT and diffusers save with an adapter: alpha and rank, for all layers and for single ones."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeVar

from zimage.errors import CheckpointError
from zimage.formats.json_text import json_object, read_json

HEADER_KEY = "lora_adapter_metadata"
FILE_NAME = "adapter_config.json"
COMPONENT = "transformer."  # diffusers' pipelines put this before the settings of the DiT's adapter

T = TypeVar("T")


@dataclass(frozen=True)
class PeftConfig:
    """PEFT's `lora_alpha`, `r`, `alpha_pattern`, `rank_pattern` and `use_rslora`; `place` says where they stand."""

    place: str
    alpha: float
    rank: int
    alphas: Mapping[str, float]
    ranks: Mapping[str, int]
    rank_stabilised: bool

    @classmethod
    def find(cls, file: Path, metadata: Mapping[str, str]) -> Self | None:
        """From the header of an adapter's file, else from PEFT's file beside it. Raises CheckpointError."""
        beside = file.with_name(FILE_NAME)
        if HEADER_KEY not in metadata:
            return cls.read(f"{FILE_NAME} beside it", read_json(beside)) if beside.is_file() else None
        return cls.read(HEADER_KEY, json_object(f"{HEADER_KEY} in its header", metadata[HEADER_KEY]))

    @classmethod
    def read(cls, place: str, config: Mapping[str, object]) -> Self:
        """From the object that PEFT writes; for LoKr and LoHa `lora_alpha` is `alpha`. Raises CheckpointError."""
        if any(key.startswith(COMPONENT) for key in config):
            config = {key.removeprefix(COMPONENT): value for key, value in config.items() if key.startswith(COMPONENT)}
        return cls(
            place,
            _alpha(f"{place}: lora_alpha", config.get("lora_alpha", config.get("alpha"))),
            _rank(f"{place}: r", config.get("r")),
            {key: _alpha(f"{place}: {key}", value) for key, value in _pattern(place, "alpha_pattern", config)},
            {key: _rank(f"{place}: {key}", value) for key, value in _pattern(place, "rank_pattern", config)},
            config.get("use_rslora", False) is True,
        )

    def scale(self, module: str, rank: int | None) -> float:
        """alpha / rank of a module, or alpha / √rank if rank-stabilised; `rank` is that of its tensors, if any."""
        alpha, stated = _find(self.alphas, module, self.alpha), _find(self.ranks, module, self.rank)
        if rank not in (None, stated):
            raise CheckpointError(f"{module} has rank {rank}, but {self.place} says {stated}; they should agree")
        return alpha / (math.sqrt(stated) if self.rank_stabilised else stated)


def _find(pattern: Mapping[str, T], module: str, default: T) -> T:
    """The first entry that matches the end of the module's name, as PEFT looks it up."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _pattern(place: str, name: str, config: Mapping[str, object]) -> list[tuple[str, object]]:
    pattern = config.get(name) or {}
    if not isinstance(pattern, dict):
        raise CheckpointError(f"{place}: {name} should be an object, not {type(pattern).__name__}")
    for key in pattern:
        try:
            re.compile(key)
        except re.error as error:
            raise CheckpointError(f"{place}: {name} has {key!r}, which is not a regular expression: {error}") from error
    return list(pattern.items())


def _alpha(name: str, value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value == 0:
        raise CheckpointError(f"{name} = {value!r} should be a number other than 0")
    return value


def _rank(name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"{name} = {value!r} should be a whole number above 0")
    return value
