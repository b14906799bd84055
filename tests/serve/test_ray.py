"""`serve --address`: workers on a Ray cluster, which share no folder with the server, and what may happen to them."""

import base64
import importlib.util
import io
import os
import signal
import threading
import time
from contextlib import suppress

import httpx
import lora_files
import pytest
from hostile import picture
from PIL import Image
from ray_cluster import Cluster
from running import PATIENCE, Server
from safetensors.torch import load

import zimage
from zimage.cli import main

if importlib.util.find_spec("ray") is None:
    pytest.skip("the extra ray is not installed", allow_module_level=True)

PNG = base64.b64encode(picture()).decode()
SHORT = {"prompt": "a cat", "seed": 7, "steps": 3, "width": 64, "height": 48}
LONG = {**SHORT, "images": 2, "steps": 200, "width": 128, "height": 128}


@pytest.fixture(scope="module")
def cluster():
    one = Cluster(cores=3)
    yield one
    one.shutdown()


@pytest.fixture(scope="module")
def loras(tmp_path_factory, model):
    folder = tmp_path_factory.mktemp("loras")
    lora_files.strong(folder / "strong.safetensors", zimage.ZImage.load(model))
    return folder


@pytest.fixture(scope="module")
def options(model, controls, loras):
    folders = ("--control-folder", str(controls), "--lora-folder", str(loras))
    return ("--model", str(model), "--dtype", "fp32", *folders)


@pytest.fixture(scope="module")
def server(tmp_path_factory, cluster, options):
    """Its two workers are on the cluster; tests leave it as it is."""
    where = ("--address", cluster.address, "--workers", "2")
    running = Server(tmp_path_factory.mktemp("ray") / "data", *options, *where, environment=cluster.environment)
    yield running.start()
    assert running.stop() == 0
    assert "Traceback" not in running.said()


@pytest.fixture(scope="module")
def pipe(model):
    return zimage.ZImage.load(model, dtype="fp32")


def pixels(images):
    return [image.tobytes() for image in images]


def until(condition, seconds=PATIENCE):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.01)
    return found


def step(server, id):
    job = server.http.get(f"/api/jobs/{id}").json()
    assert job["state"] in ("queued", "running"), job
    return job["step"] if job["stage"] == "denoise" else 0


