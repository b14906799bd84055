"""Small models know few words: a hint of which words of a prompt a model has never seen."""

import re
from pathlib import Path

from zimage.errors import CheckpointError, quoted
from zimage.formats.json_text import read_json
from zimage.settings.fields import close_matches

SHOWN = 5  # words of a prompt that are named
LISTS = ("words", "objects", "colours")


def unknown_words(folder: Path, prompts: list[str]) -> str | None:
    """One line naming unknown words, or None; only models with a `vocabulary.json` have it. Raises CheckpointError."""
    path = folder / "vocabulary.json"
    if not path.is_file():
        return None
    words, objects, colours = _lists(path)
    known = set(words)
    said = dict.fromkeys(w for prompt in prompts for w in re.findall(r"[a-z]+", prompt.lower()))
    unknown = [word for word in said if word not in known][:SHOWN]
    if not unknown:
        return None
    near = dict.fromkeys(m for w in unknown for m in close_matches(w, known, 1, cutoff=0.75))
    examples = [name for name in objects if name not in near][:6]
    return (
        f"hint: this model does not know {', '.join(map(quoted, unknown))}; "
        + (f"similar: {', '.join(near)}; " if near else "")
        + f"it knows {len(objects)} objects ({', '.join(examples)} …) on {', '.join(colours[:50])}"
    )


def _lists(path: Path) -> list[list[str]]:
    content = read_json(path)
    lists = [content.get(name) for name in LISTS]
    for name, found in zip(LISTS, lists, strict=True):
        if not isinstance(found, list) or not all(isinstance(word, str) and len(word) < 100 for word in found):
            raise CheckpointError(f"{path}: {name} = {quoted(found)} should be a list of words")
    return [list(found) for found in lists if found is not None]
