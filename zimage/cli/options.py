"""Command-line options made from the settings' dataclass fields."""

from collections.abc import Callable
from typing import Any

import click

from zimage.settings import fields, list_fields


def options_of(settings: type, skip: tuple[str, ...] = (), only: tuple[str, ...] | None = None) -> Callable:
    """A decorator that adds one option per field of a settings dataclass; options not given stay None."""

    def decorate(command: Callable) -> Callable:
        repeatable = list_fields(settings)
        for field, kinds in reversed(fields(settings)):
            if field.name not in skip and (only is None or field.name in only):
                command = _option(field, kinds, field.name in repeatable)(command)
        return command

    return decorate


def given(values: dict[str, Any], settings: type, skip: tuple[str, ...] = ()) -> dict[str, Any]:
    """Of all option values those that belong to `settings` and were given."""
    names = {field.name for field, _ in fields(settings)} - set(skip)
    found = {name: value for name, value in values.items() if name in names and value not in (None, ())}
    takes_one = list_fields(settings)
    return {name: _plain(value, takes_one.get(name, True)) for name, value in found.items()}


def _option(field: Any, kinds: tuple[type, ...], repeatable: bool) -> Callable:
    names = [n for n in (field.metadata["flag"], "--" + field.name.replace("_", "-")) if n]
    default = "" if field.default in (None, "") else f" Default: {field.default}."
    choices = field.metadata["choices"]
    if kinds[-1] is bool:
        return click.option(*names, field.name, is_flag=True, default=None, help=field.metadata["help"])
    return click.option(
        *names,
        field.name,
        type=click.Choice(choices) if choices else kinds[-1],
        multiple=repeatable,
        metavar=field.metadata["metavar"] or (None if choices else kinds[-1].__name__.upper()),
        help=field.metadata["help"] + default,
    )


def _plain(value: Any, takes_one: bool) -> Any:
    """What repeatable options collect, as a list; given once, as the single value where the field takes one."""
    if not isinstance(value, tuple):
        return value
    return value[0] if takes_one and len(value) == 1 else list(value)
