"""Conversion from one layout and dtype to another: the output is planned from shapes, then copied piece by piece."""

import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zimage.errors import CheckpointError, RequestError
from zimage.formats.atomic import destination
from zimage.formats.checkpoint import Checkpoint
from zimage.formats.files import read_file, require_inside
from zimage.formats.layouts import Layout, fused_name, layout, split_names
from zimage.formats.pages import forget_pages
from zimage.formats.stored import DTYPES, Maps, Stored
from zimage.loading.files import Component
from zimage.loading.registry import CONTROL, DIT, ROWS, TEXT_ENCODER, VAE
from zimage.weights.components import all_finite, check_configs, find_components, open_component
from zimage.weights.manifest import Progress, silent
from zimage.weights.writer import DEFAULT_SHARD, Planned, check_space, placing, write_file, write_shards

# Target → component → (prefix of its keys, layout). `diffusers` is a folder or a file, the others are files.
TARGETS: dict[str, dict[str, tuple[str, str]]] = {
    "diffusers": {
        TEXT_ENCODER: ("", "transformers"),
        DIT: ("", "diffusers"),
        VAE: ("", "diffusers"),
        CONTROL: ("", "diffusers"),
    },
    "native": {DIT: ("", "native"), CONTROL: ("", "native")},
    "ldm": {VAE: ("", "ldm")},
    "transformers": {TEXT_ENCODER: ("", "transformers")},
    "bare": {TEXT_ENCODER: ("", "bare")},
    "all-in-one": {
        DIT: ("model.diffusion_model.", "native"),
        TEXT_ENCODER: ("text_encoders.qwen3_4b.transformer.", "transformers"),
        VAE: ("vae.", "ldm"),
    },
}
STORED_AS = {"bf16": "BF16", "fp32": "F32", "fp16": "F16"}
STEMS = {TEXT_ENCODER: "model", **dict.fromkeys((DIT, VAE, CONTROL), "diffusion_pytorch_model")}
EXTRAS = (
    "model_index.json",
    "vocabulary.json",
    "scheduler/*.json",
    "tokenizer/*",
    "text_encoder/generation_config.json",
)
PIECE = 16 << 20  # values copied at a time
LARGEST_EXTRA = 64 << 20  # bytes; a tokenizer.json has 11 MB


@dataclass(frozen=True)
class Converted:
    """What was written: the file or folder, its components, tensors and bytes of weights."""

    path: Path
    layout: str
    components: tuple[str, ...]
    tensors: int
    nbytes: int


def convert(
    source: Path,
    target: Path,
    to: str = "keep",
    dtype: str = "keep",
    component: str | None = None,
    configs: Path | None = None,
    shard_size: int = DEFAULT_SHARD,
    force: bool = False,
    progress: Progress = silent,
) -> Converted:
    """Write the weights of `source` at `target`, which ends in .safetensors or is a folder.

    to: a key of TARGETS, or "keep". component: write only this one. configs: a model folder with the config.json,
    tokenizer and schedule that loose files lack. Raises RequestError, CheckpointError or ConfigError before anything is
    written, except for values that the dtype cannot hold; on failure nothing is left at `target`.
    """
    found = find_components(source)
    check_configs(source, configs)
    to = _kept(source, found) if to == "keep" else to
    given, target = target, _place(target)
    _check_target(source, target, to, force)
    chosen = _chosen(source, list(found), to, component, target)
    components = {name: open_component(name, found[name], configs) for name in chosen}
    plans = {name: list(_planned(each, *TARGETS[to][name], dtype)) for name, each in components.items()}
    tensors = [tensor for plan in plans.values() for tensor in plan]
    size = sum(tensor.nbytes for tensor in tensors)
    extras = _extras(source if source.is_dir() else configs)
    check_space(target.absolute().parent, size)
    with placing(target, force) as temporary:
        if _is_file(target):
            write_file(temporary, tensors, progress)
        else:
            _write_folder(temporary, components, plans, dtype, extras, shard_size, progress)
    return Converted(given, to, tuple(plans), len(tensors), size)


