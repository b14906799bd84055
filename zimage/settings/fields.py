"""What a run setting is: a dataclass field that knows its help text, bounds, flag and group, and how it is checked.

Options, settings files and `json_schema` (server, forms) are all made from these declarations.

A value may be a str, int, float or bool, a list of these, a mapping of whole numbers to numbers (`Weights`), or an
attachment: a picture, a mask or embeddings, given as a path or as an object; or a list of conditions, which are
pictures with what belongs to them (`settings.conditions`). No torch here: `--help` must be quick.
"""

import dataclasses
import difflib
import functools
import os
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self, TypeAlias, TypeVar

from zimage.errors import RequestError, quoted
from zimage.settings.conditions import MOST_CONDITIONS, Condition

T = TypeVar("T")
Weights = dict[int, float]
Hint: TypeAlias = Any  # a type, or a union of types, as a field is annotated with it
Plain: TypeAlias = Any  # a plain value, as JSON and TOML hold it
Attachment: TypeAlias = Any  # a picture, a mask or embeddings: a path or an object
Conditions: TypeAlias = list[Any] | None  # each in any form that its class parses
Field: TypeAlias = "dataclasses.Field[Plain | Attachment]"
MAX_WEIGHT = 1e6
LONGEST_WORD = 80  # characters of a name that may have been mistyped
NO_ATTACHMENT = (bool, int, float, list, tuple, dict, set, bytes)
DRAFT = "https://json-schema.org/draft/2020-12/schema"
JSON_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string"}
JSON_BOUNDS = {
    "minimum": "minimum",
    "maximum": "maximum",
    "above": "exclusiveMinimum",
    "multiple": "multipleOf",
    "longest": "maxLength",
}
_hints: Callable[[type], dict[str, Hint]] = functools.cache(typing.get_type_hints)


def setting(
    default: object,
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
    longest: int | None = None,
    attachment: bool = False,
    condition: type[Condition] | None = None,
    path: bool = False,
    per_call: bool = False,
) -> Any:
    """A run setting. `env` is the environment variable that sets it where no option does.

    `path`: it names files or folders, which are relative to the settings file that they stand in. `per_call`: it
    belongs to a single call, as attachments do, and may not stand in a settings file. `longest` counts the characters
    of a text. `condition`: the class of each item of a list of conditions.
    """
    bounds = {"minimum": minimum, "maximum": maximum, "above": above, "multiple": multiple, "longest": longest}
    shown = {"help": help, "group": group, "flag": flag, "metavar": metavar, "choices": choices}
    kind = {"env": env, "attachment": attachment, "condition": condition, "path": path}
    kind["per_call"] = per_call or attachment or condition is not None
    return dataclasses.field(default=default, metadata={**shown, **kind, **bounds})


@dataclasses.dataclass(frozen=True)
class Settings:
    """What settings dataclasses share."""

    @classmethod
    def names(cls) -> list[str]:
        return [field.name for field in dataclasses.fields(cls)]

    @classmethod
    def from_mapping(cls, values: Mapping[str, Plain]) -> Self:
        """From plain values, as JSON and TOML hold them; an unknown name is an error that suggests the nearest."""
        for key in values:
            if key not in cls.names():
                raise RequestError(f"there is no setting {quoted(key)}; {nearest(key, cls.names())}", fields=(key,))
        hints = _hints(cls)
        return cls(**{name: _coerced(name, value, hints[name]) for name, value in values.items()})

    @classmethod
    def check_one(cls, name: str, value: Plain) -> Plain:
        """The value as its field holds it, checked by itself. Raises RequestError."""
        accepted = _hints(cls)[name]
        coerced = _coerced(name, value, accepted)
        _check(cls.__dataclass_fields__[name], accepted, coerced)
        return coerced

    def to_mapping(self) -> dict[str, Plain]:
        """Plain values, as JSON holds them; an attachment becomes its name and the hash of its contents."""
        return {
            field.name: _plain(field, value)
            for field in dataclasses.fields(self)
            for value in [getattr(self, field.name)]
        }


def either(value: T | None, default: T) -> T:
    """`default` where the value was left open."""
    return default if value is None else value


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of a message on an unknown word: the nearest known one, or all of them."""
    known = list(known)
    near = close_matches(word, known, 1)
    return f"did you mean {near[0]!r}?" if near else "known: " + (", ".join(known) or "none")


def close_matches(word: str, known: Iterable[str], count: int, cutoff: float = 0.6) -> list[str]:
    """Known words that look like this one, the nearest first; long ones are nobody's slip, and take long to compare."""
    if len(word) > LONGEST_WORD:
        return []
    return difflib.get_close_matches(word, [k for k in known if len(k) <= LONGEST_WORD], count, cutoff)


def parse_weights(text: str) -> Weights:
    """LAYER:WEIGHT,… → {layer: weight}. Raises ValueError."""
    pairs = [part.split(":") for part in text.split(",")]
    weights = {int(layer): float(weight) for layer, weight in pairs}
    if len(weights) != len(pairs):
        raise ValueError("a layer is named twice")
    return weights


