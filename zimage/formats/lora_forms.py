"""The forms of adapters: from the tensors of one module to its delta.

LoRA, LoKr and LoHa, each also with DoRA's magnitudes: ΔW = alpha / rank · product of the factors. OFT: the blocks of a
rotation, as PEFT and OneTrainer or as LyCORIS and kohya write them. Differences of weights: as they are.
"""

import itertools
import math

import torch
from torch import Tensor

from zimage.errors import CheckpointError
from zimage.formats.lora_keys import Group
from zimage.formats.peft import MOST, PeftConfig, Rotating
from zimage.nn.deltas import Decomposed, Delta, Dense, Hadamard, Kronecker, LowRank
from zimage.nn.rotations import InputRotation, OutputRotation, cayley, cayley_series, limited, side_of, skew

# Each form and its factors. A factor is one matrix or the product of two, (out, rank) and (rank, in).
LOKR_FACTORS = [[(f"lokr_{w}",), (f"lokr_{w}_a", f"lokr_{w}_b")] for w in ("w1", "w2")]
FORMS: list[tuple[type, tuple[tuple[str, ...], ...]]] = [
    (LowRank, (("lora_B", "lora_A"),)),
    (Hadamard, (("hada_w1_a", "hada_w1_b"), ("hada_w2_a", "hada_w2_b"))),
    *((Kronecker, factors) for factors in itertools.product(*LOKR_FACTORS)),
]
MOST_OF_ROTATION = 1e3  # of a value in Q; a turn of 180° is infinite, one of 89.9° is 573

Shape = tuple[int, int]


def delta_of(group: Group, tensors: dict[str, Tensor], config: PeftConfig | None, whole: Shape) -> Delta:
    """The delta of one module, whose weight has the shape `whole`, from its tensors. Raises CheckpointError."""
    if "oft_R" in tensors:
        return _input_rotation(group, tensors, Rotating() if config is None else config.rotating, whole)
    if "oft_blocks" in tensors:
        return _output_rotation(group, tensors, whole)
    if tensors.keys() == {"diff"}:
        return _dense(group, tensors["diff"])
    return _product(group, tensors, config)


def _product(group: Group, tensors: dict[str, Tensor], config: PeftConfig | None) -> Delta:
    alpha, magnitude = tensors.pop("alpha", None), tensors.pop("dora_scale", None)
    form, names = next(((form, names) for form, names in FORMS if tensors.keys() == set(sum(names, ()))), (None, ()))
    if form is None:
        raise CheckpointError(
            f"{group.module} has {', '.join(sorted(group.keys))}; it should have lora_A and lora_B, "
            "lokr_w1 and lokr_w2, hada_w1_a, hada_w1_b, hada_w2_a and hada_w2_b, oft_R, oft_blocks or diff"
        )
    factors = [tuple(tensors[name] for name in factor) for factor in names]
    rank = _rank(group, factors)
    delta = form(*factors, scale=_scale(group, alpha, rank, config))
    if form is Hadamard and delta.shape != LowRank(delta.w2).shape:
        raise CheckpointError(f"{group.module}: the two products of a LoHa should have the same shape")
    return delta if magnitude is None else _decomposed(group, delta, magnitude)


def _rank(group: Group, factors: list[tuple[Tensor, ...]]) -> int | None:
    """The inner size of the factors that are products, or None if there are none."""
    shapes = ", ".join(str(list(matrix.shape)) for factor in factors for matrix in factor)
    if any(matrix.ndim != 2 for factor in factors for matrix in factor):
        raise CheckpointError(f"{group.module}: tensors of shapes {shapes} should be matrices")
    ranks = {size for factor in factors if len(factor) == 2 for size in (factor[0].shape[1], factor[1].shape[0])}
    if len(ranks) > 1 or 0 in ranks:
        raise CheckpointError(f"{group.module}: matrices of shapes {shapes} should share one rank above 0")
    return ranks.pop() if ranks else None


def _scale(group: Group, alpha: Tensor | None, rank: int | None, config: PeftConfig | None) -> float:
    """alpha / rank, with alpha from the file's tensor or PEFT's settings; 1 without both or without a rank."""
    if alpha is None:
        return 1.0 if config is None else config.scale(group.module, rank)
    number = _number(group, "alpha", alpha)
    if not 0 < abs(number) <= MOST:
        raise CheckpointError(f"{group.keys['alpha']} {number:g} should be one number other than 0, at most {MOST:g}")
    return 1.0 if rank is None else number / rank


