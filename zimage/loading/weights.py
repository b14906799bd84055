"""From a checkpoint's tensors to a module's weights: checked strictly, never copied needlessly."""

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from zimage.errors import CheckpointError, NonFiniteError
from zimage.formats.checkpoint import Checkpoint, listing
from zimage.formats.pages import forget_pages
from zimage.formats.stored import Stored
from zimage.nn.gain import gain
from zimage.nn.layers import BlockLinear, StreamedLinear, WideningLinear
from zimage.nn.packed import Packed, PackedEmbedding, PackedLinear, decoded, is_packed


@runtime_checkable
class Folds(Protocol):
    """A model whose layout differs from its file's: `fold` gives a weight its own name and shape."""

    def published_shapes(self) -> Mapping[str, tuple[int, ...]]: ...
    def fold(self, key: str, tensor: Tensor) -> tuple[str, Tensor] | None: ...


@runtime_checkable
class Halves(Protocol):
    """A model that computes in fp16 where nothing overflows, and in fp32 beside: it is told which it is to do."""

    in_half: bool


def check_fit(model: nn.Module, checkpoint: Checkpoint, other_keys: Iterable[str] = ()) -> None:
    """Raise CheckpointError with all missing, unexpected and misshapen keys; `other_keys` belong to other modules."""
    _check_keys(checkpoint, _published_shapes(model), set(other_keys), late_matrices(model))


def load_weights(
    model: nn.Module,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    widen_late: bool = False,
    away: Collection[str] = (),
) -> None:
    """Load the weights of a checkpoint that fits `model`, which was built on meta, as `dtype` on `device`.

    On the CPU, tensors already stored as `dtype` stay views of the mapped file; others are cast one by one and their
    pages released. As fp16, only matrices of blocks are held, all else as fp32: see `zimage.dit.units`.
    Quantised matrices stay packed and are widened when used; with `widen_late`, plain matrices of Linear and Embedding
    layers stay as stored too. On a GPU, kinds that it cannot widen are decoded here. Weights named in `away` stay views
    of the file, whatever the dtype and the device: their attribute `wanted` is the dtype in which they are used.
    """
    read = checkpoint.reader()
    kept = late_matrices(model) if widen_late else set()
    half = half_matrices(model)
    if isinstance(model, Halves):
        model.in_half = dtype is torch.float16
    if widen_late:
        _widen_linears(model)
    for key in _published_shapes(model):
        value = read(key)
        if is_packed(value):
            if stays_packed(value, device.type):
                _pack(model, key, value.to(device))
            else:
                wanted = torch.bfloat16 if widen_late else held_as(key, dtype, half)
                _assign(model, key, decoded(value, wanted, device))
            continue
        folded = model.fold(key, value) if isinstance(model, Folds) else (key, value)
        if folded is not None:
            name, tensor = folded
            wanted = tensor.dtype if name in kept else held_as(name, dtype, half)
            if name in away:
                _leave(model, name, tensor, wanted)
                if wanted is torch.float16:
                    gain(model.get_submodule(name.removesuffix(".weight")), device)  # while its pages may be read
                    forget_pages(tensor)
            else:
                _assign(model, name, _placed(tensor, value, wanted, device))
    model.requires_grad_(False).eval()


def stays_packed(matrix: Packed | Stored, device: str) -> bool:
    """Whether a quantised matrix stays so on this type of device; else it is decoded once, while it is loaded."""
    return device == "cpu" or matrix.has_kernel


def loaded_bytes(model: nn.Module, checkpoint: Checkpoint, dtype: torch.dtype, device: str = "cpu") -> int:
    """Bytes of the weights once loaded as `dtype` on this type of device; the model may be on meta."""
    packed = {key: entry for key, entry in checkpoint.entries.items() if entry.packed and stays_packed(entry, device)}
    half = half_matrices(model)
    return sum(
        packed[name].nbytes if name in packed else weight.numel() * held_as(name, dtype, half).itemsize
        for name, weight in model.named_parameters()
    )


def half_matrices(model: nn.Module) -> set[str]:
    """Names of the weights that can be held as fp16."""
    return {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, BlockLinear)}