def fields(cls: type[Settings]) -> list[tuple[Field, tuple[type, ...]]]:
    """Each field with the plain types that its value may have, or each item of its list of values."""
    hints = _hints(cls)
    return [(field, _scalar_types(hints[field.name])) for field in dataclasses.fields(cls)]


def list_fields(cls: type[Settings]) -> dict[str, bool]:
    """The fields that take a list → whether they also take a single value without one."""
    hints = _hints(cls)
    return {name: _takes_one(hint) for name, hint in hints.items() if _list_types(hint)}


def json_schema(cls: type[Settings]) -> dict[str, Plain]:
    """JSON Schema (draft 2020-12) of the plain values that `from_mapping` takes.

    `x-group` is the field's section in the help. `x-attachment` marks pictures and embeddings, which are paths here;
    `x-per-call` marks what may not stand in a settings file. The checks of several fields together are not part of it.
    """
    hints = _hints(cls)
    properties = {field.name: _schema(field, hints[field.name]) for field in dataclasses.fields(cls)}
    whole = {"$schema": DRAFT, "title": cls.__name__, "type": "object"}
    return {**whole, "properties": properties, "additionalProperties": False}


def check_fields(settings: Settings) -> None:
    """Raise RequestError unless every value has its field's type and lies within its bounds."""
    hints = _hints(type(settings))
    for field in dataclasses.fields(settings):
        _check(field, hints[field.name], getattr(settings, field.name))


def check_text(name: str, text: str, longest: int | None = None) -> None:
    """Raise RequestError for text that UTF-8 cannot hold, and for more than `longest` characters."""
    if longest is not None and len(text) > longest:
        raise _fault(name, f" has {len(text):,} characters; it may have at most {longest:,}")
    if not text.isascii() and text != text.encode(errors="ignore").decode():
        raise _fault(name, " is not valid text; it must be valid UTF-8")
    if "\0" in text:
        raise _fault(name, f" contains a null character at {text.index(chr(0)):,}; is it text in UTF-16?")


def _schema(field: Field, accepted: Hint) -> dict[str, Plain]:
    m, forms = field.metadata, _forms(field.metadata, accepted)
    if types.NoneType in _members(accepted) or m["attachment"]:
        enum = {"enum": [*forms[0]["enum"], None]} if "enum" in forms[0] else {}
        forms[0] = {**forms[0], **enum, "type": [forms[0]["type"], "null"]}
    shape = forms[0] if len(forms) == 1 else {"anyOf": forms}
    marks = {"x-attachment": m["attachment"], "x-condition": bool(m["condition"]), "x-per-call": m["per_call"]}
    shown = {"default": as_plain(field.default), "description": m["help"], "x-group": m["group"]}
    return {**shape, **shown, **{mark: True for mark, holds in marks.items() if holds}}


def _forms(m: Mapping[str, Plain], accepted: Hint) -> list[dict[str, Plain]]:
    """The schema of each form that a value may have, None aside."""
    if m["attachment"]:
        return [{"type": "string"}]
    if m["condition"]:
        return [{"type": "array", "items": {"type": "string"}, "maxItems": MOST_CONDITIONS}]
    if Weights in _members(accepted):
        weight = {"type": "number", "minimum": -MAX_WEIGHT, "maximum": MAX_WEIGHT}
        layers = {"propertyNames": {"pattern": r"^-\d+$"}, "additionalProperties": weight, "minProperties": 1}
        return [{"type": "object", **layers}, {"type": "string"}]
    one: dict[str, Plain] = {"type": JSON_TYPES[_scalar_types(accepted)[-1]]}
    one |= {name: m[bound] for bound, name in JSON_BOUNDS.items() if m[bound] is not None}
    one |= {"enum": list(m["choices"])} if m["choices"] else {}
    return [one] * _takes_one(accepted) + [{"type": "array", "items": one}] * bool(_list_types(accepted))


def _coerced(name: str, value: Plain, accepted: Hint) -> Plain:
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
        text = f"{name} {quoted(value)} cannot be read; write LAYER:WEIGHT,…, such as -2:0.7,-8:0.3"
        raise RequestError(text, fields=(name,)) from None
    return value


def as_plain(value: Plain) -> Plain:
    """As JSON gives it back: keys are text there."""
    return {str(key): item for key, item in value.items()} if isinstance(value, dict) else value


def _plain(field: Field, value: Plain | Attachment) -> Plain:
    if field.metadata["attachment"]:
        return _described(value)
    if value is not None and (condition := field.metadata["condition"]):
        return [condition.parse(item).describe() for item in value]
    return as_plain(value)


def _described(attachment: Attachment) -> Plain:
    """What an attachment is, without its folder."""
    if attachment is None or hasattr(attachment, "describe"):
        return attachment and attachment.describe()
    is_path = isinstance(attachment, str | os.PathLike)
    return {"name": os.path.basename(attachment) if is_path else type(attachment).__name__}


