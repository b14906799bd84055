"""The settings that PEFT and diffusers save with an adapter: alpha and rank, for all layers and for single ones; OFT's.

Every value is checked when it is read, whether a layer uses it or not.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar

from zimage.errors import CheckpointError
from zimage.formats.json_text import json_object, read_json
from zimage.formats.patterns import Pattern

if TYPE_CHECKING:
    from typing_extensions import TypeIs

HEADER_KEY = "lora_adapter_metadata"
FILE_NAME = "adapter_config.json"
COMPONENT = "transformer."  # diffusers' pipelines put this before the settings of the DiT's adapter
SCALED = ("LORA", "LOKR", "LOHA")
OFT = "OFT"
MOST = 1e6  # of an alpha or a rank
MOST_PATTERNS = 2000  # a model has 240 layers
MOST_COMPLEX = 100  # of them with operators, which take longer
MOST_TERMS = 50

T = TypeVar("T")
Patterns = list[tuple[Pattern, T]]


@dataclass(frozen=True)
class Scaling:
    """PEFT's `lora_alpha`, `r`, `alpha_pattern`, `rank_pattern` and `use_rslora`; `place` says where they stand."""

    place: str
    alpha: float
    rank: int
    alphas: Patterns[float]
    ranks: Patterns[int]
    rank_stabilised: bool

    def of(self, module: str, rank: int | None) -> float:
        """alpha / rank of a module, or alpha / √rank if rank-stabilised; `rank` is that of its tensors, if any."""
        alpha, stated = _find(self.alphas, module, self.alpha), _find(self.ranks, module, self.rank)
        if rank not in (None, stated):
            raise CheckpointError(f"{module} has rank {rank}, but {self.place} says {stated}; they should agree")
        return alpha / (math.sqrt(stated) if self.rank_stabilised else stated)


@dataclass(frozen=True)
class Rotating:
    """PEFT's `coft`, `eps`, `use_cayley_neumann` and `num_cayley_neumann_terms`, with its defaults."""

    constrained: bool = False
    eps: float = 6e-5
    neumann: bool = True
    terms: int = 5


@dataclass(frozen=True)
class PeftConfig:
    """What stands in an adapter's settings; an OFT has no scale."""

    place: str
    scaling: Scaling | None
    rotating: Rotating

    @classmethod
    def find(cls, file: Path, metadata: Mapping[str, str]) -> Self | None:
        """From the header of an adapter's file, else from PEFT's file beside it. Raises CheckpointError."""
        beside = file.with_name(FILE_NAME)
        if HEADER_KEY not in metadata:
            return cls.read(f"{FILE_NAME} beside it", read_json(beside)) if beside.is_file() else None
        return cls.read(HEADER_KEY, json_object(f"{HEADER_KEY} in its header", metadata[HEADER_KEY]))

    @classmethod
    def read(cls, place: str, config: Mapping[str, object]) -> Self:
        """From the object that PEFT writes. Raises CheckpointError."""
        if any(key.startswith(COMPONENT) for key in config):
            config = {key.removeprefix(COMPONENT): value for key, value in config.items() if key.startswith(COMPONENT)}
        kind = config.get("peft_type") or SCALED[0]
        if kind not in (*SCALED, OFT):
            known = ", ".join((*SCALED, OFT))
            raise CheckpointError(f"{place}: peft_type {str(kind)[:80]!r} is not implemented; adapters may be {known}")
        scaling = None if kind == OFT else _scaling(place, config)
        return cls(place, scaling, _rotating(place, config) if kind == OFT else Rotating())

    def scale(self, module: str, rank: int | None) -> float:
        """The scale of a module's product. Raises CheckpointError where the settings are those of an OFT."""
        if self.scaling is None:
            raise CheckpointError(f"{module} is not an OFT, but {self.place} says that it is")
        return self.scaling.of(module, rank)


def _scaling(place: str, config: Mapping[str, object]) -> Scaling:
    """For LoKr and LoHa `lora_alpha` is `alpha`."""
    alphas, ranks = (_pattern(place, name, config) for name in ("alpha_pattern", "rank_pattern"))
    return Scaling(
        place,
        _alpha(f"{place}: lora_alpha", config.get("lora_alpha", config.get("alpha"))),
        _rank(f"{place}: r", config.get("r")),
        [(pattern, _alpha(f"{place}: {pattern.text}", value)) for pattern, value in alphas],
        [(pattern, _rank(f"{place}: {pattern.text}", value)) for pattern, value in ranks],
        _switch(place, "use_rslora", config, False),
    )


def _rotating(place: str, config: Mapping[str, object]) -> Rotating:
    eps, terms = config.get("eps", Rotating.eps), config.get("num_cayley_neumann_terms", Rotating.terms)
    if not _is_number(eps) or not 0 <= eps <= MOST:
        raise CheckpointError(f"{place}: eps = {_shown(eps)} should be a number from 0 to {MOST:g}")
    if not isinstance(terms, int) or isinstance(terms, bool) or not 1 <= terms <= MOST_TERMS:
        text = f"should be a whole number from 1 to {MOST_TERMS}"
        raise CheckpointError(f"{place}: num_cayley_neumann_terms = {_shown(terms)} {text}")
    neumann = _switch(place, "use_cayley_neumann", config, Rotating.neumann)
    return Rotating(_switch(place, "coft", config, Rotating.constrained), eps, neumann, terms)


def _find(patterns: Patterns[T], module: str, default: T) -> T:
    """The first entry that matches the end of the module's name, as PEFT looks it up."""
    return next((value for pattern, value in patterns if pattern.matches(module)), default)


def _pattern(place: str, name: str, config: Mapping[str, object]) -> Iterable[tuple[Pattern, object]]:
    given = config.get(name)
    if given is None:
        return []
    if not isinstance(given, dict):
        raise CheckpointError(f"{place}: {name} should be an object, not {type(given).__name__}")
    if len(given) > MOST_PATTERNS:
        raise CheckpointError(f"{place}: {name} has {len(given):,} entries; at most {MOST_PATTERNS:,} are read")
    try:
        patterns = [(Pattern(key), value) for key, value in given.items()]
    except CheckpointError as error:
        raise CheckpointError(f"{place}: {name} has {error}") from error
    if sum(not pattern.simple for pattern, _ in patterns) > MOST_COMPLEX:
        raise CheckpointError(f"{place}: {name} has more than {MOST_COMPLEX} regular expressions with operators")
    return patterns


def _switch(place: str, name: str, config: Mapping[str, object], default: bool) -> bool:
    value = config.get(name, default)
    if not isinstance(value, bool):
        raise CheckpointError(f"{place}: {name} = {_shown(value)} should be true or false")
    return value


def _alpha(name: str, value: object) -> float:
    if not _is_number(value) or not 0 < abs(value) <= MOST:
        raise CheckpointError(f"{name} = {_shown(value)} should be a number other than 0, at most {MOST:g}")
    return value


def _rank(name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MOST:
        raise CheckpointError(f"{name} = {_shown(value)} should be a whole number above 0, at most {MOST:g}")
    return value


def _is_number(value: object) -> "TypeIs[int | float]":
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(value: object) -> str:
    return repr(value)[:80]
