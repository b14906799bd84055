"""Jobs over HTTP, on a real server: from a request to the bits that `gen` draws, whatever happens in between."""

import asyncio
import base64
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image, ImageChops, ImageStat
from running import ROOT

import zimage
from zimage.serve.service import UNUSED, Launch, Service
from zimage.settings.serving import ServeSettings

LONG = {"prompt": "a cat", "seed": 1, "width": 512, "height": 512, "steps": 60}  # some seconds


def pixels(server, image):
    return Image.open(io.BytesIO(server.http.get(image["url"]).content)).tobytes()


@pytest.fixture(scope="module")
def pipe():
    return zimage.ZImage.load()


def test_a_job_draws_what_the_library_draws(server, pipe):
    job = server.draw(prompt="a dog face on a red background", seed=7, images=2)
    expected = pipe.generate("a dog face on a red background", seed=7, images=2)
    assert [pixels(server, image) for image in job["images"]] == [one.tobytes() for one in expected.images]
    assert job["seeds"] == [7, 8]
    assert [image["seed"] for image in job["images"]] == [7, 8]
    assert job["images"][0]["settings"] == json.loads(json.dumps(expected.metadata[0]))


def test_events_tell_the_whole_story_in_order(server):
    id = server.submit(prompt="a cat", seed=1, images=2)["id"]
    events = list(server.events(f"/api/jobs/{id}/events"))
    kinds = [kind for _, kind, _ in events]
    assert kinds[0] == "job"
    assert kinds[-1] == "end"
    assert kinds.count("image") == 2
    steps = [(d["index"], d["step"]) for _, kind, d in events if kind == "progress" and d["stage"] == "denoise"]
    assert steps == sorted(steps)
    assert steps[-1] == (1, 8)
    assert events[-1][2]["state"] == "done"
    assert len(events[-1][2]["images"]) == 2
    numbers = [int(place.partition("-")[2]) for place, _, _ in events]
    assert numbers == sorted(numbers)


def test_previews_become_the_picture(server):
    id = server.submit(prompt="a cat face on a blue background", seed=1)["id"]
    shown = [data for _, kind, data in server.events(f"/api/jobs/{id}/events") if kind == "preview"]
    assert shown[-1]["step"] == 8
    head, _, text = shown[-1]["image"].partition(",")
    assert head == "data:image/jpeg;base64"
    preview = Image.open(io.BytesIO(base64.b64decode(text)))
    assert preview.size == (shown[-1]["width"], shown[-1]["height"]) == (32, 32)
    image = server.http.get(f"/api/jobs/{id}").json()["images"][0]
    picture = Image.open(io.BytesIO(server.http.get(image["url"]).content)).resize((32, 32), Image.Resampling.BOX)
    difference = ImageChops.difference(preview.convert("RGB"), picture)
    assert sum(ImageStat.Stat(difference).mean) / 3 < 30  # levels; grey is 60 from it


def test_events_are_taken_up_where_they_were_lost(server):
    id = server.submit(prompt="a cat", seed=2)["id"]
    whole = list(server.events(f"/api/jobs/{id}/events"))
    middle = next(i for i, (_, kind, d) in enumerate(whole) if kind == "progress" and d["step"] == 4)
    rest = list(server.events(f"/api/jobs/{id}/events", after=whole[middle][0]))
    assert rest[-1][1] == "end"
    unknown = list(server.events(f"/api/jobs/{id}/events", after="0badcafe-3"))
    assert [kind for _, kind, _ in unknown][-1] == "end"


def test_the_same_key_is_the_same_job(server):
    asked = {"prompt": "a cat", "seed": 3}
    with ThreadPoolExecutor(8) as pool:
        headers = {"Idempotency-Key": "once"}
        answers = list(pool.map(lambda _: server.http.post("/api/jobs", json=asked, headers=headers), range(8)))
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["id"] for answer in answers}) == 1
    other = server.http.post("/api/jobs", json={**asked, "seed": 4}, headers=headers)
    assert other.status_code == 422
    assert "Idempotency-Key" in other.json()["error"]["message"]


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({"prompt": "a", "width": 1000}, "width"),
        ({"prompt": "a", "steps": 0}, "steps"),
        ({"prompt": "a", "template": "no-such"}, "template"),
        ({"prompt": "a", "hidden_layer": -500}, "hidden_layer"),
        ({"prompt": "a", "negative": "b", "guidance": 0}, "negative"),
        ({"prompt": "a", "strength": 0.5}, "strength"),
        ({"prompt": "a", "nonsense": 1}, "nonsense"),
        ({"prompt": ["a"] * 17}, "prompt"),
        ({"prompt": "a", "lora": ["absent"]}, "lora"),
        ({"prompt": "a", "image": "/etc/passwd"}, "image"),
        ({"prompt": "a", "image": "aGVsbG8="}, "image"),
        ({"prompt": "a", "rewriter": "no-such"}, "rewriter"),
    ],
)
def test_what_cannot_be_drawn_is_refused_at_once_by_its_field(server, asked, field):
    answer = server.http.post("/api/jobs", json=asked)
    assert answer.status_code == 422, answer.text
    assert field in answer.json()["error"]["fields"], answer.text


