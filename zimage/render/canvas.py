"""What a render from a picture is painted on: its picture and mask, the part that is rendered, and the way back.

Two ways lead through here. With `paste` masks count by value, the picture keeps its size and its own pixels outside
the mask, and a part of it may be rendered alone: a `Frame` says which. Without, everything is as in the reference
(diffusers): the picture is brought to the size of the render, the mask is cut at one half, and what is decoded is what
comes out.

Shapes: pictures (1, 3, H, W) fp32 in [−1, 1]; masks (1, 1, H, W) fp32, 1 = repaint … 0 = keep.
"""

from functools import cached_property

from PIL import Image, ImageChops, ImageFilter, ImageOps
from torch import Tensor

from zimage import flow
from zimage.errors import RequestError
from zimage.pictures import inpaint
from zimage.pictures.image import InputPicture, fit, from_pil, mask_tensor, mask_values, natural_size, nearest_side
from zimage.pictures.inpaint import Frame
from zimage.pictures.opening import MOST_PIXELS
from zimage.settings.declared import MASK_ALPHA, MAX_SIDE, Request, split_margins

NOTHING = (0, 0, 0, 0)  # px that are added to the sides


def pastes(request: Request) -> bool:
    """Whether what is rendered is pasted back."""
    return request.paste and (request.mask is not None or request.extend is not None)


class Rendered:
    """The picture of a request as it is rendered, and its mask, each computed when it is first asked for.

    This is what image to image and inpainting start from, and what a ControlNet sees of the picture: cropped, extended
    and scaled as the render is.
    """

    def __init__(self, request: Request, frame: Frame, width: int, height: int):
        self._request, self._frame, self._size = request, frame, (width, height)

    @cached_property
    def picture(self) -> Tensor:
        """(1, 3, H, W)."""
        if not pastes(self._request):
            return from_pil(fit(picture_of(self._request), *self._size))
        part = inpaint.cut(_picture_in(self._request, self._frame), self._frame)
        return from_pil(_resized(part, self._size, Image.Resampling.LANCZOS))

    @cached_property
    def mask(self) -> Tensor | None:
        """(1, 1, H, W) by value, without `paste` only zeros and ones; None where there is none."""
        if not pastes(self._request):
            mask = mask_of(self._request)
            return None if mask is None else mask_tensor(mask, *self._size)
        part = inpaint.cut(_mask_in(self._request, self._frame), self._frame)
        return mask_values(inpaint.levels(_resized(part, self._size, Image.Resampling.BILINEAR)))

    def latent_mask(self, h: int, w: int) -> Tensor | None:
        """(1, 1, h, w): the mask at the latents' size; by value where the picture is pasted back."""
        if self.mask is None:
            return None
        reduced = flow.soft_latent_mask if pastes(self._request) else flow.latent_mask
        return reduced(self.mask, h, w)

    def first_step(self, first: int, steps: int, h: int, w: int) -> int:
        """The step with which a run of h × w latents begins that would begin with step `first`, were there no mask."""
        mask = self.latent_mask(h, w)
        later = 0 if mask is None else int(flow.first_steps(mask.max(), steps - first))
        return min(first + later, steps - 1)

    @property
    def kept(self) -> Tensor | None:
        """(1, 1, H, W): 1 where the picture's own pixels stay, 0 where any step repaints them; None without a mask."""
        return None if self.mask is None else (self.mask == 0).float()


def alongside(picture: Image.Image, frame: Frame, size: tuple[int, int]) -> Image.Image:
    """Another picture of the whole scene, cut and scaled as the picture that is rendered."""
    cut = inpaint.cut(fit(picture, *frame.size), frame)
    return _resized(cut, size, Image.Resampling.LANCZOS)


class Pasting:
    """Puts the pictures of a job back to where they belong; made once, since all have the same place."""

    def __init__(self, request: Request, frame: Frame):
        self.frame, self.picture = frame, _picture_in(request, frame)
        self.shown = inpaint.edge_of(_mask_in(request, frame))

    def onto(self, image: Image.Image) -> Image.Image:
        """The whole picture, with a render in its place."""
        return inpaint.pasted(image, self.picture, self.shown, self.frame)


# ---------------------------------------------------------------------- sizes


