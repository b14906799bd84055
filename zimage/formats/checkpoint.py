"""The weights of one part, from folders and loose files: memory-mapped, checked strictly, never copied needlessly."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from zimage.errors import CheckpointError
from zimage.formats import gguf as gguf_file
from zimage.formats.layouts import Layout, recognise, split_names
from zimage.formats.quantised import gathered
from zimage.formats.stored import A_PICKLE, Maps, Stored, is_pickle, stored_in

SINGLE_NAMES = ("diffusion_pytorch_model.safetensors", "model.safetensors")
SHOWN = 120  # characters of a key in an error
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


class Checkpoint:
    """The tensors of one part by their canonical keys: known, not read, and not mapped before `reader` is asked for."""

    def __init__(self, origin: Path, files: list[Path], entries: dict[str, Stored], layout: Layout | None):
        self.origin, self.files, self.entries, self.layout = origin, files, entries, layout

    @classmethod
    def of_folder(cls, folder: Path, part: str) -> "Checkpoint":
        """A component folder: one file, or shards with their index. Raises CheckpointError."""
        files = _weight_files(folder)
        raw: dict[str, Stored] = {}
        for file in files:
            raw |= _opened(file)
        _check_index(folder, raw)
        layout = recognise(raw).get(part, ("", None))
        return cls(folder, files, _canonical(raw, *layout) if layout[1] else raw, layout[1])

    @classmethod
    def of_file(cls, file: Path, part: str) -> "Checkpoint":
        """A loose file of any layout, or an all-in-one file that holds the part. Raises CheckpointError."""
        raw = _opened(file)
        found = recognise(raw)
        if part not in found:
            holds = " and ".join(found) or f"keys that are not known: {listing(list(raw))}"
            raise CheckpointError(f"{file} holds no {part}; it holds {holds}")
        return cls(file, [file], _canonical(raw, *found[part]), found[part][1])

    def reader(self) -> Callable[[str], Any]:
        """key → view of the mapped file, or packed matrix of views; nothing is read before its values are.

        (The safetensors package touches every tensor that it hands out, and with each the kernel reads megabytes
        around it.) The mapping lives as long as the reader or one of its tensors.
        """
        maps = Maps()
        return lambda key: self.entries[key].read(maps)

    @property
    def describes(self) -> str:
        """What says of the model what the weights must fit."""
        return "config.json" if self.origin.is_dir() else "the architecture that their shapes tell"

    def is_mapped(self, key: str) -> bool:
        """Whether a tensor can be a view of the file; a careless writer may leave one unaligned."""
        return self.entries[key].aligned

    def stored_bytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries.values())

    def fingerprint(self) -> str:
        """Twelve hex digits that tell checkpoints apart: file sizes, headers and sixteen samples of each file's bytes.

        Hashing everything would mean reading 20 GB before the first picture.
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
        """When the files were last changed: tells apart, on one machine, what samples of their bytes may not."""
        return " ".join(str(file.stat().st_mtime_ns) for file in self.files)


def parts_of(file: Path) -> list[str]:
    """The parts that a file holds, by its keys."""
    return list(recognise(_opened(file)))


def _opened(file: Path) -> dict[str, Stored]:
    """A file's tensors, quantised weights gathered with their companions."""
    if not file.is_file():
        raise CheckpointError(f"{file} is missing" if not file.exists() else f"{file} is not a file")
    if is_pickle(file):
        raise CheckpointError(f"{file} {A_PICKLE}")
    raw, metadata = gguf_file.stored_in(file) if gguf_file.is_gguf(file) else stored_in(file)
    maps = Maps()
    return gathered(file, raw, metadata, lambda key: raw[key].read(maps))


def _canonical(raw: dict[str, Stored], prefix: str, layout: Layout) -> dict[str, Stored]:
    """The part behind `prefix` under canonical keys: fused matrices split into rows, 1 × 1 convolutions flat."""
    own = {key.removeprefix(prefix): value for key, value in raw.items() if key.startswith(prefix)}
    others = [other for other, _ in recognise(raw).values() if other and other != prefix]
    own = {key: value for key, value in own.items() if prefix or not key.startswith(tuple(others))}
    last, entries = layout.last_index(own), {}
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
    """Every tensor that the index promises must be in the shard it names."""
    index = _index_file(folder)
    if index is None:
        return
    missing = [key for key in read_json(index)["weight_map"] if key not in raw]
    if missing:
        raise CheckpointError(f"{index}: {listing(missing)} in none of the shards")


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
    """The first names, and how many more there are."""
    rest = len(names) - LISTED
    return (", ".join(map(_shown, names[:LISTED])) or "none") + (f" and {rest} more" if rest > 0 else "")


def _shown(name: str) -> str:
    """A key as an error may print it: damaged files hold any."""
    return name if name.isprintable() and 0 < len(name) <= SHOWN else ascii(name[:SHOWN])
