"""From a checkpoint's tensors to a module's weights: checked strictly, never copied needlessly."""

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from zimage import interrupts
from zimage.errors import CheckpointError, NonFiniteError
from zimage.formats.checkpoint import Checkpoint, listing
from zimage.formats.pages import Prefetch, forget_pages
from zimage.formats.stored import Stored
from zimage.loading.uploads import Uploads
from zimage.nn.gain import gain
from zimage.nn.late import LATE
from zimage.nn.layers import BlockLinear, StreamedLinear, WideningLinear
from zimage.nn.packed import Packed, PackedEmbedding, PackedLinear, decoded, is_packed
from zimage.nn.quant import DTYPES, QuantisedLinear, quantisable

CPU = torch.device("cpu")


@runtime_checkable
class Folds(Protocol):
    """A model whose layout differs from its file's: `fold` gives a weight its own name and shape."""

    def published_shapes(self) -> Mapping[str, tuple[int, ...]]: ...
    def fold(self, key: str, tensor: Tensor) -> tuple[str, Tensor] | None: ...


@runtime_checkable
class Halves(Protocol):
    """A model that computes in fp16 where nothing overflows, and in fp32 beside: it is told which it is to do."""

    in_half: bool


@runtime_checkable
class LeavesOut(Protocol):
    """A model that does not use some of the tensors that are published with it."""

    def leaves_out(self, key: str) -> bool: ...


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
    late: Collection[str] = (),
    precision: str = "bf16",
) -> None:
    """Load the weights of a checkpoint that fits `model`, which was built on meta, as `dtype` on `device`.

    On the CPU, tensors already stored as `dtype` stay views of the mapped file; others are cast one by one and their
    pages released. As fp16, only matrices of blocks are held, all else as fp32: see `zimage.dit.units`. Quantised
    matrices stay packed and are widened when used; with `widen_late`, plain matrices of Linear and Embedding layers
    stay as stored too. On a GPU, kinds that it cannot widen are decoded here. A `precision` of "int8" or "fp8"
    quantises a DiT's matrices one after another, so that memory never holds both models. Weights named in `away`,
    which are streamed, and in `late`, which come when something reads them, stay on the host: their attribute `wanted`
    is the dtype in which they are used.
    """
    read, keys = checkpoint.reader(), list(_published_shapes(model))
    if isinstance(model, Halves):
        model.in_half = dtype is torch.float16
    arrivals = Arrivals(model, dtype, device, widen_late)
    if widen_late:
        _widen_linears(model)
    quantised = _quantised_keys(model, precision)
    with arrivals.read_ahead(read(key) for key in keys if checkpoint.entries[key].aligned and key not in late):
        for key in keys:
            value, stays = read(key), (key in away or key in late) and key not in quantised
            if is_packed(value):
                arrivals.put_packed(key, value, stays)
            elif folded := model.fold(key, value) if isinstance(model, Folds) else (key, value):
                arrivals.put(*folded, value, stays, late=folded[0] in late)
            if key in quantised:
                _quantise(model, key, precision, key in away)
                _forget(value)
    model.requires_grad_(False).eval()


def stays_packed(matrix: Packed | Stored, device: str) -> bool:
    """Whether a quantised matrix stays so on this type of device; else it is decoded once, while it is loaded."""
    return device == "cpu" or matrix.has_kernel


def loaded_sizes(model: nn.Module, checkpoint: Checkpoint, dtype: torch.dtype, device: str = "cpu") -> dict[str, int]:
    """Name → bytes of each weight once loaded as `dtype` on this type of device; the model may be on meta."""
    packed = {key: entry for key, entry in checkpoint.entries.items() if entry.packed and stays_packed(entry, device)}
    half = half_matrices(model)
    return {
        name: packed[name].nbytes if name in packed else weight.numel() * held_as(name, dtype, half).itemsize
        for name, weight in model.named_parameters()
    }


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