def _kept(source: Path, found: Mapping[str, Path]) -> str:
    """The target that matches the source."""
    if source.is_dir():
        return "diffusers"
    if len(found) > 1:
        return "all-in-one"
    (component,) = found
    name = _layout_name(component, source)
    fitting = [to for to, held in TARGETS.items() if held.get(component) == ("", name)]
    if not fitting:
        raise RequestError(
            f"{source} is in layout {name}, which cannot be written; use --layout {' or '.join(TARGETS)}"
        )
    return fitting[-1]


def _layout_name(component: str, file: Path) -> str:
    """The name of the layout in which a file holds a component."""
    found = Checkpoint.of_file(file, component).layout
    return found.name if found else "diffusers"


def _place(target: Path) -> Path:
    """Where a target is written: a link stays, and what it points to is written. Raises RequestError for a pipe."""
    if target.is_dir():
        return Path(os.path.realpath(target)) if target.is_symlink() else target
    return destination(target)


def _check_target(source: Path, target: Path, to: str, force: bool) -> None:
    """Raise RequestError for every fault of the place that shows before anything is written."""
    if to != "diffusers" and not _is_file(target):
        raise RequestError(f"the layout {to} is a single file; name one that ends in .safetensors, not {str(target)!r}")
    if not target.absolute().parent.is_dir():
        raise RequestError(f"the folder {str(target.parent)!r} does not exist; make it first")
    inside, around = source.resolve(), target.resolve()
    if inside == around or (target.exists() and target.samefile(source)):
        raise RequestError(f"{target} is the source itself; name another place")
    if inside in around.parents:
        raise RequestError(f"{target} lies inside {source}; name a place outside it")
    if around in inside.parents:
        raise RequestError(f"{source} lies inside {target}, which would be replaced; name another place")
    if target.exists():
        _check_replaceable(target, force)


def _check_replaceable(target: Path, force: bool) -> None:
    if not force:
        raise RequestError(f"{target} exists; use --force to replace it, or choose another name")
    if target.is_dir() == _is_file(target):
        kind, other = ("folder", "file") if target.is_dir() else ("file", "folder")
        raise RequestError(f"{target} is a {kind}, which --force does not replace with a {other}; remove it yourself")
    marks = ("model_index.json", "config.json", *(f"{row.folder}/config.json" for row in ROWS.values()))
    if target.is_dir() and not any((target / mark).is_file() for mark in marks) and any(target.iterdir()):
        raise RequestError(f"{target} is not a model folder, so --force does not replace it; remove it yourself")


def _chosen(source: Path, found: list[str], to: str, component: str | None, target: Path) -> list[str]:
    """The components to write."""
    names = [name for name in found if name in TARGETS[to] and component in (None, name)]
    if not names:
        wanted = component or " or ".join(TARGETS[to])
        raise RequestError(f"{source} holds {' and '.join(found)}; the layout {to} needs {wanted}")
    if to == "diffusers" and _is_file(target) and len(names) > 1:
        raise RequestError(f"{source} holds {' and '.join(names)}: write a folder, or choose one with --component")
    return names


def _is_file(target: Path) -> bool:
    return target.suffix == ".safetensors"


def _planned(component: Component, prefix: str, name: str, dtype: str) -> Iterator[Planned]:
    """A component's tensors in the target, in the source's order, with q, k and v fused where the layout does so."""
    target, entries, maps = layout(component.name, name), component.checkpoint.entries, Maps()
    if name == "ldm" and component.config.get("_class_name") != "AutoencoderKL":
        raise RequestError(f"the layout ldm has no names for {component.config.get('_class_name')}; use diffusers")
    last, done = target.last_index(entries), set()
    for key in entries:
        fused = fused_name(key) if target.fused else None
        own = fused or key
        if own not in done:
            done.add(own)
            sources = [entries[each] for each in (fused and split_names(fused)) or (key,)]
            yield _tensor(prefix + _foreign(target, own, last), _shape(target, own, sources), sources, dtype, maps)


