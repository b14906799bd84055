"""Clients that keep a server at work while it is killed, and what must be so of it afterwards."""

import io
import random
import sqlite3
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
from PIL import Image
from running import PATIENCE, Server

import zimage

BRIEF = {"width": 64, "height": 64, "steps": 4}
REQUESTS = [
    *({"prompt": prompt, "seed": seed, **BRIEF} for prompt in ("a cat", "a red ball") for seed in (1, 2)),
    {"prompt": "a dog", "seed": 3, "images": 2, **BRIEF},
    {"prompt": "a dog", "seed": 4, "width": 128, "height": 128, "steps": 12},
]
ENDED = ("done", "failed", "cancelled")


class Expected:
    """The pixels that the library draws for a request, each computed once."""

    def __init__(self):
        self._pipe, self._known = zimage.ZImage.load(), dict[str, list[bytes]]()

    def of(self, request: dict) -> list[bytes]:
        name = repr(sorted(request.items()))
        if name not in self._known:
            self._known[name] = [image.tobytes() for image in self._pipe.generate(**request).images]
        return self._known[name]


class Client(threading.Thread):
    """Submits, watches, cancels and deletes at random until it is told to stop; what it began it sees to its end.

    `accepted`: each job that the server took, with its request; `cancelled` and `deleted`: what it asked for.
    """

    def __init__(self, server: Server, seed: int):
        super().__init__(name=f"client-{seed}")
        self.server, self.random, self.number = server, random.Random(seed), seed
        self.http = httpx.Client(base_url=server.url, timeout=PATIENCE)
        self.leaving = threading.Event()
        self.accepted: dict[str, dict] = {}
        self.cancelled, self.deleted = set[str](), set[str]()
        self.ends = Counter[str]()
        self.fault: BaseException | None = None

    def run(self) -> None:
        try:
            while not self.leaving.is_set():
                self._one()
        except BaseException as error:
            self.fault = error

    def _one(self) -> None:
        request = self.random.choice(REQUESTS)
        key = f"{self.number}-{len(self.accepted)}"
        answer = self._insist("POST", "/api/jobs", json=request, headers={"Idempotency-Key": key})
        assert answer.status_code == 202, answer.text
        job = answer.json()
        assert job["id"] not in self.accepted, "two keys gave one job"
        self.accepted[job["id"]] = request
        what = self.random.random()
        if what < 0.2:
            time.sleep(self.random.uniform(0, 1))
            self.cancelled.add(job["id"])
            assert self._insist("DELETE", f"/api/jobs/{job['id']}").status_code in (200, 409)
        end = self._watched(job["id"]) if what < 0.7 else self._polled(job["id"])
        assert end["state"] in ENDED, end
        if what > 0.85:
            for image in end["images"]:
                assert self._insist("DELETE", f"/api/history/{image['id']}").status_code in (200, 404)
                self.deleted.add(image["id"])

    def _watched(self, id: str) -> dict:
        """Follow its events over every break, and see its end once."""
        after, ends = "", []
        while not ends:
            try:
                for place, kind, data in self.server.events(f"/api/jobs/{id}/events", after):
                    after = place
                    assert data.get("job", id) == id or data.get("id") == id, "an event of another job"
                    ends += [data] if kind == "end" else []
            except httpx.TransportError:
                time.sleep(0.05)
        assert len(ends) == 1
        self.ends[id] += 1
        return ends[0]

    def _polled(self, id: str) -> dict:
        while (job := self._insist("GET", f"/api/jobs/{id}").json())["state"] not in ENDED:
            time.sleep(0.1)
        return job

    def _insist(self, method: str, path: str, **more: object) -> httpx.Response:
        """The answer, asked again where the connection breaks or the server is not ready to say."""
        end = time.monotonic() + 2 * PATIENCE
        while time.monotonic() < end:
            try:
                answer = self.http.request(method, path, **more)
            except httpx.TransportError:
                time.sleep(0.05)
                continue
            if answer.status_code not in (429, 503, 507):
                return answer
            time.sleep(0.1)
        raise AssertionError(f"{method} {path} was not answered in {2 * PATIENCE:g} s")


class Backups(threading.Thread):
    """Another program that copies the index over and over, as a backup does, and sometimes locks it for a while."""

    def __init__(self, folder: Path, target: Path):
        super().__init__(name="backups")
        self.index, self.target, self.leaving, self.taken = folder / "index.sqlite", target, threading.Event(), 0
        self.fault: BaseException | None = None

    def run(self) -> None:
        try:
            while not self.leaving.wait(0.3):
                self._one()
        except BaseException as error:
            self.fault = error

    def _one(self) -> None:
        source, copy = sqlite3.connect(self.index, 30, isolation_level=None), sqlite3.connect(self.target)
        source.backup(copy)
        assert copy.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        source.execute("BEGIN IMMEDIATE")
        time.sleep(0.2)
        source.execute("COMMIT")
        source.close()
        copy.close()
        self.taken += 1


def check_ends(server: Server, clients: list[Client], expected: Expected, may_fail: bool) -> Counter[str]:
    """Every accepted job has ended, in the one way that it may have; returns how many did in which."""
    ends = Counter[str]()
    for client in clients:
        if client.fault:
            raise client.fault
        for id, request in client.accepted.items():
            job = server.wait(id)
            ends[job["state"]] += 1
            assert job["state"] != "cancelled" or id in client.cancelled, job
            assert job["state"] != "failed" or (may_fail and "ended unexpectedly 2 times" in job["error"]["message"])
            _check_pictures(server, job, client, expected.of(request))
    return ends


def _check_pictures(server: Server, job: dict, client: Client, pixels: list[bytes]) -> None:
    """Those that are there are right, and of a job that is done all are, but for those that its client deleted."""
    ids = [f"{job['id']}-{i + 1}" for i in range(len(pixels))]
    there = {image["id"]: image for image in job["images"]}
    if job["state"] == "done":
        assert set(there) | client.deleted >= set(ids), job
    for id, right in zip(ids, pixels, strict=True):
        if id in there and id not in client.deleted:
            drawn = Image.open(io.BytesIO(server.http.get(there[id]["url"]).content))
            assert drawn.tobytes() == right, f"{id} is not what the library draws"


def check_folder(folder: Path, accepted: set[str]) -> None:
    """Of a server that is stopped: index and folder agree, there is nothing else, and no job too many."""
    database = sqlite3.connect(folder / "index.sqlite")
    assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert {id for (id,) in database.execute("SELECT id FROM jobs")} == accepted
    rows = database.execute("SELECT id, deleted IS NOT NULL FROM images").fetchall()
    database.close()
    for place, deleted in (("pictures", 0), ("trash", 1)):
        names = {path.name for path in (folder / place).iterdir()}
        assert names == {f"{id}.png" for id, gone in rows if gone == deleted}
        for name in names:
            Image.open(folder / place / name).load()  # raises where it is not whole
    assert not list((folder / "states").iterdir())
    assert not [path for path in folder.rglob(".*") if path.is_file()], "a part of a file is left"
