"""From click's options to resolved settings: the one path that every command takes."""

import contextlib
import gc
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, TypeAlias

import click

from zimage.cli.options import Command, given
from zimage.cli.trust import check_folder, check_server
from zimage.settings.environment import CONFIG, PROFILE
from zimage.settings.fields import Plain
from zimage.settings.loading import LoadSettings
from zimage.settings.merging import EVERY_SETTINGS
from zimage.settings.profiles import Resolved, find_config, is_own_file, read_config, resolve

if TYPE_CHECKING:
    from zimage.pipeline import ZImage

Resolve: TypeAlias = Callable[[Mapping[str, Plain]], Resolved]
NOTHING: Mapping[str, Plain] = {}


def configured(command: Command) -> Command:
    """A decorator that adds the options --config and --profile."""
    profile = f"Profile in the settings file. Default: {PROFILE}, else [default]."
    config = f"Settings file (TOML). Default: {CONFIG}, else ./zimage.toml, else the user's own."
    command = click.option("--profile", metavar="NAME", help=profile)(command)
    return click.option("--config", metavar="FILE", help=config)(command)


def resolve_options(options: Mapping[str, Plain], origin: Mapping[str, Plain] | None = None) -> Resolved:
    """The options over the picture's request `origin`, the environment, the file and defaults. Raises RequestError."""
    return resolver(options, origin)({})


def resolver(options: Mapping[str, Plain], origin: Mapping[str, Plain] | None = None) -> Resolve:
    """The same for values that stand over the options, each time others; the settings file is read once."""
    named = options.get("config")
    path = find_config(named)
    config = None if path is None else read_config(path, is_own_file(path, named))
    values = {name: value for settings in EVERY_SETTINGS for name, value in given(options, settings).items()}
    return lambda over: resolve({**values, **over}, origin, config, options.get("profile"))


def load_pipeline(resolved: Resolved, other: Mapping[str, Plain] = NOTHING) -> "ZImage":
    """The pipeline that the settings ask for, but with `other` ones. Only this imports torch, so that help is quick."""
    with _nothing_to_collect():
        from zimage.pipeline import ZImage

    loading = {**resolved.of(LoadSettings), **other}
    check_server(resolved, "encoder_url")
    with resolved.naming_sources():
        check_folder(resolved, "cache_folder")
        return ZImage.load(loading.pop("model", None), **loading)


@contextlib.contextmanager
def _nothing_to_collect() -> Iterator[None]:
    """For an import: what it makes stays, and looking for garbage among it takes an eighth of a command's start."""
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
