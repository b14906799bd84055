"""The queue, in SQLite: what was accepted is there after any crash, and runs once.

    queued ─→ running ─→ done | failed | cancelled
       ↑         │
       └─────────┘  its process died, or the server was stopped

The row holds what does not change while a job runs, and the outcome; progress lives in memory (`live.py`). `deaths`
counts the worker processes that ended in the middle of the job, `restarts` the servers.
"""

import json
import secrets
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from zimage.serve.database import Database
from zimage.settings.fields import Plain

QUEUED, RUNNING, DONE, FAILED, CANCELLED = STATES = ("queued", "running", "done", "failed", "cancelled")
OPEN, ENDED = (QUEUED, RUNNING), (DONE, FAILED, CANCELLED)
STEPS = (
    """CREATE TABLE jobs (
        id TEXT PRIMARY KEY, place REAL NOT NULL, state TEXT NOT NULL, form TEXT NOT NULL,
        created REAL NOT NULL, started REAL, finished REAL, key TEXT UNIQUE, asked TEXT NOT NULL,
        deaths INTEGER NOT NULL, restarts INTEGER NOT NULL, plain TEXT NOT NULL
    ) STRICT""",
    "CREATE INDEX jobs_in_order ON jobs (state, place)",
    "CREATE INDEX jobs_by_end ON jobs (finished)",
)
PLAIN = ("request", "seeds", "job", "rewrite", "rewritten", "uploads", "images", "timings", "notes", "error")


@dataclass
class JobRow:
    """A job as it is kept.

    `key` is the client's idempotency key, `asked` a digest of what came with it; `job` and `rewrite` are what a worker
    needs (None once the job has ended), `uploads` the hashes of the files that it starts from.
    """

    id: str
    form: str
    asked: str
    request: dict[str, Plain]
    seeds: list[int]
    job: dict[str, Plain] | None
    rewrite: dict[str, Plain] | None = None
    key: str | None = None
    uploads: list[str] = field(default_factory=list)
    state: str = QUEUED
    place: float = 0.0
    created: float = field(default_factory=time.time)
    started: float | None = None
    finished: float | None = None
    deaths: int = 0
    restarts: int = 0
    rewritten: list[dict[str, Plain]] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    error: dict[str, Plain] | None = None

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    def copy(self) -> "JobRow":
        """As it is now, for a thread that writes it down."""
        return replace(self, images=list(self.images), notes=list(self.notes), timings=dict(self.timings))


def new_id() -> str:
    """Sorts by time, and cannot be guessed from others: 20261127-174501-3fa9c2d1."""
    return f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(4)}"


class Jobs:
    """The table of jobs. Raises NoRoom where the disk is full."""

    def __init__(self, database: Database):
        self._database = database
        database.declare("jobs", STEPS)

    def add(self, row: JobRow) -> None:
        """Keep a new job, behind all others. Once this returns, it is accepted."""
        with self._database.writing() as db:
            (last,) = db.execute("SELECT coalesce(max(place), 0) FROM jobs").fetchone()
            row.place = last + 1
            db.execute(ADD, _values(row))

    def put(self, *rows: JobRow) -> None:
        """Keep what has become of jobs."""
        with self._database.writing() as db:
            db.executemany(PUT, map(_values, rows))

    def get(self, id: str) -> JobRow | None:
        with self._database.reading() as db:
            return _first(db.execute(f"{SELECT} WHERE id = ?", (id,)))

    def by_key(self, key: str) -> JobRow | None:
        with self._database.reading() as db:
            return _first(db.execute(f"{SELECT} WHERE key = ?", (key,)))

    def waiting(self) -> list[JobRow]:
        """Those that have not ended, in their order; what ran is before what waits."""
        with self._database.reading() as db:
            found = db.execute(f"{SELECT} WHERE state IN (?, ?) ORDER BY state = ? DESC, place", (*OPEN, RUNNING))
            return [_row(one) for one in found]

    def ended(self, states: Collection[str], limit: int) -> list[JobRow]:
        """The latest that have ended in one of these states, the last first."""
        marks = ", ".join("?" * len(states))
        query = f"{SELECT} WHERE state IN ({marks}) AND finished IS NOT NULL ORDER BY finished DESC LIMIT ?"
        with self._database.reading() as db:
            return [_row(one) for one in db.execute(query, (*states, limit))]

    def forget(self, before: float) -> int:
        """Remove the rows of jobs that ended before this time; returns how many."""
        with self._database.writing() as db:
            marks = ", ".join("?" * len(ENDED))
            found = db.execute(f"DELETE FROM jobs WHERE state IN ({marks}) AND finished < ?", (*ENDED, before))
            return found.rowcount


def uploads_of(rows: Iterable[JobRow]) -> set[str]:
    """The hashes of the files that jobs still need."""
    return {upload for row in rows for upload in row.uploads}


COLUMNS = ("id", "place", "state", "form", "created", "started", "finished", "key", "asked", "deaths", "restarts")
SELECT = f"SELECT {', '.join(COLUMNS)}, plain FROM jobs"
ADD = f"INSERT INTO jobs ({', '.join(COLUMNS)}, plain) VALUES ({', '.join('?' * (len(COLUMNS) + 1))})"
PUT = f"{ADD} ON CONFLICT (id) DO UPDATE SET {', '.join(f'{name} = excluded.{name}' for name in (*COLUMNS, 'plain'))}"


def _values(row: JobRow) -> tuple[Any, ...]:
    plain = {name: getattr(row, name) for name in PLAIN}
    text = json.dumps(plain, ensure_ascii=False, separators=(",", ":"))
    return (*(getattr(row, name) for name in COLUMNS), text)


def _first(found: Iterable[tuple[Any, ...]]) -> JobRow | None:
    return next((_row(one) for one in found), None)


def _row(one: tuple[Any, ...]) -> JobRow:
    *columns, plain = one
    return JobRow(**dict(zip(COLUMNS, columns, strict=True)), **json.loads(plain))
