"""The server's one database: SQLite in a folder that one server has to itself. Its owners declare their tables.

    database = Database(folder / "index.sqlite")
    database.declare("images", STEPS)
    with database.writing() as db:
        db.execute("INSERT …")
    with database.reading() as db:
        rows = db.execute("SELECT …").fetchall()

One thread writes at a time; readers wait for nobody (WAL) and see one moment of the database. Any thread may do both.
What is committed survives the end of the process at any moment, and of the machine too unless it is `synced=False`.
"""

import contextlib
import errno
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

from zimage.errors import OutputError, RequestError
from zimage.formats.lock import Lock
from zimage.serve.refusals import NoRoom, Unavailable

PATIENCE = 30.0  # seconds that a look from outside (a backup, sqlite3's shell) may keep a writer waiting
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EIO}
FULL_DATABASE = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR}
BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
OWNERS = "CREATE TABLE IF NOT EXISTS owners (name TEXT PRIMARY KEY, version INTEGER NOT NULL) STRICT"


class Database:
    """Opens the file, or makes it. Raises RequestError where another server has the folder, OutputError, or NoRoom."""

    def __init__(self, path: Path):
        self.path = path
        self._turn = threading.RLock()
        self._idle: list[sqlite3.Connection] = []
        self._closed = False
        with storing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = _held(path.parent)
            try:
                self._writer = self._opened()
                with self.writing() as db:
                    db.execute(OWNERS)
            except BaseException:
                self._lock.close()
                raise

    def declare(self, owner: str, steps: Sequence[str]) -> None:
        """Bring the tables of an owner up to date: run those of the `steps` that this file has not seen.

        Each is one or more statements. They are never changed, only added to. Raises OutputError where a newer version
        has written the file.
        """
        with self.writing() as db:
            done = (db.execute("SELECT version FROM owners WHERE name = ?", (owner,)).fetchone() or (0,))[0]
            if done > len(steps):
                raise OutputError(f"{self.path} was written by a newer version of zimage; use that one")
            for statement in chain.from_iterable(map(_statements, steps[done:])):
                db.execute(statement)
            if done < len(steps):  # a full disk lets a server start that has nothing to write
                db.execute("INSERT OR REPLACE INTO owners VALUES (?, ?)", (owner, len(steps)))

    @contextlib.contextmanager
    def writing(self, synced: bool = True) -> Iterator[sqlite3.Connection]:
        """One transaction, committed at the end of the block or, after an error, not at all. It may not be nested.

        `synced=False` is for what can be found out again: a loss of power may undo the last such commits, in order.
        """
        with self._turn, storing(self.path):
            self._check_open()
            self._writer.execute(f"PRAGMA synchronous = {'FULL' if synced else 'NORMAL'}")
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield self._writer
                self._writer.execute("COMMIT")
            finally:
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """The database at one moment, whatever is written meanwhile."""
        with storing(self.path):
            self._check_open()
            connection = self._idle.pop() if self._idle else self._opened()
            try:
                connection.execute("BEGIN")
                yield connection
            finally:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                self._idle.append(connection)

    def close(self) -> None:
        """Let go of the file and the folder; nothing may use it any more."""
        with self._turn:
            self._closed = True
            for connection in (*self._idle, self._writer):
                connection.close()
            self._lock.close()

    def _check_open(self) -> None:
        if self._closed:
            raise Unavailable("the server is stopping; try again later", retry_after=30)

    def _opened(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, PATIENCE, isolation_level=None, check_same_thread=False)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA foreign_keys = ON")
        return connection


@contextlib.contextmanager
def storing(path: Path) -> Iterator[None]:
    """Turn what the system and SQLite raise: NoRoom where the disk is full or fails, Unavailable, else OutputError."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the rest says more on the same fault
        if code in FULL_DATABASE:
            raise NoRoom(f"the disk with {path} is full or fails: {error}; make room and try again") from error
        if code in BUSY:
            raise Unavailable(f"another program keeps {path} locked; try again", retry_after=5) from error
        if code in DAMAGED:
            text = f"{path} is damaged ({error}); move it away, and `zimage serve --reindex` finds the pictures again"
            raise OutputError(text) from error
        if isinstance(error, sqlite3.OperationalError):
            raise OutputError(f"{path} cannot be used: {error}") from error
        raise
    except OSError as error:
        if error.errno in FULL:
            raise NoRoom(f"the disk with {path} is full or fails: {error.strerror}; make room and try again") from error
        raise OutputError(f"{error.filename or path} cannot be written: {error.strerror or error}") from error


def _statements(script: str) -> Iterator[str]:
    """SQL, statement by statement: SQLite's own way to run several would end the transaction."""
    statement = ""
    for piece in script.split(";"):
        statement += piece + ";"
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


def _held(folder: Path) -> Lock:
    try:
        return Lock.of(folder)
    except BlockingIOError:
        text = f"{folder} is used by another server; stop it, or name another folder with --data"
        raise RequestError(text, fields=("data",)) from None
