"""LoRA files: opened, checked completely, and read as the deltas of named layers.

Recognised forms are LoRA, LoKr and LoHa, each also with DoRA's magnitudes; ΔW = alpha / rank · product of the factors.
"""

import hashlib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from zimage.errors import CheckpointError
from zimage.formats.checkpoint import listing
from zimage.formats.lora_keys import Group, grouped, layer_names
from zimage.formats.peft import PeftConfig
from zimage.formats.stored import TensorFile
from zimage.nn.deltas import Decomposed, Delta, Hadamard, Kronecker, LowRank

# Each form and its factors. A factor is one matrix or the product of two, (out, rank) and (rank, in).
LOKR_FACTORS = [[(f"lokr_{w}",), (f"lokr_{w}_a", f"lokr_{w}_b")] for w in ("w1", "w2")]
FORMS: list[tuple[type, tuple[tuple[str, ...], ...]]] = [
    (LowRank, (("lora_B", "lora_A"),)),
    (Hadamard, (("hada_w1_a", "hada_w1_b"), ("hada_w2_a", "hada_w2_b"))),
    *((Kronecker, factors) for factors in itertools.product(*LOKR_FACTORS)),
]


@dataclass(frozen=True)
class LoraFile:
    """`deltas`: path of a linear layer → its ΔW at strength 1. `fingerprint`: twelve hex digits of the file's hash."""

    name: str
    fingerprint: str
    deltas: dict[str, Delta]


def read_lora(file: Path, shapes: Mapping[str, tuple[int, int]]) -> LoraFile:
    """The deltas that a safetensors file holds for layers of these shapes (out, in).

    Raises CheckpointError, on one line, if the file is missing, damaged, not safetensors or not for these layers: every
    key must be known and every tensor must fit.
    """
    try:
        with TensorFile(file) as stored:
            groups = grouped(list(stored.slots), layer_names(shapes))
            deltas = _deltas(stored, groups, shapes, PeftConfig.find(file, stored.metadata))
    except CheckpointError as error:
        told = str(error)
        raise CheckpointError(f"LoRA {told if told.startswith(str(file)) else f'{file}: {told}'}") from error
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return LoraFile(file.name, digest[:12], deltas)


def _deltas(
    stored: TensorFile, groups: list[Group], shapes: Mapping[str, tuple[int, int]], config: PeftConfig | None
) -> dict[str, Delta]:
    """The deltas of all layers. Raises CheckpointError listing the layers that do not fit."""
    deltas, misfits = dict[str, Delta](), []
    for group in groups:
        sizes = [shapes[layer] for layer in group.layers]
        whole = (sum(out for out, _ in sizes), sizes[0][1])
        delta = _delta(group, {role: _tensor(stored, key) for role, key in group.keys.items()}, config)
        if delta.shape != whole:
            misfits.append(f"{group.module} {list(delta.shape)} should be {list(whole)}")
            continue
        ends = itertools.accumulate((out for out, _ in sizes), initial=0)
        for layer, (first, last) in zip(group.layers, itertools.pairwise(ends), strict=True):
            deltas[layer] = delta if len(sizes) == 1 else delta.rows(first, last)
    if misfits:
        raise CheckpointError(f"{len(misfits)} of {len(groups)} layers do not fit: {listing(misfits)}")
    return deltas


def _tensor(stored: TensorFile, key: str) -> Tensor:
    """A copy in memory, since a trainer may rewrite its file while the deltas are in use."""
    tensor = stored.read(key)
    if not tensor.is_floating_point() and not key.endswith(".alpha"):
        raise CheckpointError(f"{key} is stored as {tensor.dtype}; it should be a floating-point kind")
    if not torch.isfinite(tensor.float()).all():
        raise CheckpointError(f"{key} holds NaN or infinity")
    return tensor


def _delta(group: Group, tensors: dict[str, Tensor], config: PeftConfig | None) -> Delta:
    """The delta of one module from its tensors."""
    alpha, magnitude = tensors.pop("alpha", None), tensors.pop("dora_scale", None)
    form, names = next(((form, names) for form, names in FORMS if tensors.keys() == set(sum(names, ()))), (None, ()))
    if form is None:
        raise CheckpointError(
            f"{group.module} has {', '.join(sorted(group.keys))}; it should have lora_A and lora_B, "
            "lokr_w1 and lokr_w2 or hada_w1_a, hada_w1_b, hada_w2_a and hada_w2_b"
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
    if alpha.numel() != 1 or alpha.item() == 0:
        raise CheckpointError(f"{group.keys['alpha']} {alpha.tolist()} should be one number other than 0")
    return 1.0 if rank is None else alpha.item() / rank


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
