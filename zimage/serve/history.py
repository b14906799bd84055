"""The history: every picture that was drawn, found by words and page by page, deleted with a way back.

The folder is the truth and the index only a way to find things in it: what a picture is, its own metadata says, when it
was made, its file's time, and whether it is deleted, the folder that it lies in. So every change moves a file, and an
index that missed one (the process ended in between) is put right by `recover`, on every start.

    id ─ pictures/ID.png ── delete ─→ trash/ID.png ── 600 s ─→ gone
              ↑                            │
              └───────── restore ──────────┘
"""

import json
import logging
import re
import threading
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from sqlite3 import Connection
from typing import Any, BinaryIO, NamedTuple

from zimage.errors import RequestError, quoted
from zimage.serve.database import Database
from zimage.serve.picture_files import ID, LATEST, Picture, PictureFiles, Seen, checked
from zimage.serve.refusals import NotFound

log = logging.getLogger("zimage")

UNDO_SECONDS = 600  # how long a deleted picture can be restored, and how long no limit takes a new one
TOGETHER = 500  # pictures of one transaction: others may write in between
SAID = 20  # remarks of a kind that are written out
MOST_WORDS = 32
CURSOR = re.compile(rf"(\d{{1,19}})_({ID.pattern})", re.ASCII)
COLUMNS = "id, job, created, bytes, width, height, settings"
LIVE = "FROM images WHERE deleted IS NULL"
# `words` is the prompt as it is compared; in the index too, so that a search reads nothing else.
STEPS = (
    """CREATE TABLE images (
        id TEXT PRIMARY KEY, job TEXT NOT NULL, created INTEGER NOT NULL, bytes INTEGER NOT NULL,
        width INTEGER NOT NULL, height INTEGER NOT NULL, settings TEXT NOT NULL, words TEXT NOT NULL, deleted REAL
    ) STRICT""",
    "CREATE INDEX images_in_order ON images (created DESC, id DESC, words) WHERE deleted IS NULL",
    "CREATE INDEX images_by_job ON images (job)",
    "CREATE INDEX images_in_trash ON images (deleted) WHERE deleted IS NOT NULL",
)
UPSERT = "INSERT OR REPLACE INTO images VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"


class Page(NamedTuple):
    """Pictures, newest first; `next` is the cursor of those after them, None at the end; `total` counts all."""

    pictures: list[Picture]
    next: str | None
    total: int


