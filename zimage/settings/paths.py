"""Paths as people write them: `~` stands for a home folder, which a user may not have. And names made of prompts."""

import os
import re
from pathlib import Path

from zimage.errors import RequestError

WORDS = 60  # characters of a prompt in a name


def user_path(text: str | os.PathLike[str], setting: str) -> Path:
    """The path with its `~` expanded. Raises RequestError, which names the setting, where that cannot be done."""
    path = Path(text)
    try:
        os.fsencode(path)
        if "\0" in str(path):
            raise ValueError
        return path.expanduser()
    except RuntimeError:
        told = f"{setting} {str(text)[:80]!r}: there is no such home folder; write the path without ~"
    except ValueError:
        told = f"{setting} {str(text)[:80]!r} is not a path"
    raise RequestError(told, fields=(setting,))


def slug(prompt: str) -> str:
    """The beginning of a prompt as part of a file's name."""
    words = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-_")
    return words[:WORDS].rstrip("-_") or "image"
