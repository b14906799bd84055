"""The embedding cache: what it keeps and counts, threads, shared folders, and files that were harmed."""

import logging
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import save_file

from zimage.errors import RequestError
from zimage.text.cache import CacheStats, EmbeddingCache, cache_key


def key(i: int) -> str:
    return cache_key(f"prompt {i}", -2, "encoder", torch.float32)


def caption(i: int, dtype=torch.float32):
    return torch.full((i + 1, 4), float(i), dtype=dtype)


# ------------------------------------------------------------------ keys


def test_keys_cover_everything_that_a_caption_depends_on():
    keys = {
        cache_key("a", -2, "e", torch.float32),
        cache_key("b", -2, "e", torch.float32),
        cache_key("a", -3, "e", torch.float32),
        cache_key("a", {-2: 1.0, -3: 0.5}, "e", torch.float32),
        cache_key("a", {-2: 1.0, -3: 0.25}, "e", torch.float32),
        cache_key("a", -2, "f", torch.float32),
        cache_key("a", -2, "e", torch.bfloat16),
        cache_key("a", -2, "e", torch.float32, mode="pool"),
        cache_key("a", -2, "e", torch.float32, mode="pool", limit=1504),
        cache_key('a", -2', -2, "e", torch.float32),
        cache_key("a\ud800", -2, "e", torch.float32),
    }
    assert len(keys) == 11
    assert all(len(k) == 64 for k in keys)


def test_keys_do_not_depend_on_how_it_is_said():
    plain = cache_key("a", -2, "e", torch.float32, mode="pool", limit=3)
    assert plain == cache_key("a", {-2: 1}, "e", "float32", limit=3, mode="pool")
    assert cache_key("a", {-2: 1.0, -3: 0.5}, "e", "x") == cache_key("a", {-3: 0.5, -2: 1.0}, "e", "x")


@pytest.mark.parametrize("bad", ["", "a cat", "../../etc/passwd", "ABCDEF0123456789", "a" * 65])
def test_other_keys_are_refused(tmp_path, bad):
    cache = EmbeddingCache(2, tmp_path)
    for use in (cache.get, lambda k: cache.put(k, caption(1))):
        with pytest.raises(RequestError, match="should be 16 to 64 hex digits"):
            use(bad)


# ------------------------------------------------------------------ in memory


def test_what_was_put_comes_back_as_a_copy():
    cache, original = EmbeddingCache(), caption(3, torch.bfloat16)
    cache.put(key(3), original)
    original.zero_()
    first = cache.get(key(3))
    assert torch.equal(first, caption(3, torch.bfloat16))
    first.zero_()
    assert torch.equal(cache.get(key(3)), caption(3, torch.bfloat16))
    assert cache.get(key(4)) is None


def test_the_entry_unused_for_longest_goes():
    cache = EmbeddingCache(2)
    cache.put(key(1), caption(1))
    cache.put(key(2), caption(2))
    cache.get(key(1))
    cache.put(key(3), caption(3))
    assert [cache.get(key(i)) is not None for i in (1, 2, 3)] == [True, False, True]
    cache.put(key(1), caption(7))
    assert torch.equal(cache.get(key(1)), caption(7))


def test_statistics():
    cache = EmbeddingCache(2)
    assert cache.stats == CacheStats()
    assert cache.stats.hit_rate == 0
    for i in range(3):
        cache.put(key(i), caption(i))
    for i in (0, 1, 2, 2):
        cache.get(key(i))
    assert cache.stats == CacheStats(hits=3, misses=1, evictions=1, size=2, bytes=(2 + 3) * 4 * 4)
    assert cache.stats.hit_rate == 0.75
    cache.clear()
    assert cache.stats == CacheStats()
    assert cache.get(key(2)) is None


def test_no_entries_turn_it_off(tmp_path):
    cache = EmbeddingCache(0, tmp_path)
    cache.put(key(1), caption(1))
    assert cache.get(key(1)) is None
    assert cache.stats == CacheStats()
    assert not list(tmp_path.iterdir())
    with pytest.raises(RequestError, match="is -1; the minimum is 0"):
        EmbeddingCache(-1)


@pytest.mark.parametrize("on_disk", [False, True])
def test_threads(tmp_path, on_disk):
    """Many threads over few entries: never a wrong caption, never too many, every question counted."""
    cache = EmbeddingCache(4, tmp_path if on_disk else None)

    def work(seed: int) -> None:
        for step in range(60):
            i = (seed * 7 + step * step) % 9
            found = cache.get(key(i))
            if found is None:
                cache.put(key(i), caption(i))
            else:
                assert torch.equal(found, caption(i))
                found.fill_(-1)
            assert cache.stats.size <= 4

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    stats = cache.stats
    assert stats.hits + stats.misses == 8 * 60
    assert stats.bytes <= 4 * 9 * 4 * 4
    assert (stats.disk_hits > 0) == on_disk