def _check(field: Field, accepted: Hint, value: object) -> None:
    if value is None:
        if types.NoneType not in _members(accepted) and not field.metadata["attachment"]:
            raise _fault(field.name, ": a value is needed")
        return
    if field.metadata["attachment"]:
        if isinstance(value, NO_ATTACHMENT):
            raise _mistyped(field.name, value, "the path of a file")
        return
    if condition := field.metadata["condition"]:
        _check_conditions(field.name, condition, value)
        return
    if Weights in _members(accepted):
        _check_weights(field.name, value)
        return
    items = value if isinstance(value, list) and _list_types(accepted) else None
    if items is None and not _takes_one(accepted):
        raise _mistyped(field.name, value, "a list")
    for item in [value] if items is None else items:
        _check_scalar(field, _scalar_types(accepted), item)


def _check_conditions(name: str, condition: type[Condition], value: object) -> None:
    if not isinstance(value, list):
        raise _mistyped(name, value, f"a list of {condition.FORM}")
    if not 1 <= len(value) <= MOST_CONDITIONS:
        raise _fault(name, f": {len(value)} were passed; pass 1 to {MOST_CONDITIONS}, or leave it out")
    for item in value:
        condition.parse(item)


def _check_weights(name: str, value: object) -> None:
    if not isinstance(value, dict) or not value:
        raise _fault(name, f" {quoted(value)} should be a table of layers and weights, such as {{-2: 0.7, -8: 0.3}}")
    for layer, weight in value.items():
        if not isinstance(layer, int) or isinstance(layer, bool) or layer > -1:
            raise _fault(name, f": layer {quoted(layer)} should be a negative integer, counted from the end")
        if not isinstance(weight, int | float) or isinstance(weight, bool) or not abs(weight) <= MAX_WEIGHT:
            raise _fault(
                name, f": the weight {quoted(weight)} of layer {layer} should be a number up to {MAX_WEIGHT:g}"
            )
    if not abs(sum(value.values())) > 1e-6:
        raise _fault(name, ": the weights add up to 0, so they cannot be normalised")


@functools.cache
def _scalar_types(accepted: Hint) -> tuple[type, ...]:
    """The types of a single value, or of a list's items where only lists are accepted."""
    plain = tuple(m for m in _members(accepted) if m is not types.NoneType and typing.get_origin(m) is None)
    return plain or _list_types(accepted) or (str,)  # text on the command line stands for a mapping


@functools.cache
def _list_types(accepted: Hint) -> tuple[type, ...]:
    """The types of a list's items; none where no list is accepted."""
    return next((typing.get_args(m) for m in _members(accepted) if typing.get_origin(m) is list), ())


@functools.cache
def _takes_one(accepted: Hint) -> bool:
    return any(m is not types.NoneType and typing.get_origin(m) is None for m in _members(accepted))


@functools.cache
def _members(accepted: Hint) -> tuple[Hint, ...]:
    is_union = typing.get_origin(accepted) in (typing.Union, types.UnionType)
    return typing.get_args(accepted) if is_union else (accepted,)


def _check_scalar(field: Field, accepted: tuple[type, ...], value: object) -> None:
    name, m = field.name, field.metadata
    numbers = (int, float) if float in accepted else accepted
    if not isinstance(value, numbers) or (isinstance(value, bool) and bool not in accepted):
        raise _mistyped(name, value, "of type " + " or ".join(t.__name__ for t in accepted))
    if m["choices"] and value not in m["choices"]:
        raise _fault(name, f" {quoted(value)} is not known; use {', '.join(m['choices'])}")
    if isinstance(value, str):
        check_text(name, value, m["longest"])
        if m["path"] and not value:  # a shell's variable that was not set
            raise _fault(name, ": the path is empty; write a path or leave it out")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        _check_number(name, m, value)


def _check_number(name: str, m: Mapping[str, Plain], value: float) -> None:
    if value != value:
        raise _fault(name, " is not a number")
    shown = quoted(value)
    if m["minimum"] is not None and value < m["minimum"]:
        raise _fault(name, f" {shown} is too small; the minimum is {m['minimum']}")
    if m["above"] is not None and value <= m["above"]:
        raise _fault(name, f" {shown} is too small; it must be above {m['above']}")
    if m["maximum"] is not None and value > m["maximum"]:
        raise _fault(name, f" {shown} is too large; the maximum is {m['maximum']}")
    if m["multiple"] and value % m["multiple"]:
        down = value // m["multiple"] * m["multiple"]
        raise _fault(name, f" {shown} is not a multiple of {m['multiple']}; nearest {down} or {down + m['multiple']}")


def _mistyped(name: str, value: object, right: str) -> RequestError:
    return _fault(name, f" {quoted(value)} is of type {type(value).__name__}; it should be {right}")


def _fault(name: str, rest: str) -> RequestError:
    """The error on one field; its text begins with the name."""
    return RequestError(name + rest, fields=(name,))
