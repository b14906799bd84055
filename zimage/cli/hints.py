"""Small models know few words: a hint of which words of a prompt a model has never seen."""

import difflib
import json
import re
from pathlib import Path


def unknown_words(folder: Path, prompts: list[str]) -> str | None:
    """One line naming unknown words, or None; only for models that bring a `vocabulary.json`."""
    path = folder / "vocabulary.json"
    if not path.is_file():
        return None
    vocabulary = json.loads(path.read_text(encoding="utf-8"))
    known = set(vocabulary["words"])
    words = dict.fromkeys(w for prompt in prompts for w in re.findall(r"[a-z]+", prompt.lower()))
    unknown = [word for word in words if word not in known]
    if not unknown:
        return None
    near = dict.fromkeys(m for w in unknown for m in difflib.get_close_matches(w, known, n=1, cutoff=0.75))
    objects, colours = vocabulary["objects"], vocabulary["colours"]
    examples = [name for name in objects if name not in near][:6]
    return (
        f"hint: this model does not know {', '.join(map(repr, unknown[:5]))}; "
        + (f"similar: {', '.join(near)}; " if near else "")
        + f"it knows {len(objects)} objects ({', '.join(examples)} …) on {', '.join(colours)}"
    )
