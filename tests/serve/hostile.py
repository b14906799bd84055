"""Files that are sent as uploads: sound ones, and small ones that claim to be large."""

import io
import json
import struct
import zlib

from PIL import Image


def picture(format="PNG", size=(40, 30)):
    stream = io.BytesIO()
    Image.new("RGB", size, (200, 30, 30)).save(stream, format)
    return stream.getvalue()


def tensors(metadata=None, size=8):
    entry = {"embeddings": {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, size]}}
    header = json.dumps(entry | ({"__metadata__": metadata} if metadata else {})).encode()
    return struct.pack("<Q", len(header)) + header + b"\0" * 8


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_claiming(width, height, *more):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def gif_claiming(width, height):
    return (
        b"GIF89a"
        + struct.pack("<HH", width, height)
        + b"\x80\0\0"
        + b"\0" * 6
        + b"\x2c"
        + struct.pack("<HHHH", 0, 0, width, height)
        + b"\0\x02\x02\x44\x01\0;"
    )


def tiff_claiming(width, height):
    tags = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]
    tags += [(273, 4, 1, 8), (277, 3, 1, 1), (278, 4, 1, height), (279, 4, 1, 1)]
    return (
        b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *t) for t in tags) + b"\0" * 4
    )


def webp_claiming(width, height):
    extended = struct.pack("<I", 0) + struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    body = b"WEBPVP8X" + struct.pack("<I", len(extended)) + extended
    return b"RIFF" + struct.pack("<I", len(body)) + body


BOMBS = {
    "PNG": png_claiming(60_000, 60_000),
    "PNG of all pixels there are": png_claiming(2**31 - 1, 2**31 - 1),
    "PNG with 100 MB of text": png_claiming(40, 30, chunk(b"zTXt", b"a\0\0" + zlib.compress(b"a" * 10**8))),
    "PNG with 100 MB of profile": png_claiming(40, 30, chunk(b"iCCP", b"a\0\0" + zlib.compress(b"a" * 10**8))),
    "GIF": gif_claiming(65_535, 65_535),
    "TIFF": tiff_claiming(100_000, 100_000),
    "WebP": webp_claiming(16_383, 16_383),
    "BMP": b"BM"
    + struct.pack("<IHHI", 60, 0, 0, 54)
    + struct.pack("<IiiHHIIiiII", 40, 50_000, 50_000, 1, 24, *[0] * 6),
}
