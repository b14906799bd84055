"""Pictures as an input: every kind of file, sizes, masks, content hashes, and one clear line for each fault."""

import io
import os

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops, PngImagePlugin, features

from zimage.errors import RequestError
from zimage.pictures.files import read_metadata
from zimage.pictures.image import content_hash, fit, from_pil, mask_tensor, natural_size, open_image, open_mask, to_pil

ORIENTATION = 0x0112


def colours(width: int = 24, height: int = 16) -> Image.Image:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def same(a: Image.Image, b: Image.Image) -> bool:
    return a.mode == b.mode and a.size == b.size and a.tobytes() == b.tobytes()


def test_tensors_and_pictures_are_inverse():
    image = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    assert same(to_pil(from_pil(image))[0], image)
    assert from_pil(image).dtype == torch.float32
    assert from_pil(Image.new("L", (3, 2), 255)).shape == (1, 3, 2, 3)


# ------------------------------------------------------------------ reading


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "webp"])
def test_one_picture_in_any_lossless_file(tmp_path, suffix):
    image, path = colours(), tmp_path / f"a.{suffix}"
    image.save(path, **({"lossless": True} if suffix == "webp" else {}))
    for source in (path, str(path), image):
        assert same(open_image(source), image)
        assert content_hash(open_image(source)) == content_hash(image)


