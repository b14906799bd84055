"""`config`: which settings are in force, and where each comes from."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import click

from zimage.cli import terminal
from zimage.cli.options import Command, Group, GroupedCommand, options_of
from zimage.cli.progress import counted
from zimage.cli.settings import configured, resolve_options
from zimage.errors import ConfigFileError
from zimage.settings.merging import EVERY_SETTINGS, FIELDS
from zimage.settings.profiles import EXAMPLE, Resolved, find_config, read_config, usual_places

CREATE_ONE = "create one with: zimage config example > zimage.toml"


@click.group(cls=Group)
def config() -> None:
    """Show settings files, their profiles and the resulting settings."""


def every_setting(command: Command) -> Command:
    """A decorator that adds the options of all settings."""
    for settings in reversed(EVERY_SETTINGS):
        command = options_of(settings, skip=("prompt",))(command)
    return command


@config.command(cls=GroupedCommand)
@configured
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@every_setting
def show(as_json: bool, **options: object) -> None:
    """Show every setting, its value and where it comes from."""
    resolved = resolve_options(options)
    if as_json:
        terminal.out_json(_facts(resolved))
        return
    for line, is_default in _lines(resolved):
        terminal.out(line, dim=is_default)


@config.command()
@click.option("--config", "named", metavar="FILE", help="Settings file, as for the other commands.")
def profiles(named: str | None) -> None:
    """List the profiles of the settings file."""
    found = read_config(_file(named))
    width = max(map(len, found.profiles), default=0)
    for name, entries in found.profiles.items():
        inherits = f"  inherits {', '.join(found.inherited(name))}" if found.inherited(name) else ""
        terminal.out(f"{name:{width}}  {counted(len(entries), 'setting'):11}{inherits}".rstrip())


@config.command()
@click.option("--config", "named", metavar="FILE", help="Settings file, as for the other commands.")
def path(named: str | None) -> None:
    """Print the path of the settings file in use."""
    terminal.out(str(_file(named).absolute()))


@config.command()
def example() -> None:
    """Print a commented settings file to start from."""
    terminal.out(EXAMPLE.read_text(encoding="utf-8"), end="")


def _file(named: str | None) -> Path:
    found = find_config(named)
    if found is None:
        raise ConfigFileError(f"no settings file exists at {' or '.join(map(str, usual_places()))}; {CREATE_ONE}")
    return found


def _facts(resolved: Resolved) -> dict[str, object]:
    """All that `config show` prints, as plain values."""
    return {
        "file": str(resolved.config.path.absolute()) if resolved.config else None,
        "profile": resolved.profile,
        "settings": {n: {"value": value, "source": resolved.source(n)} for n, value in _values(resolved).items()},
        "left_out": {
            name: {"value": entry.value, "source": entry.source, "reason": reason}
            for name, (entry, reason) in resolved.left_out.items()
        },
    }


def _values(resolved: Resolved) -> dict[str, object]:
    """Every setting's value; those of a single call only where they were passed."""
    values: dict[str, object] = {}
    for settings in EVERY_SETTINGS:
        values |= settings.from_mapping(resolved.of(settings)).to_mapping()
    return {n: v for n, v in values.items() if n in resolved.entries or not FIELDS[n].metadata["per_call"]}


def _lines(resolved: Resolved) -> Iterator[tuple[str, bool]]:
    """What `show` prints, and whether it is only a default."""
    yield from ((line, False) for line in _file_lines(resolved))
    values = _values(resolved)
    groups: dict[str, list[str]] = {}
    for name in values:
        groups.setdefault(FIELDS[name].metadata["group"], []).append(name)
    names = max(map(len, values))
    shown = {name: _shown(value) for name, value in values.items()}
    widths = [len(text) for text in shown.values()]
    width = max(w for w in widths if w <= max(24, shutil.get_terminal_size().columns // 3))
    for group, members in groups.items():
        yield f"\n{group}", False
        for name in members:
            line = f"  {name:{names}}  {shown[name]:{width}}  {resolved.source(name)}"
            yield (line, False) if name in resolved.entries else (line + _meaning(name), True)
    for name, (entry, reason) in resolved.left_out.items():
        yield f"\nleft out: {name} {_shown(entry.value)} from {entry.source}, because\n  {reason}", False


def _meaning(name: str) -> str:
    """What a default of None comes to, as the help says."""
    field = FIELDS[name]
    said = re.search(r"Default: (.+)\.$", field.metadata["help"]) if field.default is None else None
    return f": {said[1]}" if said else ""


def _file_lines(resolved: Resolved) -> Iterator[str]:
    if resolved.config is None:
        yield f"file     none ({' or '.join(map(str, usual_places()))}); {CREATE_ONE}"
        return
    yield f"file     {resolved.config.path.absolute()}"
    others = ", ".join(name for name in resolved.config.profiles if name != resolved.profile) or "none"
    if resolved.profile is None:
        yield f"profile  none: the file has no [default]; choose one with --profile: {others}"
        return
    inherited = resolved.config.inherited(resolved.profile)
    yield f"profile  {resolved.profile}{', inherits ' + ', '.join(inherited) if inherited else ''} (others: {others})"


def _shown(value: object) -> str:
    """A value on one line: an empty one as a dash, a long text cut."""
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    if isinstance(value, dict):
        return ", ".join(f"{key}: {item}" for key, item in value.items())
    text = " ".join(str(value).split())
    return text if len(text) <= 72 else f"{text[:71]}…"