def placed(request: Request, side: int) -> tuple[int, int, Frame]:
    """(width, height) at which a request from a picture is rendered, and the frame of that.

    `side`: that of a picture of the usual size. Its files are open. Placing it again at that size leads to the same.
    Raises RequestError where nothing is to be repainted.
    """
    size = canvas_size(request)
    mask = mask_of(request) if pastes(request) else None
    if mask is None:
        found = _proportioned(request, size, natural_size(size))
        return (*found, inpaint.whole(found))
    if mask.getbbox() is None:
        text = "mask: it is black, so that nothing would be repainted; make those areas white that should be"
        raise RequestError(text, fields=("mask",))
    if request.mask_crop is None:
        found = _proportioned(request, size, inpaint.rounded_up(*size))
        return (*found, inpaint.whole(size, found))
    box = inpaint.region_of(mask, request.mask_crop)
    own = box[2] - box[0], box[3] - box[1]
    found = _proportioned(request, own, inpaint.region_size(box, side))
    return (*found, inpaint.framed(box, found, size))


def _proportioned(request: Request, own: tuple[int, int], usual: tuple[int, int]) -> tuple[int, int]:
    """What was given; else, where one side was, in the proportions of what has this size; else the usual."""
    if request.width and request.height:
        return request.width, request.height
    if request.width:
        return request.width, nearest_side(request.width * own[1] / own[0])
    if request.height:
        return nearest_side(request.height * own[0] / own[1]), request.height
    return usual


def canvas_size(request: Request) -> tuple[int, int]:
    """(width, height) of the picture with what it is extended by. Raises RequestError where that is too large."""
    left, top, right, bottom = _margins(request)
    width, height = _picture(request).size
    size = width + left + right, height + top + bottom
    if max(size) > MAX_SIDE or size[0] * size[1] > MOST_PIXELS:
        most = f"a side may have at most {MAX_SIDE} px, and the whole {MOST_PIXELS:,} pixels"
        raise RequestError(f"extend: the picture would be {size[0]} × {size[1]} px; {most}", fields=("extend", "image"))
    return size


# ---------------------------------------------------------------------- the canvas


def picture_of(request: Request) -> Image.Image:
    """The picture "RGB", extended, with the colours around them in areas that have none of their own."""
    picture = _picture(request)
    blank = Image.new("L", picture.size)
    if _is_alpha(request) and not request.mask_invert:
        assert request.mask is not None
        blank = request.mask.picture
        picture = inpaint.unmixed(picture, blank)
    if (margins := _margins(request)) != NOTHING:
        picture, blank = inpaint.extended(picture, margins), inpaint.extended(blank, margins, 255)
    return inpaint.filled(picture, blank) if blank.getextrema()[1] == 255 else picture


def mask_of(request: Request) -> Image.Image | None:
    """The mask "L" of the extended picture, blurred; None where nothing is masked.

    What is new, or was transparent, is repainted whole, however the mask is blurred.
    """
    margins, size = _margins(request), _picture(request).size
    if request.mask is None and margins == NOTHING:
        return None
    mask = blank = Image.new("L", size)
    if request.mask is not None:
        by = Image.Resampling.BILINEAR if request.paste else Image.Resampling.LANCZOS  # which would ring
        mask = _resized(request.mask.picture, size, by)
        mask = ImageOps.invert(mask) if request.mask_invert else mask
        blank = mask if _is_alpha(request) else blank
    mask, blank = (inpaint.extended(one, margins, 255) for one in (mask, blank))
    if request.mask_blur:
        mask = ImageChops.lighter(mask.filter(ImageFilter.GaussianBlur(request.mask_blur)), blank)
    return inpaint.levels(mask) if request.paste else mask


def _picture_in(request: Request, frame: Frame) -> Image.Image:
    """The picture as it comes out, but for its paint."""
    return fit(picture_of(request), *frame.size)


def _mask_in(request: Request, frame: Frame) -> Image.Image:
    """The mask of the picture as it comes out."""
    mask = mask_of(request)
    assert mask is not None, "only what has a mask is pasted back"
    return inpaint.levels(fit(mask, *frame.size, Image.Resampling.BILINEAR))


def _resized(image: Image.Image, size: tuple[int, int], by: Image.Resampling) -> Image.Image:
    return image if image.size == size else image.resize(size, by)


def _margins(request: Request) -> inpaint.Margins:
    return NOTHING if request.extend is None else split_margins(request.extend)


def _picture(request: Request) -> Image.Image:
    opened: InputPicture = request.image
    return opened.picture


def _is_alpha(request: Request) -> bool:
    return request.mask is not None and request.mask.path == MASK_ALPHA
