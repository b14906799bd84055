"""The records of sweeps and profiles: there and back, lines that were cut off, what is not a record."""

import json

import pytest

from zimage.errors import RequestError
from zimage.experiments.record import RECORDS, Record, read_records, write_records


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
