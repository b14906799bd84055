"""Files from requests: looked at before they are decoded, kept once, and swept when nobody needs them."""

import asyncio
import errno
import hashlib
import json
import os
import struct
import time

import pytest
from hostile import BOMBS, picture, tensors
from PIL import Image

from zimage.errors import CheckpointError, OutputError, RequestError
from zimage.serve import uploads as module
from zimage.serve.refusals import NoRoom, NotFound, TooLarge
from zimage.serve.uploads import Uploads, named
from zimage.settings.serving import ServeSettings

FORMATS = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"]


@pytest.fixture
def uploads(tmp_path):
    return Uploads(tmp_path / "uploads", ServeSettings(max_decoded=1200, max_upload=1))


def keep(uploads, content, name="image"):
    return asyncio.run(uploads.keep(name, content))


@pytest.mark.parametrize("format", FORMATS)
def test_a_picture_is_kept_under_the_hash_of_its_bytes(uploads, format):
    content = picture(format)
    upload = keep(uploads, content)
    assert upload.hash == hashlib.sha256(content).hexdigest()
    assert upload.path.read_bytes() == content
    assert uploads.path_of(upload.hash) == upload.path
    assert keep(uploads, content, "mask") == upload
    assert os.listdir(uploads.folder) == [upload.hash]


def test_errors_on_files_name_the_field_and_not_the_folder(uploads):
    path = str(keep(uploads, tensors(), "embeddings").path)
    for error in (CheckpointError(f"{path}: 1 of 2 tokens contain NaN"), RequestError(f"{path}: no", fields=("mask",))):
        with pytest.raises(RequestError) as caught, named({path: "embeddings"}):
            raise error
        assert str(caught.value) == str(error).replace(path, "embeddings")
        assert caught.value.fields == (error.fields or ("embeddings",))
    with (
        pytest.raises(RequestError, match=r"^control is not lora$"),
        named({"/x/lite": "lora", "/x/lite-2": "control"}),
    ):
        raise CheckpointError("/x/lite-2 is not /x/lite")
    with pytest.raises(CheckpointError, match="another"), named({path: "embeddings"}):
        raise CheckpointError("another file")


def test_what_is_kept_as_one_thing_is_looked_at_as_another(uploads):
    keep(uploads, picture())
    with pytest.raises(RequestError, match="embeddings is not a whole safetensors file") as caught:
        keep(uploads, picture(), "embeddings")
    assert str(uploads.folder) not in str(caught.value)
    assert len(os.listdir(uploads.folder)) == 1


@pytest.mark.parametrize("name", ["embeddings", "reference"])
def test_embeddings_are_kept_by_their_header(uploads, name):
    upload = keep(uploads, tensors({"format": "x"}), name)
    assert upload.path.read_bytes() == tensors({"format": "x"})
    assert upload.path.suffix == ".safetensors", "by which a reference is told from a picture"
    assert uploads.path_of(upload.hash) == upload.path
    os.utime(upload.path, (1, 1))
    assert uploads.sweep({upload.hash}, older_than=60) == 0
    assert uploads.sweep(set(), older_than=60) == 1


@pytest.mark.parametrize("format", FORMATS)
def test_a_reference_may_be_a_picture(uploads, format):
    upload = keep(uploads, picture(format), "reference")
    assert (upload.path.suffix, upload.pixels) == ("", 1200)


def test_a_reference_that_is_neither_is_refused_as_a_picture(uploads):
    for content in (b"x", b"\x02" + bytes(7) + b"{", tensors()[:-9], b"\xff" * 8 + b"{}"):
        with pytest.raises(RequestError, match=r"reference (cannot be read as a picture|is not a whole)") as caught:
            keep(uploads, content, "reference")
        assert caught.value.fields == ("reference",)


@pytest.mark.parametrize("format", FORMATS)
def test_a_small_file_of_many_pixels_is_refused_before_it_is_decoded(uploads, format, monkeypatch):
    content = picture(format, (40, 31))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(TooLarge, match="image is 40 × 31 px; at most 1,200 pixels are decoded") as caught:
        keep(uploads, content)
    assert caught.value.fields == ("image",)
    assert os.listdir(uploads.folder) == []


@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_costs_nothing(uploads, kind):
    start = time.process_time()
    with pytest.raises((RequestError, TooLarge)) as caught:
        keep(uploads, BOMBS[kind])
    assert time.process_time() - start < 1
    assert caught.value.fields == ("image",)
    assert os.listdir(uploads.folder) == []