def _foreign(target: Layout, key: str, last: int) -> str:
    name = target.foreign(key, last)
    if target.canonical(name, last) != key:
        raise CheckpointError(f"{key} has no name in the layout {target.name}")
    return name


def _shape(target: Layout, key: str, sources: list[Stored]) -> tuple[int, ...]:
    shape = sources[0].shape
    if len(sources) > 1:
        return (sum(source.shape[0] for source in sources), *shape[1:])
    return (*shape, 1, 1) if re.search(target.flat, key) and len(shape) == 2 else shape


def _tensor(name: str, shape: tuple[int, ...], sources: list[Stored], dtype: str, maps: Maps) -> Planned:
    kinds = {source.dtype for source in sources}
    if dtype == "keep" and (len(kinds) > 1 or any(source.packed for source in sources)):
        raise RequestError(f"{name} is stored as {' and '.join(kinds)}, which cannot be kept; pass a --dtype")
    kind = sources[0].dtype if dtype == "keep" else STORED_AS[dtype]

    def pieces() -> Iterator[Tensor]:
        return itertools.chain.from_iterable(_pieces(name, source, DTYPES[kind], maps) for source in sources)

    return Planned(name, kind, shape, pieces)


def _pieces(name: str, source: Stored, dtype: torch.dtype, maps: Maps) -> Iterator[Tensor]:
    """Yield a stored tensor's values as `dtype`, in order; pages that have been copied are released."""
    value = source.read(maps)
    if isinstance(value, Tensor):
        for numbers in value.reshape(-1).split(PIECE):
            yield _cast(name, numbers, dtype)
            forget_pages(numbers)
        return
    step = max(1, PIECE // 4 // source.shape[1])  # widening takes several times the memory
    for begin in range(0, source.shape[0], step):
        rows = value.rows(begin, min(begin + step, source.shape[0]))
        yield _cast(name, rows.decode(), dtype)
        forget_pages(rows.tensors()[0])  # the codes: only they are mapped unchanged


def _cast(name: str, numbers: Tensor, dtype: torch.dtype) -> Tensor:
    cast = numbers.to(dtype)
    if dtype == torch.float16 and not all_finite(cast) and (cast.isinf() & numbers.isfinite()).any():
        raise CheckpointError(f"{name} holds {numbers.abs().max():g}, beyond fp16's 65,504; use bf16")
    return cast


def _write_folder(
    folder: Path,
    components: Mapping[str, Component],
    plans: Mapping[str, list[Planned]],
    dtype: str,
    extras: Mapping[str, Path],
    shard_size: int,
    progress: Progress,
) -> None:
    """Write a model folder, or a component folder where there is only one."""
    folder.mkdir()
    whole = len(components) > 1
    for name, component in components.items():
        inner = folder / ROWS[name].folder if whole else folder
        inner.mkdir(exist_ok=True)
        _write_config(inner / "config.json", component.config, dtype)
        write_shards(inner, STEMS[name], plans[name], shard_size, progress)
    for path, file in extras.items() if whole else ():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(read_file(file, LARGEST_EXTRA))


def _write_config(path: Path, config: Mapping[str, Any], dtype: str) -> None:
    """Write the config unchanged, except for the dtype that transformers notes in it."""
    words = {"bf16": "bfloat16", "fp32": "float32", "fp16": "float16"}
    noted = {key: words[dtype] for key in ("dtype", "torch_dtype") if key in config and dtype in words}
    path.write_text(json.dumps({**config, **noted}, indent=2) + "\n", encoding="utf-8")


def _extras(source: Path | None) -> dict[str, Path]:
    """What a model folder holds besides weights and their configs, by its path below the folder."""
    found: dict[str, Path] = {}
    if source is None:
        return found
    for pattern in EXTRAS:
        for file in source.glob(pattern):
            if file.is_file() and not file.name.startswith("."):
                require_inside(source, file)
                found[file.relative_to(source).as_posix()] = file
    return found