def _number(group: Group, role: str, tensor: Tensor) -> float:
    if tensor.numel() != 1:
        raise CheckpointError(f"{group.keys[role]} {list(tensor.shape)} should be one number")
    return float(tensor.item())


def _decomposed(group: Group, delta: Delta, magnitude: Tensor) -> Decomposed:
    out, into = delta.shape
    if tuple(magnitude.shape) not in ((out,), (out, 1), (1, into)):
        raise CheckpointError(
            f"{group.keys['dora_scale']} {list(magnitude.shape)} should be {[out]}, {[out, 1]} or {[1, into]}"
        )
    decomposed = Decomposed(delta, magnitude[:, None] if magnitude.ndim == 1 else magnitude)
    if len(group.layers) > 1 and not decomposed.per_row:
        raise CheckpointError(
            f"{group.keys['dora_scale']} is a norm per column of q, k and v together; "
            "only a norm per row is implemented"
        )
    return decomposed


def _dense(group: Group, difference: Tensor) -> Dense:
    if difference.ndim != 2:
        raise CheckpointError(f"{group.keys['diff']} {list(difference.shape)} should be a matrix")
    return Dense(difference)


# ---------------------------------------------------------------------- rotations


def _input_rotation(group: Group, tensors: dict[str, Tensor], settings: Rotating, whole: Shape) -> InputRotation:
    """As PEFT merges it: Cayley's formula for −Q, or, by default, its series for Q."""
    if more := tensors.keys() - {"oft_R", "scaled_oft"}:
        raise CheckpointError(f"{group.module} is an OFT; it cannot have {', '.join(sorted(more))} too")
    upper, (out, into) = tensors["oft_R"], whole
    side = side_of(upper.shape[1]) if upper.ndim == 2 else None
    if not side or side < 2 or into % side or len(upper) not in (1, into // side):
        text = f"should have the values of a triangle for 1 or all blocks of {into} inputs"
        raise CheckpointError(f"{group.keys['oft_R']} {list(upper.shape)} {text}")
    upper = upper.float()
    if "scaled_oft" in tensors:
        upper = upper / math.sqrt(upper.shape[1])
    q = _sane(group, "oft_R", skew(upper, side))
    if settings.constrained:
        q = limited(q, settings.eps / math.sqrt(len(q)))
    blocks = _sane(group, "oft_R", cayley_series(q, settings.terms) if settings.neumann else cayley(-q), math.inf)
    return InputRotation(blocks.expand(into // side, side, side), out)


def _output_rotation(group: Group, tensors: dict[str, Tensor], whole: Shape) -> OutputRotation:
    """As LyCORIS merges it: alpha · O limits the norm of all Q together, unless it is 0."""
    if more := tensors.keys() - {"oft_blocks", "rescale", "alpha"}:
        raise CheckpointError(f"{group.module} is an OFT; it cannot have {', '.join(sorted(more))} too")
    blocks, rescale, (out, into) = tensors["oft_blocks"], tensors.get("rescale"), whole
    if blocks.ndim == 4:
        raise CheckpointError(f"{group.keys['oft_blocks']} {list(blocks.shape)} is a BOFT, which is not implemented")
    if blocks.ndim != 3 or blocks.shape[1] != blocks.shape[2] or len(blocks) * blocks.shape[1] != out or not out:
        text = f"should be square blocks for {out} outputs"
        raise CheckpointError(f"{group.keys['oft_blocks']} {list(blocks.shape)} {text}")
    if rescale is not None and rescale.numel() != out:
        raise CheckpointError(f"{group.keys['rescale']} {list(rescale.shape)} should be {[out, 1]}")
    q = _sane(group, "oft_blocks", blocks.float() - blocks.float().mT)
    most = out * _number(group, "alpha", tensors["alpha"]) if "alpha" in tensors else 0.0
    if most > 0 and (norm := q.norm().item()) > most:
        q = q * (most / norm)
    return OutputRotation(cayley(q), into, None if rescale is None else rescale.flatten())


def _sane(group: Group, role: str, values: Tensor, most: float = MOST_OF_ROTATION) -> Tensor:
    if not torch.isfinite(values).all() or (values.numel() and values.abs().max() > most):
        raise CheckpointError(f"{group.keys[role]} makes no rotation; its values are too large")
    return values
