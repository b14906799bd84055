"""Plain values from outside, checked against the kinds that they should have: a file or a caller may say anything.

A kind is a type as fields are annotated with it: text, a number, `list[…]`, `tuple[…]` (a list in JSON),
`dict[str, …]`, a union, a dataclass of these; or a dict of names and kinds, all of which have to be there.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

from zimage.settings.fields import Hint, Plain

WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", types.NoneType: "null"}
LARGEST = 1 << 64


def mistake(value: Plain, kind: Hint, place: str) -> str:
    """What is wrong with a value, in words that name the place; empty where it is of its kind."""
    if isinstance(kind, dict):
        return _in_record(value, kind, place)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _in_record(value, typing.get_type_hints(kind), place, others=False)
    outer, inner = typing.get_origin(kind), typing.get_args(kind)
    if outer in (typing.Union, types.UnionType):
        found = [mistake(value, one, place) for one in inner if one is not types.NoneType or value is None]
        return "" if "" in found else found[0]
    if outer in (list, tuple):
        return _in_list(value, inner, place)
    if outer is dict:
        return _in_record(value, dict.fromkeys(value, inner[1]) if isinstance(value, dict) else {}, place)
    return "" if kind is Any or _is(value, kind) else f"{place} should be {WORDS[kind]}, not {_shown(value)}"


def _in_record(value: Plain, kinds: Mapping[str, Hint], place: str, others: bool = True) -> str:
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        return f"{place} should be a table of named values, not {_shown(value)}"
    for name, kind in kinds.items():
        if name not in value:
            return f"{place} lacks {name!r}"
        if found := mistake(value[name], kind, f"{place}.{name[:40]}"):
            return found
    unknown = [name for name in value if name not in kinds]
    return f"{place} has an unknown entry {unknown[0][:40]!r}" if unknown and not others else ""


def _in_list(value: Plain, inner: tuple[Hint, ...], place: str) -> str:
    """`inner` is the kind of all items, by itself or before an ellipsis, or that of each item."""
    if not isinstance(value, list | tuple):
        return f"{place} should be a list, not {_shown(value)}"
    kinds = [inner[0]] * len(value) if len(inner) == 1 or inner[1:] == (...,) else list(inner)
    if len(value) != len(kinds):
        return f"{place} has {len(value)} items; it should have {len(kinds)}"
    found = (mistake(item, kind, f"{place}[{i}]") for i, (item, kind) in enumerate(zip(value, kinds, strict=True)))
    return next(filter(None, found), "")


def _is(value: Plain, kind: type) -> bool:
    if isinstance(value, bool) or kind in (bool, types.NoneType):
        return type(value) is kind
    if kind is str:
        return isinstance(value, str) and (value.isascii() or value == value.encode(errors="ignore").decode())
    number = isinstance(value, int) or (kind is float and isinstance(value, float) and math.isfinite(value))
    return number and abs(value) < LARGEST


def _shown(value: Plain) -> str:
    """What was given instead: of text and numbers the beginning, of others the kind."""
    plain = value is None or isinstance(value, str | float) or (isinstance(value, int) and abs(value) < LARGEST)
    return f"{value!r:.40}" if plain else type(value).__name__
