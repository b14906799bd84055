"""The server's database: what is committed stays, what fails leaves nothing, and one server has the folder."""

import errno
import sqlite3
import threading

import pytest

from zimage.errors import OutputError, RequestError
from zimage.serve.database import Database, storing
from zimage.serve.refusals import NoRoom

THINGS = "CREATE TABLE things (name TEXT PRIMARY KEY) STRICT"


@pytest.fixture
def database(tmp_path):
    database = Database(tmp_path / "data" / "index.sqlite")
    database.declare("things", [THINGS])
    yield database
    database.close()


def names(database):
    with database.reading() as db:
        return [name for (name,) in db.execute("SELECT name FROM things ORDER BY name")]


def test_what_was_written_is_there_after_it_is_opened_again(database):
    with database.writing() as db:
        db.execute("INSERT INTO things VALUES ('a')")
    database.close()
    again = Database(database.path)
    assert names(again) == ["a"]
    again.close()


def test_an_error_leaves_nothing_of_its_transaction(database):
    with pytest.raises(ZeroDivisionError), database.writing() as db:
        db.execute("INSERT INTO things SELECT ?", (1 / 0 if db.execute("INSERT INTO things VALUES ('a')") else "",))
    with database.writing() as db:
        db.execute("INSERT INTO things VALUES ('b')")
    assert names(database) == ["b"]


def test_steps_run_once_each(database):
    database.declare("things", [THINGS, "ALTER TABLE things ADD COLUMN size INTEGER"])
    database.declare("things", [THINGS, "ALTER TABLE things ADD COLUMN size INTEGER"])
    with database.writing() as db:
        db.execute("INSERT INTO things VALUES ('a', 1)")


def test_a_step_that_fails_leaves_its_owner_as_it_was(database):
    with pytest.raises(OutputError, match="cannot be used"):
        database.declare("things", [THINGS, "ALTER TABLE things ADD COLUMN size INTEGER", "nonsense"])
    database.declare("things", [THINGS, "ALTER TABLE things ADD COLUMN size INTEGER"])


def test_a_step_may_be_several_statements_of_any_kind(database):
    trigger = "CREATE TRIGGER t AFTER INSERT ON a BEGIN INSERT INTO b VALUES (new.x || ';'); DELETE FROM a; END"
    database.declare("others", [f"CREATE TABLE a (x); CREATE TABLE b (x);\n{trigger};\n", "DROP TABLE a"])
    with database.reading() as db:
        assert db.execute("SELECT name FROM sqlite_schema WHERE name IN ('a', 'b', 't')").fetchall() == [("b",)]


def test_tables_of_a_newer_version_are_refused(database):
    with pytest.raises(OutputError, match="newer version"):
        database.declare("things", [])


def test_two_servers_cannot_have_one_folder(database):
    with pytest.raises(RequestError, match="another server") as caught:
        Database(database.path)
    assert caught.value.fields == ("data",)


def test_readers_do_not_wait_for_a_writer_and_see_one_moment(database):
    with database.writing() as writer, database.reading() as reader:
        writer.execute("INSERT INTO things VALUES ('a')")
        assert reader.execute("SELECT count(*) FROM things").fetchone() == (0,)
        assert names(database) == []
    assert names(database) == ["a"]


def test_threads_write_one_after_another(database):
    def write(thread):
        for i in range(50):
            with database.writing(synced=False) as db:
                (count,) = db.execute("SELECT count(*) FROM things").fetchone()
                db.execute("INSERT INTO things VALUES (?)", (f"{count} by {thread} in {i}",))

    threads = [threading.Thread(target=write, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(int(name.split()[0]) for name in names(database)) == list(range(200))


@pytest.mark.parametrize(("synced", "level"), [(True, 2), (False, 1)])
def test_commits_reach_the_disk_unless_told_otherwise(database, synced, level):
    with database.writing(synced) as db:
        assert db.execute("PRAGMA synchronous").fetchone() == (level,)


def test_a_file_that_is_not_a_database_is_named(tmp_path):
    path = tmp_path / "index.sqlite"
    path.write_bytes(b"something else " * 500)
    with pytest.raises(OutputError, match=r"index\.sqlite is damaged"):
        Database(path)
    path.unlink()
    Database(path).close()  # the folder is free again


def test_a_full_disk_is_no_room_and_passes(database):
    """SQLite's own limit on pages stands for the disk's."""
    with database.writing() as db:
        (pages,) = db.execute("PRAGMA page_count").fetchone()
        db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(NoRoom), database.writing() as db:
        db.execute("INSERT INTO things VALUES (?)", ("a" * 100_000,))
    with database.writing() as db:
        db.execute("PRAGMA max_page_count = 100000")
        db.execute("INSERT INTO things VALUES ('b')")
    assert names(database) == ["b"]


FAULTS = {errno.ENOSPC: NoRoom, errno.EDQUOT: NoRoom, errno.EIO: NoRoom, errno.EACCES: OutputError}


@pytest.mark.parametrize("number", FAULTS)
def test_errors_of_the_system_are_told_apart(tmp_path, number):
    with pytest.raises(FAULTS[number]), storing(tmp_path):
        raise OSError(number, "why")


def test_a_mistake_in_the_program_is_not_taken_for_one_of_the_disk(database):
    with pytest.raises(sqlite3.IntegrityError), database.writing() as db:
        db.executemany("INSERT INTO things VALUES (?)", [("a",), ("a",)])
