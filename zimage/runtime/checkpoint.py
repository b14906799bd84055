"""Published weights, in one safetensors file or sharded: memory-mapped, checked strictly, never copied needlessly."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from zimage.errors import CheckpointError, NonFiniteError
from zimage.nn.layers import StreamedLinear, WideningLinear
from zimage.runtime.memory import forget_pages

SINGLE_NAMES = ("diffusion_pytorch_model.safetensors", "model.safetensors")
STORED_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
LISTED = 5  # how many keys an error names before it only counts


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises CheckpointError where it is missing or is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} should hold a JSON object, not {type(content).__name__}")
    return content


class Entry(NamedTuple):
    """Where a tensor lies and what it is."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    begin: int  # first byte in the file
    end: int


class Checkpoint:
    """The tensors of one component folder: known by name, not read, and not mapped before `reader` is asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.files = _weight_files(folder)
        self.entries = {key: entry for file in self.files for key, entry in _entries(file)}
        self._check_index()

    def reader(self) -> Callable[[str], Tensor]:
        """key → view of the mapped file, of which nothing is read before the view's values are.

        (The safetensors package touches every tensor that it hands out, and with each the kernel reads megabytes
        around it.) The mapping lives as long as the reader or one of its tensors.
        """
        shards = {file: torch.from_file(str(file), size=file.stat().st_size, dtype=torch.uint8) for file in self.files}
        return lambda key: _view(shards[self.entries[key].file], self.entries[key])

    def is_mapped(self, key: str) -> bool:
        """Whether a tensor can be a view of the file; a careless writer may leave one unaligned."""
        entry = self.entries[key]
        return entry.begin % entry.dtype.itemsize == 0

    def stored_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)

    def fingerprint(self) -> str:
        """Twelve hex digits that tell checkpoints apart: file sizes, headers and sixteen samples of each file's bytes.

        Hashing everything would mean reading 20 GB before the first picture.
        """
        digest = hashlib.sha256()
        for file in self.files:
            size = file.stat().st_size
            with file.open("rb") as stream:
                header = int.from_bytes(stream.read(8), "little")
                digest.update(size.to_bytes(8, "little") + stream.read(header))
                for i in range(16):
                    stream.seek(8 + header + (size - 8 - header) * i // 16)
                    digest.update(stream.read(4096))
        return digest.hexdigest()[:12]

    def _check_index(self) -> None:
        """Every tensor that the index promises must be in the shard it names."""
        index = _index_file(self.folder)
        if index is None:
            return
        promised = read_json(index)["weight_map"]
        missing = [key for key in promised if key not in self.entries]
        if missing:
            raise CheckpointError(f"{index}: {_listing(missing)} in none of the shards")


def check_fit(model: nn.Module, checkpoint: Checkpoint, other_keys: Iterable[str] = ()) -> None:
    """Raise CheckpointError listing what is missing, unexpected or misshapen; `other_keys` belong to other modules."""
    _check_keys(checkpoint, stored_names(model, checkpoint), _published_shapes(model), set(other_keys))


def load_weights(
    model: nn.Module,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    widen_late: bool = False,
    away: Collection[str] = (),
) -> None:
    """Give `model` (built on meta) the weights of a checkpoint that was found to fit, as `dtype` on `device`.

    On the CPU, tensors already stored as `dtype` stay views of the mapped file; others are cast one by one and their
    pages let go. With `widen_late` the matrices of Linear and Embedding layers stay as stored, and Linear layers widen
    them when used. Weights named in `away` stay views of the file, whatever the dtype and the device: their attribute
    `wanted` says what they are to be when used. A model whose layout differs from the file's brings
    `published_shapes()` and `fold(key, tensor)`.
    """
    stored, read = stored_names(model, checkpoint), checkpoint.reader()
    kept = late_matrices(model) if widen_late else set()
    if widen_late:
        _widen_linears(model)
    for key in _published_shapes(model):
        mapped = read(stored[key])
        folded = model.fold(key, mapped) if hasattr(model, "fold") else (key, mapped)
        if folded is not None:
            name, tensor = folded
            wanted = tensor.dtype if name in kept else dtype
            if name in away:
                _leave(model, name, tensor, wanted)
            else:
                _assign(model, name, _placed(tensor, mapped, wanted, device))
    model.requires_grad_(False).eval()


def non_finite_weights(model: nn.Module) -> list[str]:
    """Names of parameters holding NaN or infinity: asked only when a result is not finite, since it reads them all."""
    return [name for name, weight in model.named_parameters() if not torch.isfinite(weight).all()]


def finite(values: Tensor, source: str, model: nn.Module) -> Tensor:
    """`values`, or NonFiniteError that names the weights at fault where there are such."""
    if torch.isfinite(values).all():
        return values
    broken = non_finite_weights(model)
    if broken:
        raise NonFiniteError(f"{source} holds NaN or infinity in {broken[0]}; fetch the weights again")
    raise NonFiniteError(f"{source} produced NaN or infinity though its weights are finite; try dtype fp32")


def late_matrices(model: nn.Module) -> set[str]:
    """Names of the weights that stay as stored where they are widened late."""
    modules = model.named_modules()
    return {f"{path}.weight" for path, module in modules if isinstance(module, nn.Linear | nn.Embedding)}


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
    """Returns the module that owns the weight."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    setattr(owner, leaf, nn.Parameter(tensor, requires_grad=False))
    return owner


