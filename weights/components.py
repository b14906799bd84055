"""The components of a model that a path holds, and where each lies: what `verify` and `convert` both ask."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from zimage.errors import CheckpointError, RequestError, quoted
from zimage.formats.checkpoint import Checkpoint, components_in
from zimage.formats.files import require_file, require_inside
from zimage.formats.hub_cache import snapshot
from zimage.formats.json_text import read_json
from zimage.loading.files import Component
from zimage.loading.registry import CONTROL, DIT, ROWS, TEXT_ENCODER, VAE

OWN = tuple(name for name, row in ROWS.items() if not row.inside)  # those that have files of their own


def find_components(path: Path) -> dict[str, Path]:
    """Component → the folder or file that holds it.

    Raises CheckpointError where there is none, or where a link leads out of the folder: whoever packed it may have set
    the link, and what it leads to may be anybody's.
    """
    path, found = snapshot(path), dict[str, Path]()
    if path.is_file():
        found = dict.fromkeys(components_in(path), path)
    elif path.is_dir():
        found = {name: path / ROWS[name].folder for name in OWN if (path / ROWS[name].folder).is_dir()}
        _check_links(path, found.values() or [path])
        if not found and (path / "config.json").is_file():
            found = {_component_of(path): path}
    elif path.exists():
        require_file(path)
    else:
        raise CheckpointError(f"{path} does not exist; pass a model folder, a component's folder or a weight file")
    if not found:
        raise CheckpointError(f"{path} holds no component of a model: none of {', '.join(OWN)}")
    return {name: found[name] for name in OWN if name in found}


def check_configs(path: Path, configs: Path | None) -> None:
    """Raise RequestError where `configs` cannot describe how `path` is built."""
    if configs is not None and path.is_dir():
        raise RequestError(f"--configs is for loose files; {path} is a folder, which has configs of its own")
    if configs is not None and not configs.is_dir():
        raise RequestError(f"--configs {configs} is not a folder; name a model folder")


def open_component(name: str, path: Path, configs: Path | None = None) -> Component:
    """A component, checked against its config, which for a loose file may lie in the model folder `configs`."""
    if configs is None or path.is_dir():
        return Component.open(name, path)
    config = configs / ROWS[name].folder / "config.json"
    require_inside(configs, config)
    return Component(name, read_json(config), Checkpoint.of_file(path, name), config)


def all_finite(numbers: Tensor) -> bool:
    """Whether there is neither NaN nor infinity: one pass, at forty times the speed of `isfinite`."""
    if not numbers.numel():
        return True
    ends = torch.stack(torch.aminmax(numbers.float() if numbers.dtype.itemsize == 1 else numbers))
    return bool(torch.isfinite(ends).all())


def _check_links(path: Path, folders: Iterable[Path]) -> None:
    for folder in folders:
        require_inside(path, folder)
        for file in folder.iterdir():
            require_inside(path, file)


def _component_of(folder: Path) -> str:
    config = read_json(folder / "config.json")
    kinds = {**dict.fromkeys(ROWS[VAE].classes, VAE), "ZImageTransformer2DModel": DIT, "qwen3": TEXT_ENCODER}
    kinds["ZImageControlNetModel"] = CONTROL
    kind = config.get("_class_name") or config.get("model_type")
    if not isinstance(kind, str) or kind not in kinds:
        raise CheckpointError(f"{folder / 'config.json'} describes {quoted(kind)}; known kinds are {', '.join(kinds)}")
    return kinds[kind]
