"""From click's options to resolved settings: the one way that every command takes."""

from collections.abc import Callable, Mapping
from typing import Any

import click

from zimage.cli.options import given
from zimage.settings.declared import ALL_SETTINGS, LoadSettings
from zimage.settings.profiles import Resolved, find_config, read_config, resolve


def configured(command: Callable) -> Callable:
    """A decorator that adds the options naming the settings file and its profile."""
    command = click.option(
        "--profile", metavar="NAME", help="Profile of the settings file. Default: ZIMAGE_PROFILE, else default."
    )(command)
    return click.option(
        "--config",
        metavar="FILE",
        help="Settings file (TOML). Default: ZIMAGE_CONFIG, else zimage.toml here, else the user's own.",
    )(command)


def resolve_options(options: Mapping[str, Any], origin: Mapping[str, Any] | None = None) -> Resolved:
    """Options before the picture's request `origin`, environment, file and defaults. Raises RequestError."""
    path = find_config(options.get("config"))
    values = {name: value for settings in ALL_SETTINGS for name, value in given(options, settings).items()}
    return resolve(values, origin, path and read_config(path), options.get("profile"))


def load_pipeline(resolved: Resolved) -> Any:
    """The pipeline that settings ask for. Torch is imported only now: help and usage errors are quick without it."""
    from zimage.pipeline import ZImage

    loading = resolved.of(LoadSettings)
    with resolved.naming_sources():
        return ZImage.load(loading.pop("model", None), **loading)
