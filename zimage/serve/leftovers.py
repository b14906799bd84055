"""What a job leaves in a server's folder that did not come to its end: its state, parts of files, pictures unheard of.

A worker may end at any moment: in the middle of a file, or between the writing of a picture and the word of it. What it
leaves nobody else removes, and what it has drawn should be found.
"""

from pathlib import Path

from zimage.serve.database import storing
from zimage.serve.jobs import JobRow

STATES, PICTURES = "states", "pictures"


def clear(folder: Path, row: JobRow) -> list[tuple[int, str]]:
    """Remove the state of a job that is over, and parts of its files; returns index and id of each of its pictures."""
    states, pictures = folder / STATES, folder / PICTURES
    parts = f".{row.id}-*"
    with storing(folder):
        for path in (states / f"{row.id}.safetensors", *states.glob(parts), *pictures.glob(parts)):
            path.unlink(missing_ok=True)
        drawn = [(index, f"{row.id}-{index + 1}") for index in range(len(row.seeds))]
        return [(index, id) for index, id in drawn if (pictures / f"{id}.png").exists()]
