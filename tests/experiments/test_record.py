"""The records of sweeps and profiles: there and back, lines that were cut off, what is not a record."""

import json
import subprocess
import sys

import pytest

from zimage.errors import CheckpointError, OutputError, RequestError
from zimage.experiments.record import RECORDS, Journal, Record, read_records, write_records


def test_records_go_to_a_file_and_back(tmp_path):
    records = [Record("a", axes={"steps": 4}, prompt="ein Öltropfen", seed=1), Record("b", error="no")]
    write_records(tmp_path, records)
    assert read_records(tmp_path) == records


def test_of_several_records_of_one_cell_the_last_counts_in_the_place_of_the_first(tmp_path):
    lines = [Record("a", seed=1), Record("b"), Record("a", seed=2)]
    (tmp_path / RECORDS).write_text("".join(record.line() + "\n" for record in lines))
    assert read_records(tmp_path) == [Record("a", seed=2), Record("b")]


def test_a_last_line_that_was_cut_off_is_left_out_and_others_are_told(tmp_path):
    whole = Record("a").line()
    (tmp_path / RECORDS).write_text(whole + "\n" + whole[:20])
    assert read_records(tmp_path) == [Record("a")]
    (tmp_path / RECORDS).write_text(whole[:20] + "\n" + whole + "\n")
    with pytest.raises(RequestError, match="line 1"):
        read_records(tmp_path)


@pytest.mark.parametrize("plain", [[], {}, {"schema": 1}, {"schema": 2, "id": "a"}, {"schema": 1, "id": "a", "b": 1}])
def test_what_is_not_a_record_is_refused(tmp_path, plain):
    (tmp_path / RECORDS).write_text(json.dumps(plain) + "\n")
    with pytest.raises(RequestError, match="not a record"):
        read_records(tmp_path)


def test_a_folder_without_records_is_refused(tmp_path):
    with pytest.raises(RequestError, match=r"holds no cells\.jsonl"):
        read_records(tmp_path)


@pytest.mark.parametrize("path", ["../a.png", "/etc/passwd", "b/a.png", "..", "", "b\\a.png"])
def test_a_record_names_no_file_outside_of_its_folder(tmp_path, path):
    (tmp_path / RECORDS).write_text(json.dumps({"id": "a", "path": path}) + "\n")
    with pytest.raises(RequestError, match=r"line 1 is not a record: record\.path .* the name of a file in the folder"):
        read_records(tmp_path)


def test_a_journal_goes_on_behind_what_a_killed_writer_left(tmp_path):
    with Journal(tmp_path) as journal:
        journal.append(Record("a", seed=1))
    with (tmp_path / RECORDS).open("a") as stream:
        stream.write(Record("b").line()[:30])
    with Journal(tmp_path) as journal:
        assert list(journal.records) == ["a"]
        journal.append(Record("a", seed=2))
        journal.append(Record("c"))
    assert read_records(tmp_path) == [Record("a", seed=2), Record("c")]


def test_records_are_replaced_while_others_read_and_the_journal_goes_on(tmp_path):
    with Journal(tmp_path) as journal:
        journal.append(Record("a"))
        reader = (tmp_path / RECORDS).open()
        journal.replace([record.replaced(scores={"psnr": 30.5}) for record in journal.records.values()])
        journal.append(Record("b"))
        assert reader.read() == Record("a").line() + "\n"
        reader.close()
    assert read_records(tmp_path) == [Record("a", scores={"psnr": 30.5}), Record("b")]


def test_one_process_writes_at_a_time(tmp_path):
    with Journal(tmp_path) as journal:
        with pytest.raises(RequestError, match="another command is writing"):
            Journal(tmp_path)
        journal.replace([Record("a")])  # the lock goes with the new file
        with pytest.raises(RequestError, match="another command is writing"):
            Journal(tmp_path)
        assert read_records(tmp_path) == [Record("a")]
    with Journal(tmp_path) as journal:
        assert list(journal.records) == ["a"]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written to"):
        Journal(tmp_path / "file" / "folder")


def test_records_behind_a_link_that_leads_away_are_left_alone(tmp_path):
    (tmp_path / "secret").write_text("one line without an end")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / RECORDS).symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="by a link, which is not followed"):
        Journal(tmp_path / "folder")
    assert (tmp_path / "secret").read_text() == "one line without an end"


def test_a_record_that_a_full_disk_cuts_off_leaves_the_others(tmp_path):
    """A limit on the size of files stands for the disk: the kernel takes the part of a line that fits."""
    script = """
import resource, signal, sys
from pathlib import Path
from zimage.experiments.record import Journal, Record
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with Journal(Path(sys.argv[1])) as journal:
    journal.append(Record("a"))
    size = journal.path.stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, resource.RLIM_INFINITY))
    try:
        journal.append(Record("b"))
    except OSError as error:
        print(error.filename)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    journal.append(Record("c"))
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / RECORDS}\n"), done.stderr
    assert read_records(tmp_path) == [Record("a"), Record("c")]
