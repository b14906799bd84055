"""Users without a home, disks that fill, folders that go, interrupts at any moment: what was rendered is never lost."""

import os
import random
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
import warm
from fuzz.commands import REST
from PIL import Image

from zimage import interrupts
from zimage.cli import main
from zimage.cli.target import LONGEST, Target
from zimage.errors import OutputError, RequestError
from zimage.loading.weights import on_meta
from zimage.pictures import files as picture_files
from zimage.settings.environment import config_folder
from zimage.settings.paths import user_path
from zimage.settings.profiles import usual_places

ROOT = Path(__file__).parent.parent
SIZE = ["--steps", "1", "--width", "32", "--height", "32", "--device", "cpu"]
BIG = 2**63 - 1
# Another user to those who ask for its name, home or permissions; Python's own files may be root's, and stay readable.
NAMELESS = "os.setreuid(54321, 0)"


@pytest.fixture(scope="module")
def commands():
    process = warm.Warm()
    yield process
    process.close()


def record(prompt="a cat", seed=1, **more):
    request = {"prompt": prompt, "seed": seed, "width": 32, "height": 32, "steps": 1, "guidance": 0.0, "shift": 3.0}
    return {"request": {**request, **more}, "model": {"name": "m", "fingerprint": "f"}, "version": "0"}


def picture():
    return Image.new("RGB", (32, 32), "red")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / "here"


# ---------------------------------------------------------------------- users


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become a user that has no name")
def test_a_user_without_home_and_name_can_do_everything(commands, tmp_path):
    tmp_path.chmod(0o777)
    setup = f"os.environ.pop('HOME', None); {NAMELESS}"
    for command in (["templates", "list"], ["config", "show"], ["info"], ["tokens", "a cat"], ["rewrite", "--help"]):
        status, _, err = commands.run(tmp_path, *command, setup=setup)
        assert status == 0, (command, err)
    assert commands.run(tmp_path, "gen", "a cat", "--seed", "1", *SIZE, setup=setup)[:2] == (0, "a-cat-1.png\n")
    status, _, err = commands.run(tmp_path, "gen", "a cat", *SIZE, "--model", "~/model", setup=setup)
    assert (status, err) == (2, "error: model '~/model': there is no such home folder; write the path without ~\n")


def test_without_a_home_there_are_no_settings_of_the_user(monkeypatch):
    monkeypatch.setattr(Path, "expanduser", lambda _: (_ for _ in ()).throw(RuntimeError("no home")))
    assert config_folder({}) is None
    assert usual_places({}) == [Path("zimage.toml")]
    with pytest.raises(RequestError, match="XDG_CONFIG_HOME '~x': there is no such home folder"):
        config_folder({"XDG_CONFIG_HOME": "~x"})


PATHS = ("model", "dit", "text_encoder", "vae", "tokenizer", "templates", "cache_folder", "lora", "config")


@pytest.mark.parametrize("setting", PATHS)
def test_the_home_of_nobody_is_an_error_that_names_the_setting(folder, capsys, setting):
    assert main(["gen", "a", "--" + setting.replace("_", "-"), "~nosuch/x", *SIZE]) == 2
    err = capsys.readouterr().err
    assert err == f"error: {setting} '~nosuch/x': there is no such home folder; write the path without ~\n"


def test_the_home_of_nobody_in_a_settings_file_names_its_line(folder, capsys, monkeypatch):
    (folder / "zimage.toml").write_text("[default]\nmodel = '~nosuch/x'\n")
    monkeypatch.setenv("ZIMAGE_CONFIG", "zimage.toml")
    assert main(["config", "show"]) == 2
    assert "zimage.toml line 2: model '~nosuch/x': there is no such home folder" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["a\0b", "a\ud800b"])
def test_what_is_no_path(text):
    with pytest.raises(RequestError, match=r"model .* is not a path"):
        user_path(text, "model")
    with pytest.raises(RequestError, match=r"output .* is not a path"):
        Target(text + ".png", 1)


# ---------------------------------------------------------------------- names


LONG = {
    "emoji": "🦊" * 60,
    "letters of four bytes": "𞤀" * 60,
    "Chinese": "猫" * 80,
    "words": "a cat " * 100,
    "one long word": "ü" * 500,
}


