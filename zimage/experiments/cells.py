"""The cells of a sweep: every combination of prompts, points of the axes and seeds, each known by a stable id.

The id of a cell is a hash of all that its picture is made from: prompt, seed, settings, and the content of the files
that they name. The same command finds its cells again wherever the folders have gone, a larger grid finds the smaller
one's, and a LoRA that was trained on makes new cells.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from zimage.errors import RequestError, one_line, quoted
from zimage.experiments.axes import OWNERS, Axis, shown
from zimage.settings.conditions import names_of
from zimage.settings.declared import MASK_ALPHA, Request
from zimage.settings.fields import Plain, as_plain
from zimage.settings.loading import LoadSettings, split_lora
from zimage.settings.merging import FIELDS
from zimage.settings.paths import user_path
from zimage.settings.profiles import Resolved
from zimage.settings.sampling import is_open

if TYPE_CHECKING:
    from zimage.text.templates import Templates

Resolve = Callable[[Mapping[str, Plain]], Resolved]  # the settings of all sources, under these values

MOST_CELLS = 100_000
ID_DIGITS = 16
LONGEST_SHOWN, LONGEST_LABEL = 60, 200  # characters
# No picture depends on them, but for a template's own text; as axes they tell cells apart all the same.
WITHOUT_EFFECT = ("cache_entries", "cache_folder", "encoder_timeout", "lora_folder", "memory", "residency", "templates")
WHOLE = 8 << 20  # bytes of a file that are read for an id; of a larger one samples
SAMPLES, SAMPLE = 16, 1 << 16
MOST_FILES = 10_000  # of a folder


@dataclass(frozen=True)
class Cell:
    """One picture to be drawn: `request` and `load` are all settings that were set anywhere, as plain values.

    `axes` are those that a sweep varies, None where the setting is left as it is. With an `error`, the settings do not
    go together.
    """

    id: str
    axes: Mapping[str, Plain]
    prompt: str
    seed: int
    request: Mapping[str, Plain]
    load: Mapping[str, Plain] = field(default_factory=dict)
    error: str = ""

    @property
    def picture(self) -> str:
        """The name of its picture's file."""
        return f"{self.id}.png"

    @property
    def state(self) -> str:
        """The name of the file in which its latents lie until they are decoded."""
        return f"{self.id}.state"

    @property
    def label(self) -> str:
        """What tells it from other cells of its prompt, on one line."""
        told = [f"{name} {one_line(shown(value), LONGEST_SHOWN)}" for name, value in self.axes.items()]
        return one_line(", ".join([*told, f"seed {self.seed}"]), LONGEST_LABEL)


def cells_of(axes: Sequence[Axis], prompts: Sequence[str], seeds: Sequence[int], resolve: Resolve) -> list[Cell]:
    """All cells, prompt by prompt, the last axis quickest and the seeds quicker still.

    Settings that do not go together make a cell with an error. Raises RequestError for too many cells, and where two
    would be the same picture.
    """
    count = len(prompts) * len(seeds)
    for one in axes:
        count *= len(one.points)
    if count > MOST_CELLS:
        raise RequestError(f"the sweep has {count:,} cells; at most {MOST_CELLS:,} are drawn")
    contents, found = Contents(), dict[str, Cell]()
    points = [dict(_flat(axes, point)) for point in itertools.product(*(one.points for one in axes))]
    resolved = [_resolved(point, resolve) for point in points]
    for prompt, (point, settings), seed in itertools.product(prompts, zip(points, resolved, strict=True), seeds):
        cell = _cell(point, prompt, seed, settings, contents)
        if other := found.get(cell.id):
            what = f"prompt {quoted(prompt)}" if other.axes == cell.axes else f"{other.label} and {cell.label}"
            raise RequestError(f"two cells are the same picture: {what}; leave out one of them", fields=tuple(point))
        found[cell.id] = cell
    return list(found.values())


def _flat(axes: Sequence[Axis], point: tuple[tuple[Plain, ...], ...]) -> Iterator[tuple[str, Plain]]:
    for one, values in zip(axes, point, strict=True):
        yield from zip(one.names, values, strict=True)


class _Settled(NamedTuple):
    """The settings of a point, and why they cannot be used."""

    request: dict[str, Plain]
    load: dict[str, Plain]
    error: str = ""


def _resolved(point: Mapping[str, Plain], resolve: Resolve) -> _Settled:
    varied = {name: value for name, value in point.items() if value is not None}
    try:
        settings = resolve(varied)
        request, load = settings.of(Request), settings.of(LoadSettings)
        LoadSettings.from_mapping(load)
    except RequestError as error:
        return _Settled({n: v for n, v in varied.items() if OWNERS[n] is Request}, {}, str(error))
    single = {name: value for name, value in request.items() if name not in ("images", "batch_size")}
    return _Settled(single, {name: absolute(name, value) for name, value in load.items()})


