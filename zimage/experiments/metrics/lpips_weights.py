"""The weights of LPIPS under our names: converted once, then kept as safetensors in the user's cache."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

from safetensors.torch import save
from torch import Tensor

from zimage.errors import CheckpointError
from zimage.experiments.metrics.lpips_package import PUBLISHED, Source, published_arrays
from zimage.formats.atomic import write_bytes
from zimage.formats.stored import TensorFile
from zimage.settings.environment import cache_folder

log = logging.getLogger("zimage")

FORMAT = "zimage-lpips"
KERNEL = re.compile(r"(?:AlexNet|VGG16)_0/Conv_(\d+)/kernel")
BIAS = re.compile(r"(?:AlexNet|VGG16)_0/Conv_(\d+)/bias")
LINEAR = re.compile(r"NetLinLayer_(\d+)/Conv_0/kernel")
Shapes: TypeAlias = Mapping[str, tuple[int, ...]]


def lpips_weights(network: str, shapes: Shapes, source: Source = None) -> dict[str, Tensor]:
    """`convolutions.N.weight` (out, in, k, k), `.bias` and `weights.N` (channels) of a network, checked by `shapes`.

    Without a `source` they come from the cache, else from the installed package. What was converted is put into the
    cache. Raises as `published_arrays` does, and CheckpointError for weights of another shape.
    """
    folder = cache_folder()
    cached = folder / f"lpips-{network}.safetensors" if folder else None
    kept = _cached(cached, network) if cached and source is None else None
    if kept is not None and not _misfit(kept, shapes):
        return kept
    weights = converted(published_arrays(network, source))
    if problem := _misfit(weights, shapes):
        raise CheckpointError(f"the weights of {network} do not fit: {problem}")
    if cached:
        _keep(cached, network, weights)
    return weights


def converted(arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Flax's names and layout → ours: kernels (k, k, in, out) become (out, in, k, k). Raises CheckpointError."""
    weights = dict[str, Tensor]()
    for path, array in arrays.items():
        if found := KERNEL.fullmatch(path):
            weights[f"convolutions.{found[1]}.weight"] = array.permute(3, 2, 0, 1).contiguous()
        elif found := BIAS.fullmatch(path):
            weights[f"convolutions.{found[1]}.bias"] = array
        elif found := LINEAR.fullmatch(path):
            weights[f"weights.{found[1]}"] = array.flatten()
        else:
            raise CheckpointError(f"{path[:80]!r} is not a weight of LPIPS")
    return weights


def _cached(file: Path, network: str) -> dict[str, Tensor] | None:
    """What the cache holds; a file that is damaged, or of other weights, is as good as none."""
    if not file.is_file():
        return None
    try:
        with TensorFile(file, 2 * PUBLISHED[network].size) as opened:
            weights = {key: opened.read(key) for key in opened.slots}
            return weights if opened.metadata == _described(network) else None
    except CheckpointError as error:
        log.warning("cached weights are not used: %s", error)
        return None


def _keep(file: Path, network: str, weights: dict[str, Tensor]) -> None:
    """For the next time; where that fails, the package is read again then."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(file, save(weights, _described(network)))
    except OSError as error:
        log.warning("the weights of LPIPS are not cached in %s: %s", file.parent, error.strerror or error)


def _described(network: str) -> dict[str, str]:
    return {"format": FORMAT, "source_sha256": PUBLISHED[network].sha256}


def _misfit(weights: Mapping[str, Tensor], shapes: Shapes) -> str:
    """What keeps weights from being these, or nothing."""
    if odd := sorted(set(weights) ^ set(shapes)):
        return f"{odd[0]} is missing or unexpected"
    return next((f"{key} is {list(w.shape)}" for key, w in weights.items() if tuple(w.shape) != shapes[key]), "")
