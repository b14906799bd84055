"""The token that clients must send: from a file or from the environment, and checked before anybody relies on it."""

import logging
import os
import stat
import sys
from collections.abc import Mapping
from pathlib import Path

from zimage.errors import CheckpointError, RequestError
from zimage.formats.files import read_file
from zimage.settings.serving import TOKEN, ServeSettings

log = logging.getLogger("zimage")

SHORTEST, LONGEST = 16, 1024  # characters
HOW = 'python -c "import secrets; print(secrets.token_urlsafe())"'


def read_token(settings: ServeSettings, environ: Mapping[str, str] = os.environ) -> str | None:
    """The token in the settings' file, else in the variable, else None. Raises RequestError."""
    if settings.token_file is not None:
        return _checked(_read(Path(settings.token_file)), f"the token in {settings.token_file}")
    return _checked(environ[TOKEN], f"the token in {TOKEN}") if environ.get(TOKEN) else None


def _read(path: Path) -> str:
    try:
        text = read_file(path, 4 * LONGEST).decode()
        mode = os.stat(path).st_mode
    except CheckpointError as error:
        raise _fault(f"token_file: {error}") from None
    except UnicodeDecodeError:
        raise _fault(f"token_file {path} should hold text") from None
    if sys.platform != "win32" and mode & (stat.S_IRWXG | stat.S_IRWXO):
        log.warning("other users of this computer can read the token in %s; change that with: chmod 600 %s", path, path)
    return text


def _checked(text: str, name: str) -> str:
    token = text.strip()
    if not SHORTEST <= len(token) <= LONGEST:
        raise _fault(
            f"{name} has {len(token)} characters; it should have {SHORTEST} to {LONGEST:,}, such as from {HOW}"
        )
    if len(token.split()) != 1 or not (token.isascii() and token.isprintable()):
        raise _fault(f"{name} should be one line of letters, digits and signs of ASCII without spaces")
    return token


def _fault(text: str) -> RequestError:
    return RequestError(text, fields=("token_file",))
