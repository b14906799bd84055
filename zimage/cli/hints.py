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
    offers = list(near) + [name for name in vocabulary["objects"] if name not in near]
    return (
        f"hint: this model has not learned {', '.join(map(repr, unknown[:5]))}; it knows {', '.join(offers[:8])} "
        f"and {len(vocabulary['objects'])} objects in all, on {', '.join(vocabulary['colours'])}"
    )
