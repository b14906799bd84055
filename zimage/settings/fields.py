"""What a run setting is: a dataclass field that knows its help text, bounds, flag and group, and how it is checked.

A value may be a str, int, float or bool, a list of these, a mapping of whole numbers to numbers (`Weights`), or an
attachment: a picture, a mask or embeddings, given as a path or as an object. No torch here: `--help` must be quick.
"""

import dataclasses
import difflib
import functools
import os
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Self

from zimage.errors import RequestError

Weights = dict[int, float]
MAX_WEIGHT = 1e6
PLAIN = (bool, int, float, list, tuple, dict, set, bytes)  # what no attachment can be


def setting(
    default: Any,
    help: str,
    *,
    group: str = "General",
    flag: str | None = None,
    metavar: str | None = None,
    env: str | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    multiple: int | None = None,
    choices: tuple[str, ...] | None = None,
    attachment: bool = False,
    path: bool = False,
    per_call: bool = False,
) -> Any:
    """A run setting. `env` is the environment variable that gives it where no flag does.

    `path`: files and folders, which in a settings file are relative to that file. `per_call`: it belongs to one call
    only, as attachments do, and stands in no settings file.
    """
    bounds = {"minimum": minimum, "maximum": maximum, "above": above, "multiple": multiple, "choices": choices}
    shown = {"help": help, "group": group, "flag": flag, "metavar": metavar}
    kind = {"env": env, "attachment": attachment, "path": path, "per_call": per_call or attachment}
    return dataclasses.field(default=default, metadata={**shown, **kind, **bounds})


class Settings:
    """What settings dataclasses share."""

    @classmethod
    def names(cls) -> list[str]:
        return [field.name for field in dataclasses.fields(cls)]

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """From plain values, as JSON and TOML hold them; an unknown name is an error that offers the nearest."""
        for key in values:
            if key not in cls.names():
                raise RequestError(f"there is no setting {key!r}; {nearest(key, cls.names())}", fields=(key,))
        hints = _hints(cls)
        return cls(**{name: _coerced(name, value, hints[name]) for name, value in values.items()})

    @classmethod
    def check_one(cls, name: str, value: Any) -> Any:
        """The value as its field holds it, checked by itself; raises RequestError."""
        accepted = _hints(cls)[name]
        coerced = _coerced(name, value, accepted)
        _check(cls.__dataclass_fields__[name], accepted, coerced)
        return coerced

    def to_mapping(self) -> dict[str, Any]:
        """Plain values, as JSON holds them; of an attachment the name and the hash of its contents."""
        return {
            field.name: _described(value) if field.metadata["attachment"] else _plain(value)
            for field in dataclasses.fields(self)
            for value in [getattr(self, field.name)]
        }


def either(value: Any, default: Any) -> Any:
    """`default` where the value was left open."""
    return default if value is None else value


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of a message on a word that is not known: the nearest one, or all."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]!r}?" if near else "known: " + (", ".join(known) or "none")


def parse_weights(text: str) -> Weights:
    """LAYER:WEIGHT,… → {layer: weight}. Raises ValueError."""
    pairs = [part.split(":") for part in text.split(",")]
    weights = {int(layer): float(weight) for layer, weight in pairs}
    if len(weights) != len(pairs):
        raise ValueError("a layer is named twice")
    return weights


def fields(cls: type) -> list[tuple[dataclasses.Field, tuple[type, ...]]]:
    """Each field with the plain types that its value, or each in its list of values, may have."""
    hints = _hints(cls)
    return [(field, _scalar_types(hints[field.name])) for field in dataclasses.fields(cls)]


def list_fields(cls: type) -> dict[str, bool]:
    """The fields that take a list → whether they also take a single value without one."""
    hints = _hints(cls)
    return {name: _takes_one(hint) for name, hint in hints.items() if _list_types(hint)}


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def check_fields(settings: Any) -> None:
    """Raise RequestError unless every value has its field's type and lies within its bounds."""
    hints = _hints(type(settings))
    for field in dataclasses.fields(settings):
        _check(field, hints[field.name], getattr(settings, field.name))


def _coerced(name: str, value: Any, accepted: Any) -> Any:
    """JSON has text for a mapping's keys, the command line for the whole mapping."""
    if Weights not in _members(accepted):
        return value
    try:
        if isinstance(value, str):
            return parse_weights(value)
        if isinstance(value, Mapping):
            weights = {int(key): weight for key, weight in value.items()}
            if len(weights) == len(value):
                return weights
            raise ValueError("a layer is named twice")
    except ValueError:
        text = f"{name} {value!r} cannot be read; write LAYER:WEIGHT,… as in -2:0.7,-8:0.3"
        raise RequestError(text, fields=(name,)) from None
    return value


