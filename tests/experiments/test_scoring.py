"""`metrics`: which cells are compared, what is written into the records, and what is printed."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from sweeps import VARIED, folder_of, picture, records

from zimage.cli import main
from zimage.errors import NonFiniteError, RequestError
from zimage.experiments.folder import Experiment
from zimage.experiments.metrics import catalogue
from zimage.experiments.metrics.catalogue import KINDS, Kind, parse_metrics
from zimage.experiments.metrics.pixels import IDENTICAL, levels, psnr
from zimage.experiments.metrics.scoring import base_of, score, store
from zimage.experiments.metrics.walks import Alone, AmongSeeds, BesideBase, partners
from zimage.experiments.record import RECORDS, Journal, Record, read_records

CPU = torch.device("cpu")
PROMPTS = ("a fox", 'a sign "OPEN"')


@pytest.fixture
def folder(tmp_path):
    """Steps × shift × two prompts × two seeds, each cell with a picture of its own."""
    return folder_of(tmp_path / "sweep", records(prompts=PROMPTS, seeds=(0, 1)))


def by_id(folder):
    return {record.id: record for record in read_records(folder)}


# ------------------------------------------------------------------ which cells are compared


@pytest.mark.parametrize(
    ("texts", "fixed"),
    [
        (["steps=4"], {"steps": 4}),
        (["steps=4", "shift=3"], {"steps": 4, "shift": 3.0}),
        (["CELL"], {"steps": 8, "shift": 1.0}),
    ],
)
def test_a_base_has_the_prompt_and_seed_of_its_cell(folder, texts, fixed):
    named = next(r.id for r in read_records(folder) if (r.axes["steps"], r.axes["shift"]) == (8, 1.0) and r.seed == 1)
    experiment = Experiment.open(folder)
    found = partners(experiment.cells, base_of(experiment, [named if text == "CELL" else text for text in texts]))
    for cell in experiment.cells:
        wanted, own = {**cell.record.axes, **fixed}, dict(cell.record.axes)
        if wanted == own:
            assert cell.id not in found
            continue
        base = found[cell.id].record
        assert (base.prompt, base.seed, dict(base.axes)) == (cell.record.prompt, cell.record.seed, wanted)


def test_scores_are_those_of_the_pictures(folder):
    experiment = Experiment.open(folder)
    (metric,) = parse_metrics(["psnr"])
    found = {cell.id: value for cell, value in score(experiment, metric, base_of(experiment, ["steps=4"]), CPU)}
    assert sorted(found) == sorted(cell.id for cell in experiment.cells)
    ids = {(r.prompt, r.seed, *r.axes.values()): r.id for r in read_records(folder)}
    number = {id: i for i, id in enumerate(by_id(folder))}
    for (prompt, seed, steps, shift), id in ids.items():
        other = ids[prompt, seed, 4, shift]
        expected = None if steps == 4 else psnr(*(levels(picture(number[i])) for i in (id, other)))
        assert found[id] == expected


def test_a_base_is_opened_once(folder, monkeypatch):
    experiment, opened = Experiment.open(folder), []
    plain = type(experiment.cells[0]).picture
    monkeypatch.setattr(type(experiment.cells[0]), "picture", lambda cell: opened.append(cell.id) or plain(cell))
    list(score(experiment, *parse_metrics(["psnr"]), base_of(experiment, ["steps=4"]), CPU))
    assert sorted(opened) == sorted(cell.id for cell in experiment.cells)


def test_seeds_are_compared_in_pairs_and_only_with_their_like(tmp_path):
    folder = folder_of(tmp_path, records({"steps": [4, 8]}, seeds=(0, 1, 2)))
    cells = Experiment.open(folder).cells
    pairs = BesidePixels()
    found = {cell.id: value for cell, value in AmongSeeds(pairs)(cells, {})}
    for steps in (4, 8):
        group = [cell for cell in cells if cell.record.axes["steps"] == steps]
        a, b, c = (np.asarray(cell.picture()).astype(float).mean() for cell in group)
        expected = (abs(a - b) + abs(a - c) + abs(b - c)) / 3
        assert [found[cell.id] for cell in group] == [pytest.approx(expected)] * 3


class BesidePixels:
    """A distance that is easily told: of the means of all levels."""

    def prepare(self, picture: Image.Image) -> float:
        return float(np.asarray(picture).astype(float).mean())

    def distance(self, one: float, other: float) -> float:
        return abs(one - other)


def test_one_seed_has_no_diversity(tmp_path):
    cells = Experiment.open(folder_of(tmp_path, records())).cells
    assert {value for _, value in AmongSeeds(BesidePixels())(cells, {})} == {None}


def test_pictures_of_another_size_damaged_and_missing_ones_have_no_score(tmp_path, caplog):
    folder = folder_of(tmp_path, [*records({"steps": [4, 8, 16, 20, 30]})])
    paths = [folder / f"c00{i}.png" for i in range(5)]
    picture(9, (32, 32)).save(paths[1])
    paths[2].write_bytes(paths[2].read_bytes()[:200])
    paths[3].unlink()
    experiment = Experiment.open(folder)
    walk = BesideBase(KINDS["psnr"].build(None, CPU).pairs)
    shown = [cell for cell in experiment.cells if not cell.fault]
    found = {cell.id: value for cell, value in walk(shown, base_of(experiment, ["steps=4"]))}
    assert [id for id, value in found.items() if value is not None] == ["c004"]
    assert set(found) == {"c000", "c001", "c002", "c004"}
    assert "the cell c002 has no score" in caplog.text


def test_a_score_that_is_no_number_is_an_error(folder, monkeypatch):
    odd = Kind("odd", True, lambda *_: Alone(lambda picture, prompt: float("nan")))
    monkeypatch.setitem(catalogue.KINDS, "odd", odd)
    with pytest.raises(NonFiniteError, match="odd of the cell c000 is nan"):
        list(score(Experiment.open(folder), *parse_metrics(["odd"]), {}, CPU))


# ------------------------------------------------------------------ what is written


def test_scores_replace_earlier_ones_of_their_metric_only(folder):
    before = by_id(folder)
    with Journal(folder) as journal:
        store(journal, {"psnr": {"c000": 20.0, "c001": 30.0}, "grid": {"c000": 1.0}})
        store(journal, {"psnr": {"c001": 31.0}})
    after = by_id(folder)
    assert after["c000"].scores == {"grid": 1.0}
    assert after["c001"].scores == {"psnr": 31.0}
    assert list(after) == list(before)
    for id, record in after.items():
        assert vars(record) == {**vars(before[id]), "scores": record.scores}


def test_a_folder_that_a_sweep_is_writing_is_left_alone(folder, capsys):
    with Journal(folder) as journal:
        status, _, err = run(capsys, folder, "--base", "steps=4")
        assert status == 2
        assert "another command is writing the records" in err
        late = Record("late", axes={"steps": 4, "shift": 1.0}, prompt="a fox", seed=9)
        journal.append(late)
    assert run(capsys, folder, "--base", "steps=4")[0] == 0
    assert by_id(folder)["late"] == late


# ------------------------------------------------------------------ the command


def run(capsys, *arguments) -> tuple[int, str, str]:
    status = main(["metrics", *map(str, arguments)])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_the_command_scores_stores_and_ranks(folder, capsys):
    for number in (0, 1):  # equal pictures at steps 4 and 8, shift 1
        picture(number).save(folder / "c000.png") if number == 0 else picture(0).save(folder / "c002.png")
    status, out, _ = run(capsys, folder, "--base", "steps=4", "--metric", "psnr,ssim", "--by", "steps")
    assert status == 0
    found = by_id(folder)
    assert found["c002"].scores == {"psnr": IDENTICAL, "ssim": pytest.approx(1)}
    assert found["c000"].scores == {}
    lines = out.splitlines()
    assert lines[0] == "psnr: PSNR to the base, dB (higher is better), 16 of 24 cells"
    assert lines[1].split() == ["rank", "mean", "behind", "the", "first", "best", "in", "steps"]
    assert [line.split()[-1] for line in lines[2:4]] == ["8", "16"]
    assert lines[4] == "  over 2 prompts: the intervals are narrower than they should be"
    assert lines[5].startswith("ssim:")


def test_stored_scores_are_ranked_again_without_pictures(folder, capsys):
    run(capsys, folder, "--base", "steps=4")
    written = (folder / RECORDS).read_bytes()
    for file in folder.glob("*.png"):
        file.unlink()
    status, out, _ = run(capsys, folder, "--stored", "--json")
    assert status == 0
    assert (folder / RECORDS).read_bytes() == written
    tables = json.loads(out)
    assert list(tables) == ["psnr", "ssim"]  # the pictures are too small for the grid
    row = tables["psnr"][0]
    assert set(row["setting"]) == set(VARIED)
    assert row["prompts"] == 2
    assert row["mean_interval"][0] <= row["mean"] <= row["mean_interval"][1]


def test_long_and_listed_values_are_told_on_a_line(tmp_path, capsys):
    values = {"lora": [None, ["a.safetensors:1"]], "system_prompt": ["In oil.\n\x1b[2J" + "On wood. " * 50]}
    folder_of(tmp_path, [record.replaced(scores={"grid": 1.0}) for record in records(values)])
    status, out, _ = run(capsys, tmp_path, "--stored")
    assert status == 0
    assert len(out.splitlines()) == 5
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) < 320
    assert "a.safetensors:1" in out
    assert "(" not in out.splitlines()[3].partition("100%")[2]


def test_settings_without_a_common_prompt_are_told(tmp_path, capsys):
    scored = [Record(f"c{n}", axes={"steps": n}, prompt=f"prompt {n}", scores={"grid": 1.0}) for n in (4, 8)]
    folder_of(tmp_path, scored)
    status, out, _ = run(capsys, tmp_path, "--stored")
    assert status == 0
    assert "no prompt has a score in all settings" in out


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["--metric", "psnr"], "psnr compares with a base; pass --base CELL or --base AXIS=VALUE"),
        (["--metric", "fid"], "'fid' is not a metric; known are psnr, ssim, lpips"),
        (["--metric", "psnr,psnr"], "the metric psnr is named twice"),
        (["--metric", "ssim=folder"], "ssim takes no path"),
        (["--metric", "clip"], "clip needs the folder of its model; pass clip=PATH"),
        (["--metric", "siglip="], "siglip needs the folder of its model; pass siglip=PATH"),
        (["--metric", "clip=nowhere"], "should name the folder of a model"),
        (["--base", "steps=5"], "steps has no value '5' here; it has 4, 8, 16"),
        (["--base", "width=5"], "'width=5' should be AXIS=VALUE"),
        (["--base", "zzz"], "no cell is 'zzz'"),
        (["--base", "steps=4", "--by", "width"], "there is no axis 'width'"),
        (["--device", "tpu"], "device 'tpu' is not known"),
        (["--stored", "--base", "steps=4"], "base: it has no effect on stored scores"),
    ],
    ids=range(13),
)
def test_mistakes_are_one_line_and_leave_the_records(folder, capsys, arguments, fault):
    status, out, err = run(capsys, folder, *arguments)
    assert (status, out) == (2, "")
    assert fault in err
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert all(not record.scores for record in read_records(folder))


@pytest.mark.parametrize("arguments", [["--metric", "grid,psnr"], ["--metric", "grid", "--by", "width"]], ids=range(2))
def test_mistakes_are_told_before_hours_of_work(folder, capsys, arguments):
    for number, file in enumerate(folder.glob("*.png")):
        picture(number, (96, 96)).save(file)  # large enough for the grid
    assert run(capsys, folder, *arguments)[0] == 2
    assert all(not record.scores for record in read_records(folder))


def test_a_folder_without_records(tmp_path, capsys):
    status, _, err = run(capsys, tmp_path)
    assert status == 2
    assert "holds no cells.jsonl" in err


def test_every_metric_is_in_the_help(capsys):
    _, out, _ = run(capsys, "--help")
    assert not [name for name in KINDS if name not in out]


def test_metrics_that_take_paths():
    first, second = parse_metrics(["lpips=a,b/c.tar.gz", "grid,ocr", "clip=~/x"])[0:4:3]
    assert (first.name, str(first.given)) == ("lpips", "a,b/c.tar.gz")
    assert second.given.is_absolute()
    with pytest.raises(RequestError):
        parse_metrics(["grid,clip"])