@pytest.mark.parametrize("kind", LONG)
def test_names_are_cut_by_bytes_with_number_and_ending_counted(folder, kind):
    target, metadata = Target(None, 2), record(LONG[kind], BIG)
    names = [target.save(picture(), metadata, 0) for _ in range(12)]
    assert all(len(os.fsencode(name.name)) <= LONGEST for name in names)
    assert names[0].name.endswith(f"-{BIG}.png")
    assert names[-1].name.endswith(f"-{BIG}-12.png")
    assert sorted(os.listdir()) == sorted(name.name for name in names), "none went elsewhere"


def test_a_name_that_the_user_wrote_is_not_cut_but_refused(folder, monkeypatch):
    assert Target("x" * 251 + ".png", 1).save(picture(), record(), 0).name == "x" * 251 + ".png"
    with pytest.raises(RequestError, match="has 256 bytes; it may have 255"):
        Target("x" * 252 + ".png", 1)
    with pytest.raises(RequestError, match="has 255 bytes; it may have 249, without a number"):
        Target("x" * 251 + ".png", 2)
    target = Target("{prompt}-" + "x" * 200 + ".png", 2)
    target.check([record("a cat " * 20), record("a cat " * 20)])
    with pytest.raises(RequestError, match="it may have 249, without a number"):
        Target("{prompt}-" + "x" * 250 + ".png", 2)


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("{seed:>1000000000}.png", "is not valid"),
        ("{seed:{width}}.png", "is not valid"),
        ("{seed!r}.png", "is not valid"),
        ("{seed.__class__}.png", "is not valid"),
        ("{}.png", "is not valid"),
        ("{seed:c}.png", "is not valid"),
        ("{index:999}.png", "is wider than 100 characters"),
        ("{.png", "is not valid"),
    ],
)
def test_patterns_that_make_no_name(folder, pattern, words):
    with pytest.raises(RequestError, match=words):
        Target(pattern, 1).check([record(seed=BIG)])


def test_what_a_format_cannot_hold_is_refused_before_rendering(folder):
    Target("x.png", 1).check([record(width=16384)])
    with pytest.raises(RequestError, match="a side of 16384 px does not fit into WEBP; use"):
        Target("x.webp", 1).check([record(width=16384)])


# ---------------------------------------------------------------------- what stands where a picture should go


@pytest.mark.parametrize("output", ["x.png/", "new/", "new//"])
def test_a_folder_is_not_taken_for_a_file(folder, output):
    with pytest.raises(RequestError, match="does not exist; create it first"):
        Target(output, 1)


def test_pipes_devices_and_folders_are_no_outputs(folder, capsys):
    os.mkfifo("fifo.png")
    os.mkfifo("fifo.safetensors")
    os.mkfifo("state")
    os.mkdir("folder.png")
    os.symlink("/dev/null", "null.png")
    os.symlink("loop.png", "loop.png")
    os.symlink("nowhere/x.png", "dangling.png")
    cases = {
        ("gen", "a", "-o", "fifo.png"): "fifo.png is a named pipe; name a regular file",
        ("gen", "a", "-o", "null.png"): "null.png is a device; name a regular file",
        ("gen", "a", "-o", "loop.png"): "loop.png cannot be written: Too many levels of symbolic links",
        ("gen", "a", "-o", "dangling.png"): "the folder",
        ("encode", "a", "-o", "fifo.safetensors"): "fifo.safetensors is a named pipe; name a regular file",
        ("gen", "a", "--save-state", "state"): "state is a named pipe; name a regular file",
        ("gen", "--resume", "state"): "state is a named pipe",
    }
    for command, words in cases.items():
        assert main([*command]) in (1, 2), command
        err = capsys.readouterr().err
        assert words in err, command
        assert err.count("\n") == 1
    assert stat.S_ISFIFO(os.stat("fifo.png").st_mode)
    assert Target("folder.png", 1).save(picture(), record(), 0) == Path("folder.png/a-cat-1.png")


