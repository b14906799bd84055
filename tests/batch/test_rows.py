"""From files and options to rows: kinds of files, defaults, products, ids that stay, faults that name their place."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from zimage.batch.contents import Packing, Unpacking
from zimage.batch.rows import rows_of
from zimage.batch.sources import Source, multiplied, read_rows
from zimage.errors import RequestError

ROWS = [
    {"id": "one", "prompt": "a cat, asleep", "steps": 4, "guidance": 1.5, "paste": True},
    {"prompt": "a dog", "seed": 3, "layer_weights": "-2:0.5,-3:0.5"},
    {"prompt": "a fox", "reference": ["one.png:0.4"], "vision_blend": "linear"},
]


def write(folder, kind, rows):
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("\n\n".join(map(json.dumps, rows)), encoding="utf-8-sig")
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        names = list(dict.fromkeys(name for row in rows for name in row))
        lines = [names, *([_cell(row.get(name, "")) for name in names] for row in rows)]
        path.write_text("".join(",".join(line) + "\n" for line in lines), encoding="utf-8")
    return path


def _cell(value):
    text = json.dumps(value) if isinstance(value, list) else str(value)
    return '"' + text.replace('"', '""') + '"'


def rows(*values, **defaults):
    """The rows of these values."""
    return rows_of([Source(f"line {i}", row) for i, row in enumerate(values, 1)], defaults, Path())


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_every_kind_of_file_says_the_same(tmp_path, kind):
    names = list(dict.fromkeys(name for row in ROWS for name in row))  # Parquet fills its table with nulls
    filled = [{name: row.get(name) for name in names} for row in ROWS] if kind == "parquet" else ROWS
    assert [source.values for source in read_rows(write(tmp_path, kind, filled))] == ROWS


FAULTS = {
    'jsonl: {"prompt": "a"}\n{"prompt": "a", "stepz": 4}': "rows.jsonl line 2: there is no setting 'stepz'",
    'jsonl: {"prompt": "a"}\n["a"]': "rows.jsonl line 2 should hold a JSON object",
    'jsonl: {"prompt": "a", "prompt": "b"}': "a key appears twice",
    'jsonl: {"prompt": "a"': "rows.jsonl line 1 is not JSON",
    'jsonl: {"prompt": "a", "steps": 0}': "rows.jsonl line 1: steps 0 is too small",
    'jsonl: {"prompt": "a", "steps": "4"}': "rows.jsonl line 1: steps '4' is of type str",
    'jsonl: {"steps": 4}': "rows.jsonl line 1: a prompt is needed",
    'jsonl: {"prompt": "a", "batch_size": 2}': "rows.jsonl line 1: batch_size 2: rows are drawn one by one",
    'jsonl: {"prompt": "a", "id": "x"}\n{"prompt": "b", "id": "X"}': "line 2: the id 'X' is that of rows.jsonl line 1",
    'jsonl: {"prompt": "a", "id": "../x"}': "line 1: id '../x' should be a text",
    'jsonl: {"prompt": "a", "id": ".x"}': "line 1: id '.x' should be a text",
    'jsonl: {"prompt": "a", "id": true}': "line 1: id True should be a text",
    'jsonl: {"prompt": "a", "id": "%s"}' % ("x" * 201): "should be a text of at most 200 bytes",
    "csv: prompt,steps\na,many": "rows.csv line 2: steps 'many' should be of type int",
    "csv: prompt,steps\na,1,2": "rows.csv line 2 has more values than the first line has names",
    "csv: prompt,paste\na,maybe": "rows.csv line 2: paste 'maybe' should be one of",
    'csv: prompt\n"a': "is not CSV",
    "csv: prompt,stepz\na,1": "there is no setting 'stepz' of a row; did you mean 'steps'?",
    "parquet: PAR1": "rows.parquet is not Parquet",
    "txt: a": "rows are read from .jsonl, .ndjson, .csv, .parquet",
    "jsonl: \ud800": "is not UTF-8",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_names_its_place(tmp_path, fault):
    kind, _, text = fault.partition(": ")
    path = tmp_path / f"rows.{kind}"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    with pytest.raises(RequestError) as raised:
        rows_of(read_rows(path), {}, tmp_path)
    assert FAULTS[fault] in str(raised.value)


def test_a_prompt_may_begin_with_a_bracket(tmp_path):
    (tmp_path / "rows.csv").write_text("prompt\n[a cat] on a chair\n")
    assert [source.values for source in read_rows(tmp_path / "rows.csv")] == [{"prompt": "[a cat] on a chair"}]


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(RequestError, match=r"nowhere\.csv cannot be read: No such file"):
        list(read_rows(tmp_path / "nowhere.csv"))


def test_an_endless_line_ends(tmp_path):
    (tmp_path / "rows.jsonl").symlink_to("/dev/zero")
    with pytest.raises(RequestError, match="line 1 has more than"):
        list(read_rows(tmp_path / "rows.jsonl"))


def test_defaults_give_way_to_rows():
    first, second = rows(
        {"prompt": "a", "steps": 2}, {"prompt": "b", "layer_weights": {"-2": 1}}, steps=9, hidden_layer=-3
    )
    assert (first.request["steps"], first.request["hidden_layer"]) == (2, -3)
    assert second.request["steps"] == 9
    assert "hidden_layer" not in second.request  # it does not go together with what the row says


def test_several_pictures_of_a_row_are_rows():
    several = rows({"id": "x", "prompt": ["a", "b"], "images": 2, "seed": 5, "steps": 3})
    assert [(row.id, row.request["prompt"], row.request["seed"]) for row in several] == [
        ("x-1", "a", 5),
        ("x-2", "a", 6),
        ("x-3", "b", 5),
        ("x-4", "b", 6),
    ]
    assert {row.request["images"] for row in several} == {1}


def test_ids_and_seeds_stay_when_rows_are_put_between():
    before = rows({"prompt": "a"}, {"prompt": "b"})
    after = rows({"prompt": "new"}, {"prompt": "b"}, {"prompt": "a"})
    assert {row.id: row.request for row in before}.items() <= {row.id: row.request for row in after}.items()


def test_the_same_row_again_is_another_picture():
    first, second = rows({"prompt": "a cat"}, {"prompt": "a cat"})
    assert second.id == f"{first.id}-2"
    assert first.request["seed"] != second.request["seed"]


def test_an_id_may_be_a_number():
    assert [row.file for row in rows({"id": 7, "prompt": "a"})] == ["7.png"]


def test_a_product_has_every_combination():
    lists = {"steps": [1, 2], "negative": ["blurry, dark", None]}
    found = [source.values for source in multiplied([Source("here", {"prompt": "a"})], lists)]
    assert [(row["steps"], row.get("negative")) for row in found] == [
        (1, "blurry, dark"),
        (1, None),
        (2, "blurry, dark"),
        (2, None),
    ]
    with pytest.raises(RequestError, match="here sets steps itself"):
        list(multiplied([Source("here", {"prompt": "a", "steps": 4})], lists))


def test_an_id_gets_a_number_for_each_value():
    lists = {"steps": [1, 2], "seed": [5, 6]}
    found = rows_of(multiplied([Source("here", {"id": "x", "prompt": "a"})], lists), {}, Path())
    assert [row.id for row in found] == ["x-1-1", "x-1-2", "x-2-1", "x-2-2"]


# ------------------------------------------------------------------ files of rows


def test_pictures_travel_by_content_and_arrive_under_their_names(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "cat.png").write_bytes(b"a picture")
    (tmp_path / "cat.png").write_bytes(b"another")
    (row,) = rows_of(
        [Source("here", {"prompt": "a", "image": "a/cat.png", "reference": ["cat.png:0.4", "a/cat.png"]})], {}, tmp_path
    )
    packing = Packing(lambda content: content[::-1])
    packed = json.loads(json.dumps(packing.pack(row.request)))
    assert len(packing.contents) == 2  # each once
    assert str(tmp_path) not in json.dumps(packed)
    (tmp_path / "cat.png").unlink()
    unpacking = Unpacking(packing.contents, lambda kept: kept[::-1])
    unpacked = unpacking.unpack(packed)
    paths = [unpacked["image"], *(one["picture"] for one in unpacked["reference"])]
    contents = [Path(path).read_bytes() for path in paths]
    assert contents == [b"a picture", b"another", b"a picture"]
    assert all(path.endswith("/cat.png") for path in paths)
    assert unpacking.named(f"{paths[0]}: damaged") == "cat.png: damaged"
    assert [one["alpha"] for one in unpacked["reference"]] == [0.4, 0.3]


def test_files_of_control_nets_stay_where_they_are(tmp_path):
    (tmp_path / "pose.png").write_bytes(b"a picture")
    (row,) = rows_of([Source("here", {"prompt": "a", "control": ["net.safetensors:pose.png:0.5"]})], {}, tmp_path)
    packing = Packing(lambda content: content)
    (control,) = packing.pack(row.request)["control"]
    assert control["model"] == str(tmp_path / "net.safetensors")
    assert list(packing.contents.values()) == [b"a picture"]


def test_a_mask_in_its_image_is_no_file(tmp_path):
    (tmp_path / "clear.png").write_bytes(b"a picture")
    (row,) = rows_of([Source("here", {"prompt": "a", "image": "clear.png", "mask": "alpha"})], {}, tmp_path)
    assert Packing(lambda content: content).pack(row.request)["mask"] == "alpha"


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (row,) = rows_of([Source("here", {"prompt": "a", "image": "gone.png"})], {}, tmp_path)
    with pytest.raises(RequestError, match=r"gone\.png is not a file"):
        Packing(lambda content: content).pack(row.request)