def held_as(name: str, dtype: torch.dtype, half: Collection[str]) -> torch.dtype:
    """The dtype in which a weight is held by a model that computes in `dtype`; `half` are its `half_matrices`."""
    return torch.float32 if dtype is torch.float16 and name not in half else dtype


def non_finite_weights(model: nn.Module) -> list[str]:
    """Names of the weights with NaN or infinity. It reads them all, so it is called only if a result is not finite."""
    return [name for name, weight in model.named_parameters() if not torch.isfinite(weight).all()]


def finite(values: Tensor, source: str, model: nn.Module) -> Tensor:
    """Return `values` if they are finite, else raise NonFiniteError with the weights at fault, if any are."""
    if torch.isfinite(values).all():
        return values
    broken = non_finite_weights(model)
    if broken:
        half = model.get_parameter(broken[0]).dtype is torch.float16
        remedy = "try dtype bf16, and else fetch the weights again" if half else "fetch the weights again"
        raise NonFiniteError(f"{source} holds NaN or infinity in {broken[0]}; {remedy}")
    raise NonFiniteError(f"{source} produced NaN or infinity though its weights are finite; try dtype fp32")


def late_matrices(model: nn.Module) -> set[str]:
    """Names of the weights that stay as stored with `widen_late`."""
    return {f"{path}.weight" for path, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)}


def _widen_linears(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.__class__ = WideningLinear


def _placed(tensor: Tensor, mapped: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    placed = tensor.to(device=device, dtype=dtype).contiguous()
    if placed.data_ptr() != tensor.data_ptr():
        forget_pages(mapped)
    return placed


def _assign(model: nn.Module, name: str, tensor: Tensor) -> nn.Module:
    """Set a weight and return the module that owns it."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    setattr(owner, leaf, nn.Parameter(tensor, requires_grad=False))
    return owner


def _leave(model: nn.Module, name: str, stored: Tensor, wanted: torch.dtype) -> None:
    """Leave a weight in its file, to be streamed; the class of its plain Linear says so."""
    owner = _assign(model, name, stored)
    getattr(owner, name.rpartition(".")[2]).wanted = wanted
    if type(owner) is BlockLinear:
        owner.__class__ = StreamedLinear


def _published_shapes(model: nn.Module) -> Mapping[str, tuple[int, ...]]:
    if isinstance(model, Folds):
        return model.published_shapes()
    return {key: tuple(weight.shape) for key, weight in model.named_parameters()}


def _pack(model: nn.Module, key: str, packed: Packed) -> None:
    """Replace the layer whose weight is `key` by a packed one."""
    path = key.removesuffix(".weight")
    owner, _, name = path.rpartition(".")
    layer = model.get_submodule(path)
    bias = layer.bias if isinstance(layer, nn.Linear) else None
    new = PackedEmbedding(packed) if isinstance(layer, nn.Embedding) else PackedLinear(packed, bias)
    setattr(model.get_submodule(owner), name, new)


def _check_keys(
    checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]], other: set[str], matrices: set[str]
) -> None:
    found = checkpoint.entries
    fitting = [key for key in shapes if key in found and found[key].shape == shapes[key]]
    misshapen = [
        f"{key} {list(found[key].shape)} should be {list(shape)}"
        for key, shape in shapes.items()
        if key in found and found[key].shape != shape
    ]
    lists = {
        "missing": [key for key in shapes if key not in found],
        "unexpected": [key for key in found if key not in shapes and key not in other],
        "of the wrong shape": misshapen,
        "of a kind of number that is not implemented": [
            f"{key} ({found[key].dtype})"
            for key in fitting
            if not found[key].is_number or (found[key].packed and key not in matrices)
        ],
    }
    complaints = [f"{len(keys)} tensors {word}: {listing(keys)}" for word, keys in lists.items() if keys]
    if complaints:
        raise CheckpointError(
            f"{checkpoint.origin}: the weights do not fit {checkpoint.describes}; " + "; ".join(complaints)
        )


@contextlib.contextmanager
def on_meta() -> Iterator[None]:
    """Modules built inside have shapes and no storage."""
    with torch.device("meta"):
        yield
