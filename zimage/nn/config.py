"""Architecture settings: frozen dataclasses that are filled from a checkpoint's `config.json`.

Each field's annotation is the whole check of its value: its kind and, by `Between`, its bounds. The bounds admit every
published model with room to spare. Nothing is built of a value outside, which could take hours or all memory.
A needed key that the file lacks is an error, never a guess; so is a value that this code does not implement.
"""

import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, TypeAlias, TypeVar

from zimage.errors import ConfigError, quoted

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")
Hint: TypeAlias = Any  # a type, as a field is annotated with it


class Between(NamedTuple):
    """The least and the greatest value of a number, or number of a list's items; both may be reached."""

    low: float
    high: float
    multiple: int = 1


Depth = Annotated[int, Between(1, 256)]  # layers one after another; the time to build them grows with their number
GroupDepth = Annotated[int, Between(1, 32)]  # of one of several groups of layers
Heads = Annotated[int, Between(1, 1024)]
HeadSize = Annotated[int, Between(2, 4096, multiple=2)]  # rotations turn pairs
Width = Annotated[int, Between(1, 1 << 20)]
Channels = Annotated[int, Between(1, 1 << 16)]
Colours = Annotated[int, Between(3, 3)]  # a picture's
Epsilon = Annotated[float, Between(1e-20, 1)]
Positive = Annotated[float, Between(1e-12, 1e12)]
Offset = Annotated[float, Between(-1e6, 1e6)]


def read_architecture(cls: type[T], config: Mapping[str, object], implemented: Mapping[str, tuple] | None = None) -> T:
    """Fill the dataclass `cls` from `config`, every value checked.

    `implemented` maps further keys to the values that this code implements, the default first. Raises ConfigError.
    """
    check_implemented(cls, config, implemented or {})
    hints = typing.get_type_hints(cls, include_extras=True)
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        if field.name in config:
            values[field.name] = _checked(cls, field.name, hints[field.name], config[field.name])
        elif field.default is dataclasses.MISSING:
            raise fault(cls, f"the key {field.name!r} is missing")
    return cls(**values)


def check_implemented(cls: type, config: Mapping[str, object], implemented: Mapping[str, tuple]) -> None:
    """Raise ConfigError where a value is not among those that this code implements."""
    for key, allowed in implemented.items():
        value = config.get(key, allowed[0])
        if value not in allowed:
            choices = " or ".join(repr(a) for a in allowed)
            raise fault(cls, f"{key} = {quoted(value)} is not implemented; it must be {choices}")


def section(cls: type, config: Mapping[str, object], key: str) -> Mapping[str, object]:
    """An object within the config, empty where it is absent or null. Raises ConfigError."""
    value = config.get(key)
    if value is not None and not isinstance(value, Mapping):
        raise fault(cls, f"{key} = {quoted(value)} should be an object")
    return value or {}


def check_divides(cls: type, divisor: str, divided: str, config: object) -> None:
    """Raise ConfigError unless one field divides another, or every item of it."""
    by, found = getattr(config, divisor), getattr(config, divided)
    if isinstance(found, Iterable) and any(item % by for item in found):
        raise fault(cls, f"{divisor} = {by} must divide {divided} = {list(found)}")
    if isinstance(found, int) and found % by:
        raise fault(cls, f"{divided} = {found} must be a multiple of {divisor} = {by}")


def fault(cls: type, text: str) -> ConfigError:
    """The error on the config of an architecture."""
    return ConfigError(f"{cls.__name__.removesuffix('Config')} config: {text}")


def _checked(cls: type, key: str, hint: Hint, value: object) -> object:
    """The value; lists become tuples, which can be hashed."""
    if not _fits(hint, value):
        raise fault(cls, f"{key} = {quoted(value)} should be {_described(hint)}")
    return tuple(value) if isinstance(value, list) else value


def _fits(hint: Hint, value: object) -> bool:
    kind, bounds = _parts(hint)
    if words := _words(kind):
        return (value is None or isinstance(value, str)) and value in words
    if typing.get_origin(kind) is tuple:
        item, count = _items(kind, bounds)
        is_list = isinstance(value, list | tuple) and count.low <= len(value) <= count.high
        return is_list and all(_fits(item, each) for each in typing.cast("list[object]", value))
    if kind is bool:
        return isinstance(value, bool)
    accepted = (int, float) if kind is float else (int,)
    if not isinstance(value, accepted) or isinstance(value, bool):
        return False
    return bounds.low <= value <= bounds.high and not (kind is int and value % bounds.multiple)


def _described(hint: Hint) -> str:
    kind, bounds = _parts(hint)
    if words := _words(kind):
        return " or ".join("null" if word is None else repr(word) for word in words)
    if typing.get_origin(kind) is tuple:
        item, count = _items(kind, bounds)
        return f"a list of {_range(count, ' to ')} values {_described(item)}"
    if kind is bool:
        return "of type bool"
    multiple = f", a multiple of {bounds.multiple}" if bounds.multiple > 1 else ""
    return f"of type {kind.__name__}, {_range(bounds)}{multiple}"


def _range(bounds: Between, to: str = "") -> str:
    low, high = (f"{end:,}" if isinstance(end, int) else f"{end:g}" for end in bounds[:2])
    return low if low == high else f"{low}{to}{high}" if to else f"from {low} to {high}"


def _parts(hint: Hint) -> tuple[Hint, Between]:
    """The type without its bounds, and these."""
    if typing.get_origin(hint) is not Annotated:
        return hint, Between(-float("inf"), float("inf"))
    kind, bounds = typing.get_args(hint)
    return kind, bounds


def _words(kind: Hint) -> tuple[str | None, ...]:
    """The words of a Literal, and None where it may be absent; empty for every other type."""
    parts = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    literals = [typing.get_args(part) for part in parts if typing.get_origin(part) is typing.Literal]
    return (*(word for words in literals for word in words), *([None] if literals and len(parts) > 1 else []))


def _items(kind: Hint, bounds: Between) -> tuple[Hint, Between]:
    """The type of a list's items, and how many there may be."""
    items = typing.get_args(kind)
    return items[0], bounds if items[-1] is Ellipsis else Between(len(items), len(items))
