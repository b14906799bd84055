"""Both sides of a worker on another machine, joined without Ray, with worker processes that do what the test says."""

import sys
import threading
import time
from pathlib import Path

import pytest
from test_workers import HEAD, OPEN, REST

from zimage.errors import RequestError
from zimage.formats import own_folder
from zimage.formats.own_folder import LOCK, sweep
from zimage.serve import ray_worker, relay
from zimage.serve.ray_worker import Bridge
from zimage.serve.relay import PREFIX, Relay

PATIENCE = 20.0


class Said:
    """What the server hears."""

    def __init__(self):
        self.messages = []

    def send(self, message):
        self.messages.append(message)

    def wait(self, on):
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if found := [message for message in self.messages if message["on"] == on]:
                return found[-1]
            time.sleep(0.005)
        raise AssertionError(f"no {on!r} in {self.messages}")


class Rig:
    """A server's folder with files to name, and a bridge to a worker whose other machine is a folder of its own."""

    def __init__(self, folder):
        self.data, self.loras, self.away = folder / "data", folder / "loras", folder / "away"
        for path in (self.loras, self.away, *(self.data / name for name in relay.FOLDERS)):
            path.mkdir(parents=True)
        self.said = Said()
        self.bridge = Bridge(self.said, self.data, [self.loras])
        self.relay = Relay()
        self.calls = []
        start = {"op": "start", "data": str(self.data)}
        self._thread = threading.Thread(target=self.bridge.work, args=(self.call, start))
        self._thread.start()
        self.said.wait("ready")

    def call(self, method, *values):
        self.calls.append((method, *values))
        return getattr(self.relay, method)(*values)

    def tell(self, op, **plain):
        self.bridge._forward({"op": op, **plain})

    def there(self, path):
        return Path(f"{self.relay.root}{path}")

    def puts(self, path):
        """How many pieces of a file were sent."""
        return sum(call[:2] == ("put", str(self.there(path))) for call in self.calls)

    def end(self):
        self.relay.close()
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()


@pytest.fixture
def rig(tmp_path, monkeypatch):
    """Makes a rig with a worker of a script."""
    made = []

    def make(script=""):
        head = HEAD.replace("n = nth()", "DATA = Path(hear()['data'])")
        monkeypatch.setattr(relay, "COMMAND", (sys.executable, "-S", "-E", "-c", head + OPEN + script + REST))
        monkeypatch.setattr(own_folder.tempfile, "gettempdir", lambda: str(tmp_path))
        monkeypatch.setattr(own_folder.tempfile, "tempdir", str(tmp_path))
        made.append(Rig(tmp_path))
        return made[-1]

    yield make
    for one in made:
        one.end()
        assert not one.relay.root.exists(), "the folder goes with the worker"


SHOWS = """
asked = hear()
paths = [asked[k] for k in ("image", "mask", "prompt", "model")] + [one["picture"] for one in asked["reference"]]
say(on="answer", re=1, notes=[], answer={"paths": [Path(p).exists() for p in paths], "text": " ".join(paths)})
"""


def test_files_go_before_the_message_that_names_them_and_others_do_not(rig):
    one = rig(SHOWS)
    picture, mask, secret = one.data / "uploads" / "ab", one.data / "uploads" / "cd", one.data / "index.sqlite"
    for path in (picture, mask, secret):
        path.write_text(path.name)
    named = {"image": str(picture), "prompt": str(mask), "model": str(secret)}
    one.tell("prepare", re=1, mask="alpha", **named, reference=[{"picture": str(mask), "alpha": 0.5}])
    answer = one.said.wait("answer")["answer"]
    assert answer["paths"] == [True, False, True, False, True], "the prompt is what it was, and exists on this machine"
    assert answer["text"].split() == [str(picture), "alpha", str(mask), str(secret), str(mask)], "paths are ours again"
    assert one.there(picture).read_text() == "ab"
    assert not one.there(secret).exists()
    told = next(call[1].message for call in one.calls if call[0] == "tell")
    assert (told["prompt"], told["mask"]) == (str(mask), "alpha")


def test_what_lies_outside_of_the_servers_folders_stays_here(rig):
    one = rig("asked = hear()\nsay(on='answer', re=1, notes=[], answer=asked)\n")
    (one.away / "key").write_text("secret")
    paths = [str(one.away / "key"), f"{one.loras}/../away/key", "key"]
    one.tell("text", re=1, asked=[{"model": path} for path in paths])
    assert [asked["model"] for asked in one.said.wait("answer")["answer"]["asked"]] == paths
    assert "put" not in [method for method, *_ in one.calls]


def test_large_files_go_in_pieces_once_and_again_when_they_have_changed(rig, monkeypatch):
    monkeypatch.setattr(ray_worker, "PIECE", 1000)
    one = rig()
    lora = one.loras / "style.safetensors"
    for content, pieces in ((b"a" * 3500, 4), (b"a" * 3500, 4), (b"b" * 2000, 6), (b"", 7)):
        if not lora.exists() or lora.read_bytes() != content:
            lora.write_bytes(content)
        one.tell("prepare", lora=[{"path": str(lora)}])
        assert one.there(lora).read_bytes() == content
        assert one.puts(lora) == pieces


def test_a_lora_comes_with_its_settings_and_a_control_with_its_folder(rig):
    one = rig()
    names = ["control/a/b.json", "control/model.safetensors", "peft/adapter.safetensors", "peft/adapter_config.json"]
    for name in names:
        (one.loras / name).parent.mkdir(parents=True, exist_ok=True)
        (one.loras / name).write_text(name)
    control = {"model": str(one.loras / "control"), "picture": str(one.data / "uploads" / "ab")}
    one.tell("prepare", lora=[{"path": str(one.loras / "peft/adapter.safetensors")}], values={"control": [control]})
    there = one.there(one.loras)
    assert sorted(str(path.relative_to(there)) for path in there.rglob("*.*")) == names


