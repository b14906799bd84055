"""Inpainting and outpainting as picture maths: what is painted on, which part of it is rendered, how that comes back.

    picture, mask ─ extended ─→ canvas ─ a box of it, scaled ─→ what is rendered ─ scaled back, soft edge ─→ canvas

Pictures are "RGB" and masks "L": 0 = keep … 255 = repaint, with the values between as `flow.first_steps` reads them.
Sizes are in pixels. Outside the mask and its edge the canvas keeps its own pixels, bit for bit.
"""

from collections.abc import Container
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image, ImageChops, ImageFilter

from zimage.pictures.image import Given, eight_bits, nearest_side
from zimage.pictures.opening import decoded
from zimage.settings.declared import MAX_SIDE, SIZE_MULTIPLE

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Box = tuple[int, int, int, int]  # left, top, right, bottom
Margins = tuple[int, int, int, int]  # the same sides
EDGE = 16  # px beyond the mask over which a render fades into the picture: two cells of latents
TONE = 8  # px
SEEN = 64  # px around what is shown of a render, over which its tone is compared
FINE = 4  # parts of a level in which a tone is averaged; up to 32 levels are one, more is another picture
BLACK, WHITE = 7, 248  # the last level that counts as black, the first that counts as white: what JPEG makes of them
LEVELS = [0 if level <= BLACK else 255 if level >= WHITE else level for level in range(256)]
LONGEST = 2  # a cropped region's long side over its short one, where the picture has room


class Frame(NamedTuple):
    """Which part of a picture is rendered.

    `width` × `height` is the picture as it comes out, and the others are the box of it that is rendered, at any size.
    The box may reach beyond the right and lower border, where the picture is mirrored.
    """

    width: int
    height: int
    left: int
    top: int
    right: int
    bottom: int

    @property
    def size(self) -> tuple[int, int]:
        return self.width, self.height

    @property
    def box(self) -> Box:
        return self.left, self.top, self.right, self.bottom

    @property
    def inside(self) -> Box:
        """The box without what is beyond the borders."""
        return self.left, self.top, min(self.right, self.width), min(self.bottom, self.height)


# ---------------------------------------------------------------------- masks


def open_alpha(source: Given) -> Image.Image:
    """The transparency of a picture as a mask "L", 255 where it is transparent; black where it has none."""
    name, image = decoded(source)
    image = eight_bits(image, name)
    if not image.has_transparency_data:
        return Image.new("L", image.size)
    return ImageChops.invert(image.convert("RGBA").getchannel("A"))


def levels(mask: Image.Image) -> Image.Image:
    """A mask whose nearly black and nearly white values are black and white: JPEG's noise repaints nothing."""
    return mask.point(LEVELS)