def _cell(point: Mapping[str, Plain], prompt: str, seed: int, settings: _Settled, contents: "Contents") -> Cell:
    request, load, error = {**settings.request, "prompt": prompt, "seed": seed}, settings.load, settings.error
    if not error:
        try:
            if any(is_open(other) for other, _ in Request.from_mapping(request).variations):
                text = "variation: its seed is open, and a cell is drawn the same each time; pass one, such as 7:0.5"
                raise RequestError(text, fields=("variation",))
        except RequestError as fault:
            error = str(fault)
    used = {name: value for name, value in load.items() if name in point or name not in WITHOUT_EFFECT}
    marked = {name: contents.marked(name, value) for name, value in {**request, **used}.items()}
    if template := request.get("template"):
        marked["template"] = contents.template(str(template), load.get("templates"))
    tried = {name: as_plain(value) for name, value in point.items()} if error else {}
    text = json.dumps([marked, tried], sort_keys=True)
    identity = hashlib.sha256(text.encode()).hexdigest()[:ID_DIGITS]
    return Cell(
        identity,
        {name: as_plain(value) for name, value in point.items()},
        prompt,
        seed,
        {name: as_plain(value) for name, value in request.items()},
        load,
        error,
    )


# ------------------------------------------------------------------ files that settings name


def absolute(name: str, value: Plain) -> Plain:
    """A load setting's paths from the root on, so that a record means the same in another folder."""
    if not FIELDS[name].metadata["path"] or value is None:
        return value
    if isinstance(value, list):
        pairs = [split_lora(text) for text in value]
        paths = [os.path.abspath(user_path(path, name)) for path, _ in pairs]
        return [path if scale is None else f"{path}:{scale}" for path, (_, scale) in zip(paths, pairs, strict=True)]
    return os.path.abspath(user_path(value, name))


class Contents:
    """What settings name, by content: a digest stands for a file or a folder of files. Each is read once."""

    def __init__(self) -> None:
        self._digests: dict[str, str] = {}
        self._templates: dict[Plain, Templates] = {}

    def marked(self, name: str, value: Plain) -> Plain:
        """A setting's value with the content of files instead of their paths."""
        m = FIELDS[name].metadata
        if value is None or (name == "mask" and value == MASK_ALPHA):
            return value
        if condition := m["condition"]:
            return [self._marked_condition(condition.parse(one)) for one in value]
        if name == "lora":
            return [[self.digest(path), scale] for path, scale in map(split_lora, value)]
        return self.digest(value) if m["path"] or m["attachment"] else as_plain(value)

    def template(self, name: str, folder: Plain) -> Plain:
        """What a template says, of a folder or the user's own; its name where it cannot be read."""
        from zimage.text.templates import Templates, user_folder

        try:
            if folder not in self._templates:
                self._templates[folder] = Templates.open(Path(str(folder)) if folder else user_folder())
            found = self._templates[folder].get(name)
        except RequestError:  # what draws the cell says it
            return name
        return [found.add_think_block, found.thinking_content, found.assistant_content, found.system_prompt]

    def _marked_condition(self, condition: Plain) -> list[Plain]:
        values = {name: getattr(condition, name) for name in names_of(type(condition))}
        return [self.digest(value) if name in condition.FILES else value for name, value in values.items()]

    def digest(self, path: str) -> str:
        """That of a file, or of all files of a folder and their names; the path where nothing can be read there."""
        if path not in self._digests:
            try:
                self._digests[path] = _digest(Path(path).expanduser())
            except (OSError, ValueError, RuntimeError):  # what draws the cell says it better
                self._digests[path] = path
        return self._digests[path]


def _digest(path: Path) -> str:
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    if len(files) > MOST_FILES or not all(map(Path.is_file, files)):  # a pipe would be waited for
        raise ValueError
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(path)}\0{file.stat().st_size}\0".encode())
        for piece in _pieces(file):
            digest.update(piece)
    return digest.hexdigest()


def _pieces(file: Path) -> Iterator[bytes]:
    """All of a small file; of a large one its beginning and samples, as its checkpoint's fingerprint has."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        if size <= WHOLE:
            yield stream.read()
            return
        for i in range(SAMPLES):
            stream.seek((size - SAMPLE) * i // (SAMPLES - 1))
            yield stream.read(SAMPLE)
