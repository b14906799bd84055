"""A server that is killed, stopped and starved under load: what it accepted ends once, with the right bits."""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from load import BRIEF, REQUESTS, Backups, Client, Expected, check_ends, check_folder
from running import PATIENCE

CLIENTS = 4
LONG = {"prompt": "a dog", "seed": 4, "width": 128, "height": 128, "steps": 60}


@pytest.fixture(scope="module")
def expected():
    return Expected()


def kill_server(server):
    server.kill()
    server.start()


def kill_worker(server):
    for worker in server.workers():
        os.kill(worker, signal.SIGKILL)


def kill_both(server):
    workers = server.workers()
    server.process.kill()
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    server.process.wait()
    server.start()


def stop_server(server):
    assert server.stop() == 0
    server.start()


KILLS = (kill_server, kill_worker, kill_both, stop_server)


@pytest.mark.parametrize(
    "times", [1, pytest.param(3, marks=pytest.mark.full), pytest.param(20, marks=pytest.mark.full)]
)
def test_no_kill_loses_or_doubles_a_job(new_server, tmp_path, expected, times):
    """Clients submit, follow, cancel and delete; the index is backed up meanwhile."""
    chance, server = random.Random(times), new_server("--grace", "1").start()
    clients = [Client(server, seed) for seed in range(CLIENTS)]
    backups = Backups(server.folder, tmp_path / "backup.sqlite")
    for thread in (*clients, backups):
        thread.start()
    kills = [kill for kill in KILLS for _ in range(times)]
    chance.shuffle(kills)
    for kill in kills:
        time.sleep(chance.uniform(0.2, 2.5))
        kill(server)
    time.sleep(1)
    for thread in (*clients, backups):
        thread.leaving.set()
    for thread in (*clients, backups):
        thread.join(2 * PATIENCE)
        assert not thread.is_alive(), f"{thread.name} waits for ever"
    ends = check_ends(server, clients, expected, may_fail=True)
    print(f"{len(kills)} kills, {sum(ends.values())} jobs: {dict(ends)}, {backups.taken} backups")
    assert ends["done"] >= len(kills) / 2
    assert ends["failed"] <= ends["done"] / 4
    assert not backups.fault
    assert backups.taken
    assert server.stop() == 0
    check_folder(server.folder, {id for client in clients for id in client.accepted})


@pytest.fixture
def small_disk(tmp_path):
    """A folder with room for 12 MB."""
    folder = tmp_path / "data"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder):
    """Leave not a byte."""
    with (folder / "filler").open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                continue


def test_a_full_disk_delays_what_was_accepted_and_refuses_what_is_new(new_server, small_disk, expected):
    server = new_server("--min-free", "2").start()
    server.draw(**REQUESTS[0])
    ids = {server.submit(**LONG)["id"]: LONG, server.submit(**REQUESTS[1])["id"]: REQUESTS[1]}
    fill(small_disk)
    refused = server.http.post("/api/jobs", json=REQUESTS[2])
    assert refused.status_code == 507, refused.text
    end = time.monotonic() + PATIENCE
    while server.http.get("/health").json()["status"] != "degraded":  # the picture is drawn, and cannot be written
        assert time.monotonic() < end
        time.sleep(0.05)
    time.sleep(1.5)
    assert server.http.get("/health").status_code == 200
    assert all(server.http.get(f"/api/jobs/{id}").json()["state"] in ("queued", "running") for id in ids)
    assert server.http.get("/api/history").status_code == 200
    assert server.http.post("/api/jobs", json=REQUESTS[2]).status_code == 507
    (small_disk / "filler").unlink()
    for id, request in ids.items():
        job = server.wait(id)
        assert job["state"] == "done", job
        assert server.pixels(job) == expected.of(request)
    assert server.http.get("/health").json()["status"] == "ok"
    assert server.pixels(server.draw(**REQUESTS[2])) == expected.of(REQUESTS[2])
    kept = {job["id"] for job in server.http.get("/api/jobs").json()["jobs"]}
    assert server.stop() == 0
    check_folder(server.folder, kept)


@pytest.mark.full
def test_a_server_that_is_killed_on_a_full_disk_goes_on_when_there_is_room(new_server, small_disk, expected):
    server = new_server("--min-free", "2").start()
    id = server.submit(**LONG)["id"]
    while server.http.get(f"/api/jobs/{id}").json()["step"] < 2:
        time.sleep(0.02)
    fill(small_disk)
    server.kill()
    server.start()
    assert server.http.get(f"/api/jobs/{id}").json()["state"] in ("queued", "running")
    (small_disk / "filler").unlink()
    job = server.wait(id)
    assert job["state"] == "done", job
    assert server.pixels(job) == expected.of(LONG)
    assert server.stop() == 0
    check_folder(server.folder, {id})


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_clients_that_read_nothing_take_no_memory(new_server):
    """Their events wait in the kernel and in one log for all, which has an end."""
    server = new_server().start()
    server.draw(**REQUESTS[0])
    deaf = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(100)]
    for one in deaf:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        one.sendall(f"GET /api/events HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n\r\n".encode())
    server.draw(**REQUESTS[0])
    before = memory(server.process.pid)
    ids = [server.submit(prompt="a", seed=seed, **{**BRIEF, "steps": 1})["id"] for seed in range(30)]
    assert {server.wait(id)["state"] for id in ids} == {"done"}
    assert memory(server.process.pid) - before < 24e6
    for one in deaf:
        one.close()


def memory(process):
    """Bytes of a process that are in memory."""
    with open(f"/proc/{process}/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
