"""The weights of one component, from a folder or a loose file: mapped into memory and checked strictly."""

import hashlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from zimage.errors import CheckpointError
from zimage.formats import gguf as gguf_file
from zimage.formats.files import require_file
from zimage.formats.json_text import read_json
from zimage.formats.layouts import Layout, recognise, split_names
from zimage.formats.quantised import gathered
from zimage.formats.stored import A_PICKLE, Maps, Stored, is_pickle, stored_in
from zimage.nn.packed import Packed

SINGLE_NAMES = ("diffusion_pytorch_model.safetensors", "model.safetensors")
SHOWN = 120  # characters of a name in an error
LISTED = 5  # names in an error; the others are only counted


class Checkpoint:
    """The tensors of one component by their canonical keys: known, but neither mapped nor read before `reader`."""

    def __init__(self, origin: Path, files: list[Path], entries: dict[str, Stored], layout: Layout | None):
        self.origin, self.files, self.entries, self.layout = origin, files, entries, layout

    @classmethod
    def of_folder(cls, folder: Path, component: str) -> "Checkpoint":
        """From a component folder: one file, or shards with their index. Raises CheckpointError."""
        files = _weight_files(folder)
        raw: dict[str, Stored] = {}
        for file in files:
            raw |= _opened(file)
        _check_index(folder, raw)
        layout = recognise(raw).get(component, ("", None))
        return cls(folder, files, _canonical(raw, *layout) if layout[1] else raw, layout[1])

    @classmethod
    def of_file(cls, file: Path, component: str) -> "Checkpoint":
        """From a loose file in any layout, or an all-in-one file that holds the component. Raises CheckpointError."""
        raw = _opened(file)
        found = recognise(raw)
        if component not in found:
            holds = " and ".join(found) or f"unknown keys: {listing(list(raw))}"
            raise CheckpointError(f"{file} holds no {component}; it holds {holds}")
        return cls(file, [file], _canonical(raw, *found[component]), found[component][1])

    def reader(self) -> Callable[[str], Tensor | Packed]:
        """key → view of the mapped file, or packed matrix of views; values are read from disk only when they are used.

        (The safetensors package touches every tensor that it returns, and the kernel then reads megabytes around it.)
        The mapping lives as long as the reader or one of its tensors.
        """
        maps = Maps()
        return lambda key: self.entries[key].read(maps)

    @property
    def describes(self) -> str:
        """What describes the architecture that the weights must fit."""
        return "config.json" if self.origin.is_dir() else "the architecture inferred from their shapes"

    def stored_bytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries.values())

    def fingerprint(self) -> str:
        """Twelve hex digits that tell checkpoints apart: a hash of sizes, headers and sixteen samples of each file.

        Hashing every byte would mean reading 20 GB before the first picture.
        """
        digest = hashlib.sha256()
        for file in self.files:
            size = file.stat().st_size
            with file.open("rb") as stream:
                header = min(int.from_bytes(stream.read(8), "little"), size - 8)
                digest.update(size.to_bytes(8, "little") + stream.read(header))
                for i in range(16):
                    stream.seek(8 + header + (size - 8 - header) * i // 16)
                    digest.update(stream.read(4096))
        return digest.hexdigest()[:12]

    def stamp(self) -> str:
        """When the files were last changed; on one machine this shows changes that the fingerprint's samples miss."""
        return " ".join(str(file.stat().st_mtime_ns) for file in self.files)


def components_in(file: Path) -> list[str]:
    """The components that a file holds, recognised by its keys."""
    return list(recognise(_opened(file)))


def _opened(file: Path) -> dict[str, Stored]:
    """The tensors of a file, each quantised weight joined with its companions."""
    require_file(file)
    if is_pickle(file):
        raise CheckpointError(f"{file} {A_PICKLE}")
    raw, metadata = gguf_file.stored_in(file) if gguf_file.is_gguf(file) else stored_in(file)
    maps = Maps()
    return gathered(file, raw, metadata, lambda key: raw[key].tensor(maps))


def _canonical(raw: dict[str, Stored], prefix: str, layout: Layout) -> dict[str, Stored]:
    """The tensors behind `prefix` under canonical keys: fused matrices split by rows, 1 × 1 convolutions flattened."""
    own = {key.removeprefix(prefix): value for key, value in raw.items() if key.startswith(prefix)}
    others = [other for other, _ in recognise(raw).values() if other and other != prefix]
    own = {key: value for key, value in own.items() if prefix or not key.startswith(tuple(others))}
    last, entries = layout.last_index(own), dict[str, Stored]()
    for key, stored in own.items():
        names = split_names(key) if layout.fused else None
        if key in layout.unused:
            continue
        if names and len(stored.shape) == 2 and stored.shape[0] % 3 == 0:
            third = stored.shape[0] // 3
            entries |= {name: stored.rows(i * third, (i + 1) * third) for i, name in enumerate(names)}
            continue
        name = layout.canonical(key, last)
        if re.search(layout.flat, name) and stored.shape[2:] == (1, 1):
            stored = stored.reshaped(*stored.shape[:2])
        entries[name] = stored
    return entries


def _check_index(folder: Path, raw: Mapping[str, Stored]) -> None:
    """Raise CheckpointError if a tensor that the index lists is in none of the shards."""
    index = _index_file(folder)
    missing = [key for key in read_json(index)["weight_map"] if key not in raw] if index else []
    if missing:
        raise CheckpointError(f"{index} lists tensors that are in none of the shards: {listing(missing)}")


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
        raise CheckpointError(f"{folder}: {len(absent)} of {len(files)} shards are missing: {listing(absent)}")
    return files


def _index_file(folder: Path) -> Path | None:
    for name in SINGLE_NAMES:
        if (folder / f"{name}.index.json").is_file():
            return folder / f"{name}.index.json"
    return None


def listing(names: list[str]) -> str:
    """The first names, fit to be shown, and how many more there are."""
    rest = len(names) - LISTED
    return (", ".join(map(_shown, names[:LISTED])) or "none") + (f" and {rest} more" if rest > 0 else "")


def _shown(name: str) -> str:
    """A name as an error may print it: in a damaged file it may be any text."""
    return name if name.isprintable() and 0 < len(name) <= SHOWN else ascii(name[:SHOWN])
