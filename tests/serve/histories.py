"""Histories with pictures in them, for tests."""

import os
from pathlib import Path

from PIL import Image

from zimage.pictures.files import save
from zimage.serve.database import Database
from zimage.serve.history import History

START = 1_700_000_000  # seconds since 1970


def history(folder: Path, **limits) -> History:
    """As a server opens it; `close` lets it go."""
    return History(folder, Database(folder / "index.sqlite"), **limits)


def metadata(prompt="a cat", seed=1, size=(32, 32)):
    request = {"prompt": prompt, "seed": seed, "steps": 8, "guidance": 0.0, "shift": 3.0}
    request |= {"width": size[0], "height": size[1]}
    return {"version": "0", "request": request, "model": {"name": "demo", "fingerprint": "0" * 16}, "lora": []}


def draw(path: Path, prompt="a cat", seed=1, size=(32, 32), created=None) -> Path:
    """A picture as a worker saves it, and with a time of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save(Image.new("RGB", size, (seed * 40 % 256, 90, 160)), path, metadata(prompt, seed, size), replace=True)
    if created is not None:
        os.utime(path, (created, created))
    return path


def job_id(i: int) -> str:
    return f"20261127-{i:06d}-abcdef"


def fill(history: History, count: int, prompt=lambda i: f"picture number {i}") -> list[str]:
    """Pictures of as many jobs, a second apart; their ids, the newest first."""
    ids = []
    for i in range(count):
        id = f"{job_id(i)}-1"
        path = draw(history.files.path(id), prompt(i), seed=i, created=START + i)
        history.add(path, id, job_id(i))
        ids.append(id)
    return ids[::-1]


def ids(page) -> list[str]:
    return [picture.id for picture in page.pictures]


def folder(kept):
    return {p.name: sorted(f.name for f in p.iterdir()) for p in (kept.files.pictures, kept.files.trash)}


def consistent(kept):
    """Every row has its file where it should be, whole, and every file has a row."""
    with kept.database.reading() as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        rows = db.execute("SELECT id, deleted IS NOT NULL FROM images").fetchall()
    listed = {"pictures": sorted(f"{id}.png" for id, gone in rows if not gone)}
    listed["trash"] = sorted(f"{id}.png" for id, gone in rows if gone)
    assert folder(kept) == listed
    for id, gone in rows:
        kept.files.read(id, trashed=bool(gone))
    return dict(rows)
