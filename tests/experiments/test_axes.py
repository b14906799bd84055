"""The axes of a sweep, its cells and their order: pure functions, without a model."""

import itertools
import os
from pathlib import Path

import pytest

from zimage.cli.settings import resolver
from zimage.errors import ConfigFileError, RequestError
from zimage.experiments.axes import Axis, axis, check_axes, parse_axis, parse_seeds, zipped
from zimage.experiments.cells import cells_of
from zimage.experiments.order import by_caption, ordered
from zimage.experiments.sweep_file import read_sweep


def cells(*axes, prompts=("a cat",), seeds=(0,), **options):
    return cells_of(
        [parse_axis(one) if isinstance(one, str) else one for one in axes], prompts, seeds, resolver(options)
    )


def ids(*axes, **options):
    return [cell.id for cell in cells(*axes, **options)]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("steps=4,8", [4, 8]),
        ("hidden-layer=-2,-6", [-2, -6]),
        ("shift=3,4.5", [3.0, 4.5]),
        ("force_think_block=,true,off,1", [None, True, False, True]),
        ("long_prompt=pool,truncate", ["pool", "truncate"]),
        ('layer_weights=-2:1,"-2:0.7,-5:0.3"', [{-2: 1.0}, {-2: 0.7, -5: 0.3}]),
        ('system_prompt="In oil, on ""wood"".",', ['In oil, on "wood".', None]),
        ("lora=,a.safetensors:0.5", [None, ["a.safetensors:0.5"]]),
        ("reference=a.png:0.1,b=c.png", [["a.png:0.1"], ["b=c.png"]]),
        ("model=here,there", ["here", "there"]),
        ("dtype=bf16,fp32", ["bf16", "fp32"]),
        ("image=a.png", ["a.png"]),
        ("template=", [None]),
    ],
)
def test_values_are_read_as_their_fields_hold_them(text, values):
    assert [point[0] for point in parse_axis(text).points] == values


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("steps", "vary 'steps' should be NAME=VALUE,VALUE"),
        ("stepz=1", "there is no setting 'stepz' to vary; did you mean 'steps'"),
        ("port=1", "there is no setting 'port' to vary"),
        ("seed=1", "seed cannot be varied: pass --seeds"),
        ("prompt=a", "prompt cannot be varied: pass prompts as arguments"),
        ("images=2", "images cannot be varied: a cell is one picture"),
        ("steps=4,many", "steps 'many' should be of type int"),
        ("width=1000", "width 1000 is not a multiple of 16; nearest 992 or 1008"),
        ("precision=int3", "precision 'int3' is not known; use bf16, int8, fp8"),
        ('system_prompt="a', "a value with a comma stands in double quotes"),
    ],
)
def test_what_is_no_axis_is_refused_before_anything_is_drawn(text, says):
    with pytest.raises(RequestError, match=says):
        parse_axis(text)


def test_seeds_are_numbers_and_ranges():
    assert parse_seeds("0-3, 7") == [0, 1, 2, 3, 7]
    for text in ("", "a", "3-1", "-2", "1-", "0-9999999", "1,1", str(2**63)):
        with pytest.raises(RequestError, match="seeds"):
            parse_seeds(text)


def test_zipped_axes_change_together():
    together = zipped([parse_axis("steps=4,8"), parse_axis("shift=3,6")])
    assert together == [Axis(("steps", "shift"), ((4, 3.0), (8, 6.0)))]
    with pytest.raises(RequestError, match="steps has 2, shift has 1"):
        zipped([parse_axis("steps=4,8"), parse_axis("shift=3")])


def test_axes_hold_each_setting_and_each_point_once():
    with pytest.raises(RequestError, match="steps: it stands in two axes"):
        check_axes([parse_axis("steps=4"), *zipped([parse_axis("shift=3,6"), parse_axis("steps=1,2")])])
    with pytest.raises(RequestError, match="steps: 4 stands twice"):
        check_axes([parse_axis("steps=4,4")])
    check_axes(zipped([parse_axis("steps=4,4"), parse_axis("shift=3,6")]))


