"""Every mode draws what it drew before: small versions of some forty requests' pictures, the same on any machine.

`python tests/test_pixels.py` writes the goldens anew. Bits are compared by `pixels.py`, on one machine.
"""

import sys
from pathlib import Path

import numpy as np
import pixels
import pytest
from PIL import Image

GOLDENS = Path(__file__).parent / "goldens" / "pixels.png"
SIDE = 24  # px of a thumbnail
ALLOWED = 3.0  # of 255: products in another order move a level here and there, another mode moves tens


def thumbnail(images: list[Image.Image]) -> np.ndarray:
    """The pictures of a request side by side, (SIDE, SIDE, 3)."""
    widths = [SIDE * (i + 1) // len(images) - SIDE * i // len(images) for i in range(len(images))]
    small = [np.asarray(im.resize((w, SIDE), Image.Resampling.BOX)) for im, w in zip(images, widths, strict=True)]
    return np.concatenate(small, axis=1)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return pixels.write_files(tmp_path_factory.mktemp("pixels"))


@pytest.mark.parametrize("name", pixels.REQUESTS)
def test_a_request_draws_what_it_drew(name, files):
    i = list(pixels.REQUESTS).index(name)
    wanted = np.asarray(Image.open(GOLDENS).convert("RGB"))[:, i * SIDE : (i + 1) * SIDE]
    off = np.abs(thumbnail(pixels.render(name, files)).astype(float) - wanted)
    assert off.mean() <= ALLOWED / 4
    assert off.max() <= ALLOWED * 4


if __name__ == "__main__":
    made = pixels.write_files(Path(sys.argv[1]))
    row = [thumbnail(pixels.render(name, made)) for name in pixels.REQUESTS]
    Image.fromarray(np.concatenate(row, axis=1)).save(GOLDENS)
