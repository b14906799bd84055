"""Sheets, differences and flips of a folder of cells: every picture in its place, words that can be read."""

import dataclasses
import json

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image, ImageDraw
from sweeps import VARIED, folder_of, picture, records

from zimage.cli import cli, main
from zimage.errors import RequestError
from zimage.experiments import lettering
from zimage.experiments.difference import KINDS, RED, SCALE, difference, distance
from zimage.experiments.flip import animated, frames
from zimage.experiments.folder import Experiment, shown
from zimage.experiments.layout import arranged, placed, told
from zimage.experiments.lettering import ELLIPSIS, Letters
from zimage.experiments.record import RECORDS
from zimage.experiments.sheet import MOST_SIDE, SMALLEST_LETTERS, THEMES, Style, drawn, measured, parts
from zimage.experiments.showing import Showing
from zimage.pictures.opening import opened


@pytest.fixture
def experiment(tmp_path):
    return Experiment.open(folder_of(tmp_path / "sweep", records(prompts=("a fox", "a dog"))))


def boxes(grid, measures):
    """(row, column) → where its box stands."""
    (left, top), (across, down), (width, height) = measures.origin, measures.step, measures.box
    for row in range(len(grid.rows)):
        for column in range(len(grid.columns)):
            x, y = left + column * across, top + row * down
            yield (row, column), (x, y, x + width, y + height)


# ------------------------------------------------------------------ folders


def test_axes_are_what_differs_in_the_order_of_values(tmp_path):
    made = records({"steps": [16, 4, 8], "template": ["b", "a"], "shift": [3.0]})
    experiment = Experiment.open(folder_of(tmp_path, made))
    assert {name: [shown(v) for v in values] for name, values in experiment.axes.items()} == {
        "steps": ["4", "8", "16"],
        "template": ["b", "a"],
    }


def test_a_cell_without_an_axis_has_its_default(tmp_path):
    made = records({"steps": [4, 8]})
    made.append(dataclasses.replace(made[0], id="other", axes={"steps": 4, "layer_weights": {"-2": 1}}))
    experiment = Experiment.open(folder_of(tmp_path, made))
    assert [shown(value) for value in experiment.axes["layer_weights"]] == ["default", "-2:1"]


@pytest.mark.parametrize("name", ["link.png", "gone.png", "folder", "a\0b"])
def test_pictures_lie_in_the_folder(tmp_path, name):
    picture(0).save(tmp_path / "secret.png")
    folder = tmp_path / "sweep"
    folder.mkdir()
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "folder").mkdir()
    (folder / RECORDS).write_text(json.dumps({**vars(records()[0]), "path": name}) + "\n")
    (cell,) = Experiment.open(folder).cells
    assert cell.path is None
    with pytest.raises(RequestError, match="not rendered"):
        cell.picture()


DAMAGED = [
    {"axes": [1]},
    {"seed": "x"},
    {"scores": {"psnr": "high"}},
    {"id": "../a"},
    {"id": "a b"},
    {"request": None},
    {"path": 3},
    {"path": "../secret.png"},
    {"path": "/etc/hostname"},
    {"prompt": "\ud800"},
    {"request": {"shift": float("nan")}},
    {"id": "<b>"},
]


@pytest.mark.parametrize("wrong", DAMAGED, ids=str)
def test_records_of_the_wrong_kind_are_one_line(tmp_path, wrong):
    (tmp_path / RECORDS).write_text(json.dumps({**vars(records()[0]), **wrong}) + "\n")
    with pytest.raises(RequestError) as error:
        Experiment.open(tmp_path)
    assert "record" in str(error.value)
    assert len(str(error.value)) < 400


def test_cells_are_named_by_id_and_by_value(experiment):
    assert experiment.cell("c003").id == "c003"
    assert [cell.id for cell in experiment.only(["steps=4", "steps=8", "prompt=a dog", "shift=3"]).cells] == [
        "c007",
        "c009",
    ]
    for wrong, said in (("c00", "begin with"), ("x", "no cell is"), ("", "begin with")):
        with pytest.raises(RequestError, match=said):
            experiment.cell(wrong)
    for wrong, said in (("steps=5", "has 4, 8, 16"), ("size=3", "AXIS is one of"), ("steps", "AXIS=VALUE")):
        with pytest.raises(RequestError, match=said):
            experiment.only([wrong])


