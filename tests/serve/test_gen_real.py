"""`gen --server` and a real server, with the demo model: the same pictures as here, also across a restart."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from PIL import Image
from running import ROOT

from zimage.cli import main
from zimage.pictures.files import read_metadata


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def start(*arguments):
    command = [sys.executable, ROOT / "cli.py", "gen", *map(str, arguments)]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=dict(os.environ))


def test_bits_and_settings_are_those_of_a_run_here(server, capsys):
    asked = ["gen", "a cat face on a blue background", "--seed", "4", "-n", "2", "--json", "-o"]
    assert main([*asked, "there-{index}.png", "--server", server.url]) == 0
    told = json.loads(capsys.readouterr().out)["images"]
    assert main([*asked, "here-{index}.png"]) == 0
    renamed = [{**image, "path": image["path"].replace("there", "here")} for image in told]
    assert json.loads(capsys.readouterr().out)["images"] == renamed
    for index in (1, 2):
        assert Path(f"there-{index}.png").read_bytes() == Path(f"here-{index}.png").read_bytes()


def test_pictures_to_start_from_are_uploaded(server):
    Image.linear_gradient("L").resize((128, 96)).convert("RGB").save("start.jpg")
    Image.linear_gradient("L").resize((64, 64)).save("mask.webp")
    asked = ["gen", "a dog", "--seed", "4", "--image", "start.jpg", "--mask", "mask.webp", "--strength", "0.7", "-q"]
    assert main([*asked, "-o", "there.png", "--server", server.url]) == 0
    assert main([*asked, "-o", "here.png"]) == 0
    with Image.open("here.png") as here, Image.open("there.png") as there:
        assert (there.size, there.tobytes()) == ((128, 96), here.tobytes())


def test_a_picture_of_the_server_is_drawn_again_from_its_settings(server, capsys):
    asked = ["--server", server.url, "-q"]
    assert main(["gen", "a dog", "--guidance", "2", "--negative", "a cat", *asked, "-o", "dog.png"]) == 0
    assert main(["gen", "--from", "dog.png", *asked, "-o", "again.png"]) == 0
    assert capsys.readouterr().err == "", "nothing has changed"
    assert Path("again.png").read_bytes() == Path("dog.png").read_bytes()
    assert main(["gen", "--from", "dog.png", *asked, "--steps", "3", "-o", "quick.webp"]) == 0
    assert read_metadata(Path("quick.webp"))["request"]["steps"] == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--steps", "900"], "steps 900 is too large; this server takes at most 200"),
        (["-n", "17"], "17 pictures are too many"),
        (["--lora", "nothing"], "lora 'nothing' is not on this server"),
        (["--lora", "../up:2"], "not a path"),
        (["--template", "nothing"], "nothing"),
        (["--rewrite", "nothing"], "nothing"),
        (["--image", "text.png"], "image"),
    ],
)
def test_what_the_server_refuses_is_one_line(server, capsys, options, words):
    Path("text.png").write_text("text")
    assert main(["gen", "a cat", *options, "--server", server.url, "-q"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert words in said.err
    assert said.err.count("\n") == 1


def test_an_interrupt_ends_the_job_there(server):
    process = start("a cat", "--width", 512, "--height", 512, "--steps", 200, "--server", server.url)
    first = process.stderr.readline()
    assert first.startswith("512×512, 200 steps"), first
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, list(Path().iterdir())) == (130, [])
    assert "the job was cancelled on the server; 0 pictures saved" in err
    assert server.http.get("/api/jobs?state=queued,running").json()["jobs"] == []


@pytest.mark.full
def test_a_server_that_is_killed_and_started_again_finishes_what_was_asked(new_server):
    server = new_server().start()
    process = start("a cat", "--seed", 3, "-n", 3, "--steps", 40, "--server", server.url)
    assert process.stderr.readline().startswith("128×128, 40 steps")
    drawn = threading.Event()
    names = []

    def read():
        for line in process.stdout:
            names.append(line.strip())
            drawn.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert drawn.wait(100)
    server.kill()
    server.start()
    assert process.wait(120) == 0
    reader.join()
    assert names == ["a-cat-3.png", "a-cat-4.png", "a-cat-5.png"]
    assert [read_metadata(Path(name))["request"]["seed"] for name in names] == [3, 4, 5]
    (job,) = server.http.get("/api/jobs").json()["jobs"]
    assert len(job["images"]) == 3
