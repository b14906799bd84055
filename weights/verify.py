"""Verification of weights: headers, lengths, keys and shapes, hashes on record and, on request, all values."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from zimage.errors import CheckpointError
from zimage.formats.files import is_inside, read_file
from zimage.formats.headers import Header, Slot, read_header
from zimage.formats.json_text import json_value, read_json
from zimage.formats.pages import forget_pages
from zimage.formats.stored import DTYPES, NUMBERS, Maps
from zimage.loading.files import ModelFiles
from zimage.loading.registry import REQUIRED
from zimage.weights.components import all_finite, check_configs, find_components, open_component
from zimage.weights.manifest import Progress, Record, find_known, find_record, hash_file, silent

PIECE = 64 << 20  # bytes checked at a time
MAX_JSON = 64 << 20  # bytes; a tokenizer.json has 11 MB
LISTED = 5  # problems of a file that are named before the rest is counted
KINDS = (".safetensors", ".gguf", ".json", ".txt", ".jinja")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass
class Report:
    """What was found out about a file, or about a component with all its files."""

    path: str
    size: int | None = None
    tensors: int | None = None
    dtypes: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "sound": not self.problems}


def verify(
    path: Path, values: bool = False, hashes: bool = True, configs: Path | None = None, progress: Progress = silent
) -> Iterator[Report]:
    """Yield a report per file, then one per component and one for the whole.

    values: look for NaN and infinity in every tensor. hashes: compare those on record, which reads every file.
    configs: a model folder with the config.json against which a loose file's shapes are checked. Raises CheckpointError
    where `path` does not exist.
    """
    check_configs(path, configs)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; pass a model folder, a component's folder or a weight file")
    record, wrong = find_record(path), False
    for file in _files(path, record):
        report = _check_file(file, path, record, values, hashes, progress)
        wrong |= bool(report.problems) and (file.suffix in (".safetensors", ".gguf") or not is_inside(path, file))
        yield report
    if not wrong:  # else the components would only repeat it
        yield from _check_components(path, configs)


def _files(path: Path, record: Record | None) -> list[Path]:
    if path.is_file():
        return [path]
    entries = list(path.glob("*"))
    inner = [file for entry in entries if entry.is_dir() and is_inside(path, entry) for file in entry.glob("*")]
    out = {entry for entry in entries if entry.is_dir() and not is_inside(path, entry)}
    found = {file for file in (*entries, *inner) if file.suffix in KINDS + PICKLES} | out
    recorded = {record.folder / name for name in record.files} if record else set()
    mine = {file for file in recorded if path.absolute() in file.absolute().parents}
    visible = {file for file in found if not any(p.startswith(".") for p in file.relative_to(path).parts)}
    return sorted(visible | {path / file.absolute().relative_to(path.absolute()) for file in mine})


def _check_file(file: Path, top: Path, record: Record | None, values: bool, hashes: bool, progress: Progress) -> Report:
    report = Report(str(file.relative_to(top)) if file != top else file.name)
    if file != top and not is_inside(top, file):
        report.problems.append("it is a link that leads out of the folder, which is not followed")
        return report
    if not file.is_file():
        report.problems.append("it is missing; fetch it again" if not file.exists() else "it should be a file")
        return report
    report.size = file.stat().st_size
    if file.suffix in PICKLES:
        report.notes.append("a pickle: not opened, and never loaded")
    elif file.suffix == ".json":
        _check_json(file, report)
    elif file.suffix == ".safetensors" or (file == top and file.suffix not in KINDS):
        _check_weights(file, report, values, progress)
    _check_hash(file, report, record, hashes, progress)
    return report


def _check_json(file: Path, report: Report) -> None:
    try:
        json_value("it", read_file(file, MAX_JSON), MAX_JSON)
    except CheckpointError as error:
        report.problems.append(str(error))


def _check_weights(file: Path, report: Report, values: bool, progress: Progress) -> None:
    with file.open("rb") as stream:
        header = read_header(stream, report.size or 0)
    report.tensors = len(header.slots)
    report.dtypes = dict(Counter(slot.dtype for slot in header.slots.values()))
    _tell(report, header.problems)
    if values and not header.problems:
        _tell(report, list(_bad_values(file, header, progress)))
        if not report.problems:
            report.notes.append("all values finite")


def _tell(report: Report, problems: list[str]) -> None:
    report.problems += problems[:LISTED]
    if len(problems) > LISTED:
        report.problems.append(f"and {len(problems) - LISTED} more")


def _bad_values(file: Path, header: Header, progress: Progress) -> Iterator[str]:
    """Tensors that hold NaN or infinity, in the order of the file."""
    maps, size = Maps(), file.stat().st_size
    for name, slot in sorted(header.slots.items(), key=lambda item: item[1].begin):
        if slot.dtype in NUMBERS:
            count = sum(_count_bad(maps, file, slot, begin) for begin in range(slot.begin, slot.end, PIECE))
            if count:
                yield f"{name} holds {count:,} values that are NaN or infinite"
        progress(f"reading {file.name}", slot.end, size)


def _count_bad(maps: Maps, file: Path, slot: Slot, begin: int) -> int:
    dtype = DTYPES[slot.dtype]
    data = maps(file)[begin : min(begin + PIECE, slot.end)]
    numbers = (data.clone() if begin % dtype.itemsize else data).view(dtype)
    count = 0 if all_finite(numbers) else int((~torch.isfinite(numbers.float())).sum())
    forget_pages(data)
    return count


def _check_hash(file: Path, report: Report, record: Record | None, hashes: bool, progress: Progress) -> None:
    about = _recorded(file, record)
    if about is None:
        _compare_known(file, report, hashes, progress)
    elif about["size"] != report.size:
        report.problems.append(f"it has {report.size:,} bytes and was fetched with {about['size']:,}; fetch it again")
    elif not hashes:
        report.notes.append("hash not checked")
    elif (found := hash_file(file, progress).sha256) != about["sha256"]:
        report.problems.append(f"its sha256 is {found} and was {about['sha256']} when fetched; fetch it again")
    else:
        report.notes.append("sha256 as fetched")


def _recorded(file: Path, record: Record | None) -> dict[str, Any] | None:
    if record is None:
        return None
    return record.files.get(file.absolute().relative_to(record.folder.absolute()).as_posix())


def _compare_known(file: Path, report: Report, hashes: bool, progress: Progress) -> None:
    """Check a file that no fetch brought; it should be the published one if it has a published name and size."""
    known = find_known(file.name)
    if known is None or known.sha256 is None or known.size not in (None, report.size):
        report.notes.append("hash not on record")
    elif hashes and (found := hash_file(file, progress).sha256) != known.sha256:
        report.problems.append(f"its sha256 is {found}; the published {known.path} has {known.sha256}")
    else:
        report.notes.append("sha256 as published" if hashes else "hash not checked")


def _check_components(path: Path, configs: Path | None) -> Iterator[Report]:
    """Check keys and shapes against the config, and the components of a whole folder against one another."""
    try:
        found = find_components(path)
    except CheckpointError as error:
        yield Report(str(path), problems=[str(error)])
        return
    sound = True
    for name, place in found.items():
        report = _check_component(name, place, configs)
        sound &= not report.problems
        yield report
    if path.is_dir() and (len(found) > 1 or (path / "model_index.json").is_file()) and sound:
        yield _check_whole(path, found)


def _check_component(name: str, place: Path, configs: Path | None) -> Report:
    report = Report(name)
    try:
        component = open_component(name, place, configs)
    except CheckpointError as error:
        report.problems.append(str(error))
        return report
    report.tensors = len(component.checkpoint.entries)
    report.size = component.checkpoint.stored_bytes()
    report.dtypes = dict(Counter(entry.dtype for entry in component.checkpoint.entries.values()))
    report.notes.append(f"keys and shapes fit {'the given config' if configs else component.checkpoint.describes}")
    return report


def _check_whole(path: Path, found: dict[str, Path]) -> Report:
    report = Report("model")
    absent = [name for name in REQUIRED if name not in found]
    if absent:
        report.problems.append(f"it has no {' and no '.join(absent)}")
        return report
    try:
        if (path / "model_index.json").is_file():
            read_json(path / "model_index.json")
        model = ModelFiles.of_folder(path)
    except CheckpointError as error:
        report.problems.append(str(error))
        return report
    shift = "no scheduler config" if model.shift is None else f"shift {model.shift:g}"
    report.notes.append(f"the components fit together; tokenizer of {model.tokenizer.vocab_size:,} entries, {shift}")
    return report