def test_the_partner_of_a_cell_differs_in_the_base_alone(experiment):
    for cell in experiment.cells:
        partner = experiment.partner(cell, "steps=16")
        assert partner.values == {**cell.values, "steps": "16"}
        assert experiment.partner(cell, "c002").id == "c002"


# ------------------------------------------------------------------ layout


def test_sides_by_themselves_and_as_asked(experiment):
    axes = placed(experiment)
    assert (axes.columns, axes.rows, axes.pages) == (("steps",), ("shift",), ("prompt",))
    axes = placed(experiment, columns=["prompt"])
    assert (axes.columns, axes.rows, axes.pages) == (("prompt",), ("steps",), ("shift",))
    axes = placed(experiment, rows=["shift", "prompt"])
    assert (axes.columns, axes.rows, axes.pages) == (("steps",), ("shift", "prompt"), ())
    for wrong in (["nothing"], ["shift", "shift"]):
        with pytest.raises(RequestError):
            placed(experiment, rows=wrong)


@pytest.mark.parametrize("sides", [{}, {"columns": ["prompt", "shift"]}, {"rows": ["seed"], "pages": ["steps"]}])
def test_every_cell_has_one_place_with_its_own_headings(experiment, sides):
    axes = placed(experiment, **sides)
    grids = arranged(experiment, axes)
    assert sorted(cell.id for grid in grids for cell in grid.places.values()) == [c.id for c in experiment.cells]
    for grid in grids:
        for (row, column), cell in grid.places.items():
            for names, heading in ((axes.rows, grid.rows[row]), (axes.columns, grid.columns[column])):
                assert heading == tuple(cell.values[name] for name in names)
            assert told(axes.pages, grid.page) == told(axes.pages, tuple(cell.values[n] for n in axes.pages))


def test_headings_are_combinations_that_exist(tmp_path):
    zipped = [r for r in records() if (r.axes["steps"], r.axes["shift"]) in ((4, 1.0), (8, 3.0))]
    experiment = Experiment.open(folder_of(tmp_path, zipped))
    (grid,) = arranged(experiment, placed(experiment, columns=["steps", "shift"]))
    assert [told(grid.axes.columns, one) for one in grid.columns] == ["steps 4 · shift 1", "steps 8 · shift 3"]


# ------------------------------------------------------------------ sheets


def test_every_picture_stands_in_its_place_bit_for_bit(experiment):
    showing, style = Showing(experiment), Style(box=144)  # three times the pictures' own size
    for grid in arranged(experiment, placed(experiment)):
        measures = measured(grid, showing, style)
        sheet = drawn(grid, measures, showing, style)
        assert len(grid.places) == 6
        for place, box in boxes(grid, measures):
            own = grid.places[place].picture().resize((144, 96), Image.Resampling.NEAREST)
            assert sheet.crop(box).tobytes() == own.tobytes()


def test_every_label_is_written_where_it_belongs(experiment):
    showing, style = Showing(experiment), Style("dark", box=144)
    grid = arranged(experiment, placed(experiment))[1]
    measures, theme = measured(grid, showing, style), THEMES["dark"]
    sheet = drawn(grid, measures, showing, style)
    letters, (left, top), edge = measures.letters, measures.origin, 2 * measures.gap
    places = [
        (text, (left + k * measures.step[0], top - measures.gap - letters.line))
        for k, text in enumerate(["4", "8", "16"])
    ]
    places += [(text, (edge, top + k * measures.step[1])) for k, text in enumerate(("1", "3"))]
    for text, (x, y) in [*places, ("prompt a dog", (edge, edge))]:
        wanted = Image.new("RGB", (letters.width(text), letters.line), theme.paper)
        letters.draw(ImageDraw.Draw(wanted), (0, 0), [text], theme.ink)
        assert sheet.crop((x, y, x + wanted.width, y + wanted.height)).tobytes() == wanted.tobytes(), text


