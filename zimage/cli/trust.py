"""What a settings file may not decide that merely lies in the current folder: it may have come with an archive.

Where secrets go, who may reach this computer, what is written outside of the folder and what is deleted is up to the
user: by an option, a variable, their own settings file, or one that they name.
"""

import logging
import os

from zimage.errors import RequestError, printable, quoted
from zimage.settings.environment import ENCODER_TOKEN, REWRITER_KEY, encoder_token, rewriter_key
from zimage.settings.paths import user_path
from zimage.settings.profiles import Resolved

log = logging.getLogger("zimage")

SECRETS = {"rewriter_url": (REWRITER_KEY, rewriter_key), "encoder_url": (ENCODER_TOKEN, encoder_token)}
KEEPING = ("keep_days", "keep_gb")
SERVING = {
    "host": "opens the server to other computers",
    "address": "sends prompts and pictures to other computers",
    "token_file": "decides who may use the server",
    "allow_host": "decides who may use the server",
    **dict.fromkeys(KEEPING, "deletes pictures of yours"),
}


def check_server(resolved: Resolved, name: str) -> None:
    """Say which server is asked where the user did not name it. Raises RequestError where it would get a secret."""
    if resolved.is_own(name) or not (value := resolved.entries[name].value):
        return
    url, source, (variable, secret) = printable(value[:80]), resolved.source(name), SECRETS[name]
    if secret() is not None:
        raise RequestError(
            f"{name} {url} comes from {source}, and {variable} goes only to a server that you name yourself; "
            f"to send it there pass {_flag(name)} {url}, else unset {variable}",
            fields=(name,),
        )
    log.warning("prompts are sent to %s, which %s names", url, source)


def check_folder(resolved: Resolved, name: str) -> None:
    """Raise RequestError where a file that merely lies in the current folder has files written outside of it."""
    if not resolved.is_own(name) and not _is_here(resolved, name):
        text = f"{name} {quoted(resolved.entries[name].value)} lies outside of the current folder; pass {_flag(name)}"
        raise RequestError(f"{text} to use it", fields=(name,))


def check_address(resolved: Resolved) -> None:
    """Raise RequestError where such a file names the cluster: its processes and this one run each other's code."""
    if not resolved.is_own("address"):
        text = (
            f"address {quoted(resolved.entries['address'].value)} names machines that run code for you, and you theirs"
        )
        raise RequestError(f"{text}; pass {_flag('address')} to use it", fields=("address",))


def check_serving(resolved: Resolved) -> None:
    """Raise RequestError where such a file lets others in, sends work out, or has pictures of the user deleted."""
    from zimage.serve.hosts import is_loopback

    check_folder(resolved, "data")
    for name, does in SERVING.items():
        if resolved.is_own(name) or (name == "host" and is_loopback(resolved.entries[name].value)):
            continue
        if name in KEEPING and not resolved.is_own("data"):  # in the folder, as was just checked
            continue
        text = f"{name} {quoted(resolved.entries[name].value)} {does}; pass {_flag(name)} if it should"
        raise RequestError(text, fields=(name,))


def _is_here(resolved: Resolved, name: str) -> bool:
    here = os.path.realpath(".")
    return os.path.commonpath([os.path.realpath(user_path(resolved.entries[name].value, name)), here]) == here


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