def _plain(value: Any) -> Any:
    return {str(key): item for key, item in value.items()} if isinstance(value, dict) else value


def _described(attachment: Any) -> Any:
    """What it is, without the folder that it lies in."""
    if attachment is None or hasattr(attachment, "describe"):
        return attachment and attachment.describe()
    is_path = isinstance(attachment, str | os.PathLike)
    return {"name": os.path.basename(attachment) if is_path else type(attachment).__name__}


def _check(field: dataclasses.Field, accepted: Any, value: Any) -> None:
    if value is None:
        if types.NoneType not in _members(accepted) and not field.metadata["attachment"]:
            raise _fault(field.name, ": a value is needed")
        return
    if field.metadata["attachment"]:
        if isinstance(value, PLAIN):
            raise _fault(field.name, f" {value!r} is a {type(value).__name__}; it should be a file's path")
        return
    if Weights in _members(accepted):
        _check_weights(field.name, value)
        return
    many = isinstance(value, list) and bool(_list_types(accepted))
    if not many and not _takes_one(accepted):
        raise _fault(field.name, f" {value!r} is a {type(value).__name__}; it should be a list")
    for item in value if many else [value]:
        _check_scalar(field, _scalar_types(accepted), item)


def _check_weights(name: str, value: Any) -> None:
    if not isinstance(value, dict) or not value:
        raise _fault(name, f" {value!r} should be a table of layers and their weights, as in {{-2: 0.7, -8: 0.3}}")
    for layer, weight in value.items():
        if not isinstance(layer, int) or isinstance(layer, bool) or layer > -1:
            raise _fault(name, f": layer {layer!r} should be a whole number below 0, counted from the last layer")
        if not isinstance(weight, int | float) or isinstance(weight, bool) or not abs(weight) <= MAX_WEIGHT:
            raise _fault(name, f": the weight {weight!r} of layer {layer} should be a number ≤ {MAX_WEIGHT:g}")
    if not abs(sum(value.values())) > 1e-6:
        raise _fault(name, ": the weights add up to 0, by which they cannot be divided")


@functools.cache
def _scalar_types(accepted: Any) -> tuple[type, ...]:
    """The types of a single value; where only lists are accepted, of what is in them."""
    plain = tuple(m for m in _members(accepted) if m is not types.NoneType and typing.get_origin(m) is None)
    return plain or _list_types(accepted) or (str,)  # text on the command line stands for a mapping


@functools.cache
def _list_types(accepted: Any) -> tuple[type, ...]:
    """The types of what a list may hold; none where no list is accepted."""
    return next((typing.get_args(m) for m in _members(accepted) if typing.get_origin(m) is list), ())


@functools.cache
def _takes_one(accepted: Any) -> bool:
    return any(m is not types.NoneType and typing.get_origin(m) is None for m in _members(accepted))


@functools.cache
def _members(accepted: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(accepted) in (typing.Union, types.UnionType)
    return typing.get_args(accepted) if is_union else (accepted,)


def _check_scalar(field: dataclasses.Field, accepted: tuple[type, ...], value: Any) -> None:
    name, m = field.name, field.metadata
    numbers = (int, float) if float in accepted else accepted
    if not isinstance(value, numbers) or (isinstance(value, bool) and bool not in accepted):
        kind = " or ".join(t.__name__ for t in accepted)
        raise _fault(name, f" {value!r} is a {type(value).__name__}; it should be of type {kind}")
    if m["choices"] and value not in m["choices"]:
        raise _fault(name, f" {value!r} is not known; use {', '.join(m['choices'])}")
    if isinstance(value, str):
        if not value.isascii() and value != value.encode(errors="ignore").decode():
            raise _fault(name, " is not valid text; it must be encoded in UTF-8")
    elif not isinstance(value, bool):
        _check_number(name, m, value)


def _check_number(name: str, m: Mapping[str, Any], value: float) -> None:
    if value != value:
        raise _fault(name, " is not a number")
    if m["minimum"] is not None and value < m["minimum"]:
        raise _fault(name, f" {value} is too small; the least is {m['minimum']}")
    if m["above"] is not None and value <= m["above"]:
        raise _fault(name, f" {value} is too small; it must be above {m['above']}")
    if m["maximum"] is not None and value > m["maximum"]:
        raise _fault(name, f" {value} is too large; the most is {m['maximum']}")
    if m["multiple"] and value % m["multiple"]:
        down = value // m["multiple"] * m["multiple"]
        raise _fault(name, f" {value} is not a multiple of {m['multiple']}; nearest {down} or {down + m['multiple']}")


def _fault(name: str, rest: str) -> RequestError:
    """The error on one field, whose name begins the text."""
    return RequestError(name + rest, fields=(name,))