def test_scores_and_faults_stand_in_the_cells_place(tmp_path):
    made = records({"steps": [4, 8]})
    made[0] = dataclasses.replace(made[0], scores={"psnr": 31.25})
    made[1] = dataclasses.replace(made[1], path=None, error="out of\nmemory")
    showing = Showing(Experiment.open(folder_of(tmp_path, made)), scores=("psnr",))
    first, second = map(showing.of, showing.experiment.cells)
    assert (first.captions, first.fault) == (["psnr 31.2"], "")
    assert (second.picture, second.captions, second.fault) == (None, ["psnr —"], "out of memory")
    with pytest.raises(RequestError, match="there are psnr"):
        Showing(showing.experiment, scores=("lpips",))


def test_pictures_of_several_shapes_are_centred_and_a_damaged_one_says_so(tmp_path):
    made = records({"steps": [1, 2, 3]})
    folder = folder_of(tmp_path, made)
    picture(9, (32, 64)).save(folder / made[1].path)
    (folder / made[2].path).write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    experiment = Experiment.open(folder)
    showing, style = Showing(experiment), Style(box=64)
    (grid,) = arranged(experiment, placed(experiment))
    measures = measured(grid, showing, style)
    assert measures.box == (48, 64)
    sheet = drawn(grid, measures, showing, style)
    x, y, *_ = dict(boxes(grid, measures))[0, 1]
    assert sheet.crop((x + 8, y, x + 40, y + 64)).tobytes() == picture(9, (32, 64)).tobytes()
    assert "cannot be read as a picture" in showing.of(experiment.cells[2]).fault


@pytest.mark.parametrize(("columns", "rows"), [(300, 1), (3, 200), (62, 62)])
def test_sheets_of_any_number_of_cells_are_legible(tmp_path, columns, rows):
    """Boxes shrink, letters do not; what is still too large is divided, and nothing is lost or shown twice."""
    made = [dataclasses.replace(r, path=None, error="none") for r in records({"a": range(columns), "b": range(rows)})]
    experiment = Experiment.open(folder_of(tmp_path, made))
    (grid,) = arranged(experiment, placed(experiment))
    measures = measured(grid, Showing(experiment), Style())
    cut = list(parts(grid, measures))
    assert measures.letters.size >= SMALLEST_LETTERS
    assert all(max(measures.size(len(part.columns), len(part.rows))) <= MOST_SIDE for part in cut)
    assert sorted(cell.id for part in cut for cell in part.places.values()) == sorted(r.id for r in made)
    for part in cut:
        assert all(
            told(("a",), part.columns[c]) == f"a {cell.record.axes['a']}" for (_, c), cell in part.places.items()
        )