def test_a_job_is_cancelled_in_the_middle_of_a_step(server):
    """The steps of this one take longer than the cancel may."""
    id = server.submit(prompt="a cat", seed=1, width=1536, height=1536, steps=8)["id"]
    for _, kind, data in server.events(f"/api/jobs/{id}/events"):
        if kind == "progress" and data["stage"] == "denoise":
            break
    begun = time.monotonic()
    job = server.http.delete(f"/api/jobs/{id}").json()
    assert job["state"] == "cancelled", job
    assert time.monotonic() - begun < 3
    assert server.http.delete(f"/api/jobs/{id}").status_code == 409
    assert server.draw(prompt="a cat", seed=1)["images"]  # the worker lives


def test_a_cancelled_step_leaves_no_trace(server, pipe):
    for delay in (0.05, 0.2, 0.4):
        id = server.submit(**LONG)["id"]
        time.sleep(delay)
        server.http.delete(f"/api/jobs/{id}")
    job = server.draw(prompt="a cat", seed=5)
    assert pixels(server, job["images"][0]) == pipe.generate("a cat", seed=5).images[0].tobytes()


def test_waiting_jobs_can_be_moved_and_cancelled(server):
    first = server.submit(**LONG)["id"]
    ids = [server.submit(prompt="a cat", seed=seed)["id"] for seed in range(3)]
    moved = server.http.patch(f"/api/jobs/{ids[2]}", json={"position": 0}).json()
    assert moved["position"] == 0
    order = [job["id"] for job in server.http.get("/api/jobs?state=queued").json()["jobs"]]
    assert order == [ids[2], ids[0], ids[1]]
    assert server.http.delete(f"/api/jobs/{ids[0]}").json()["state"] == "cancelled"
    server.http.delete(f"/api/jobs/{first}")
    ends = [server.wait(id) for id in ids]
    assert [job["state"] for job in ends] == ["cancelled", "done", "done"]
    assert ends[2]["started"] < ends[1]["started"]


def test_a_picture_at_once(server, pipe):
    answer = server.http.post("/api/generate", json={"prompt": "a cat", "seed": 6})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "image/png"
    assert Image.open(io.BytesIO(answer.content)).tobytes() == pipe.generate("a cat", seed=6).images[0].tobytes()
    assert answer.headers["x-seed"] == "6"
    assert float(answer.headers["x-generation-time"]) > 0
    assert server.http.get(f"/api/images/{answer.headers['x-history-id']}").content == answer.content
    assert server.http.post("/api/generate", json={"prompt": "a", "images": 2}).status_code == 422


def test_a_client_that_goes_away_cancels_its_picture(server):
    import httpx

    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/api/generate", json=LONG, timeout=1.0)
    end = time.monotonic() + 10
    while jobs := server.http.get("/api/jobs?state=running,queued").json()["jobs"]:
        assert time.monotonic() < end, jobs
        time.sleep(0.05)


def test_a_worker_that_dies_takes_nothing_with_it(new_server, pipe):
    server = new_server().start()
    first = server.submit(**LONG)["id"]
    second = server.submit(prompt="a cat", seed=8)["id"]
    time.sleep(0.5)
    (worker,) = server.workers()
    os.kill(worker, signal.SIGKILL)
    assert server.http.get("/health").status_code == 200
    jobs = [server.wait(id) for id in (first, second)]
    assert [job["state"] for job in jobs] == ["done", "done"]
    assert pixels(server, jobs[1]["images"][0]) == pipe.generate("a cat", seed=8).images[0].tobytes()


def test_a_job_whose_process_dies_twice_has_failed(new_server):
    server = new_server().start()
    id = server.submit(**LONG)["id"]
    for _ in range(2):
        while server.http.get(f"/api/jobs/{id}").json()["step"] < 2:
            time.sleep(0.02)
        for worker in server.workers():
            os.kill(worker, signal.SIGKILL)
        time.sleep(0.3)
    job = server.wait(id)
    assert job["state"] == "failed"
    assert "2 times" in job["error"]["message"]
    assert server.draw(prompt="a cat", seed=1)["images"]