# ------------------------------------------------------------------ in a folder


def test_a_folder_outlives_the_process_and_the_memory(tmp_path):
    folder = tmp_path / "new" / "cache"
    cache = EmbeddingCache(1, folder)
    for i in range(3):
        cache.put(key(i), caption(i, torch.bfloat16))
    assert sorted(file.name for file in folder.iterdir()) == sorted(f"{key(i)}.safetensors" for i in range(3))
    later = EmbeddingCache(5, folder)
    for i in (0, 1, 2, 0):
        assert torch.equal(later.get(key(i)), caption(i, torch.bfloat16))
    assert (later.stats.hits, later.stats.disk_hits, later.stats.size) == (4, 3, 3)
    (folder / "notes.safetensors").write_text("mine")
    later.clear()
    assert [file.name for file in folder.iterdir()] == ["notes.safetensors"]
    assert cache.get(key(0)) is None


def harm_cut(file, whole):
    file.write_bytes(whole[:-1])


def harm_empty(file, whole):
    file.write_bytes(b"")


def harm_one_bit(file, whole):
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))


def harm_other_key(file, whole):
    file.write_bytes(file.with_name(f"{key(1)}.safetensors").read_bytes())


def harm_foreign(file, whole):
    save_file({"embeddings": caption(5)}, file)


def harm_other_tensor(file, whole):
    save_file({"weights": caption(5)}, file)


HARMS = [harm_cut, harm_empty, harm_one_bit, harm_other_key, harm_foreign, harm_other_tensor]


@pytest.mark.parametrize("harm", HARMS)
def test_harmed_files_are_misses_and_are_replaced(tmp_path, harm, caplog):
    for i in range(2):
        EmbeddingCache(1, tmp_path).put(key(i), caption(i))
    file = tmp_path / f"{key(0)}.safetensors"
    harm(file, file.read_bytes())
    cache = EmbeddingCache(1, tmp_path)
    with caplog.at_level(logging.WARNING, "zimage"):
        assert cache.get(key(0)) is None
    assert len(caplog.messages) == 1
    assert str(file) in caplog.text
    assert cache.stats.misses == 1
    cache.put(key(0), caption(0))
    assert torch.equal(EmbeddingCache(1, tmp_path).get(key(0)), caption(0))


def test_an_entry_that_is_replaced_while_it_is_read_is_a_miss_or_whole(tmp_path):
    """Entries of different sizes under one key: what is read is one of them, never a mixture or a traceback."""
    file = tmp_path / f"{key(0)}.safetensors"
    for length in (3, 4000):
        EmbeddingCache(1, tmp_path).put(key(0), torch.full((length, 8), float(length)))
        file.rename(tmp_path / f"{length}")
    code = f"import os\nwhile True:\n for n in '3', '4000': os.link(n, 'link'); os.replace('link', '{file.name}')"
    with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path) as other:
        try:
            while not file.exists():
                time.sleep(0.01)
            for _ in range(1000):
                read = EmbeddingCache(1, tmp_path).get(key(0))
                assert read is None or bool((read == len(read)).all())
        finally:
            other.kill()


def test_a_single_number_in_the_folder_is_a_miss(tmp_path):
    save_file({"embeddings": torch.tensor(1.0)}, tmp_path / f"{key(0)}.safetensors")
    assert EmbeddingCache(1, tmp_path).get(key(0)) is None


def test_a_fifo_in_the_folder_is_a_miss(tmp_path):
    os.mkfifo(tmp_path / f"{key(0)}.safetensors")
    assert EmbeddingCache(1, tmp_path).get(key(0)) is None


def test_a_folder_that_cannot_be_written_only_warns(tmp_path, caplog):
    (tmp_path / "taken").write_text("a file")
    cache = EmbeddingCache(1, tmp_path / "taken")
    cache.put(key(0), caption(0))
    assert torch.equal(cache.get(key(0)), caption(0))
    assert "is not cached in" in caplog.text
    caplog.clear()
    EmbeddingCache(1, tmp_path).put(key(0), caption(0))
    file = tmp_path / f"{key(0)}.safetensors"
    file.unlink()
    file.mkdir()
    other = EmbeddingCache(1, tmp_path)
    assert other.get(key(0)) is None
    other.put(key(0), caption(0))
    assert len(caplog.messages) == 2


def test_caches_share_a_folder(tmp_path, caplog):
    """As processes do, they have only the folder in common; no reader ever sees half a file."""

    def share(seed: int) -> None:
        cache = EmbeddingCache(1, tmp_path)
        for step in range(60):
            i = (seed + step) % 3
            found = cache.get(key(i))
            assert found is None or torch.equal(found, caption(i))
            cache.put(key(i), caption(i))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(share, range(4)))
    assert not caplog.messages
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(f"{key(i)}.safetensors" for i in range(3))
