"""A history whose process is killed at any moment, and one on a disk without room."""

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from threading import Thread

import pytest
from histories import consistent, draw, fill, history, ids

from zimage.serve.refusals import NoRoom, NotFound

BUSY = """
import random, sys
sys.path.insert(0, {here!r})
from pathlib import Path
from histories import draw, history
kept, luck = history(Path({folder!r})), random.Random({seed})
def say(*words): print(*words, flush=True)
say("ready")
for i in range(100_000):
    there = [p.stem for p in kept.files.pictures.glob("*.png")]
    trash = [p.stem for p in kept.files.trash.glob("*.png")]
    do = luck.choice(["add", "add", "delete", "restore", "thumbnail", "page", "delete_all"])
    chosen = luck.sample(there, min(len(there), 3)) if do == "delete" else luck.sample(trash, min(len(trash), 3))
    chosen = [f"{seed}-{{i}}"] if do == "add" else there if do == "delete_all" else chosen
    if do == "page":
        kept.page("cat")
    elif do == "thumbnail":
        there and kept.thumbnail(luck.choice(there))
    elif chosen:
        say("begin", do, *chosen)
        if do == "add":
            kept.add(draw(kept.files.path(chosen[0])), chosen[0], "")
        else:
            getattr(kept, do.removesuffix("_all"))(chosen)
        say("end", do, *chosen)
"""


def told(lines):
    """What must be, by what a process said before it was killed: id → whether it is deleted; None: one of the two."""
    state = {}
    for line in lines:
        when, do, *chosen = line.split()
        for id in chosen:
            state[id] = None if when == "begin" else do.startswith("delete")
            if when == "begin" and do == "add":
                state.pop(id)  # it may not be there at all
    return state


def killed(folder, seed, seconds):
    """Its lines: a process that changes a history, killed after some seconds of work."""
    here = str(Path(__file__).parent)
    code = BUSY.format(here=here, folder=str(folder), seed=seed)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    said, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL
    return [line for line in said.splitlines(keepends=True) if line.endswith("\n")]


@pytest.mark.parametrize("rounds", [6, pytest.param(60, marks=pytest.mark.full)])
def test_a_kill_at_any_moment_loses_and_doubles_nothing(tmp_path, rounds):
    luck, expected, changes = random.Random(rounds), {}, 0
    for seed in range(rounds):
        lines = killed(tmp_path, seed, luck.uniform(0.02, 0.3))
        changes += len(lines)
        expected |= told(lines)
        kept = history(tmp_path)
        found = consistent(kept)
        for id, deleted in expected.items():
            assert id in found, f"{id} is lost"
            assert deleted is None or found[id] == deleted, f"{id} is not as it was left"
        assert not [name for name in os.listdir(kept.files.pictures) if name.startswith(".")]
        expected |= {id: bool(gone) for id, gone in found.items()}
        kept.database.close()
    assert changes > 10 * rounds


def test_threads_find_and_change_at_once(tmp_path):
    """What one thread added and nobody deleted is on every page that another reads, and none is told twice."""
    kept, faults = history(tmp_path), []

    def add(name):
        for i in range(25):
            id = f"{name}-{i}"
            kept.add(draw(kept.files.path(id), f"a cat by {name}"), id, "")
            with suppress(NotFound):  # another thread has just deleted it, and is about to restore it
                kept.get(id)

    def delete_and_restore(name):
        for _ in range(25):
            gone = kept.delete([picture.id for picture in kept.page(limit=5).pictures])
            assert kept.restore(gone) == gone

    def read(name):
        for _ in range(50):
            found = ids(kept.page("cat", limit=200))
            assert len(found) == len(set(found))
            if found:
                with suppress(NotFound):  # deleted meanwhile
                    kept.open(found[0]).close()
                    kept.thumbnail(found[0])

    def guarded(work, name):
        try:
            work(name)
        except BaseException as error:
            faults.append(error)

    works = [*[add] * 3, delete_and_restore, delete_and_restore, read, read]
    threads = [Thread(target=guarded, args=(work, f"t{i}")) for i, work in enumerate(works)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    assert sorted(consistent(kept).items()) == sorted((f"t{i}-{k}", 0) for i in range(3) for k in range(25))
    kept.database.close()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 16 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", place], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk needs more rights")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def fill_up(file):
    """Take every byte that is left."""
    with file.open("wb", buffering=0) as stream:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while stream.write(bytes(size)) == size:
                    pass
            except OSError:
                continue


def test_a_full_disk_refuses_and_harms_nothing(small_disk):
    kept = history(small_disk)
    made = fill(kept, 5)
    waiting = [draw(kept.files.path(f"waiting-{i}"), "x" * 20_000) for i in range(60)]
    fill_up(small_disk / "filler")
    with pytest.raises(NoRoom, match="full"):  # sooner or later: the log has some room in its file
        [kept.add(path, path.stem, "") for path in waiting]
    assert {*ids(kept.page())} >= {*made}
    assert kept.thumbnail(made[0])
    (small_disk / "filler").unlink()
    for path in waiting:
        kept.add(path, path.stem, "")
    assert kept.total() == 65
    assert set(consistent(kept)) == {*made, *(path.stem for path in waiting)}
    kept.database.close()


def test_a_full_disk_leaves_a_deletion_undone_or_done(small_disk):
    kept = history(small_disk)
    made = fill(kept, 200)
    fill_up(small_disk / "filler")
    for some in (made[i : i + 20] for i in range(0, 200, 20)):
        try:
            assert kept.delete(some) == some
        except NoRoom:
            assert {*some} <= {*ids(kept.page(limit=200))}
    consistent(kept)
    kept.database.close()
