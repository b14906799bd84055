"""Who is sent the rewriter's key: a server that the user named, and none that a file in the current folder names."""

import chat_server
import pytest

from zimage.cli import main
from zimage.settings.profiles import find_config, is_own_file, read_config, resolve
from zimage.settings.rewriting import RewriteSettings


@pytest.fixture
def server():
    with chat_server.serving(chat_server.said("A fine cat.")) as server:
        yield server


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Rewrite in a folder of somebody else's; returns (status, standard error)."""
    (tmp_path / "unpacked").mkdir()
    monkeypatch.chdir(tmp_path / "unpacked")
    monkeypatch.delenv("ZIMAGE_CONFIG", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("ZIMAGE_REWRITER_KEY", "sesame")
    (tmp_path / "home" / "zimage").mkdir(parents=True)

    def call(*arguments, command=("rewrite", "a cat", "-q")):
        status = main([*command, *map(str, arguments)])
        return status, capsys.readouterr().err

    return call


def write(path, url, more=""):
    path.write_text(f'[default]\nrewriter_url = "{url}"\nrewrite_seed = 1\n{more}')
    return path


def test_a_folders_file_gets_no_key_sent(run, server, tmp_path):
    write(tmp_path / "unpacked" / "zimage.toml", server.url)
    status, err = run()
    assert (status, server.asked) == (2, [])
    assert f"rewriter_url {server.url} comes from zimage.toml [default] line 2" in err
    assert "pass --rewriter-url" in err
    assert "sesame" not in err
    assert len(err.splitlines()) == 1


def test_gen_asks_as_little(run, server, tmp_path):
    write(tmp_path / "unpacked" / "zimage.toml", server.url, 'rewriter = "rewrite-photo"\n')
    status, err = run(command=("gen", "a cat", "-q", "--steps", "1"))
    assert (status, server.asked) == (2, [])
    assert "goes only to a server that you name yourself" in err


def test_without_a_key_the_server_is_named_once(run, server, tmp_path, monkeypatch):
    monkeypatch.delenv("ZIMAGE_REWRITER_KEY")
    write(tmp_path / "unpacked" / "zimage.toml", server.url)
    status, err = run()
    assert (status, server.keys) == (0, [None])
    assert err == f"warning: prompts are sent to {server.url}, which zimage.toml [default] line 2 names\n"


def test_what_the_user_names_gets_the_key(run, server, tmp_path, monkeypatch):
    project = write(tmp_path / "unpacked" / "zimage.toml", "http://127.0.0.1:9")
    assert run("--rewriter-url", server.url) == (0, "")
    monkeypatch.setenv("ZIMAGE_REWRITER_URL", server.url)
    assert run() == (0, "")
    monkeypatch.delenv("ZIMAGE_REWRITER_URL")
    project.unlink()
    own = write(tmp_path / "home" / "zimage" / "zimage.toml", server.url)
    assert run() == (0, "")
    project.symlink_to(own)
    assert run() == (0, "")
    project.unlink()
    write(project, server.url)
    assert run("--config", "zimage.toml") == (0, "")
    monkeypatch.setenv("ZIMAGE_CONFIG", "zimage.toml")
    assert run() == (0, "")
    assert server.keys == ["Bearer sesame"] * 6


def test_a_url_that_steers_the_terminal_does_not(run, tmp_path):
    write(tmp_path / "unpacked" / "zimage.toml", "http://h/\\u001b[31m\\u202e" + "x" * 500)
    status, err = run()
    assert status == 2
    assert err.rstrip("\n").isprintable()
    assert len(err) < 500


def test_what_a_picture_or_state_brings_is_not_the_users():
    url = {"rewriter_url": "http://h"}
    assert not resolve({}, url, environ={}).is_own("rewriter_url")
    assert resolve(url, {"steps": 3}, environ={}).is_own("rewriter_url")
    assert resolve({}, {"steps": 3}, environ={}).is_own("rewriter_url")


def test_the_environment_outranks_a_folders_file(run, tmp_path):
    path = write(tmp_path / "unpacked" / "zimage.toml", "http://h")
    assert not is_own_file(find_config())
    config = read_config(path, own=False)
    resolved = resolve({}, None, config, environ={"ZIMAGE_REWRITER_URL": "http://mine"})
    assert (resolved.of(RewriteSettings)["rewriter_url"], resolved.is_own("rewriter_url")) == ("http://mine", True)


@pytest.mark.parametrize(("folder", "allowed"), [("captions", True), ("../elsewhere", False), ("/tmp/x", False)])
def test_a_folders_file_has_captions_written_below_it_only(tmp_path, monkeypatch, capsys, folder, allowed):
    """As a `zimage.toml` may come with an archive: it should not have folders made all over a disk."""
    monkeypatch.delenv("ZIMAGE_CONFIG")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here" / "zimage.toml").write_text(f'[default]\ncache_folder = "{folder}"\n')
    run = ["gen", "a cat", "--width", "32", "--height", "32", "--steps", "1", "-q"]
    assert main(run) == (0 if allowed else 2)
    assert allowed or "pass --cache-folder" in capsys.readouterr().err
    assert (tmp_path / "elsewhere").exists() is False
    assert main([*run, "--config", "zimage.toml", "--cache-folder", str(tmp_path / "mine")]) == 0
    assert (tmp_path / "mine").is_dir()