def test_of_many_files_only_the_last_ones_stay_there(rig, monkeypatch):
    monkeypatch.setattr(ray_worker, "KEPT", 2)
    one = rig()
    files = [one.data / "uploads" / name for name in "abc"]
    for path in files:
        path.write_text(path.name)
    for path in (*files, files[0], files[2]):
        one.tell("prepare", image=str(path))
        assert one.there(path).exists()
    assert [one.puts(path) for path in files] == [2, 1, 1]
    assert sorted(path.name for path in one.there(one.data / "uploads").iterdir()) == ["a", "c"]


DRAWS = """
asked = hear()
picture = DATA / "pictures" / "job-1.png"
picture.write_bytes(b"pixels")
say(on="image", id="job", index=0, image="job-1")
"""


def test_a_picture_is_here_before_the_word_of_it(rig, monkeypatch):
    one = rig(DRAWS)
    picture, here = one.data / "pictures" / "job-1.png", []
    monkeypatch.setattr(one.bridge, "_send", lambda message: (here.append(picture.exists()), one.said.send(message)))
    one.tell("run", id="job", job={})
    one.said.wait("image")
    assert here == [True]
    assert picture.read_bytes() == b"pixels"
    assert list(one.there(one.data / "pictures").iterdir()) == []


def test_a_picture_that_cannot_be_kept_ends_the_job_as_on_a_full_disk(rig):
    """The queue then waits for room; the state stays, from which the job goes on."""
    one = rig(
        DRAWS + 'cancel = hear()\n(DATA / "states" / "job.safetensors").unlink()\n'
        'say(on="ended", id=cancel["id"], state="cancelled")\n'
    )
    state = one.data / "states" / "job.safetensors"
    state.write_text("step 3")
    (one.data / "pictures").rmdir()
    one.tell("run", id="job", job={})
    told = one.said.wait("ended")
    assert (told["state"], told["error"]["kind"]) == ("failed", "OutputError")
    assert "the picture cannot be written: No such file" in told["error"]["message"]
    assert [message["on"] for message in one.said.messages] == ["ready", "ended"]
    assert state.read_text() == "step 3"


STEPS = """
asked = hear()
state = DATA / "states" / "job.safetensors"
say(on="note", id="job", text=state.read_text() if state.exists() else "anew")
say(on="note", id="job", text=",".join(sorted(p.name for p in (DATA / "pictures").iterdir())))
for step in range(3):
    time.sleep(0.05)
    state.write_text(f"step {step}")
    say(on="progress", id="job", step=step)
"""


def test_a_job_that_has_begun_goes_on_there(rig):
    one = rig(STEPS)
    (one.data / "states" / "job.safetensors").write_text("step 9")
    for name in ("job-1.png", "job-2.png", "other-1.png"):
        (one.data / "pictures" / name).write_text("pixels")
    one.tell("run", id="job", job={})
    one.said.wait("progress")
    assert [m["text"] for m in one.said.messages if m["on"] == "note"] == ["step 9", "job-1.png,job-2.png"]
    assert (one.data / "pictures" / "job-1.png").read_text() == "pixels"


@pytest.mark.parametrize("every", [0.0, 600.0])
def test_the_state_of_a_running_job_comes_back_now_and_then_and_at_the_end(rig, monkeypatch, every):
    monkeypatch.setattr(relay, "STATE_EVERY", every)
    one = rig(STEPS)
    one.tell("run", id="job", job={})
    while one.said.wait("progress")["step"] < 2:
        time.sleep(0.01)
    state = one.data / "states" / "job.safetensors"
    assert state.exists() == (every == 0)
    one.end()
    assert state.read_text() == "step 2"


def test_the_state_goes_when_the_job_has_ended(rig, monkeypatch):
    monkeypatch.setattr(relay, "STATE_EVERY", 0.0)
    one = rig(STEPS + 'state.unlink()\nsay(on="ended", id="job", state="done")\n')
    one.tell("run", id="job", job={})
    one.said.wait("ended")
    assert list((one.data / "states").iterdir()) == []
    one.end()
    assert list((one.data / "states").iterdir()) == []


def test_captions_come_back_as_files(rig):
    path = "asked = hear()\nPath(asked['path']).write_text('captions')\n"
    one = rig(path + "say(on='ended', id='task', state='done', result={'path': asked['path']})\n")
    wanted = one.data / "captions" / "task.safetensors"
    one.tell("compute", id="task", path=str(wanted), asked={"prompt": "a"})
    assert one.said.wait("ended")["result"] == {"path": str(wanted)}
    assert wanted.read_text() == "captions"
    assert list(one.there(wanted.parent).iterdir()) == []


def test_another_version_there_is_refused(tmp_path, monkeypatch):
    bridge = Bridge(Said(), tmp_path, [])
    with pytest.raises(RequestError, match=r"zimage 0\.0 is installed on far, and .* here; install the same on both"):
        bridge.work(lambda method: {"version": "0.0", "node": "far", "root": "/"}, {})


def test_what_killed_relays_have_left_is_removed_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(own_folder.tempfile, "tempdir", str(tmp_path))
    lives, killed = Relay(), Relay()
    assert killed.root.exists()
    killed._folder._lock.close()
    (killed.root / "uploads").mkdir()
    begins = tmp_path / f"{PREFIX}begins"
    begins.mkdir()
    link = tmp_path / f"{PREFIX}link"
    link.symlink_to(tmp_path / "mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / LOCK).touch()
    sweep(tmp_path, PREFIX)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([lives.root.name, begins.name, link.name, "mine"])
    assert (tmp_path / "mine" / LOCK).exists()