def edge_of(mask: Image.Image) -> Image.Image:
    """How much of a render shows, "L": all of it where the mask is not black, none further than EDGE px from there.

    Between, it falls with the distance: the mask is grown by half the edge and averaged over windows of the same reach,
    so that each window around a painted pixel is full, and each one out of reach is empty.
    """
    window = ImageFilter.BoxBlur(EDGE // 2)  # a single white pixel is still 255 / 17² ≈ 1 after it
    near = _is(mask, range(1, 256)).filter(window)
    return _is(near, range(1, 256)).filter(window)


def _is(mask: Image.Image, levels: Container[int]) -> Image.Image:
    """White where a mask has one of these levels, else black."""
    return mask.point([255 * (level in levels) for level in range(256)])


# ---------------------------------------------------------------------- the canvas


def extended(image: Image.Image, margins: Margins, colour: int = 0) -> Image.Image:
    """A picture or mask with a margin of one grey on each side."""
    left, top, right, bottom = margins
    size = (image.width + left + right, image.height + top + bottom)
    canvas = Image.new(image.mode, size, colour if image.mode == "L" else (colour,) * 3)
    canvas.paste(image, (left, top))
    return canvas


def filled(image: Image.Image, blank: Image.Image) -> Image.Image:
    """The picture with the colours around them in its blank pixels (255), the smoother the further away.

    Known pixels are averaged into ever smaller pictures until none is blank, and these are enlarged again behind the
    known ones ("push-pull": Gortler et al. 1996). A picture that is blank altogether becomes grey.
    """
    layers = [_with_alpha(image, _is(blank, range(255)))]
    while layers[-1].getchannel("A").getextrema()[0] == 0 and max(layers[-1].size) > 1:
        smaller = layers[-1].reduce(2)
        layers.append(_with_alpha(smaller, _is(smaller.getchannel("A"), range(1, 256))))
    below = Image.new("RGB", layers[-1].size, "grey")
    for layer in reversed(layers):
        below = below.resize(layer.size, Image.Resampling.BICUBIC)
        below.paste(layer.convert("RGB"), mask=layer.getchannel("A"))
    return below


def unmixed(image: Image.Image, transparency: Image.Image) -> Image.Image:
    """The picture's own colours, of what was laid on white, where it is not wholly transparent (255).

    on white = opacity · own + (1 − opacity) · 255; an opaque pixel comes back as it is.
    """
    import numpy as np

    if transparency.getbbox() is None:
        return image
    missing = 255 - np.asarray(image, dtype=np.int32)
    opacity = 255 - np.asarray(transparency, dtype=np.int32)[..., None]
    return _from_values(255 - (missing * 255 + opacity // 2) // np.maximum(opacity, 1))


def _with_alpha(image: Image.Image, alpha: Image.Image) -> Image.Image:
    layer = image.convert("RGB")
    layer.putalpha(alpha)
    return layer


# ---------------------------------------------------------------------- the part that is rendered


def whole(size: tuple[int, int], rendered: tuple[int, int] | None = None) -> Frame:
    """All of a picture: at its own size, rounded up to what can be rendered, nothing is scaled.

    A picture that is `rendered` at another size comes out in that.
    """
    up = rounded_up(*size)
    width, height = size if rendered in (None, up) else rendered or size
    return Frame(width, height, 0, 0, *rounded_up(width, height))


def rounded_up(width: int, height: int) -> tuple[int, int]:
    """The size of a picture that is rendered without being scaled: each side at the next multiple."""
    up = [-(-side // SIZE_MULTIPLE) * SIZE_MULTIPLE for side in (width, height)]
    return up[0], up[1]


def grown(box: Box, by: int, size: tuple[int, int]) -> Box:
    """A box with so many pixels more on each side, as far as the picture reaches."""
    left, top, right, bottom = box
    return max(left - by, 0), max(top - by, 0), min(right + by, size[0]), min(bottom + by, size[1])


def region_of(mask: Image.Image, padding: int) -> Box:
    """What of a picture is worth rendering: the mask with the padding, at least its edge, around it.

    A strip is widened to LONGEST times its width, so that there is something to see beside what is painted.
    """
    left, top, right, bottom = grown(mask.getbbox() or (0, 0, *mask.size), max(padding, EDGE), mask.size)
    least = -(-max(right - left, bottom - top) // LONGEST)
    return around((left, top, right, bottom), max(right - left, least), max(bottom - top, least), mask.size, False)


def region_size(box: Box, side: int) -> tuple[int, int]:
    """The size to render a region at: its own, or where that is smaller, that of so many pixels a side, squared."""
    width, height = box[2] - box[0], box[3] - box[1]
    scale = side / (width * height) ** 0.5
    if scale <= 1:
        return rounded_up(width, height)
    longest = MAX_SIDE
    return min(nearest_side(width * scale), longest), min(nearest_side(height * scale), longest)


def framed(box: Box, rendered: tuple[int, int], size: tuple[int, int]) -> Frame:
    """A region of a picture in the proportions in which it is rendered; not scaled where it nearly has that size."""
    width, height = box[2] - box[0], box[3] - box[1]
    if rounded_up(width, height) == rendered:
        return Frame(*size, *around(box, *rendered, size, True))
    scale = max(width / rendered[0], height / rendered[1])
    wide, high = (max(round(side * scale), least) for side, least in zip(rendered, (width, height), strict=True))
    return Frame(*size, *around(box, wide, high, size, True))


def around(box: Box, width: int, height: int, size: tuple[int, int], beyond: bool) -> Box:
    """A box of this size about the middle of another, moved into the picture; a larger one is cut, or goes `beyond`."""
    found = []
    for low, high, length, most in ((box[0], box[2], width, size[0]), (box[1], box[3], height, size[1])):
        length = length if beyond else min(length, most)
        start = min(max((low + high - length) // 2, 0), max(most - length, 0))
        found.append((start, start + length))
    (left, right), (top, bottom) = found
    return left, top, right, bottom


def cut(image: Image.Image, frame: Frame) -> Image.Image:
    """The box of a frame, mirrored where it is beyond the borders."""
    import numpy as np

    inside = image.crop(frame.inside)
    beyond = frame.right - frame.left - inside.width, frame.bottom - frame.top - inside.height
    if beyond == (0, 0):
        return inside
    sides = [(0, beyond[1]), (0, beyond[0]), (0, 0)][: 2 + (image.mode == "RGB")]
    return Image.fromarray(np.pad(np.asarray(inside), sides, mode="symmetric"))


def pasted(rendered: Image.Image, picture: Image.Image, shown: Image.Image, frame: Frame) -> Image.Image:
    """The picture (frame.size) with a render of its box where `shown` ("L", of its size) lets it through."""
    size = frame.right - frame.left, frame.bottom - frame.top
    if rendered.size != size:
        rendered = rendered.resize(size, Image.Resampling.LANCZOS)
    near = grown(shown.getbbox() or frame.inside, SEEN, frame.size)  # the rest of a large picture need not be looked at
    box = _overlap(near, frame.inside)
    left, top, right, bottom = box
    painted = rendered.crop((left - frame.left, top - frame.top, right - frame.left, bottom - frame.top))
    result = picture.copy()
    result.paste(toned(painted, picture.crop(box), shown.crop(box)), box, shown.crop(box))
    return result


def _overlap(a: Box, b: Box) -> Box:
    return max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])


def toned(rendered: Image.Image, picture: Image.Image, shown: Image.Image) -> Image.Image:
    """A render in the tone of the picture around it.

    A VAE gives back colours that differ by some levels, and neighbours by about as many. By how many is seen where
    nothing of the render shows; averaged over cells of TONE pixels and filled in where it does, that is added to it.
    """
    import numpy as np

    shift = np.asarray(picture, dtype=np.int16) - np.asarray(rendered, dtype=np.int16)
    cells = _with_alpha(_from_values(128 + FINE * shift), _is(shown, [0])).reduce(TONE)
    unseen = _is(cells.getchannel("A"), [0])
    box = (0, 0, rendered.width / TONE, rendered.height / TONE)
    smooth = filled(cells.convert("RGB"), unseen).resize(rendered.size, Image.Resampling.BICUBIC, box)
    levels = (np.asarray(smooth, dtype=np.int16) - 128 + FINE // 2) // FINE
    return _from_values(np.asarray(rendered, dtype=np.int16) + levels)


def _from_values(values: "NDArray[np.signedinteger[Any]]") -> Image.Image:
    import numpy as np

    return Image.fromarray(values.clip(0, 255).astype(np.uint8))
