"""Files in folders that the server's own settings name, by the names that requests have for them."""

import re
from collections.abc import Mapping
from pathlib import Path

from zimage.errors import RequestError, quoted
from zimage.settings.fields import Plain, check_text, nearest

LORA_ENDINGS = (".safetensors",)
CONTROL_ENDINGS = (".safetensors", ".gguf")
PUBLISHED = "diffusion_pytorch_model"  # the file of every component folder: there the folder says what it is
LONGEST_NAME = 255  # characters of a file's name
PLACE = re.compile(r"[/\\:]|^\.")  # what makes a name a place


def names_in(folder: str | None, endings: tuple[str, ...]) -> dict[str, Path]:
    """Name without its ending → file, or the folder of a published component; of two with one name the first."""
    root = Path(folder).expanduser().absolute() if folder else None
    found = [path for ending in endings for path in root.rglob(f"*{ending}")] if root else []
    inside = [path.parent if path.stem == PUBLISHED and path.parent != root else path for path in sorted(found)]
    named = {name_of(path.name, endings): path for path in reversed(inside)}
    return dict(sorted(named.items(), key=lambda one: one[0].lower()))


def name_of(name: str, endings: tuple[str, ...]) -> str:
    """A name without the ending that some clients leave on it."""
    return next((name.removesuffix(ending) for ending in endings if name.endswith(ending)), name)


def check_name(field: str, name: Plain, form: str = "NAME") -> None:
    """Raise RequestError for what is no text, and for what leads to another place; `form` is how it is written."""
    if not isinstance(name, str):
        raise RequestError(f"{field} {quoted(name)} should be {form}", fields=(field,))
    check_text(field, name, LONGEST_NAME)
    if not name or PLACE.search(name):
        raise RequestError(f"{field} {quoted(name)} should be {form}, not a path", fields=(field,))


def pick(field: str, name: str, known: Mapping[str, Path], endings: tuple[str, ...]) -> Path:
    """The file of a name. Raises RequestError where this server has none of that name."""
    path = known.get(name_of(name, endings))
    if path is None:
        raise RequestError(f"{field} {quoted(name)} is not on this server; {nearest(name, known)}", fields=(field,))
    return path