def test_a_killed_server_goes_on_from_the_state_of_its_job(new_server, pipe):
    server = new_server().start()
    id = server.submit(**LONG)["id"]
    waiting = server.submit(prompt="a cat", seed=9)["id"]
    while not list((server.folder / "states").glob("*.safetensors")):
        time.sleep(0.05)
    server.kill()
    server.start()
    steps = [
        data["step"]
        for _, kind, data in server.events(f"/api/jobs/{id}/events")
        if kind == "progress" and data["stage"] == "denoise"
    ]
    assert steps[0] > 0  # not from the beginning
    job = server.wait(id)
    assert pixels(server, job["images"][0]) == pipe.generate(**LONG).images[0].tobytes()
    assert server.wait(waiting)["state"] == "done"
    assert not list((server.folder / "states").iterdir())


def test_a_server_that_is_stopped_keeps_its_jobs(new_server, pipe):
    server = new_server("--grace", "0").start()
    ids = [server.submit(**LONG)["id"], server.submit(prompt="a cat", seed=10)["id"]]
    time.sleep(1.5)
    assert server.stop() == 0
    server.start()
    jobs = [server.wait(id) for id in ids]
    assert [job["state"] for job in jobs] == ["done", "done"]
    assert pixels(server, jobs[0]["images"][0]) == pipe.generate(**LONG).images[0].tobytes()


def test_a_stopping_server_lets_its_job_end(new_server):
    server = new_server().start()
    id = server.submit(prompt="a cat", seed=1, width=256, height=256)["id"]
    ended = []
    watcher = threading.Thread(target=lambda: ended.extend(server.events(f"/api/jobs/{id}/events")))
    watcher.start()
    time.sleep(0.2)
    assert server.stop() == 0
    watcher.join(10)
    assert ended[-1][1] == "end"
    assert ended[-1][2]["state"] == "done"


def test_two_servers_do_not_share_a_folder(new_server):
    server = new_server().start()
    command = [sys.executable, ROOT / "cli.py", "serve", "--port", "0", "--data", server.folder]
    second = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert second.returncode == 2
    assert "used by another server" in second.stderr


def test_several_workers_share_the_queue(new_server, pipe):
    server = new_server("--worker", "cpu", "--worker", "cpu").start()
    while len([w for w in server.http.get("/health").json()["workers"] if w["state"] == "ready"]) < 2:
        time.sleep(0.05)
    ids = [server.submit(prompt="a cat", seed=seed)["id"] for seed in range(6)]
    jobs = [server.wait(id) for id in ids]
    spans = sorted((job["started"], job["finished"]) for job in jobs)
    assert any(begin < end for (_, end), (begin, _) in itertools.pairwise(spans))
    for seed, job in enumerate(jobs):
        assert pixels(server, job["images"][0]) == pipe.generate("a cat", seed=seed).images[0].tobytes()


def test_the_queue_has_an_end(new_server):
    server = new_server("--max-queue", "2").start()
    server.submit(**LONG)
    answers = [server.http.post("/api/jobs", json={"prompt": "a", "seed": i}) for i in range(4)]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert refused
    assert all(int(answer.headers["retry-after"]) > 0 for answer in refused)


def test_a_server_that_only_encodes_draws_nothing_and_has_no_page(new_server):
    server = new_server("--encoder-only").start()
    assert server.http.post("/api/jobs", json={"prompt": "a"}).status_code == 404
    assert server.http.get("/").status_code == 404
    counted = server.http.post("/api/format-prompt", json={"prompt": "a cat"}).json()
    assert counted["tokens"] > 0


def test_captions_that_nobody_took_go(tmp_path):
    """The client of short work may have left when its file was written."""
    service = Service(Launch({}, {}, ServeSettings(), tmp_path))
    old, new = tmp_path / "captions/old.safetensors", tmp_path / "captions/new.safetensors"
    for path, age in ((old, 2 * UNUSED), (new, 0)):
        path.write_bytes(b"x")
        os.utime(path, (time.time() - age,) * 2)

    async def once():
        sweeper = asyncio.create_task(service._sweep())
        while old.exists():
            await asyncio.sleep(0.01)
        sweeper.cancel()

    asyncio.run(asyncio.wait_for(once(), 10))
    assert new.exists()


def test_a_lora_is_found_by_its_name_off_the_loop(tmp_path):
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "style.safetensors").touch()
    service = Service(Launch({"lora_folder": str(tmp_path)}, {}, ServeSettings(), tmp_path / "data"))
    assert asyncio.run(service.loras()) == {"style": tmp_path / "more" / "style.safetensors"}
