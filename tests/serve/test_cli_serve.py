"""`zimage serve`: what it hands to the server, and what a settings file that lies in the folder may not decide."""

import logging
import sys
import types

import pytest

from zimage.cli import main
from zimage.settings.scale import BatchSettings
from zimage.settings.serving import ServeSettings


@pytest.fixture
def app(monkeypatch, tmp_path):
    """The server's place, which takes down what it is started with; one is in a folder of one's own."""
    module = types.ModuleType("zimage.serve.app")
    module.started, module.indexed = [], []
    module.run = lambda *given: module.started.append(given)
    module.reindex = lambda serving: module.indexed.append(serving) or 3
    monkeypatch.setitem(sys.modules, "zimage.serve.app", module)
    monkeypatch.delenv("ZIMAGE_CONFIG")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("APPDATA", str(tmp_path / "home"))
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    level = logging.getLogger("zimage").level
    yield module
    logging.getLogger("zimage").setLevel(level)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_options_and_a_profile_are_sorted_by_what_they_set(app, tmp_path, capsys):
    text = '[default]\nsteps = 3\nmodel = "m"\ntop_k = 5\n[default.serve]\nport = 8000\nmax_images = 2\n'
    text += '[presets.mine]\nsampler = "heun"\n'
    write(tmp_path / "project" / "zimage.toml", text)
    assert main(["serve", "--port", "0", "--rewrite", "rewrite-photo", "--device", "cpu", "--seed", "4"]) == 0
    loading, defaults, serving, machines, presets, _ = app.started[0]
    assert loading == {"model": "m", "device": "cpu"}
    assert defaults == {"steps": 3, "seed": 4, "top_k": 5, "rewriter": "rewrite-photo"}
    assert (serving, machines) == (ServeSettings(port=0, max_images=2), BatchSettings())
    assert {name: entry.value for name, entry in presets["mine"].items()} == {"sampler": "heun"}
    assert capsys.readouterr().err == "settings: zimage.toml [default]\n"


def test_reindexing_starts_no_server(app, capsys):
    assert main(["serve", "--reindex", "--data", "pictures"]) == 0
    assert capsys.readouterr().out == "3 pictures in the index\n"
    assert (app.started, app.indexed) == ([], [ServeSettings(data="pictures")])


@pytest.mark.parametrize(("option", "level"), [("-q", "WARNING"), ("-v", "DEBUG"), (None, "INFO")])
def test_the_log_tells_as_much_as_was_asked_for(app, option, level):
    assert main(["serve", *filter(None, [option])]) == 0
    assert logging.getLogger("zimage").level == logging.getLevelName(level)


@pytest.mark.parametrize("option", ["--prompt", "--image", "--mask", "--embeddings"])
def test_what_belongs_to_a_single_call_is_not_an_option_of_a_server(app, option):
    assert main(["serve", option, "x"]) == 2


@pytest.mark.parametrize("package", ["fastapi", "uvicorn", "python_multipart"])
def test_without_the_extra_one_line_names_it(app, monkeypatch, capsys, package):
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["serve"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: a server needs {package}, of the extra `serve`; run: pip install")
    assert app.started == []


FOREIGN = {  # a line in a file that merely lies in the folder, and what is said
    'host = "0.0.0.0"': "host '0.0.0.0' opens the server to other computers; pass --host if it should",
    'host = "zimage.example"': "opens the server to other computers",
    'address = "auto"': "address 'auto' sends prompts and pictures to other computers; pass --address if it should",
    'token_file = "token"': "decides who may use the server; pass --token-file if it should",
    'allow_host = ["evil.example"]': "decides who may use the server",
    'data = "../elsewhere"': "lies outside of the current folder; pass --data to use it",
    "keep_days = 0.001": "keep_days 0.001 deletes pictures of yours; pass --keep-days if it should",
    "keep_gb = 0.001": "deletes pictures of yours",
}


@pytest.mark.parametrize("line", FOREIGN)
def test_a_folders_file_neither_opens_the_server_nor_deletes_nor_writes_elsewhere(app, tmp_path, capsys, line):
    table = "default" if "address" in line else "default.serve"
    text = f"[{table}]\n{line}\n"
    write(tmp_path / "project" / "zimage.toml", text)
    assert main(["serve"]) == 2
    err = capsys.readouterr().err
    assert FOREIGN[line] in err
    assert err.endswith(f"(from zimage.toml [{table}] line 2)\n")
    assert app.started == []
    assert main(["serve", "--config", "zimage.toml"]) == 0, "a file that is named is the user's own"
    (tmp_path / "project" / "zimage.toml").unlink()
    write(tmp_path / "home" / "zimage" / "zimage.toml", text)
    assert main(["serve"]) == 0, "and so is the user's"


def test_a_folders_file_decides_what_stays_in_the_folder(app, tmp_path):
    text = '[default.serve]\nhost = "::1"\ndata = "pictures"\nkeep_days = 3\nport = 1\n'
    write(tmp_path / "project" / "zimage.toml", text)
    assert main(["serve"]) == 0
    assert app.started[0][2] == ServeSettings(host="::1", data="pictures", keep_days=3, port=1)


def test_an_option_outranks_the_folders_file(app, tmp_path):
    write(tmp_path / "project" / "zimage.toml", '[default.serve]\nhost = "0.0.0.0"\nkeep_days = 1\n')
    assert main(["serve", "--host", "127.0.0.1", "--keep-days", "9"]) == 0
    assert app.started[0][2] == ServeSettings(keep_days=9)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('cache_folder = "/tmp/captions"', "lies outside of the current folder; pass --cache-folder"),
        ('rewriter_url = "http://evil.example"', "goes only to a server that you name yourself"),
    ],
)
def test_the_rules_for_renders_hold_for_a_server_too(app, tmp_path, monkeypatch, capsys, text, words):
    monkeypatch.setenv("ZIMAGE_REWRITER_KEY", "sesame")
    write(tmp_path / "project" / "zimage.toml", f"[default]\n{text}\n")
    assert main(["serve"]) == 2
    assert words in capsys.readouterr().err
    assert app.started == []


def test_a_cluster_and_its_workers_are_options_of_a_server_too(app, tmp_path, capsys):
    assert main(["serve", "--address", "auto", "--workers", "3", "--worker", "cpu"]) == 0
    assert app.started[0][2:4] == (ServeSettings(worker=["cpu"]), BatchSettings(address="auto", workers=3))
    assert main(["serve", "--workers", "3"]) == 2
    assert "workers are those of a cluster; name it with --address" in capsys.readouterr().err
    write(tmp_path / "project" / "zimage.toml", "[default]\nworkers = 2\nencoders = 1\n")
    assert main(["serve"]) == 0, "it is meant for `batch`"