def _leave(model: nn.Module, name: str, stored: Tensor, wanted: torch.dtype) -> None:
    """A weight that is not loaded but comes and goes; its plain Linear can be told by its class."""
    owner = _assign(model, name, stored)
    getattr(owner, name.rpartition(".")[2]).wanted = wanted
    if type(owner) is nn.Linear:
        owner.__class__ = StreamedLinear


def _published_shapes(model: nn.Module) -> Mapping[str, tuple[int, ...]]:
    if hasattr(model, "published_shapes"):
        return model.published_shapes()
    return {key: tuple(weight.shape) for key, weight in model.named_parameters()}


def stored_names(model: nn.Module, checkpoint: Checkpoint) -> dict[str, str]:
    """Published key → key in this file: files saved from the bare Qwen3 decoder lack the prefix `model.`."""
    keys = checkpoint.entries
    published = all(key.startswith("model.") for key in _published_shapes(model))
    prefix = "model." if published and not any(key.startswith("model.") for key in keys) else ""
    return {prefix + key: key for key in keys}


def _check_keys(
    checkpoint: Checkpoint, found: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], other: set[str]
) -> None:
    complaints = []
    missing = [key for key in shapes if key not in found]
    unexpected = [key for key in found if key not in shapes and key not in other]
    misshapen = [
        f"{key} {list(checkpoint.entries[found[key]].shape)} should be {list(shape)}"
        for key, shape in shapes.items()
        if key in found and checkpoint.entries[found[key]].shape != shape
    ]
    for word, keys in (("missing", missing), ("unexpected", unexpected), ("of the wrong shape", misshapen)):
        if keys:
            complaints.append(f"{len(keys)} tensors {word}: {_listing(keys)}")
    if complaints:
        raise CheckpointError(f"{checkpoint.folder}: the weights do not fit config.json; " + "; ".join(complaints))


def _weight_files(folder: Path) -> list[Path]:
    index = _index_file(folder)
    if index is None:
        for name in SINGLE_NAMES:
            if (folder / name).is_file():
                return [folder / name]
        raise CheckpointError(f"{folder}: no weights were found; expected {' or '.join(SINGLE_NAMES)} or an index")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index}: the key 'weight_map' should map tensor names to file names")
    outside = [name for name in weight_map.values() if Path(name).name != name]
    if outside:
        raise CheckpointError(f"{index}: the shard {outside[0]!r} should be a file name in the same folder")
    files = [folder / name for name in sorted(set(weight_map.values()))]
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise CheckpointError(f"{folder}: {len(absent)} of {len(files)} shards are missing: {_listing(absent)}")
    return files


def _index_file(folder: Path) -> Path | None:
    for name in SINGLE_NAMES:
        if (folder / f"{name}.index.json").is_file():
            return folder / f"{name}.index.json"
    return None


def _entries(file: Path) -> Iterator[tuple[str, Entry]]:
    try:
        with safe_open(file, framework="pt", device="cpu"):
            pass  # the package checks the header: sizes against shapes, offsets against the file's length
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is not a whole safetensors file ({error}); fetch it again") from error
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    for key, about in header.items():
        if key != "__metadata__":
            if about["dtype"] not in STORED_DTYPES:
                raise CheckpointError(f"{file}: {key} is stored as {about['dtype']}, which is not implemented")
            begin, end = (8 + length + offset for offset in about["data_offsets"])
            yield key, Entry(file, tuple(about["shape"]), STORED_DTYPES[about["dtype"]], begin, end)


def _view(file: Tensor, entry: Entry) -> Tensor:
    """An entry's tensor as a view of its file's bytes; a copy where a careless writer left it unaligned."""
    stored = file[entry.begin : entry.end]
    if entry.begin % entry.dtype.itemsize:
        stored = stored.clone()
    return stored.view(entry.dtype).view(entry.shape)


def _listing(names: list[str]) -> str:
    rest = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {rest} more" if rest > 0 else "")


@contextlib.contextmanager
def on_meta() -> Iterator[None]:
    """Modules built inside have shapes and no storage."""
    with torch.device("meta"):
        yield