class History:
    """May be used from several threads at once. Raises NoRoom where the disk is full."""

    def __init__(self, folder: Path, database: Database, keep_days: float | None = None, keep_gb: float | None = None):
        self.files, self.database = PictureFiles(folder), database
        self.keep_days, self.keep_gb = keep_days, keep_gb
        self._moving = threading.RLock()  # one at a time moves files or reads which there are
        database.declare("images", STEPS)
        self.files.remove_leftovers(self.recover())
        self.tidy()

    # ------------------------------------------------------------------ looking

    def get(self, id: str) -> Picture:
        """Raises NotFound."""
        with self.database.reading() as db:
            row = db.execute(f"SELECT {COLUMNS} {LIVE} AND id = ?", (checked(id),)).fetchone()
        if row is None:
            raise NotFound(f"there is no picture {id}")
        return _picture(row)

    def of_job(self, job: str) -> list[Picture]:
        """The pictures of a job that are not deleted, in the order in which they were made."""
        with self.database.reading() as db:
            rows = db.execute(f"SELECT {COLUMNS} {LIVE} AND job = ? ORDER BY created, id", (job,)).fetchall()
        return [_picture(row) for row in rows]

    def page(self, q: str = "", before: str | None = None, limit: int = 50) -> Page:
        """Pictures whose prompts contain every word of `q`, newest first, after those that `before` ends.

        A cursor names a place, not a number: what comes and goes meanwhile moves nothing. Raises RequestError.
        """
        words, place = _words(q), _place(before)
        after = "AND (created, id) < (?, ?) ORDER BY created DESC, id DESC LIMIT ?"
        found = f"SELECT {COLUMNS} {LIVE}{_having(words)} {after}"
        with self.database.reading() as db:
            rows = db.execute(found, (*words, *place, limit + 1)).fetchall()
            whole = before is None and len(rows) <= limit
            total = len(rows) if whole else _count(db, words)
        pictures, more = [_picture(row) for row in rows[:limit]], len(rows) > limit
        return Page(pictures, f"{pictures[-1].created}_{pictures[-1].id}" if more else None, total)

    def total(self, q: str = "") -> int:
        """How many pictures have every word of `q` in their prompts."""
        with self.database.reading() as db:
            return _count(db, _words(q))

    def file(self, id: str) -> Path:
        """The PNG of a picture. Raises NotFound."""
        return self.files.path(self.get(id).id)

    def open(self, id: str) -> BinaryIO:
        """The PNG of a picture, open: it can be read to its end, whatever becomes of it. Raises NotFound."""
        try:
            return self.file(id).open("rb")
        except FileNotFoundError:
            raise NotFound(f"picture {id} is not there any more") from None

    def thumbnail(self, id: str) -> bytes:
        """A picture in WebP, its longer side at most 320 px; made when it is first wanted. Raises NotFound."""
        return self.files.thumbnail(self.get(id).id)

    # ------------------------------------------------------------------ changing

    def add(self, path: Path, id: str, job: str) -> Picture:
        """Take in a finished PNG, from wherever it lies on the same disk. Raises RequestError for a damaged one."""
        with self._moving:
            self.files.take_in(path, id)
            picture = self.files.read(id, job)
            with self.database.writing(synced=False) as db:
                db.execute(UPSERT, _row(picture, None))
        return picture

    def delete(self, ids: Iterable[str]) -> list[str]:
        """Move pictures to the trash, from where `restore` brings them back for 600 s; returns which there were."""
        away, back = self.files.throw_away, self.files.bring_back
        return [id for some in _parts(ids) for id in self._moved(some, "IS NULL", time.time(), away, back)]

    def delete_all(self) -> list[str]:
        """Every picture of the history, as `delete` does it."""
        with self.database.reading() as db:
            ids = [id for (id,) in db.execute(f"SELECT id {LIVE}").fetchall()]
        return self.delete(ids)

    def restore(self, ids: Iterable[str]) -> list[str]:
        """Bring deleted pictures back; returns those that still could be."""
        away, back = self.files.throw_away, self.files.bring_back
        return [id for some in _parts(ids) for id in self._moved(some, "IS NOT NULL", None, back, away)]

    def tidy(self) -> list[str]:
        """Empty the trash of what has lain there long enough, and delete what `keep_days` and `keep_gb` say.

        To be called now and then; returns the ids that it deleted.
        """
        with self._moving:
            with self.database.reading() as db:
                old = (time.time() - UNDO_SECONDS,)
                rows = db.execute("SELECT id FROM images WHERE deleted IS NOT NULL AND deleted < ?", old).fetchall()
            for some in _parts(id for (id,) in rows):
                for id in some:
                    self.files.purge(id)
                self._forget(some)
            return self._within_limits()

    def reindex(self) -> None:
        """Make the index anew from the folder alone."""
        with self._moving:
            with self.database.writing() as db:
                db.execute("DELETE FROM images")
            self.recover()

    def recover(self) -> set[str]:
        """Make the index agree with the folder; returns the ids of all pictures, those in the trash included.

        Pictures that lie there without a row get one, also those that somebody put there. Files that are damaged or
        carry no settings of ours are named in the log and left alone.
        """
        with self._moving:
            seen, remarks = self.files.seen()
            with self.database.reading() as db:
                rows = db.execute("SELECT id, job, bytes, created, deleted FROM images").fetchall()
            known = {id: _Known(*values) for id, *values in rows}
            for some in _parts(id for id in known if id not in seen):
                self._forget(some)
            for some in _parts(id for id, file in seen.items() if not _agrees(file, known.get(id))):
                remarks += self._read_again(some, seen, known)
        _say(remarks)
        return set(seen)

    # ------------------------------------------------------------------ with the files held

    def _moved(
        self,
        ids: Sequence[str],
        where: str,
        deleted: float | None,
        move: Callable[[str], bool],
        undo: Callable[[str], bool],
    ) -> list[str]:
        """Move the files of those whose `deleted` is as it should be, and mark their rows; after an error, none."""
        moved: list[str] = []
        with self._moving:
            try:
                with self.database.writing(synced=False) as db:
                    for id in ids:
                        if not db.execute(f"SELECT 1 FROM images WHERE id = ? AND deleted {where}", (id,)).fetchone():
                            continue
                        if move(id):
                            moved.append(id)
                            db.execute("UPDATE images SET deleted = ? WHERE id = ?", (deleted, id))
                        else:  # somebody took the file away
                            db.execute("DELETE FROM images WHERE id = ?", (id,))
            except BaseException:
                for id in moved:
                    undo(id)
                raise
        return moved

    def _read_again(self, ids: Sequence[str], seen: Mapping[str, Seen], known: Mapping[str, "_Known"]) -> list[str]:
        """Give each a row that says what its file says; remarks on those that cannot have one."""
        rows, remarks, now = [], [], time.time()
        for id in ids:
            before, trashed = known.get(id), seen[id].trashed
            try:
                picture = self.files.read(id, before.job if before else "", trashed)
            except RequestError as error:
                remarks.append(f"{error} (left alone)")
                continue
            rows.append(_row(picture, ((before and before.deleted) or now) if trashed else None))
        self._forget(ids)
        with self.database.writing(synced=False) as db:
            db.executemany(UPSERT, rows)
        return remarks

    def _forget(self, ids: Sequence[str]) -> None:
        with self.database.writing(synced=False) as db:
            db.executemany("DELETE FROM images WHERE id = ?", [(id,) for id in ids])

    def _within_limits(self) -> list[str]:
        """Delete what is too old and what is too much; pictures of the last ten minutes stay."""
        deleted, new = [], time.time_ns() - int(UNDO_SECONDS * 1e9)
        for limit, unit, condition, most in (
            (self.keep_days, "days of age", "created < ?", lambda days: time.time_ns() - int(days * 86_400e9)),
            (self.keep_gb, "GB in all", "so_far > ?", lambda gb: round(gb * 1e9)),
        ):
            if limit is None:
                continue
            sums = f"SELECT id, created, sum(bytes) OVER (ORDER BY created DESC, id DESC) AS so_far {LIVE}"
            with self.database.reading() as db:
                found = f"SELECT id FROM ({sums}) WHERE created < ? AND {condition}"
                ids = [id for (id,) in db.execute(found, (new, most(limit))).fetchall()]
            if gone := self.delete(ids):
                log.warning("%d pictures past %g %s are deleted: %s", len(gone), limit, unit, _listed(gone))
                deleted += gone
        return deleted


