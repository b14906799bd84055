"""The variables of the environment: all names stand here or beside their fields, and all values are read here."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from zimage.errors import RequestError, quoted
from zimage.settings.fields import Plain, Settings, fields, list_fields
from zimage.settings.paths import user_path
from zimage.settings.serving import TOKEN

CONFIG = "ZIMAGE_CONFIG"  # the settings file
PROFILE = "ZIMAGE_PROFILE"  # its profile
DEBUG = "ZIMAGE_DEBUG"  # show the traceback of a fault of the program itself
# Secrets of servers: no settings, so that no file or picture ever holds them.
REWRITER_KEY = "ZIMAGE_REWRITER_KEY"  # for the one that rewrites
ENCODER_TOKEN = "ZIMAGE_ENCODER_TOKEN"  # for the one that encodes
TRUE, FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


def from_environment(settings: type[Settings], environ: Mapping[str, str] = os.environ) -> dict[str, Plain]:
    """The checked values of those fields of `settings` whose variable (`env` in the declaration) is set and not empty.

    They rank below what a caller passes and above defaults: `LoadSettings(**from_environment(LoadSettings) | passed)`.
    Raises RequestError, which names the variable in its text and the field in its `fields`.
    """
    values = {}
    for field, kinds in fields(settings):
        variable = field.metadata["env"]
        if variable and (text := environ.get(variable)):
            try:
                value = from_text(field.name, text, kinds[-1])
                takes_one = list_fields(settings).get(field.name, True)
                values[field.name] = settings.check_one(field.name, value if takes_one else [value])
            except RequestError as error:
                raise error.with_text(f"{error} (from {variable})") from None
    return values


def config_folder(environ: Mapping[str, str] = os.environ) -> Path | None:
    """The folder `zimage` among the user's settings; it may not exist. None for a user without a home folder."""
    return _own_folder("APPDATA" if sys.platform == "win32" else "XDG_CONFIG_HOME", "~/.config", environ)


def data_folder(environ: Mapping[str, str] = os.environ) -> Path | None:
    """The same among the user's data."""
    return _own_folder("LOCALAPPDATA" if sys.platform == "win32" else "XDG_DATA_HOME", "~/.local/share", environ)


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path | None:
    """The same among what can be made again."""
    return _own_folder("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME", "~/.cache", environ)


def _own_folder(variable: str, usual: str, environ: Mapping[str, str]) -> Path | None:
    """Raises RequestError for a variable that names no folder."""
    if home := environ.get(variable):
        return user_path(home, variable) / "zimage"
    try:
        return user_path(usual, variable) / "zimage"
    except RequestError:
        return None


def rewriter_key(environ: Mapping[str, str] = os.environ) -> str | None:
    """The secret key of the server that rewrites, if there is one."""
    return environ.get(REWRITER_KEY) or None


def server_token(environ: Mapping[str, str] = os.environ) -> str | None:
    """The token of a server, if there is one: a server asks its clients for it, a client sends it to a server."""
    return (environ.get(TOKEN) or "").strip() or None


def encoder_token(environ: Mapping[str, str] = os.environ) -> str | None:
    """The token of the server that encodes, if there is one."""
    return environ.get(ENCODER_TOKEN) or None


def from_text(name: str, text: str, kind: type) -> Plain:
    """The value that a text stands for. Raises RequestError."""
    if kind is bool and text.lower() not in TRUE + FALSE:
        raise RequestError(f"{name} {quoted(text)} should be one of {', '.join(TRUE + FALSE)}", fields=(name,))
    try:
        return text.lower() in TRUE if kind is bool else kind(text)
    except ValueError:
        raise RequestError(f"{name} {quoted(text)} should be of type {kind.__name__}", fields=(name,)) from None
