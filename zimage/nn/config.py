"""Architecture settings: frozen dataclasses that are filled from a checkpoint's `config.json`.

A needed key that the file lacks is an error, never a guess; so is a value that this code does not implement.
"""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from zimage.errors import ConfigError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")


def read_architecture(cls: type[T], config: Mapping[str, object], implemented: Mapping[str, tuple] | None = None) -> T:
    """Fill the dataclass `cls` from `config`.

    `implemented` maps further keys to the values that this code implements, the default first. Raises ConfigError.
    """
    name = config.get("_class_name") or cls.__name__.removesuffix("Config")
    for key, allowed in (implemented or {}).items():
        value = config.get(key, allowed[0])
        if value not in allowed:
            choices = " or ".join(repr(a) for a in allowed)
            raise ConfigError(f"{name} config: {key} = {value!r} is not implemented; it must be {choices}")
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        if field.name in config:
            values[field.name] = _checked(name, field, config[field.name])
        elif field.default is dataclasses.MISSING:
            raise ConfigError(f"{name} config: the key {field.name!r} is missing")
    return cls(**values)


def _checked(name: object, field: dataclasses.Field, value: object) -> object:
    """The value, or ConfigError if it does not have the field's type; lists become tuples, which can be hashed."""
    kinds = {"int": (int,), "float": (int, float), "bool": (bool,), "tuple": (list, tuple), "str": (str,)}
    wanted = str(getattr(field.type, "__name__", field.type))
    for kind, accepted in kinds.items():
        fits = isinstance(value, accepted) and (kind == "bool" or not isinstance(value, bool))
        if wanted.startswith(kind) and not fits:
            raise ConfigError(f"{name} config: {field.name} = {value!r} should be of type {kind}")
    return tuple(value) if isinstance(value, list) else value