def test_a_link_is_followed_and_stays(folder):
    Path("elsewhere").mkdir()
    os.symlink("elsewhere/real.png", "link.png")
    for colour in ("red", "blue"):  # the first makes the file behind the link, the second replaces it
        assert Target("link.png", 1).save(Image.new("RGB", (8, 8), colour), record(), 0) == Path("link.png")
        assert os.readlink("link.png") == "elsewhere/real.png"
        assert Image.open("elsewhere/real.png").getpixel((0, 0)) == ((255, 0, 0) if colour == "red" else (0, 0, 255))
    assert os.listdir("elsewhere") == ["real.png"]
    Image.new("RGB", (8, 8)).save("other.png")
    os.symlink("other.png", "a-cat-1.png")
    assert Target(None, 1).save(picture(), record(), 0).name == "a-cat-1-2.png", "a name that nobody wrote is not taken"


def test_pipes_as_input_are_read_as_they_come(commands, folder):
    """As shells make them of <(…)."""
    feed = "r, w = os.pipe(); os.write(w, {!r}); os.close(w); os.dup2(r, 9)"
    setup = feed.format(b"one\ntwo\n")
    status, out, err = commands.run(folder, "gen", "--file", "/dev/fd/9", "--seed", "1", *SIZE, setup=setup)
    assert (status, out) == (0, "one-1.png\ntwo-1.png\n"), err
    setup = feed.format(b"[default]\nsteps = 7\n")
    status, out, _ = commands.run(folder, "config", "show", "--config", "/dev/fd/9", setup=setup)
    assert (status, "7" in out) == (0, True)


def test_a_pipe_in_the_place_of_the_usual_settings_file_is_not_waited_for(folder, capsys, monkeypatch):
    monkeypatch.delenv("ZIMAGE_CONFIG", raising=False)
    os.mkfifo("zimage.toml")
    assert main(["config", "show"]) == 2
    assert "zimage.toml should be a settings file" in capsys.readouterr().err


# ---------------------------------------------------------------------- disks


def test_a_picture_goes_to_the_next_best_folder(folder, capsys, monkeypatch):
    Path("there").mkdir()
    target = Target("there/x.png", 1)
    Path("there").rmdir()
    assert target.save(picture(), record(), 0) == folder / "x.png"
    err = capsys.readouterr().err
    assert err == (
        f"warning: there/x.png cannot be written (No such file or directory); the picture is in {folder / 'x.png'}\n"
    )
    assert target.save(picture(), record(), 0) == folder / "x-2.png", "nothing there is replaced"
    folder.rename(folder.parent / "gone")
    os.rmdir(folder.parent / "elsewhere") if (folder.parent / "elsewhere").exists() else None
    assert picture_files.read_metadata(folder.parent / "gone" / "x.png") == record()


def test_the_last_place_is_the_temporary_folder(folder, capsys, monkeypatch):
    save = picture_files.save

    def full(image, path, metadata, replace):
        if path.parent != folder.parent:
            raise OSError(28, "No space left on device")
        return save(image, path, metadata, replace)

    monkeypatch.setattr(picture_files, "save", full)
    assert Target("x.png", 1).save(picture(), record(), 0) == folder.parent / "x.png"
    assert "x.png cannot be written (No space left on device); the picture is in" in capsys.readouterr().err
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    with pytest.raises(OutputError, match=r"^x.png cannot be written: No space left on device; nor can"):
        Target("x.png", 1).save(picture(), record(), 0)


def test_a_format_that_fails_late_is_png_then(folder, capsys, monkeypatch):
    save = Image.Image.save

    def broken(self, stream, kind, **options):
        if kind == "JPEG":
            raise ValueError("encoder error")
        save(self, stream, kind, **options)

    monkeypatch.setattr(Image.Image, "save", broken)
    assert Target("x.jpg", 1).save(picture(), record(), 0) == folder / "x.png"


def test_a_disk_that_is_full(commands, folder):
    """Really full: the process may write files of 300 bytes."""
    setup = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))"
    status, out, err = commands.run(folder, "gen", "a cat", "-o", "x.png", *SIZE, setup=setup)
    assert (status, out) == (1, "")
    assert err.splitlines()[-1].startswith("error: x.png cannot be written: File too large; nor can the current folder")
    assert os.listdir(folder) == []
    status, out, err = commands.run(folder, "encode", "a cat", "-o", "x.safetensors", setup=setup)
    assert (status, out) == (1, "")
    assert err.splitlines()[-1] == "error: x.safetensors cannot be written: File too large"
    status, out, err = commands.run(folder, "gen", "a cat", "--save-state", "state", *SIZE, setup=setup)
    assert status == 1
    assert err.splitlines()[-1].startswith("error: state: state cannot be written: ")
    assert os.listdir(folder) == []