def test_lines_fit_and_keep_every_word():
    letters = Letters(14)
    text = "a long prompt with an_extremely_long_word_that_fits_nowhere, and more " * 3
    lines = letters.wrapped(text, 120, 99)
    assert all(letters.width(line) <= 120 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    short = letters.wrapped(text, 120, 2)
    assert len(short) == 2
    assert short[1].endswith(ELLIPSIS)
    assert letters.width(short[1]) <= 120
    assert letters.wrapped("\x1b[31m\n", 500, 1) == ["\\x1b[31m"]


def test_a_font_is_taken_that_has_the_characters():
    *of_system, built_in = lettering._of_system(20)
    assert not lettering._has(built_in, "éжλ")  # Pillow's own
    assert lettering._has(built_in, "a b\n")
    if not any(lettering._has(font, "éжλ") for font in of_system):
        pytest.skip("no font with these characters is installed")
    assert lettering._has(Letters(20)._font("é ж λ"), "éжλ")
    with pytest.raises(RequestError, match="TrueType"):
        Letters(14, "nothing.ttf").width("a")


# ------------------------------------------------------------------ differences


def test_differences_follow_their_formulas():
    a, b = picture(1, (7, 5)), picture(2, (7, 5))
    left, right = np.asarray(a, float), np.asarray(b, float)
    gaps, largest = abs(left - right), abs(left - right).max(axis=2)
    assert np.array_equal(np.asarray(difference(a, b, "absolute", 1)), gaps)
    assert np.array_equal(np.asarray(difference(a, b, "absolute", 3)), np.minimum(3 * gaps, 255))
    heat = np.asarray(difference(a, b, "heatmap", 1), float)
    for y, x in np.ndindex(largest.shape):
        lower, part = divmod(largest[y, x] / 255 * (len(SCALE) - 1), 1)
        upper = min(int(lower) + 1, len(SCALE) - 1)
        wanted = SCALE[int(lower)] * (1 - part) + SCALE[upper] * part
        assert abs(heat[y, x] - wanted).max() <= 0.51
    far = distance(a, b)
    assert (far.mean, far.largest, far.pixels) == (pytest.approx(gaps.mean()), gaps.max(), 35)


def test_a_highlight_marks_what_can_be_seen_and_nothing_else():
    base = Image.new("RGB", (3, 1), (100, 100, 100))
    other = base.copy()
    other.putpixel((1, 0), (100, 107, 100))
    other.putpixel((2, 0), (100, 108, 100))
    marked = np.asarray(difference(other, base, "highlight"))
    assert (marked[0, 2] == RED).all()
    assert all(len(set(marked[0, x])) == 1 for x in (0, 1))  # grey


@pytest.mark.parametrize("kind", KINDS)
def test_equal_pictures_and_sizes_that_differ(kind):
    a = picture(3)
    same = np.asarray(difference(a, a, kind))
    assert distance(a, a).lines == ("equal bits", "")
    assert not same.any() if kind != "highlight" else not (same == RED).all(axis=2).any()
    with pytest.raises(RequestError, match="48 × 32 and 9 × 9"):
        difference(a, picture(3, (9, 9)), kind)


def test_a_sheet_of_differences_compares_each_with_its_own_base(experiment):
    showing = Showing(experiment, "absolute", "steps=16", 2)
    for cell in experiment.cells:
        base = experiment.partner(cell, "steps=16")
        wanted = cell.picture() if base is cell else difference(cell.picture(), base.picture(), "absolute", 2)
        assert showing.of(cell).picture.tobytes() == wanted.tobytes()


# ------------------------------------------------------------------ flips


@pytest.mark.parametrize("ending", [".webp", ".gif", ".png"])
def test_a_flip_shows_each_column_in_one_place(experiment, tmp_path, ending):
    showing, style = Showing(experiment), Style(box=64)
    grid = arranged(experiment, placed(experiment))[0]
    pictures = frames(grid, showing, style)
    measures = measured(grid, showing, style)
    for k, frame in enumerate(pictures):
        for (row, _), box in boxes(grid.part(range(2), range(1)), measures):
            own = grid.places[row, k].picture().resize(measures.box, Image.Resampling.NEAREST)
            assert frame.crop(box).tobytes() == own.tobytes()
    path = tmp_path / f"flip{ending}"
    path.write_bytes(animated(pictures, ending, 0.5))
    with Image.open(path) as film:
        assert film.n_frames == 3
        for k, frame in enumerate(pictures):
            film.seek(k)
            film.load()
            assert film.info["duration"] == 500
            assert ending == ".gif" or film.convert("RGB").tobytes() == frame.tobytes()


# ------------------------------------------------------------------ the command


def run(*arguments):
    return CliRunner().invoke(cli, ["compare", *map(str, arguments)], catch_exceptions=False)


def test_the_command_writes_sheets_and_names_them(experiment, tmp_path):
    one, several = tmp_path / "one.png", tmp_path / "s.png"
    assert run(experiment.folder, "--only", "prompt=a fox", "-o", one).stdout.split() == [str(one)]
    assert run(experiment.folder, "-o", several).stdout.split() == [str(tmp_path / f"s-{k}.png") for k in (1, 2)]
    assert run(experiment.folder, "--only", "seed=0", "--rows", "prompt", "--rows", "shift").exit_code == 0
    for path in (one, tmp_path / "s-2.png", experiment.folder / "sheet.png"):
        with opened(path) as picture:
            picture.load()


def test_a_link_in_the_folder_is_not_written_through(experiment, tmp_path, capsys):
    (tmp_path / "precious").write_text("mine")
    (experiment.folder / "sheet.png").symlink_to(tmp_path / "precious")
    assert main(["compare", str(experiment.folder), "--only", "steps=4"]) == 1
    assert "leads out of" in capsys.readouterr().err
    assert (tmp_path / "precious").read_text() == "mine"


def test_two_cells_and_two_values_side_by_side(experiment, tmp_path):
    path = tmp_path / "pair.png"
    assert run(experiment.folder, "--side-by-side", "c005", "c001", "--diff", "absolute", "-o", path).exit_code == 0
    pair, base, columns = experiment.pair("steps=16", "steps=4")
    (grid, _) = arranged(pair, placed(pair, columns))
    assert [shown(heading[0]) for heading in grid.columns] == ["16", "4"]  # as they were named
    assert base == "steps=16"
    cells, base, columns = experiment.pair("c005", "c001")
    (grid,) = arranged(cells, placed(cells, columns))
    assert [grid.places[0, k].id for k in range(2)] == ["c005", "c001"]
    assert base == "c005"


def test_values_are_shown_and_named_as_vary_has_them(tmp_path):
    varied = {"lora": [None, ["a.safetensors:0.5"]], "layer_weights": [None, {"-2": 0.7, "-5": 0.25}]}
    whole = Experiment.open(folder_of(tmp_path, records(varied)))
    (grid,) = arranged(whole, placed(whole))
    assert [shown(heading[0]) for heading in grid.columns] == ["default", "a.safetensors:0.5"]
    assert [shown(heading[0]) for heading in grid.rows] == ["default", "-2:0.7,-5:0.25"]
    assert whole.value("layer_weights=-2:0.7,-5:0.25") == ("layer_weights", '{"-2": 0.7, "-5": 0.25}')
    with pytest.raises(RequestError, match=r"layer_weights has no value '-3:1' here; it has default, -2:0\.7"):
        whole.value("layer_weights=-3:1")


def test_of_two_sweeps_in_a_folder_the_last_stands_as_cell_and_as_base(tmp_path):
    twice = [*records({"steps": [4, 8]}), *(r.replaced(id=f"d{r.id}", path=None) for r in records({"steps": [4, 8]}))]
    whole = Experiment.open(folder_of(tmp_path, twice))
    (grid,) = arranged(whole, placed(whole))
    assert [cell.id for cell in grid.places.values()] == ["dc000", "dc001"]
    assert whole.partner(whole.cell("dc001"), "steps=4").id == "dc000"


WRONG = [
    (["--rows", "nothing"], "no cell has an axis 'nothing'; there are steps, shift, prompt, seed"),
    (["--diff", "heatmap"], "needs a base"),
    (["--base", "c9"], "no cell is 'c9'"),
    (["--side-by-side", "c001", "steps=4"], "two cells by their ids"),
    (["--side-by-side", "steps=4", "shift=1"], "two values of one axis"),
    (["--side-by-side", "c001", "c001"], "do not differ"),
    (["--cell", "5"], "cell 5 should be"),
    (["--font", "/dev/zero"], "cannot be read; pass a TrueType"),
    (["--base", "steps=4", "--diff", "heatmap", "--gain", "nan"], "gain nan should be"),
    (["--base", "steps=4", "--gain", "2"], "gain: it has no effect without --diff absolute or heatmap"),
    (["--base", "steps=4", "--diff", "highlight", "--gain", "2"], "gain: it has no effect"),
    (["--seconds", "2"], "seconds: it has no effect without --flip"),
    (["-o", "page.html", "--flip"], "flip: it has no effect on a page"),
    (["-o", "page.html", "--cell", "200"], "cell: it has no effect on a page"),
    (["--flip", "-o", "flip.gif", "--seconds", "nan"], "seconds nan should be"),
    (["--score", "psnr"], "no cell has a score 'psnr'"),
    (["-o", "sheet.tiff"], "should end in one of"),
    (["--flip", "-o", "flip.jpg"], "a flip ends in one of"),
    (["--flip", "--only", "steps=4", "--columns", "steps", "-o", "flip.gif"], "needs 2 to"),
]


@pytest.mark.parametrize(("options", "said"), WRONG, ids=lambda value: str(value)[:40])
def test_what_is_wrong_is_one_line(experiment, options, said, capsys):
    before = sorted(experiment.folder.iterdir())
    assert main(["compare", str(experiment.folder), *options]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1
    assert sorted(experiment.folder.iterdir()) == before


def test_a_folder_without_cells_is_said(tmp_path, capsys):
    assert main(["compare", str(tmp_path)]) == 2
    assert "holds no cells.jsonl" in capsys.readouterr().err


def test_the_helper_varies_what_it_says():
    assert len(records()) == len(VARIED["steps"]) * len(VARIED["shift"])
