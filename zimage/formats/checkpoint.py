"""The weights of one component, from a folder or a loose file: mapped into memory and checked strictly."""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from zimage.errors import CheckpointError
from zimage.formats import gguf as gguf_file
from zimage.formats.files import require_file
from zimage.formats.json_text import read_json
from zimage.formats.layouts import Layout, begins, recognise, split_names
from zimage.formats.quantised import COMPANIONS, gathered
from zimage.formats.stored import A_PICKLE, Maps, Stored, is_pickle, stored_in
from zimage.formats.unsupported import check_tensors
from zimage.nn.packed import Packed

STEMS = ("diffusion_pytorch_model", "model")
VARIANTS = ("", ".bf16", ".fp16", ".fp32")  # of several in one folder, the first is read
SHARD = re.compile(r".*-\d{5}-of-(?P<count>\d{5})\.\w+")
SHARD_NAME = re.compile(r"[\w.\- ]{1,200}\.safetensors", re.ASCII)
SHOWN = 120  # characters of a name in an error
LISTED = 5  # names in an error; the others are only counted


class Checkpoint:
    """The tensors of one component by their canonical keys: known, but neither mapped nor read before `reader`."""

    def __init__(self, origin: Path, files: list[Path], entries: dict[str, Stored], layout: Layout | None):
        self.origin, self.files, self.entries, self.layout = origin, files, entries, layout

    @classmethod
    def of_folder(cls, folder: Path, component: str) -> "Checkpoint":
        """From a component folder: one file, or shards with their index. Raises CheckpointError."""
        index = _index_file(folder)
        files = [_single_file(folder)] if index is None else _shards(folder, index)
        raw = _opened(folder, files)
        if index is not None:
            _check_index(index, raw)
        layout = recognise(raw).get(component, ("", None))
        return cls(folder, files, _canonical(raw, *layout) if layout[1] else raw, layout[1])

    @classmethod
    def of_file(cls, file: Path, component: str) -> "Checkpoint":
        """From a loose file in any layout, or an all-in-one file that holds the component. Raises CheckpointError."""
        raw = _opened_alone(file)
        found = recognise(raw)
        if component not in found:
            holds = " and ".join(found) or f"unknown keys: {listing(list(raw))}"
            raise CheckpointError(f"{file} holds no {component}; it holds {holds}")
        return cls(file, [file], _canonical(raw, *found[component]), found[component][1])

    def without(self, unused: Callable[[str], bool]) -> "Checkpoint":
        """The same files, less the tensors that a model knowingly does not use."""
        entries = {key: stored for key, stored in self.entries.items() if not unused(key)}
        return Checkpoint(self.origin, self.files, entries, self.layout)

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
    return list(recognise(_opened_alone(file)))


def holds_weights(path: Path) -> bool:
    """Whether `path` is a file, or a component folder with weights and not only what describes them."""
    return path.is_file() or any(path.glob("*.safetensors"))


def _opened_alone(file: Path) -> dict[str, Stored]:
    """The tensors of a file that is not one of several."""
    shard = SHARD.fullmatch(file.name)
    if shard and int(shard["count"]) > 1:
        require_file(file)
        raise CheckpointError(f"{file} is one of {int(shard['count'])} shards: pass the folder {file.parent}")
    return _opened(file, [file])


def _opened(origin: Path, files: Sequence[Path]) -> dict[str, Stored]:
    """The tensors of files that belong together, each quantised weight joined with its companions."""
    raw, metadata, held = dict[str, Stored](), dict[str, str](), dict[str, Path]()
    for file in files:
        tensors, texts = read_tensors(file)
        twice = [key for key in tensors if key in held]
        if twice:
            where = f"{held[twice[0]].name} and {file.name}"
            raise CheckpointError(f"{origin}: {len(twice)} tensors lie in two shards, {where}: {listing(twice)}")
        raw, metadata, held = raw | tensors, metadata | texts, held | dict.fromkeys(tensors, file)
    check_tensors(origin, raw)
    maps = Maps()
    return gathered(origin, raw, metadata, lambda key: raw[key].tensor(maps))


def read_tensors(file: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors of a file by its own keys, and the texts in its header. Raises CheckpointError."""
    require_file(file)
    if is_pickle(file):
        raise CheckpointError(f"{file} {A_PICKLE}")
    return gguf_file.stored_in(file) if gguf_file.is_gguf(file) else stored_in(file)


def _canonical(raw: dict[str, Stored], prefix: str, layout: Layout) -> dict[str, Stored]:
    """The tensors behind `prefix` under canonical keys: fused matrices split by rows, 1 × 1 convolutions flattened."""
    begin, all_begin = begins(raw)[layout.component], begins(raw).values()
    longer = tuple(other for other in all_begin if other != begin and other.startswith(begin))  # they take precedence
    mine = {key: value for key, value in raw.items() if key.startswith(begin) and not key.startswith(longer)}
    own = {key.removeprefix(prefix): value for key, value in mine.items()}
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


def _index_file(folder: Path) -> Path | None:
    """The index of a component folder's shards, or None where a single file holds the weights."""
    for variant in VARIANTS:
        for stem in STEMS:
            if (index := folder / f"{stem}.safetensors.index{variant}.json").is_file():
                return index
            if (folder / f"{stem}{variant}.safetensors").is_file():
                return None
    return None


def _single_file(folder: Path) -> Path:
    names = [f"{stem}{variant}.safetensors" for variant in VARIANTS for stem in STEMS]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(f"{folder}: no weights were found; expected {' or '.join(names[:2])} or an index")


def _shards(folder: Path, index: Path) -> list[Path]:
    weight_map = _weight_map(index)
    wrong = [name for name in weight_map.values() if not SHARD_NAME.fullmatch(name)]
    if wrong:
        raise CheckpointError(f"{index}: the shard {wrong[0][:80]!r} should be a safetensors file in the same folder")
    files = [folder / name for name in sorted(set(weight_map.values()))]
    absent = [file.name for file in files if not file.exists()]
    if absent:
        raise CheckpointError(f"{folder}: {len(absent)} of {len(files)} shards are missing: {listing(absent)}")
    return files


def _check_index(index: Path, raw: Mapping[str, Stored]) -> None:
    """Raise CheckpointError if a tensor that the index lists is in none of the shards."""
    missing = [key for key in _weight_map(index) if key not in raw and key.rpartition(".")[2] not in COMPANIONS]
    if missing:
        raise CheckpointError(f"{index} lists tensors that are in none of the shards: {listing(missing)}")


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor → name of the file that holds it. Raises CheckpointError."""
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found.values()):
        raise CheckpointError(f"{index}: the key 'weight_map' should map tensor names to file names")
    return found


def listing(names: list[str]) -> str:
    """The first names, fit to be shown, and how many more there are."""
    rest = len(names) - LISTED
    return (", ".join(map(_shown, names[:LISTED])) or "none") + (f" and {rest} more" if rest > 0 else "")


def _shown(name: str) -> str:
    """A name as an error may print it: in a damaged file it may be any text."""
    return name if name.isprintable() and 0 < len(name) <= SHOWN else ascii(name[:SHOWN])