def test_other_pixels_sizes_and_modes_have_other_hashes():
    image, other = colours(), colours()
    other.putpixel((3, 4), (1, 2, 3))
    turned = Image.frombytes("RGB", (image.height, image.width), image.tobytes())
    hashes = {content_hash(i) for i in (image, other, turned, image.convert("L"))}
    assert len(hashes) == 4
    assert all(len(h) == 16 and int(h, 16) >= 0 for h in hashes)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_rotation_noted_by_the_camera_is_applied(tmp_path, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    colours().save(tmp_path / "a.png", exif=exif)
    upright = open_image(tmp_path / "a.png")
    assert upright.size == ((24, 16) if orientation < 5 else (16, 24))
    turns = {
        1: lambda i: i,
        3: lambda i: i.transpose(Image.Transpose.ROTATE_180),
        6: lambda i: i.transpose(Image.Transpose.ROTATE_270),
        8: lambda i: i.transpose(Image.Transpose.ROTATE_90),
    }
    if orientation in turns:
        assert same(upright, turns[orientation](colours()))
    assert open_mask(tmp_path / "a.png").size == upright.size


def test_what_is_transparent_lies_on_white_and_in_masks_on_black():
    image = Image.new("RGBA", (2, 1), (10, 20, 30, 255))
    image.putpixel((1, 0), (200, 100, 0, 0))
    palette = image.convert("P", palette=Image.Palette.ADAPTIVE)
    grey = Image.new("LA", (2, 1), (15, 255))
    grey.putpixel((1, 0), (99, 0))
    for kind in (image, grey):
        assert open_image(kind).getpixel((1, 0)) == (255, 255, 255)
        assert open_mask(kind).getpixel((1, 0)) == 0
    assert open_image(image).getpixel((0, 0)) == (10, 20, 30)
    assert open_image(palette).mode == "RGB"
    assert open_mask(Image.new("RGBA", (1, 1), (255, 255, 255, 128))).getpixel((0, 0)) == 128


def test_a_transparent_colour_of_a_palette_is_transparent(tmp_path):
    image = Image.new("P", (2, 1), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.gif", transparency=1)
    assert [open_image(tmp_path / "a.gif").getpixel((x, 0)) for x in (0, 1)] == [(255, 0, 0), (255, 255, 255)]


def test_sixteen_bits_are_rounded_to_eight(tmp_path):
    values = np.array([[0, 127, 129, 257, 32768, 65535]], dtype=np.uint16)
    for suffix in ("png", "tiff"):
        Image.fromarray(values).save(tmp_path / f"a.{suffix}")
        assert open_mask(tmp_path / f"a.{suffix}").tobytes() == bytes([0, 0, 1, 1, 128, 255])
        assert open_image(tmp_path / f"a.{suffix}").getpixel((5, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "I", "I;16"])
def test_every_mode_becomes_rgb(mode):
    assert open_image(Image.new(mode, (5, 4))).mode == "RGB"
    assert open_mask(Image.new(mode, (5, 4))).mode == "L"


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pixels_of_unknown_range_are_refused(mode):
    image = Image.new(mode, (5, 4), 70000)
    with pytest.raises(RequestError, match="32-bit"):
        open_image(image)


# ------------------------------------------------------------------ faults


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def png(width: int = 64, height: int = 64) -> bytes:
    stream = io.BytesIO()
    colours(width, height).save(stream, "PNG")
    return stream.getvalue()


def test_missing_files_and_other_things_are_named(tmp_path):
    cases = {tmp_path / "no.png": "is missing", tmp_path: "is a folder", 7: "not int", "x" * 5000: "cannot be read"}
    for source, expected in cases.items():
        with pytest.raises(RequestError, match=expected) as error:
            open_image(source)
        one_line(error)


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", b"\x89PNG\r\n\x1a\n", png()[:2000], png()[:-500] + bytes(500), b"%PDF-1.4", b"II*\0" + bytes(40)],
    ids=["empty", "text", "header only", "cut", "zeroed", "pdf", "tiff"],
)
def test_damaged_files_are_refused(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    for read in (open_image, open_mask):
        with pytest.raises(RequestError, match=r"a\.png cannot be read as a picture") as error:
            read(tmp_path / "a.png")
        one_line(error)


@pytest.mark.parametrize("suffix", ["png", "jpeg", "webp", "gif", "tiff", "bmp"])
def test_flipped_bytes_give_a_picture_or_one_line(tmp_path, suffix):
    stream, random = io.BytesIO(), np.random.default_rng(1)
    colours(40, 40).save(stream, suffix)
    for _ in range(40):
        data = np.frombuffer(stream.getvalue(), np.uint8).copy()
        data[random.integers(0, len(data), 3)] = random.integers(0, 256, 3)
        (tmp_path / "a").write_bytes(data.tobytes())
        try:
            outcome = open_image(tmp_path / "a").mode
        except RequestError as error:
            outcome = str(error)
        assert outcome == "RGB" or (outcome.startswith(str(tmp_path)) and "\n" not in outcome)


def header(width: int, height: int) -> bytes:
    """A PNG that promises a size and has no pixels behind it."""
    stream = io.BytesIO()
    stream.write(b"\x89PNG\r\n\x1a\n")
    sides = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    PngImagePlugin.putchunk(stream, b"IHDR", sides + bytes([8, 2, 0, 0, 0]))
    PngImagePlugin.putchunk(stream, b"IDAT", bytes(10))
    return stream.getvalue()


def test_giants_are_refused_before_they_are_decoded(tmp_path):
    path = tmp_path / "a.png"
    for size, expected in {(20_000, 16): "each side must be", (30_000, 30_000): "too large"}.items():
        path.write_bytes(header(*size))
        with pytest.raises(RequestError, match=expected) as error:
            open_image(path)
        one_line(error)
    with pytest.raises(RequestError, match="too large"):
        read_metadata(path)
    with pytest.raises(RequestError, match="0 × 5 px"):
        open_image(Image.new("RGB", (0, 5)))


# ------------------------------------------------------------------ sizes


def test_a_picture_of_the_size_is_left_alone():
    image = colours()
    assert fit(image, 24, 16) is image


@pytest.mark.parametrize("size", [(48, 32), (12, 8)], ids=str)
def test_the_same_shape_is_scaled_whole(size):
    assert same(fit(colours(), *size), colours().resize(size, Image.Resampling.LANCZOS))


def test_other_shapes_lose_what_is_outside_the_centre():
    wide = Image.new("RGB", (64, 16), "red")
    wide.paste("blue", (24, 0, 40, 16))  # the centred square
    assert same(fit(wide, 16, 16), Image.new("RGB", (16, 16), "blue"))
    whole = wide.resize((128, 32), Image.Resampling.LANCZOS)
    assert same(fit(wide, 32, 32), whole.crop((48, 0, 80, 32)))
    assert same(fit(wide.transpose(Image.Transpose.ROTATE_90), 16, 16), Image.new("RGB", (16, 16), "blue"))


def test_extreme_shapes_need_no_giant_in_between():
    assert fit(Image.new("L", (16_384, 1), 9), 512, 512).getextrema() == (9, 9)


@pytest.mark.parametrize(
    ("size", "settings", "expected"),
    [
        ((512, 384), {}, (512, 384)),
        ((500, 375), {}, (496, 368)),
        ((504, 9), {}, (512, 16)),
        ((1, 3), {}, (16, 16)),
        ((4000, 3000), {"longest": 1024}, (1024, 768)),
        ((3000, 4000), {"longest": 1000}, (752, 992)),
        ((100, 60), {"multiple": 32}, (96, 64)),
    ],
)
def test_natural_sizes(size, settings, expected):
    assert natural_size(size, **settings) == expected


def test_masks_are_cut_at_one_half():
    mask = Image.fromarray(np.array([[0, 127, 128, 255]], dtype=np.uint8))
    values = mask_tensor(mask, 4, 1)
    assert values.dtype == torch.float32
    assert values.tolist() == [[[[0, 0, 1, 1]]]]


def test_masks_follow_their_picture_to_another_size():
    """The same crop and scale: what was painted stays under its mask."""
    image, mask = Image.new("RGB", (100, 60)), Image.new("L", (100, 60))
    image.paste("white", (30, 20, 60, 40))
    mask.paste(255, (30, 20, 60, 40))
    painted = fit(image, 48, 64).convert("L").point(lambda level: 255 * (level >= 128))
    masked = Image.fromarray((mask_tensor(mask, 48, 64)[0, 0] * 255).byte().numpy())
    assert ImageChops.difference(painted, masked).getbbox() is None
    assert mask_tensor(mask, 48, 64).unique().tolist() == [0, 1]


# ------------------------------------------------------------------ kinds of files


OTHERS = {"PPM": "ppm", "ICO": "ico", "TGA": "tga", "PCX": "pcx", "SGI": "sgi", "JPEG2000": "jp2", "DDS": "dds"}
LISTED = "PNG, JPEG, WebP, AVIF, BMP, GIF or TIFF"
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n%%EOF\n"


@pytest.mark.parametrize("kind", OTHERS)
def test_formats_that_are_not_listed_are_refused_whatever_their_names(tmp_path, kind):
    colours(32, 32).save(tmp_path / f"a.{OTHERS[kind]}", kind)
    (tmp_path / "a.png").write_bytes((tmp_path / f"a.{OTHERS[kind]}").read_bytes())
    for path in (tmp_path / f"a.{OTHERS[kind]}", tmp_path / "a.png"):
        for read in (open_image, open_mask, read_metadata):
            with pytest.raises(RequestError, match=f"cannot be read as a picture: it is not an intact {LISTED} file"):
                read(path)


@pytest.mark.parametrize("name", ["a.eps", "a.png"])
def test_postscript_starts_no_other_program(tmp_path, monkeypatch, name):
    started = []
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *a, **k: started.append(a) or colours().im)
    (tmp_path / name).write_bytes(EPS)
    for read in (open_image, open_mask, read_metadata):
        with pytest.raises(RequestError, match="not an intact PNG"):
            read(tmp_path / name)
    assert not started


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_avif_is_read_where_pillow_has_it(tmp_path):
    colours().save(tmp_path / "a.avif", quality=100)
    assert open_image(tmp_path / "a.avif").size == (24, 16)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_one_pixel_is_a_picture_and_half_a_file_is_none(tmp_path, kind):
    Image.new("RGB", (1, 1), "white").save(tmp_path / "a", kind)
    assert open_image(tmp_path / "a").tobytes() == b"\xff\xff\xff"
    colours(200, 150).save(tmp_path / "b", kind)
    whole = (tmp_path / "b").read_bytes()
    for part in (2, 5, 10):
        (tmp_path / "b").write_bytes(whole[: len(whole) * part // 11])
        with pytest.raises(RequestError, match="b cannot be read as a picture: it is ") as error:
            open_image(tmp_path / "b")
        one_line(error)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "TIFF", "MPO"])
def test_the_first_frame_of_an_animation_is_taken(tmp_path, kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a", kind, save_all=True, append_images=frames[1:], **_lossless(kind))
    read = open_image(tmp_path / "a")
    assert read.size == (8, 8)
    assert same(read, frames[0]) or (kind == "MPO" and read.getpixel((4, 4))[0] > 250), "MPO is several JPEGs in one"


def _lossless(kind: str) -> dict:
    return {"lossless": True} if kind == "WEBP" else {}


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("junk", [b"", b"junk", bytes(5000)], ids=len)
def test_a_broken_colour_profile_changes_nothing(tmp_path, kind, junk):
    colours().save(tmp_path / "a", kind)
    colours().save(tmp_path / "b", kind, icc_profile=junk)
    assert same(open_image(tmp_path / "b"), open_image(tmp_path / "a"))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize(
    "junk",
    [b"Exif\0\0", b"Exif\0\0MM", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + bytes(99)],
    ids=["empty", "cut", "far away", "endless"],
)
def test_broken_exif_is_none(tmp_path, kind, junk):
    colours().save(tmp_path / "a", kind)
    colours().save(tmp_path / "b", kind, exif=junk)
    assert same(open_image(tmp_path / "b"), open_image(tmp_path / "a"))


@pytest.mark.parametrize("value", [0, 9, 65535, "upright", (6, 6), b"\x06"], ids=repr)
def test_a_rotation_that_does_not_exist_is_none(value):
    image = colours()
    image.getexif()[ORIENTATION] = value
    assert same(open_image(image), colours())


def test_a_picture_is_turned_once():
    image = colours()
    image.info["exif"] = (exif := Image.Exif()).tobytes()
    exif[ORIENTATION] = 6
    image.info["exif"] = exif.tobytes()
    once = open_image(image)
    assert once.size == (16, 24)
    assert same(open_image(once), once)


def test_large_pictures_are_laid_on_their_ground_strip_by_strip():
    pixels = np.random.default_rng(3).integers(0, 256, (1200, 7, 4), dtype=np.uint8)
    layer = Image.fromarray(pixels)
    for ground, read in (("white", open_image), ("black", open_mask)):
        whole = Image.alpha_composite(Image.new("RGBA", layer.size, ground), layer).convert("RGB")
        assert same(read(layer), whole if read is open_image else whole.convert("L"))


def test_lab_colours_are_refused_by_name(tmp_path):
    Image.new("LAB", (4, 4)).save(tmp_path / "a.tiff")
    with pytest.raises(RequestError, match="LAB colours"):
        open_image(tmp_path / "a.tiff")


def test_pipes_devices_and_endless_files_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with (tmp_path / "sparse.png").open("wb") as stream:
        stream.truncate(2 << 30)
    (tmp_path / "link.png").symlink_to(tmp_path / "link.png")
    cases = {tmp_path / "pipe.png": "is a named pipe", "/dev/zero": "is a device", tmp_path / "sparse.png": "bytes; "}
    for path, words in {**cases, tmp_path / "link.png": "cannot be read"}.items():
        for read in (open_image, open_mask, read_metadata):
            with pytest.raises(RequestError, match=words) as error:
                read(path)
            one_line(error)


def test_a_large_picture_is_read_without_a_word_from_pillow(tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    colours().save(tmp_path / "a.png")
    assert same(open_image(tmp_path / "a.png"), colours())
    assert not recwarn.list
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(RequestError, match="too large: it has more than"):
        open_image(tmp_path / "a.png")
