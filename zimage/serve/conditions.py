"""Conditions as they come over the network: pictures with values of their own, several in one field.

    [{"picture": base64, "alpha": 0.3}, {"alpha": 0.5}] + one file ─→ two pieces: the second entry takes the file

An entry without a picture takes the next file that came under the field's name. Files without a list are entries of
their own, with nothing set beside.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from zimage.errors import RequestError, quoted
from zimage.serve.shelf import check_name
from zimage.settings.conditions import Condition, names_of
from zimage.settings.fields import Plain

PICTURE, MODEL = "picture", "model"
Decode = Callable[[str, Plain], bytes]


class Piece(NamedTuple):
    """A picture, and what was set beside it, checked. A model goes by its name."""

    picture: bytes
    values: Mapping[str, Plain]


def pieces(
    kind: type[Condition], entries: Plain, files: Sequence[bytes], most: int, decode: Decode
) -> tuple[Piece, ...]:
    """What a field holds: `entries` of the body (None: none) and files beside it. Raises RequestError."""
    if entries is None:
        entries = [{} for _ in files]
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise _fault(kind, f" should be a list of objects, each with a {PICTURE} in base64 or as a file beside them")
    if len(entries) > most:
        raise _fault(kind, f": {len(entries)} are too many; this server takes at most {most}")
    without = sum(entry.get(PICTURE) is None for entry in entries)
    if without != len(files):
        raise _fault(kind, f": {len(files)} files came for {without} entries without a {PICTURE}; pass one for each")
    values, rest = [_beside(kind, entry) for entry in entries], iter(files)
    pictures = [next(rest) if e.get(PICTURE) is None else decode(kind.FIELD, e[PICTURE]) for e in entries]
    return tuple(map(Piece, pictures, values))


def _beside(kind: type[Condition], entry: Mapping[str, Plain]) -> dict[str, Plain]:
    """What stands beside the picture, with a word in its place. Raises RequestError."""
    values = {name: value for name, value in entry.items() if name != PICTURE and value is not None}
    for name in values.keys() - {*names_of(kind)}:  # a job's own names for its files
        raise _fault(kind, f": there is no {quoted(name)}; known: {', '.join(names_of(kind))}")
    if MODEL in kind.FILES:
        if MODEL not in values:
            raise _fault(kind, f": each needs a {MODEL}, by its name on this server")
        check_name(kind.FIELD, values[MODEL])
    kind.parse({**values, PICTURE: PICTURE})
    return values


def _fault(kind: type[Condition], rest: str) -> RequestError:
    return RequestError(kind.FIELD + rest, fields=(kind.FIELD,))