@pytest.mark.parametrize("kind", ["PNG", "GIF", "TIFF", "BMP"])
def test_without_its_limits_a_bomb_would_be_kept(uploads, kind, monkeypatch):
    """They do it, and not some damage of these files."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    uploads.most_pixels = 10**11
    assert keep(uploads, BOMBS[kind]).path.exists()


NO_PICTURES = {
    "text": b"hello",
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n",
    "a truncated PNG": picture()[:20],
    "zeros": bytes(1000),
}


@pytest.mark.parametrize("kind", NO_PICTURES)
def test_what_is_not_a_picture_is_refused_without_naming_the_folder(uploads, kind):
    with pytest.raises(RequestError) as caught:
        keep(uploads, NO_PICTURES[kind], "mask")
    assert str(caught.value).startswith("mask cannot be read as a picture")
    assert str(uploads.folder) not in str(caught.value)
    assert caught.value.fields == ("mask",)


@pytest.mark.parametrize(
    "content", [b"x", tensors()[:-1], tensors(size=9), b"PK\x03\x04" + b"\0" * 30, b"\xff" * 8 + b"{}"]
)
def test_what_is_not_safetensors_is_refused(uploads, content):
    with pytest.raises(RequestError, match=r"^embeddings is not a whole safetensors file") as caught:
        keep(uploads, content, "embeddings")
    assert caught.value.fields == ("embeddings",)
    assert os.listdir(uploads.folder) == []


def test_a_header_of_very_many_tensors_is_not_read(tmp_path):
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({f"t{i}": entry for i in range(20_000)}).encode()
    with pytest.raises(RequestError, match="embeddings: its header may have 1,048,576 bytes"):
        keep(Uploads(tmp_path, ServeSettings()), struct.pack("<Q", len(header)) + header, "embeddings")


def test_size_is_looked_at_first(uploads, monkeypatch):
    monkeypatch.setattr(module.hashlib, "sha256", lambda content: pytest.fail("it was read"))
    with pytest.raises(TooLarge, match="1 MiB") as caught:
        keep(uploads, b"a" * (1 << 20) + b"b")
    assert caught.value.fields == ("image",)
    with pytest.raises(RequestError, match="image: it is empty"):
        keep(uploads, b"")


@pytest.mark.parametrize(
    "hash",
    ["", "..", "../index.sqlite", "a" * 64, "A" * 64, "/etc/passwd", "0" * 63 + "\n", "0" * 65, "0" * 64 + "/.."],
)
def test_only_the_hash_of_a_kept_file_leads_anywhere(uploads, hash):
    (uploads.folder.parent / "index.sqlite").touch()
    with pytest.raises(NotFound):
        uploads.path_of(hash)


def test_sweeping_removes_what_is_old_and_unused(uploads):
    used, old, new = (keep(uploads, picture(size=(20 + i, 20))) for i in range(3))
    (uploads.folder / ".left-behind").touch()
    for name in (used.hash, old.hash, ".left-behind"):
        os.utime(uploads.folder / name, (1, 1))
    assert uploads.sweep({used.hash}, older_than=60) == 2
    assert set(os.listdir(uploads.folder)) == {used.hash, new.hash}


def test_what_is_sent_again_is_new_again(uploads):
    upload = keep(uploads, picture())
    os.utime(upload.path, (1, 1))
    keep(uploads, picture())
    assert uploads.sweep(set(), older_than=60) == 0


@pytest.mark.parametrize(
    ("number", "error"), [(errno.ENOSPC, NoRoom), (errno.EDQUOT, NoRoom), (errno.EACCES, OutputError)]
)
def test_a_disk_that_does_not_take_it_leaves_nothing(uploads, monkeypatch, number, error):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(module.os, "replace", fail)
    with pytest.raises(error):
        keep(uploads, picture())
    assert os.listdir(uploads.folder) == []


def test_the_loop_goes_on_meanwhile(uploads, monkeypatch):
    monkeypatch.setattr(Uploads, "_look_at_picture", lambda self, name, path: time.sleep(0.2) or 1)

    async def run():
        task = asyncio.create_task(uploads.keep("image", picture()))
        ticks = 0
        while not task.done():
            await asyncio.sleep(0.01)
            ticks += 1
        return ticks

    assert asyncio.run(run()) >= 5
