"""Which settings of a `zimage.toml` that merely lies in the current folder are not followed as the user's own are.

Such a file comes with whatever is unpacked or cloned: it should decide neither who is sent a secret nor where files are
written, and whom it has prompts sent to is said.
"""

import logging
import os

from zimage.errors import RequestError, printable, quoted
from zimage.settings.environment import ENCODER_TOKEN, REWRITER_KEY, encoder_token, rewriter_key
from zimage.settings.paths import user_path
from zimage.settings.profiles import Resolved

log = logging.getLogger("zimage")

SECRETS = {"rewriter_url": (REWRITER_KEY, rewriter_key), "encoder_url": (ENCODER_TOKEN, encoder_token)}


def check_server(resolved: Resolved, setting: str) -> None:
    """Say which server is asked where the user did not name it. Raises RequestError where it would get a secret."""
    entry = resolved.entries.get(setting)
    if entry is None or not entry.value or entry.own:
        return
    url, (variable, secret) = printable(entry.value[:80]), SECRETS[setting]
    if secret() is not None:
        raise RequestError(
            f"{setting} {url} comes from {entry.source}, and {variable} goes only to a server that you name yourself; "
            f"to send it there pass --{setting.replace('_', '-')} {url}, else unset {variable}",
            fields=(setting,),
        )
    log.warning("prompts are sent to %s, which %s names", url, entry.source)


def check_writing(resolved: Resolved, folder: str | None) -> None:
    """Raise RequestError where captions would be written outside of the current folder."""
    if folder is None or resolved.is_own("cache_folder"):
        return
    here = os.path.realpath(".")
    if os.path.commonpath([os.path.realpath(user_path(folder, "cache_folder")), here]) != here:
        text = f"cache_folder {quoted(folder)} lies outside of the current folder; pass --cache-folder to use it"
        raise RequestError(text, fields=("cache_folder",))
