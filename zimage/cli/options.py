"""Command-line options made from the settings' dataclass fields, and help that shows them by their groups."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from zimage.cli import terminal
from zimage.cli.spellings import SPELLINGS, Spelled, names_elsewhere, spell
from zimage.settings.fields import Field, Plain, Settings, fields, list_fields
from zimage.settings.merging import FIELDS
from zimage.settings.paths import user_path

Command = TypeVar("Command", bound=Callable[..., object])
COMPONENTS = ("text_encoder", "dit", "vae")  # the registry's required ones, which cannot be imported quickly
METAVARS = {str: "TEXT", int: "INT", float: "FLOAT"}


class _UserPath(click.Path):
    """A path as people write it, whose `~` the shell may have left."""

    def convert(self, value: str | os.PathLike[str], param: click.Parameter | None, ctx: click.Context | None) -> Path:
        return user_path(value, param.name or "path" if param else "path")


PATH = _UserPath()


class _Helped(click.Command):
    """A command whose help goes through the terminal's one way."""

    def get_help_option(self, ctx: click.Context) -> click.Option | None:
        option = super().get_help_option(ctx)
        if option is not None:
            option.callback = _show_help
        return option


class PlainCommand(_Helped):
    """A command with options of its own only."""


class Group(_Helped, click.Group):
    """A command that has commands."""

    command_class = PlainCommand


class GroupedCommand(_Helped):
    """A command whose help shows its settings section by section, after its own options."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        rest = super().parse_args(ctx, args)
        spell(ctx)
        return rest

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {"Options": []}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None and isinstance(param, click.Option):
                name = param.spelling.sets[0] if isinstance(param, Spelled) else param.name
                field = FIELDS.get(name or "")
                sections.setdefault(field.metadata["group"] if field else "Options", []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


def options_of(
    settings: type[Settings], skip: tuple[str, ...] = (), only: tuple[str, ...] | None = None
) -> Callable[[Command], Command]:
    """A decorator that adds one option per field of a settings dataclass; options that are not passed stay None."""

    def decorate(command: Command) -> Command:
        named = [name for name in only or settings.names() if name not in skip]
        wanted = [one for one in fields(settings) if one[0].name in named]
        names, repeatable = {field.name for field, _ in wanted}, list_fields(settings)
        for field, kinds in reversed(wanted):
            for spelling in SPELLINGS:
                if spelling.sets[-1] == field.name and names.issuperset(spelling.sets):
                    command = click.option(*spelling.flags, cls=Spelled, spelling=spelling)(command)
            command = _option(field, kinds, field.name in repeatable)(command)
        return command

    return decorate


def given(values: Mapping[str, Plain], settings: type[Settings]) -> dict[str, Plain]:
    """Those of all option values that belong to `settings` and were passed."""
    found = {name: values[name] for name in settings.names() if values.get(name) not in (None, ())}
    takes_one = list_fields(settings)
    return {name: _single(value, takes_one.get(name, True)) for name, value in found.items()}


def _show_help(ctx: click.Context, param: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        terminal.out(ctx.get_help())
        ctx.exit()


def _option(field: Field, kinds: tuple[type, ...], repeatable: bool) -> Callable[[Command], Command]:
    m, flag = field.metadata, field.name.replace("_", "-")
    default = "" if field.default in (None, "") or field.default is False else f" Default: {field.default}."
    default += f" Environment: {m['env']}." if m["env"] else ""
    if kinds[-1] is bool:
        return click.option(f"--{flag}/--no-{flag}", field.name, default=None, help=m["help"] + default)
    kind = str if m["attachment"] or m["condition"] else kinds[-1]
    metavar = None if m["choices"] else "PATH" if m["path"] else METAVARS[kind]
    held: dict[str, Any] = {"type": click.Choice(m["choices"]) if m["choices"] else kind, "multiple": repeatable}
    own = [name for name in (m["flag"], f"--{flag}") if name]
    shown = click.option(*own, field.name, metavar=m["metavar"] or metavar, help=m["help"] + default, **held)
    if not (others := names_elsewhere(field.name)):
        return shown
    hidden = click.option(*others, field.name, hidden=True, **held)  # of both the value that comes last counts
    return lambda command: shown(hidden(command))


def _single(value: Plain, takes_one: bool) -> Plain:
    """The values of a repeatable option as a list; a single one by itself, where the field takes one."""
    if not isinstance(value, tuple):
        return value
    return value[0] if takes_one and len(value) == 1 else list(value)
