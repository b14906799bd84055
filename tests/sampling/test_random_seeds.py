"""The seed −1: a random one, wherever a seed is taken."""

import json
import secrets

import pytest

import zimage
from zimage.batch.rows import rows_of
from zimage.batch.sources import Source
from zimage.cli import main
from zimage.errors import RequestError
from zimage.experiments.axes import parse_seeds


@pytest.fixture
def thrown(monkeypatch):
    """Seeds are drawn from 1000 on."""
    numbers = iter(range(1000, 2000))
    monkeypatch.setattr(secrets, "randbelow", lambda most: next(numbers))


def seeds(pipe, **settings):
    return list(pipe.prepare(zimage.Request(**{"prompt": "a cat", **settings})).seeds)


def test_it_is_drawn_as_one_that_is_left_out(pipe, thrown):
    assert seeds(pipe, seed=-1) == [1000]
    assert seeds(pipe) == [1001]
    assert seeds(pipe, seed=-1, images=3) == [1002, 1003, 1004]  # one that is drawn, and those after it


def test_in_a_list_each_is_drawn_by_itself(pipe, thrown):
    assert seeds(pipe, seed=[5, -1, 6, -1], images=4) == [5, 1000, 6, 1001]
    assert seeds(pipe, prompt=["a", "b"], seed=[5, -1], images=2) == [5, 6, 1002, 1003]


def test_drawn_seeds_differ(pipe):
    assert len({seeds(pipe, seed=-1)[0] for _ in range(20)}) == 20


def test_lower_ones_are_refused(capsys):
    assert main(["gen", "a", "--seed", "-2"]) == 2
    assert "seed -2 is too small; the minimum is -1" in capsys.readouterr().err
    with pytest.raises(RequestError, match="too small"):
        zimage.Request(prompt="a", seed=[1, -2])


def test_a_request_with_an_open_seed_has_none():
    for seed in (-1, [3, -1]):
        with pytest.raises(RequestError, match="still open"):
            _ = zimage.Request(prompt=["a", "b"], seed=seed).seeds


def test_a_picture_tells_the_seed_that_was_drawn(tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    usual = ["--steps", "1", "--size", "32x32", "--model", str(tiny_folder), "--device", "cpu", "--json"]
    assert main(["gen", "a cat", "--seed", "-1", *usual]) == 0
    image = json.loads(capsys.readouterr().out)["images"][0]
    assert 0 <= image["request"]["seed"] < 2**32
    assert image["path"] == f"a-cat-{image['request']['seed']}.png"


def test_rows_take_it_for_an_open_one(tmp_path):
    """The seed of an open row follows from its id, so that the same command goes on where it was interrupted."""

    def rows(*values):
        return [(row.id, row.request["seed"]) for row in rows_of([Source("x", one) for one in values], {}, tmp_path)]

    assert rows({"prompt": "a", "seed": -1}) == rows({"prompt": "a"})
    several = rows({"prompt": "a", "images": 3, "seed": [5, -1, -1]})
    assert several == rows({"prompt": "a", "images": 3, "seed": [5, -1, -1]})
    assert several[0][1] == 5
    assert len({seed for _, seed in several}) == 3


def test_a_sweep_draws_one_for_all_cells_and_tells_it(tmp_path, thrown, capsys):
    assert main(["sweep", "a", "-o", str(tmp_path), "--vary", "steps=1,2", "--seeds", "7,-1,-1", "--dry-run"]) == 0
    said = capsys.readouterr()
    assert said.out.count("seed 1000") == said.out.count("seed 1001") == said.out.count("seed 7") == 2
    assert "--seeds 7,1000,1001 goes on with this sweep" in said.err


def test_a_sweep_takes_it_from_files_too(tmp_path, thrown, capsys):
    (tmp_path / "zimage.toml").write_text("[default]\nseed = -1\n")
    (tmp_path / "sweep.toml").write_text("seeds = [-1]\n")
    for option in ("--config", "--toml"):
        file = tmp_path / ("zimage.toml" if option == "--config" else "sweep.toml")
        assert main(["sweep", "a", "-o", str(tmp_path), option, str(file), "--dry-run"]) == 0
        assert "goes on with this sweep" in capsys.readouterr().err
    assert parse_seeds("-1,0-2") == [-1, 0, 1, 2]
    with pytest.raises(RequestError, match="should be numbers"):
        parse_seeds("-2")


def test_a_rewriter_takes_it(monkeypatch, thrown):
    from zimage.render import rewriting
    from zimage.settings.rewriting import RewriteSettings

    assert rewriting.drawn_seed(RewriteSettings(rewrite_seed=-1).rewrite_seed) == 1000
