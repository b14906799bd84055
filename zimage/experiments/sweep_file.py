"""A sweep as a TOML file, for values that a command line holds badly: long texts, lists, blends, groups of axes.

prompts = ["a quiet harbour", "a portrait"]
seeds = "0-3"                            # or a list of numbers

[settings]                               # of every cell; paths are relative to the file
steps = 8

[vary]                                   # axes, crossed with one another and with those below
hidden_layer = [-2, -6]
lora = ["", "style.safetensors:0.8"]

[[zip]]                                  # axes that change together
force_think_block = ["", true, true]
thinking_content = ["", "", "Soft light."]
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from zimage.errors import ConfigFileError, RequestError
from zimage.experiments.axes import OWNERS, Axis, axis, check_name, parse_seeds, zipped
from zimage.settings.declared import MASK_ALPHA
from zimage.settings.fields import Plain, nearest
from zimage.settings.merging import FIELDS
from zimage.settings.paths import user_path
from zimage.settings.scale import FIXED
from zimage.settings.toml_file import TomlFile, read_text

TABLES = ("prompts", "seeds", "settings", "vary", "zip")


@dataclass(frozen=True)
class SweepFile:
    """What a file asks for; what it leaves open is empty."""

    prompts: list[str]
    seeds: list[int]
    settings: dict[str, Plain]
    axes: list[Axis]


def read_sweep(path: Path) -> SweepFile:
    """Read a file and check all of it. Raises ConfigFileError, which names the line."""
    file = TomlFile(path, read_text(path))
    if unknown := [name for name in file.document if name not in TABLES]:
        raise file.fault(f"there is no table {unknown[0]!r}; {nearest(unknown[0], TABLES)}", unknown[0])
    axes = [_axis(file, "vary", name, values) for name, values in _table(file, "vary").items()]
    for table in _groups(file):
        group = [_axis(file, "zip", name, values) for name, values in table.items()]
        axes += _at(file, ("zip", *table), partial(zipped, group))
    settings = {name: _setting(file, name, value) for name, value in _table(file, "settings").items()}
    return SweepFile(_prompts(file), _seeds(file), settings, axes)


def _at(file: TomlFile, keys: tuple[str, ...], read: Callable[[], Any]) -> Any:
    """What `read` returns; its faults name the line of these keys."""
    try:
        return read()
    except ConfigFileError:
        raise
    except RequestError as error:
        raise file.fault(str(error), *keys, fields=error.fields) from None


def _table(file: TomlFile, name: str) -> dict[str, Plain]:
    found = file.document.get(name, {})
    if not isinstance(found, dict):
        raise file.fault(f"{name} should be a table, [{name}]", name)
    return found


def _groups(file: TomlFile) -> list[dict[str, Plain]]:
    found = file.document.get("zip", [])
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise file.fault("zip should be tables, [[zip]]", "zip")
    return found


def _prompts(file: TomlFile) -> list[str]:
    found = file.document.get("prompts", [])
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise file.fault("prompts should be a list of texts", "prompts")
    return found


def _seeds(file: TomlFile) -> list[int]:
    found = file.document.get("seeds", [])
    text = ",".join(map(str, found)) if isinstance(found, list) else str(found)
    return _at(file, ("seeds",), lambda: parse_seeds(text)) if text else []


def _axis(file: TomlFile, table: str, name: str, values: Plain) -> Axis:
    if not isinstance(values, list):
        raise file.fault(f"{name} should be a list of values", table, name)

    def read() -> Axis:
        check_name(name)
        return axis(name, [_rooted(file, name, value) for value in values])

    return _at(file, (table, name), read)


def _setting(file: TomlFile, name: str, value: Plain) -> Plain:
    def read() -> Plain:
        if name in FIXED:
            raise RequestError(f"{name} is not set here: {FIXED[name]}", fields=(name,))
        check_name(name)
        return OWNERS[name].check_one(name, _rooted(file, name, value))

    return _at(file, ("settings", name), read)


def _rooted(file: TomlFile, name: str, value: Plain) -> Plain:
    """A value whose paths are relative to the file."""
    m = FIELDS[name].metadata
    if isinstance(value, list):
        return [_rooted(file, name, one) for one in value]
    names_file = m["path"] or m["attachment"] or m["condition"]
    if not names_file or not isinstance(value, str) or not value or (name == "mask" and value == MASK_ALPHA):
        return value
    return str(file.path.parent / user_path(value, name))