def test_a_grid_has_every_combination():
    found = cells("steps=4,8", "shift=,6", prompts=["a", "b"], seeds=[0, 1], width=64)
    assert len(found) == len({cell.id for cell in found}) == 16
    assert [(cell.prompt, cell.axes["steps"], cell.axes["shift"], cell.seed) for cell in found[:5]] == [
        ("a", 4, None, 0),
        ("a", 4, None, 1),
        ("a", 4, 6.0, 0),
        ("a", 4, 6.0, 1),
        ("a", 8, None, 0),
    ]
    assert found[0].request == {"steps": 4, "width": 64, "prompt": "a", "seed": 0}
    assert found[3].label == "steps 4, shift 6, seed 1"


def test_ids_depend_on_what_is_drawn_and_on_nothing_else():
    one = ids("steps=4")
    assert ids("steps=4,8")[0] == one[0]
    assert ids(steps=4) == one, "an option is as good as an axis"
    assert ids("steps=4", memory=8.0, residency="stage", cache_entries=3) == one
    assert len(set(ids("residency=keep,stage", steps=4) + one)) == 3, "where they are compared they are cells"
    changed = [ids("steps=4", dtype="fp32"), ids("steps=4", prompts=["b"]), ids("steps=4", seeds=[1]), ids("steps=5")]
    assert len({one[0], *(found[0] for found in changed)}) == 5