@pytest.mark.skipif(os.getuid() != 0, reason="root writes everywhere: another user is needed")
def test_a_folder_that_may_not_be_written_to(commands, folder):
    (folder / "closed").mkdir(mode=0o755)
    folder.chmod(0o777)
    for command in (["gen", "a", "-o", "closed/x.png"], ["encode", "a", "-o", "closed/x.safetensors"]):
        status, out, err = commands.run(folder, *command, setup=NAMELESS)
        assert (status, out) == (1, "")
        assert err == "error: output: the folder 'closed' is not writable\n"
    status, _, err = commands.run(folder, "gen", "a", "--save-state", "closed/s", setup=NAMELESS)
    assert (status, err) == (1, "error: save-state: the folder 'closed' is not writable\n")


# ---------------------------------------------------------------------- interrupts


def _catches(process):
    """Whether the process already handles SIGTERM."""
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith("SigCgt:"):
            return bool(int(line.split()[1], 16) >> (signal.SIGTERM - 1) & 1)
    return False


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_a_host_programs_handlers_are_put_back_or_left(monkeypatch):
    """`getsignal` knows nothing (None) of a handler that is not Python's, and `signal` could not put it back."""
    before, getsignal, taken = signal.getsignal(signal.SIGINT), signal.getsignal, []
    monkeypatch.setattr(signal, "getsignal", lambda n: None if n == signal.SIGTERM else getsignal(n))
    monkeypatch.setattr(signal, "signal", lambda n, handler: taken.append((n, handler)))
    assert main(["--version"]) == 0
    assert [n for n, _ in taken] == [signal.SIGINT] * 2
    assert taken[-1][1] is before


def test_an_interrupt_waits_until_a_module_is_built():
    """In the middle of it, PyTorch's stack of modes would be left with one too few or too many."""
    built = []

    def build():
        with interrupts.handled(), on_meta():
            os.kill(os.getpid(), signal.SIGINT)
            built.append(torch.empty(1))

    with pytest.raises(KeyboardInterrupt):
        build()
    assert [tensor.device.type for tensor in (*built, torch.empty(1))] == ["meta", "cpu"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_at_any_moment_is_one_line_and_leaves_nothing_half_done(tmp_path, number):
    draw, statuses = random.Random(int(number)), []
    for i in range(6):
        folder = tmp_path / str(i)
        folder.mkdir()
        command = [sys.executable, "-m", "zimage", "gen", "a", "-n", "9", "--steps", "3", *SIZE[2:], "-o", folder]
        process = subprocess.Popen([*map(str, command)], cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
        while process.poll() is None and not _catches(process):
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 1.5))
        process.send_signal(number)
        if i % 2:
            time.sleep(draw.uniform(0, 0.2))
            process.send_signal(number)  # impatient people
        err = process.communicate(timeout=60)[1].decode()
        statuses.append(process.returncode)
        assert process.returncode in (0, 128 + number), err
        assert "Traceback" not in err, err
        assert "Exception ignored" not in err, err
        if process.returncode:
            assert err.splitlines()[-1].startswith("error: interrupted"), err
        for file in folder.iterdir():
            assert file.suffix == ".png"
            assert not file.name.startswith(".")
            picture_files.read_metadata(file)
            Image.open(file).load()
    assert 128 + number in statuses


@pytest.mark.parametrize("name", REST)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_every_command_ends_with_the_status_of_its_signal(commands, tmp_path, name, number):
    """The signal comes as soon as the command's own work begins."""
    setup = f"""
import zimage.cli
def hit(*a, **k): os.kill(os.getpid(), {int(number)}); [None for _ in range(9)]
def planted(group):
    for command in group.commands.values():
        planted(command) if hasattr(command, "commands") else setattr(command, "callback", hit)
planted(zimage.cli.cli)
"""
    arguments = [word for word in REST[name] if word != "--no-such-option"]
    status, out, err = commands.run(tmp_path, *name.split(), *arguments, setup=setup)
    assert (status, out) == (128 + number, "")
    assert err.startswith("error: interrupted")
    assert err.count("\n") == 1