def test_gen_draws_there_what_it_draws_here_with_files_of_every_kind(
    server, model, controls, loras, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (tmp_path / "pose.png").write_bytes(picture())
    (tmp_path / "start.png").write_bytes(picture())
    asked = ["gen", "a cat", "--seed", "7", "--steps", "4", "-n", "2", "--width", "64", "--height", "48", "-q"]
    for kind, there, here in (
        ("plain", [], []),
        ("image", ["--image", "start.png", "--strength", "0.5"], None),
        ("lora", ["--lora", "strong:0.7"], ["--lora", f"{loras / 'strong.safetensors'}:0.7"]),
        ("control", ["--control", "lite:pose.png"], ["--control", f"{controls / 'lite'}:pose.png"]),
    ):
        here = there if here is None else here
        assert main([*asked, *there, "--server", server.url, "-o", f"there-{kind}-{{index}}.png"]) == 0
        assert main([*asked, *here, "--model", str(model), "--dtype", "fp32", "-o", f"here-{kind}-{{index}}.png"]) == 0
    drawn = {path.name: path for path in tmp_path.glob("*-?.png")}
    assert len(drawn) == 16
    different = set()
    for name, path in drawn.items():
        twin = drawn[name.replace("there", "here")]
        different.add(Image.open(path).tobytes())
        assert Image.open(path).tobytes() == Image.open(twin).tobytes(), name
        assert path.read_bytes() == twin.read_bytes() or "plain" not in name, "metadata of files hold their names there"
    assert len(different) == 8, "each kind changes the picture"


def test_captions_come_back_and_are_drawn_from(server, pipe):
    saved = server.http.post("/api/save-embeddings", json={"prompt": "a dog"})
    assert saved.status_code == 200
    (caption,) = load(saved.content).values()
    assert caption.equal(pipe.encode("a dog")[0])
    entry = {"embeddings": base64.b64encode(saved.content).decode()}
    del (asked := {**SHORT, **entry})["prompt"]
    assert server.pixels(server.draw(**asked)) == pixels(pipe.generate(**{**SHORT, "prompt": "a dog"}).images)


@pytest.mark.full
def test_prompts_are_rewritten_there(cluster, tmp_path):
    """By the demo, since the tiny model has no words."""
    where = ("--address", cluster.address, "--workers", "1")
    running = Server(tmp_path / "data", *where, environment=cluster.environment).start()
    asked = {
        "rewriter": "rewrite-photo",
        "max_tokens": 8,
        "rewrite_seed": 1,
        "temperature": 2.0,
        "top_k": 0,
        "top_p": 1.0,
    }
    demo = zimage.ZImage.load()
    written = demo.rewrite("a cat", **asked)
    job = running.draw(**SHORT, **asked)
    assert job["request"]["prompt"] == written.prompt != "a cat"
    assert running.pixels(job) == pixels(demo.generate(**{**SHORT, "prompt": written.prompt}).images)
    assert running.stop() == 0


def test_files_are_named_by_their_fields_and_no_folder_is(server, tmp_path):
    for asked, field in (
        ({"control": [{"model": "lite-damaged", "picture": PNG}]}, "control"),
        ({"steps": 0}, "steps"),
    ):
        answer = server.http.post("/api/jobs", json={**SHORT, **asked})
        assert answer.status_code == 422, answer.text
        assert answer.json()["error"]["fields"] == [field]
        assert "/" not in answer.json()["error"]["message"]


def test_previews_and_steps_are_heard_and_a_cancel_ends_a_step(server):
    id = server.submit(**LONG)["id"]
    kinds = set()
    for _, kind, data in server.events(f"/api/jobs/{id}/events"):
        kinds.add(kind)
        if kind == "preview":
            assert Image.open(io.BytesIO(base64.b64decode(data["image"].split(",")[1]))).format == "JPEG"
            assert server.http.delete(f"/api/jobs/{id}").status_code == 200
        if kind == "end":
            assert data["state"] == "cancelled"
    assert {"progress", "preview", "end"} <= kinds
    assert server.pixels(server.draw(**SHORT))
    assert os.listdir(server.folder / "states") == []


def test_where_the_workers_are_is_told(server):
    workers = server.http.get("/health").json()["workers"]
    assert [worker["state"] for worker in workers] == ["ready", "ready"]
    assert all(worker["device"].startswith("cpu on ") for worker in workers)


class Steps(threading.Thread):
    """The steps of denoising that a job's events tell, in order."""

    def __init__(self, server, id):
        super().__init__()
        self.events, self.steps = server.events(f"/api/jobs/{id}/events"), []
        self.start()

    def run(self):
        with suppress(httpx.TransportError):  # the server was killed
            for _, kind, data in self.events:
                if kind == "progress" and data["stage"] == "denoise" and data["step"]:
                    self.steps.append(data["step"])


def kill(numbers):
    assert numbers
    for number in numbers:
        os.kill(number, signal.SIGKILL)


def begin(server):
    """A long job, once its state was sent."""
    id = server.submit(**LONG)["id"]
    until((server.folder / "states" / f"{id}.safetensors").exists)
    return id


def check(server, id, pipe):
    job = server.wait(id)
    assert job["state"] == "done", job
    assert server.pixels(job) == pixels(pipe.generate(**LONG).images)
    assert os.listdir(server.folder / "states") == []


def draws(server, id):
    job = server.http.get(f"/api/jobs/{id}").json()
    return (job["state"], job["stage"]) == ("running", "denoise")


def all_ready(server):
    return all(worker["state"] == "ready" for worker in server.http.get("/health").json()["workers"])


@pytest.mark.parametrize("what", ["actor", pytest.param("bridge", marks=pytest.mark.full)])
def test_a_job_whose_worker_dies_goes_on_from_its_state(cluster, server, pipe, what):
    """The actor on the other machine, or the process here that speaks to it."""
    id = begin(server)
    seen = Steps(server, id)
    until(lambda: seen.steps)
    kill(cluster.relays() if what == "actor" else server.workers())
    check(server, id, pipe)
    seen.join(PATIENCE)
    assert seen.steps.count(1) <= LONG["images"], "it did not begin anew"
    assert len(seen.steps) > 0
    until(lambda: all_ready(server))


@pytest.mark.full
def test_a_job_outlives_its_server(server, pipe):
    id = begin(server)
    server.kill()
    server.start()
    seen = Steps(server, id)
    check(server, id, pipe)
    seen.join(PATIENCE)
    assert seen.steps.count(1) < LONG["images"], "it did not begin anew"
    until(lambda: all_ready(server))


@pytest.mark.full
def test_a_job_that_ends_every_worker_fails_and_the_next_one_is_drawn(cluster, server):
    id = begin(server)
    for _ in range(2):
        until(lambda: draws(server, id))
        kill(cluster.relays())
        until(lambda: not draws(server, id))
    job = server.wait(id)
    assert (job["state"], job["error"]["message"].split(";")[0]) == ("failed", "its process ended unexpectedly 2 times")
    assert server.draw(**SHORT)


@pytest.mark.full
def test_a_machine_may_go(tmp_path_factory, options, pipe):
    """Each worker is on a machine of its own; the one that draws loses its power, and another machine comes."""
    lost = Cluster(cores=0, others=1)
    try:
        where = ("--address", lost.address, "--workers", "1")
        running = Server(tmp_path_factory.mktemp("lost") / "data", *options, *where, environment=lost.environment)
        running.start()
        id = begin(running)
        lost.lose()
        check(running, id, pipe)
        assert running.stop() == 0
    finally:
        lost.shutdown()


def test_a_cluster_that_is_not_there_is_one_line(tmp_path, cluster):
    running = Server(tmp_path / "data", "--address", "127.0.0.1:1", "--workers", "1", environment=cluster.environment)
    with pytest.raises(AssertionError, match=r"no Ray cluster answers at '127\.0\.0\.1:1'"):
        running.start()