def test_ids_follow_the_content_of_files(tmp_path, monkeypatch):
    for name, content in {"a": b"1", "b": b"1", "c": b"2"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.safetensors").write_bytes(content)
    paths = [str(tmp_path / name / "x.safetensors") for name in "abc"]
    (a,), (b,), (c,) = (ids(lora=(path,)) for path in paths)
    assert a == b != c
    monkeypatch.chdir(tmp_path / "a")
    assert ids(lora=("x.safetensors",)) == [a]
    assert ids(lora=("x.safetensors:0.5",)) != [a]
    assert ids(image=paths[0]) == ids(image=paths[1]) != ids(image=paths[2])
    assert ids(reference=(f"{paths[0]}:0.2",)) == ids(reference=(f"{paths[1]}:0.2",)) != ids(reference=(paths[0],))
    assert ids(model=str(tmp_path / "a")) == ids(model=str(tmp_path / "b")) != ids(model=str(tmp_path / "c"))
    assert ids(model="nowhere") != ids(model="elsewhere")


def test_ids_follow_what_a_template_says(tmp_path, monkeypatch):
    head = "---\nname: own\ndescription: mine\ncategory: photo\n---\n"
    monkeypatch.setenv("ZIMAGE_TEMPLATES", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    found = []
    for folder in (tmp_path / "own", tmp_path / "config" / "zimage" / "templates"):
        folder.mkdir(parents=True)
        for text in ("In oil.", "In ink."):
            (folder / "own.md").write_text(head + text)
            found.append(ids(template="own"))
        monkeypatch.delenv("ZIMAGE_TEMPLATES", raising=False)
    assert found[:2] == found[2:]
    assert found[0] != found[1]
    (folder / "own.md").write_text(head.replace("mine", "told otherwise") + "In oil.")
    assert ids(template="own") == found[2]
    assert ids(template="nowhere") != ids(template="elsewhere")


def test_a_large_file_counts_by_its_size_and_samples(tmp_path):
    file = tmp_path / "large.safetensors"
    with file.open("wb") as stream:
        stream.truncate(64 << 20)
    before = ids(lora=(str(file),))
    assert ids(lora=(str(file),)) == before
    with file.open("r+b") as stream:
        stream.seek(-10, os.SEEK_END)
        stream.write(b"1")
    assert ids(lora=(str(file),)) != before


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert len(ids(image=str(tmp_path / "pipe"))) == 1


def test_the_paths_of_a_load_start_at_the_root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (cell,) = cells(lora=("x.safetensors:0.123456789",), dit="a/../b.gguf")
    assert cell.load == {"lora": [f"{tmp_path}/x.safetensors:0.123456789"], "dit": f"{tmp_path}/b.gguf"}


def test_settings_that_do_not_go_together_make_a_cell_with_an_error():
    found = cells("guidance=0,2", negative="dogs", prompts=["a"])
    assert found[0].error.startswith("negative: it has no effect at guidance 0")
    assert not found[1].error
    found = cells("hidden_layer=-2", "layer_weights=,-3:1")
    assert [bool(cell.error) for cell in found] == [False, True]
    assert len({cell.id for cell in found}) == 2


def test_a_variation_that_is_open_makes_no_cell():
    """What it draws would follow from chance, not from the id."""
    found = cells(axis("variation", ["7:0.5", "-1:0.5"]))
    assert [cell.error[:40] for cell in found] == ["", "variation: its seed is open, and a cell "]
    assert cells(variation="-1:0.5")[0].error


def test_two_cells_that_are_one_picture_are_refused():
    with pytest.raises(RequestError, match="the same picture: steps default, seed 0 and steps 4, seed 0"):
        cells("steps=,4", steps=4)
    with pytest.raises(RequestError, match="the same picture: prompt 'a'"):
        cells(prompts=["a", "b", "a"])
    with pytest.raises(RequestError, match="has 1,000,000 cells; at most 100,000"):
        cells(prompts=[str(i) for i in range(1000)], seeds=range(1000))


def test_what_is_costly_changes_least_often():
    found = cells("precision=,int8", "lora=,a.st,b.st", "hidden_layer=-2,-3", seeds=[0, 1], prompts=["a", "b"])
    groups = ordered(found)
    assert [group.load.get("precision") for group in groups] == [None, "int8"]
    assert [[Path(lora).name for part in group.parts for lora in part.loras] for group in groups] == [
        ["a.st", "b.st"]
    ] * 2
    assert sorted(cell.id for group in groups for cell in group.cells) == sorted(cell.id for cell in found)
    for part in (part for group in groups for part in group.parts):
        captions = [(cell.prompt, cell.axes["hidden_layer"]) for cell in part.cells]
        assert len(captions) == 8
        changes = sum(a != b for a, b in itertools.pairwise(captions))
        assert changes == 3
    assert [len(same) for same in by_caption(groups[0].cells)] == [6] * 4


def test_noise_and_steps_share_a_caption_and_texts_do_not():
    assert len(by_caption(cells("steps=1,2", "shift=3,6", "width=64,128", seeds=[0, 1]))) == 1
    for text in ("template=,photo-overcast", "vision_layer=-2,-3", "guidance=0,2", "long_prompt=pool,truncate"):
        assert len(by_caption(cells(text))) == 2, text


TOML = """
prompts = ["a cat", "a dog"]
seeds = "0-1"
[settings]
steps = 3
lora = ["style.safetensors:0.5"]
[vary]
shift = [3, 6.0]
layer_weights = ["", {-2 = 0.7, -5 = 0.3}]
mask = ["", "alpha", "m.png"]
[[zip]]
force_think_block = ["", true]
thinking_content = ["", "Soft, warm."]
"""


def test_a_file_holds_a_whole_sweep(tmp_path):
    (tmp_path / "sweep.toml").write_text(TOML)
    file = read_sweep(tmp_path / "sweep.toml")
    assert (file.prompts, file.seeds) == (["a cat", "a dog"], [0, 1])
    assert file.settings == {"steps": 3, "lora": [f"{tmp_path}/style.safetensors:0.5"]}
    assert file.axes == [
        axis("shift", [3, 6.0]),
        axis("layer_weights", [None, {-2: 0.7, -5: 0.3}]),
        axis("mask", [None, "alpha", f"{tmp_path}/m.png"]),
        Axis(("force_think_block", "thinking_content"), ((None, None), (True, "Soft, warm."))),
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[vary]\nstepz = [1]", "line 2: there is no setting 'stepz' to vary; did you mean 'steps'"),
        ("[vary]\nsteps = 1", "line 2: steps should be a list of values"),
        ("[vary]\nsteps = [1, 'x']", "line 2: steps 'x' is of type str"),
        ("[vary]\nsteps = []", "line 2: steps: an axis needs a value"),
        ("[settings]\nseed = 1", "line 2: seed is not set here: pass --seeds"),
        ("[settings]\nwidth = 1000", "line 2: width 1000 is not a multiple"),
        ("[[zip]]\nsteps = [1, 2]\nshift = [1]", "zipped axes need as many values each"),
        ("zip = 1", "line 1: zip should be tables"),
        ("zip = [1]", "line 1: zip should be tables"),
        ("vary = 1", r"line 1: vary should be a table, \[vary\]"),
        ("prompts = 'a'", "line 1: prompts should be a list of texts"),
        ("seeds = [-2]", "line 1: seeds '-2' should be numbers"),
        ("seed = 1", "line 1: there is no table 'seed'; did you mean 'seeds'"),
    ],
)
def test_a_fault_in_a_file_names_its_line(tmp_path, text, says):
    (tmp_path / "sweep.toml").write_text(text)
    with pytest.raises(ConfigFileError, match=says):
        read_sweep(tmp_path / "sweep.toml")
