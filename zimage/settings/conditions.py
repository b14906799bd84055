"""Pictures as conditions of a render: what stands behind `--reference` and `--control`.

Each is a picture with a number, and a control with the file of its ControlNet too. In a request they may be text as on
the command line, plain objects, tuples or these classes; a prepared request holds these classes with opened files.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol, Self

from zimage.errors import RequestError, quoted

ALPHA = 0.3
CONTROL_SCALE = 0.75
MAX_CONTROL_SCALE = 10.0
MOST_CONDITIONS = 16  # of one kind in a request


class Described(Protocol):
    """An opened file: an InputPicture, Embeddings or a ControlNet's."""

    path: str

    def describe(self) -> dict[str, str]:
        """Its name and the hash of its content, under "name" and "hash"."""


@dataclass(frozen=True)
class Reference:
    """A picture that the caption is mixed with, by `alpha` from 0 (not at all) to 1.

    `picture` is a path, or an object: a PIL picture, an InputPicture, or embeddings that `see` has saved.
    """

    FIELD: ClassVar = "reference"
    FORM: ClassVar = "PICTURE[:ALPHA]"
    FILES: ClassVar = ("picture",)

    picture: Any
    alpha: float = ALPHA

    def __post_init__(self):
        _check_number(self.FIELD, "alpha", self.alpha, 1.0)

    @classmethod
    def parse(cls, given: Any) -> Self:
        """From any form that a request may have. Raises RequestError."""
        if isinstance(given, str):
            picture, alpha = _split_number(given)
            _check_words(cls.FIELD, cls.FORM, given, picture)
            return cls(picture) if alpha is None else cls(picture, alpha)
        return _parsed(cls, given)

    def describe(self) -> dict[str, Any]:
        """Plain values, which name no folders."""
        return {**_described(self.picture), "alpha": self.alpha}

    def point(self) -> dict[str, Any]:
        """Plain values from which `parse` makes it again, with the hash of its content."""
        return {**_pointed("picture", self.picture), "alpha": self.alpha}


@dataclass(frozen=True)
class Control:
    """A picture that a ControlNet follows, with `scale` as the strength of its hints; 0 is off.

    `model` is the path of a ControlNet, a file or a folder; `picture` a path or an object.
    """

    FIELD: ClassVar = "control"
    FORM: ClassVar = "FILE:PICTURE[:SCALE]"
    FILES: ClassVar = ("model", "picture")

    model: Any
    picture: Any
    scale: float = CONTROL_SCALE

    def __post_init__(self):
        _check_number(self.FIELD, "scale", self.scale, MAX_CONTROL_SCALE)

    @classmethod
    def parse(cls, given: Any) -> Self:
        """From any form that a request may have. Raises RequestError."""
        if isinstance(given, str):
            names, scale = _split_number(given)
            model, picture = _split_pair(names)
            _check_words(cls.FIELD, cls.FORM, given, model, picture)
            return cls(model, picture) if scale is None else cls(model, picture, scale)
        return _parsed(cls, given)

    def describe(self) -> dict[str, Any]:
        """Plain values, which name no folders."""
        model = {f"model_{name}": value for name, value in _described(self.model).items()}
        return {**_described(self.picture), **model, "scale": self.scale}

    def point(self) -> dict[str, Any]:
        """Plain values from which `parse` makes it again, with the hashes of its contents."""
        return {**_pointed("picture", self.picture), **_pointed("model", self.model), "scale": self.scale}


Condition = Reference | Control


def names_of(kind: type[Condition]) -> tuple[str, ...]:
    """The values of a condition: its files, then its number."""
    return tuple(field.name for field in fields(kind))


def split_number(text: str) -> tuple[str, float | None]:
    """NAME:NUMBER → (name, number): the last colon counts if a number follows; else there is none."""
    name, _, last = text.rpartition(":")
    try:
        return (name, float(last)) if name else (text, None)
    except ValueError:
        return text, None


def _split_number(text: str) -> tuple[str, float | None]:
    """The same for a path: what is the name of an existing file or folder as a whole has no number."""
    return (text, None) if _exists(text) else split_number(text)


def _split_pair(text: str) -> tuple[str, str]:
    """FILE:PICTURE, at the first colon that leaves an existing file before it; else at the first past a drive's."""
    colons = [i for i, letter in enumerate(text) if letter == ":" and i > 1]
    at = next((i for i in colons if _exists(text[:i])), colons[0] if colons else len(text))
    return text[:at], text[at + 1 :]


def _exists(path: str) -> bool:
    try:
        return os.path.exists(os.path.expanduser(path))
    except ValueError:  # a null character
        return False


def _parsed(cls: Any, given: Any) -> Any:
    """From an object of the class, a mapping with its names, a tuple of its values or, if one is enough, that one."""
    if isinstance(given, cls):
        return given
    names = names_of(cls)
    pairs = dict(given) if isinstance(given, Mapping) else {}
    if not pairs:
        given = given if isinstance(given, tuple) else (given,)
        pairs = dict(zip(names[: len(given)], given, strict=True)) if len(given) <= len(names) else {}
    pointed = [f"{role}_{part}" for role in cls.FILES for part in ("name", "hash")]
    if unknown := [key for key in pairs if key not in (*names, *pointed)]:
        raise _fault(cls.FIELD, f": there is no {quoted(unknown[0])}; known: {', '.join(names)}")
    if not all(role in pairs for role in cls.FILES):
        needed = " and ".join(cls.FILES)
        raise _fault(cls.FIELD, f": {needed} {'are' if len(cls.FILES) > 1 else 'is'} needed; write {cls.FORM}")
    for role in cls.FILES:
        absent = pairs[role] is None or (isinstance(pairs[role], str) and not pairs[role])
        if absent or isinstance(pairs[role], bool | int | float | list | tuple | dict | bytes):
            raise _fault(cls.FIELD, f": {role} {quoted(pairs[role])} should be the path of a file")
    return cls(**{name: pairs[name] for name in names if name in pairs})


def _described(file: Described | str) -> dict[str, str]:
    if isinstance(file, str | os.PathLike):
        return {"name": os.path.basename(file)}
    return file.describe() if hasattr(file, "describe") else {"name": type(file).__name__}


def _pointed(role: str, file: Described) -> dict[str, str]:
    return {role: file.path, f"{role}_name": file.describe()["name"], f"{role}_hash": file.describe()["hash"]}


def _check_number(field: str, name: str, value: object, most: float) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= most:
        raise _fault(field, f": {name} {quoted(value)} should be a number from 0 to {most:g}")


def _check_words(field: str, form: str, given: str, *words: str) -> None:
    if not all(words) or "\0" in given:
        raise _fault(field, f" {quoted(given)} cannot be read; write {form}")


def _fault(field: str, rest: str) -> RequestError:
    return RequestError(field + rest, fields=(field,))
