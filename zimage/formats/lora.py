"""LoRA files: found, opened, checked completely, and read as the deltas of named layers."""

import hashlib
import itertools
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from zimage.errors import CheckpointError
from zimage.formats.checkpoint import listing
from zimage.formats.files import require_file
from zimage.formats.lora_forms import delta_of
from zimage.formats.lora_keys import Group, grouped, layer_names
from zimage.formats.lora_known import Known, known_adapter
from zimage.formats.peft import PeftConfig
from zimage.formats.stored import TensorFile
from zimage.nn.deltas import Delta

ENDING = ".safetensors"
NAMES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")  # PEFT's and diffusers'
LEAFS = {"diff": "weight", "diff_b": "bias"}


@dataclass(frozen=True)
class LoraFile:
    """`deltas`: path of a linear layer → its ΔW at strength 1; `vectors`: name of a norm's weight or a bias → its own.

    `fingerprint`: twelve hex digits of the file's hash; `known`: what it asks for, if it is a published one that does.
    """

    name: str
    fingerprint: str
    deltas: dict[str, Delta]
    vectors: dict[str, Tensor] = field(default_factory=dict)
    known: Known | None = None


def lora_file(path: Path) -> Path:
    """The file itself, or that of a folder as PEFT or diffusers write it. Raises CheckpointError."""
    if not os.path.isdir(path):  # Path's own raises an OSError for what can be no name
        return path
    for name in NAMES:
        if (path / name).is_file():
            return path / name
    try:
        others = sorted(file.name for file in path.iterdir() if file.name.endswith(ENDING) and file.is_file())
    except OSError as error:
        raise CheckpointError(f"LoRA folder {path} cannot be read: {error.strerror or error}") from error
    if len(others) != 1:
        found = f"it holds {listing(others)}: name one of them" if others else f"it holds no {ENDING} file"
        raise CheckpointError(f"LoRA folder {path}: expected {' or '.join(NAMES)}; {found}", fields=("lora",))
    return path / others[0]


def content_hash(file: Path) -> str:
    """Twelve hex digits of the hash of all bytes. Raises CheckpointError."""
    require_file(file)
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()[:12]
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from error


def read_lora(
    file: Path,
    shapes: Mapping[str, tuple[int, int]],
    vectors: Mapping[str, int] | None = None,
    skip: Collection[str] = (),
) -> LoraFile:
    """The deltas that a safetensors file holds for layers of these shapes (out, in) and vectors of these lengths.

    `skip` names parts of the model whose keys are left out. Raises CheckpointError, on one line, if the file is
    missing, damaged, not safetensors or not for these layers: every key must be known and every tensor must fit.
    """
    vectors = vectors or {}
    paths = dict.fromkeys([*shapes, *(name.rpartition(".")[0] for name in vectors)])
    try:
        with TensorFile(file) as stored:
            groups = grouped(list(stored.slots), layer_names(paths), skip)
            deltas, found = _deltas(stored, groups, shapes, vectors, PeftConfig.find(file, stored.metadata))
            known = known_adapter(file, stored.metadata)
    except CheckpointError as error:
        told = str(error)
        raise CheckpointError(f"LoRA {told if told.startswith(str(file)) else f'{file}: {told}'}") from error
    return LoraFile(file.name, content_hash(file), deltas, found, known)


def _deltas(
    stored: TensorFile,
    groups: list[Group],
    shapes: Mapping[str, tuple[int, int]],
    sizes: Mapping[str, int],
    config: PeftConfig | None,
) -> tuple[dict[str, Delta], dict[str, Tensor]]:
    """The deltas of all layers, and of all vectors. Raises CheckpointError listing the layers that do not fit."""
    deltas, vectors, misfits = dict[str, Delta](), dict[str, Tensor](), []
    for group in groups:
        tensors = {role: _tensor(stored, key) for role, key in group.keys.items()}
        for name, tensor in _vectors(group, tensors, sizes).items():
            vectors[name] = tensor
            if tensor.shape != (sizes[name],):
                misfits.append(f"{name} {list(tensor.shape)} should be {[sizes[name]]}")
        if not tensors:
            continue
        layers = [shapes[layer] for layer in group.layers if layer in shapes]
        if not layers:
            known = "norms can only have .diff and .diff_b"
            raise CheckpointError(f"{group.module} has {', '.join(sorted(tensors))}, but it is not linear; {known}")
        whole = (sum(out for out, _ in layers), layers[0][1])
        delta = delta_of(group, tensors, config, whole)
        if delta.shape != whole:
            misfits.append(f"{group.module} {list(delta.shape)} should be {list(whole)}")
            continue
        ends = itertools.accumulate((out for out, _ in layers), initial=0)
        for layer, (first, last) in zip(group.layers, itertools.pairwise(ends), strict=True):
            deltas[layer] = delta if len(layers) == 1 else _share(group, delta, first, last)
    if misfits:
        raise CheckpointError(f"{len(misfits)} of {len(groups)} layers do not fit: {listing(misfits)}")
    return deltas, vectors


def _vectors(group: Group, tensors: dict[str, Tensor], sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Takes out of an adapter's tensors what changes vectors: a norm's weight, a layer's bias."""
    found = {}
    for role, leaf in LEAFS.items():
        names = [f"{layer}.{leaf}" for layer in group.layers]
        if role in tensors and (role == "diff_b" or names[0] in sizes):
            if len(names) > 1 or names[0] not in sizes:
                raise CheckpointError(f"{group.keys[role]}: {group.module} has no {leaf}")
            found[names[0]] = tensors.pop(role)
    return found


def _tensor(stored: TensorFile, key: str) -> Tensor:
    """A copy in memory, since a trainer may rewrite its file while the deltas are in use."""
    tensor = stored.read(key)
    if tensor.dtype == torch.bool or not (tensor.is_floating_point() or key.endswith((".alpha", ".scaled_oft"))):
        raise CheckpointError(f"{key} is stored as {tensor.dtype}; it should be a floating-point kind")
    if not torch.isfinite(tensor.float()).all():
        raise CheckpointError(f"{key} holds NaN or infinity")
    return tensor


def _share(group: Group, delta: Delta, first: int, last: int) -> Delta:
    """The rows of one layer where several were trained as one."""
    try:
        return delta.rows(first, last)
    except ValueError as error:
        raise CheckpointError(f"{group.module} stands for q, k and v, but {error}") from error