class _Known(NamedTuple):
    """What the index says of a picture's file."""

    job: str
    bytes: int
    created: int
    deleted: float | None


def _agrees(file: Seen, known: _Known | None) -> bool:
    return known is not None and file == (known.bytes, known.created, known.deleted is not None)


def _row(picture: Picture, deleted: float | None) -> tuple[object, ...]:
    settings, words = json.dumps(picture.settings, ensure_ascii=False), _comparable(picture.prompt)
    sizes = (picture.created, picture.bytes, picture.width, picture.height)
    return (picture.id, picture.job, *sizes, settings, words, deleted)


def _picture(row: Sequence[Any]) -> Picture:
    id, job, created, size, width, height, settings = row
    return Picture(id, job, created, size, width, height, json.loads(settings))


def _having(words: Sequence[str]) -> str:
    return " AND instr(words, ?)" * len(words)


def _count(db: Connection, words: Sequence[str]) -> int:
    count: int = db.execute(f"SELECT count(*) {LIVE}{_having(words)}", words).fetchone()[0]
    return count


def _words(q: str) -> list[str]:
    words = _comparable(q).split()
    if len(words) > MOST_WORDS:
        raise RequestError(f"q: {len(words)} words; at most {MOST_WORDS} are looked for", fields=("q",))
    return words


def _comparable(text: str) -> str:
    """A text without the differences that a search passes over: case, width, and how accents are put together."""
    whole = text.encode("utf-8", "replace").decode()  # half a character, which no file can hold
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", whole).casefold())


def _place(before: str | None) -> tuple[int, str]:
    """The place that a cursor names; without one the very beginning."""
    if before is None:
        return LATEST, "~"  # behind every id
    found = CURSOR.fullmatch(before)
    if found is None or int(found[1]) > LATEST:
        raise RequestError(
            f"before: {quoted(before)} is not a cursor; pass `next` of an earlier page", fields=("before",)
        )
    return int(found[1]), found[2]


def _parts(ids: Iterable[str]) -> Iterator[list[str]]:
    """As many at a time as one transaction takes."""
    remaining = (id for id in ids if ID.fullmatch(id))
    while some := list(islice(remaining, TOGETHER)):
        yield some


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SAID:,} more" if len(names) > SAID else ""
    return ", ".join(names[:SAID]) + more


def _say(remarks: Sequence[str]) -> None:
    for remark in remarks[:SAID]:
        log.warning("%s", remark)
    if len(remarks) > SAID:
        log.warning("%d more files are left alone", len(remarks) - SAID)
