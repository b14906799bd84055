"""Architecture settings: frozen dataclasses filled from a checkpoint's `config.json`.

A key the dataclass needs and the file lacks is an error, never a guess; so is a value this code does not implement.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from zimage.errors import ConfigError

T = TypeVar("T")


def read_architecture(cls: type[T], config: Mapping[str, Any], implemented: Mapping[str, tuple] | None = None) -> T:
    """Fill the dataclass `cls` from `config`.

    `implemented` maps further keys to the tuple of values this code implements; a key that is absent is taken as
    the first of them. Raises ConfigError naming the key.
    """
    name = config.get("_class_name") or cls.__name__.removesuffix("Config")
    for key, allowed in (implemented or {}).items():
        value = config.get(key, allowed[0])
        if value not in allowed:
            choices = " or ".join(repr(a) for a in allowed)
            raise ConfigError(f"{name} config: {key} = {value!r} is not implemented; it must be {choices}")
    values = {}
    for field in dataclasses.fields(cls):
        if field.name in config:
            values[field.name] = _checked(name, field, config[field.name])
        elif field.default is dataclasses.MISSING:
            raise ConfigError(f"{name} config: the key {field.name!r} is missing")
    return cls(**values)


def _checked(name: str, field: dataclasses.Field, value: Any) -> Any:
    """Refuse a value of another type than the field's; lists become tuples so that the dataclass stays hashable."""
    kinds = {"int": (int,), "float": (int, float), "bool": (bool,), "tuple": (list, tuple), "str": (str,)}
    wanted = str(getattr(field.type, "__name__", field.type))
    for kind, accepted in kinds.items():
        fits = isinstance(value, accepted) and (kind == "bool" or not isinstance(value, bool))
        if wanted.startswith(kind) and not fits:
            raise ConfigError(f"{name} config: {field.name} = {value!r} should be of type {kind}")
    return tuple(value) if isinstance(value, list) else value
