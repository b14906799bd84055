"""Rows of a batch: requests for single pictures, each with an id that stays, from what files and options say.

    file, prompts ─ options below, products ─→ requests ─ several pictures apart ─→ rows with ids and seeds

A row without an id is named after its prompt and a hash of its request, and where it leaves the seed open, the seed
follows from the id: the same command makes the same rows, whatever was put between them. No torch here.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from zimage.batch.sources import ID, Source
from zimage.errors import RequestError, quoted
from zimage.settings.conditions import Condition, names_of
from zimage.settings.declared import MASK_ALPHA, Request
from zimage.settings.fields import Plain, fields
from zimage.settings.merging import NO_PRESETS, Presets, laid_over
from zimage.settings.paths import slug, user_path
from zimage.settings.sampling import is_open, split_variation

LONGEST_ID = 200  # bytes, so that a name of a file has room for an ending
DIGITS = 8  # of a hash in an id
SEEDS = 1 << 32
Values = dict[str, Plain]
Moved = Callable[[str, str], str]  # (role, path) → the path that takes its place
PICTURE, MODEL = "picture", "model"  # roles of files: what travels with a row, and what a worker has to have


@dataclass(frozen=True)
class Row:
    """One picture that is asked for. `request` holds the values that are set, its files by absolute paths."""

    id: str
    request: Values
    place: str

    @property
    def file(self) -> str:
        """The name of its picture."""
        return file_of(self.id)


def rows_of(
    sources: Iterable[Source], defaults: Mapping[str, Plain], folder: Path, presets: Presets = NO_PRESETS
) -> list[Row]:
    """The rows that sources stand for. Their files are relative to `folder`, those of the defaults to the current one.

    `presets` are those of a settings file.

    Raises RequestError, which names the place of the row at fault.
    """
    usual, rows, taken = _absolute(dict(defaults), Path.cwd()), list[Row](), dict[str, str]()
    seen = Counter[str]()
    for source in sources:
        with _placed(source.place):
            own = dict(source.values)
            given = own.pop(ID, None)
            singles = list(_singles(laid_over(usual, _absolute(own, folder), presets)))
            for k, single in enumerate(singles):
                name = _derived(single, seen) if given is None else _given(given, k, len(singles))
                key = name.casefold()  # some file systems do not tell cases apart
                if key in taken:
                    raise RequestError(f"the id {name!r} is that of {taken[key]} too; each row needs its own")
                taken[key] = source.place
                rows.append(Row(name, {**single, **_seeds(name, single)}, source.place))
    return rows


def file_of(id: str) -> str:
    """The name of the picture of a row."""
    return f"{id}.png"


def with_files(values: Values, moved: Moved) -> Values:
    """The same request with every path in it exchanged. Raises RequestError for conditions that cannot be read."""
    found = dict(values)
    for field, _ in fields(Request):
        value = found.get(field.name)
        if value is None:
            continue
        if field.metadata["attachment"] and not (field.name == "mask" and value == MASK_ALPHA):
            found[field.name] = moved(PICTURE, value)
        elif kind := field.metadata["condition"]:
            found[field.name] = [_condition(kind, kind.parse(item), moved) for item in value]
    return found


def digest(plain: Plain) -> str:
    """Hex digits that tell plain values from others."""
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _condition(kind: type[Condition], condition: Condition, moved: Moved) -> Values:
    values = {name: getattr(condition, name) for name in names_of(kind)}
    return values | {role: moved(role, values[role]) for role in kind.FILES}


def _absolute(values: Values, folder: Path) -> Values:
    return with_files(values, lambda role, path: str(folder.absolute() / user_path(path, role)))


def _singles(values: Values) -> Iterator[Values]:
    """The requests of the single pictures that one request stands for. Raises RequestError."""
    request = Request.from_mapping(values)
    if request.batch_size != 1:
        text = f"batch_size {request.batch_size}: rows are drawn one by one; leave it out"
        raise RequestError(text, fields=("batch_size",))
    if request.embeddings is None and not any(request.prompts):
        raise RequestError("a prompt is needed, or embeddings", fields=("prompt",))
    if request.variation is not None and request.images > 1 and None in request.chosen_seeds:
        raise RequestError("variation: several images vary one seed; pass the seed", fields=("variation", "seed"))
    for k in range(request.count):
        yield {name: value for name, value in {**values, **request.single(k)}.items() if value is not None}


def _given(id: Plain, index: int, count: int) -> str:
    """The id of a row's picture; several are numbered. Raises RequestError for what cannot be a file's name."""
    if isinstance(id, int) and not isinstance(id, bool):
        id = str(id)
    name = id if count == 1 else f"{id}-{index + 1}"
    fit = isinstance(id, str) and id.isprintable() and id and not (id.startswith(".") or set(id) & set('/\\:*?"<>|'))
    if not fit or len(name.encode(errors="replace")) > LONGEST_ID:
        told = f"of at most {LONGEST_ID} bytes, which names a file: no / or \\, no dot in front"
        raise RequestError(f"id {quoted(id)} should be a text {told}", fields=(ID,))
    return name


def _derived(values: Values, seen: Counter[str]) -> str:
    """The id of a row that has none: the same request again gets a number, and so another seed where that is open."""
    named = with_files(values, lambda role, path: Path(path).name)  # the same wherever its folder lies
    name = f"{slug(values['prompt'])}-{digest(named)[:DIGITS]}"
    seen[name] += 1
    return name if seen[name] == 1 else f"{name}-{seen[name]}"


def _seeds(id: str, values: Values) -> Values:
    """Its seed, and that of its variation, from the id where they are open."""
    found: Values = {"seed": values.get("seed", _seed_of(id))}
    other, weight = split_variation(values.get("variation", "0:0"))
    return {**found, "variation": f"{_seed_of([id, 'variation'])}:{weight}"} if is_open(other) else found


def _seed_of(named: Plain) -> int:
    return int(digest(named)[:16], 16) % SEEDS


@contextmanager
def _placed(place: str) -> Iterator[None]:
    """Errors inside name the place of a row."""
    try:
        yield
    except RequestError as error:
        raise error.with_text(f"{place}: {error}") from None