class Arrivals:
    """Puts what is read from a file into a model, as `dtype` on `device`: views on a CPU, wherever dtypes agree."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, device: torch.device, widen_late: bool):
        self.model, self.dtype, self.device, self.widen_late = model, dtype, device, widen_late
        self.half, self.kept = half_matrices(model), late_matrices(model) if widen_late else set()
        self.uploads = Uploads(device) if device.type == "cuda" else None

    def put(self, name: str, tensor: Tensor, mapped: Tensor, stays: bool, late: bool) -> None:
        """A plain weight, of which `mapped` is the file's part; one that `stays` is left there."""
        wanted = tensor.dtype if name in self.kept else held_as(name, self.dtype, self.half)
        if not stays:
            _assign(self.model, name, self._brought(tensor, mapped, wanted))
            return
        _leave(self.model, name, tensor, wanted, late)
        if wanted is torch.float16:
            gain(self.model.get_submodule(name.removesuffix(".weight")), self.device)  # while its pages may be read
            forget_pages(tensor)

    def put_packed(self, key: str, value: Packed, stays: bool) -> None:
        """A packed matrix, or its numbers where the device cannot widen it later."""
        if stays_packed(value, self.device.type):
            _pack(self.model, key, self._brought_packed(value, stays))
            return
        wanted = torch.bfloat16 if self.widen_late else held_as(key, self.dtype, self.half)
        if stays:
            _leave(self.model, key, decoded(value, wanted, CPU), wanted, late=False)
        else:
            _assign(self.model, key, decoded(value, wanted, self.device))

    def _brought(self, tensor: Tensor, mapped: Tensor, dtype: torch.dtype) -> Tensor:
        """A tensor as `dtype`; if it was copied, the pages of the `mapped` one that it comes from are let go."""
        placed = self.uploads(tensor, dtype) if self.uploads else _placed(tensor, dtype, self.device)
        if self.uploads or placed.data_ptr() != tensor.data_ptr():
            forget_pages(mapped)
        return placed

    def _brought_packed(self, matrix: Packed, stays: bool) -> Packed:
        """A packed matrix; on a GPU one that `stays` on the host says so by its tensors' attribute `wanted`."""
        if self.uploads is None:
            return matrix.to(self.device)
        return _marked(matrix) if stays else self.uploads.packed(matrix)

    @contextlib.contextmanager
    def read_ahead(self, values: Iterable[Tensor | Packed]) -> Iterator[None]:
        """For a GPU, read these from the disk meanwhile; a CPU's are read ahead when they are used."""
        ahead = Prefetch(_mapped(values)) if self.uploads else None
        try:
            yield
        finally:
            if ahead:
                ahead.stop()


def _placed(tensor: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    return tensor.to(device=device, dtype=dtype).contiguous()


def _mapped(values: Iterable[Tensor | Packed]) -> Iterator[Tensor]:
    for value in values:
        yield from value.tensors() if is_packed(value) else (value,)


def _forget(value: Tensor | Packed) -> None:
    """Let go of the pages of a plain matrix; a packed one's codes may be in use as they are."""
    if isinstance(value, Tensor):
        forget_pages(value)


def _quantised_keys(model: nn.Module, precision: str) -> set[str]:
    """The weights whose products are computed in `precision`, "int8" or "fp8"."""
    if precision == "bf16":
        return set()
    paths = {id(module): path for path, module in model.named_modules()}
    return {f"{paths[id(layer)]}.weight" for _, _, layer in quantisable(model, precision)}


def _quantise(model: nn.Module, key: str, precision: str, away: bool) -> None:
    """Replace the layer whose weight is `key`; one that is streamed goes back to the host as codes and scales."""
    plain = model.get_submodule(key.removesuffix(".weight"))
    assert isinstance(plain, nn.Linear | PackedLinear)
    layer = QuantisedLinear(plain, DTYPES[precision])
    if away:
        for tensor in layer.buffers():
            tensor.data = tensor.cpu()
            vars(tensor)["wanted"] = tensor.dtype
    _replace(model, key, layer)


def _marked(matrix: Packed) -> Packed:
    """A packed matrix whose tensors stay on the host until they are streamed."""
    for tensor in matrix.tensors():
        vars(tensor)["wanted"] = tensor.dtype
    return matrix


def _assign(model: nn.Module, name: str, tensor: Tensor) -> nn.Module:
    """Set a weight and return the module that owns it."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    setattr(owner, leaf, nn.Parameter(tensor, requires_grad=False))
    return owner


def _leave(model: nn.Module, name: str, stored: Tensor, wanted: torch.dtype, late: bool) -> None:
    """Leave a weight in its file, to be streamed or to come `late`; the class of its layer says so."""
    owner = _assign(model, name, stored)
    getattr(owner, name.rpartition(".")[2]).wanted = wanted
    classes: Mapping[type[nn.Module], type[nn.Module]] = LATE if late else {BlockLinear: StreamedLinear}
    owner.__class__ = classes.get(type(owner), type(owner))


def _published_shapes(model: nn.Module) -> Mapping[str, tuple[int, ...]]:
    if isinstance(model, Folds):
        return model.published_shapes()
    return {key: tuple(weight.shape) for key, weight in model.named_parameters()}


def _pack(model: nn.Module, key: str, packed: Packed) -> None:
    """Replace the layer whose weight is `key` by a packed one."""
    layer = model.get_submodule(key.removesuffix(".weight"))
    bias = layer.bias if isinstance(layer, nn.Linear) else None
    _replace(model, key, PackedEmbedding(packed) if isinstance(layer, nn.Embedding) else PackedLinear(packed, bias))


def _replace(model: nn.Module, key: str, layer: nn.Module) -> None:
    """Put another layer in the place of the one whose weight is `key`."""
    owner, _, name = key.removesuffix(".weight").rpartition(".")
    setattr(model.get_submodule(owner), name, layer)


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
    """Modules built inside have shapes and no storage. An interrupt waits: PyTorch's stack of modes must stay whole."""
    with interrupts.held(), torch.device("meta"):
        yield
