"""Edges of a picture by Canny's method (1986), as ControlNets were trained on them. The only file that needs OpenCV."""

from typing import Any

from PIL import Image

from zimage.errors import RequestError, install_hint

LOW, HIGH = 100, 200  # of the gradient in levels: edges begin above `HIGH`, and go on above `LOW`


def opencv() -> Any:
    """The package. Raises RequestError, which names the extra, where it is missing or cannot be loaded."""
    try:
        import cv2
    except ImportError as error:
        text = f"control_preprocess canny needs OpenCV ({error}): {install_hint('canny')}"
        raise RequestError(text, fields=("control_preprocess",)) from None
    return cv2


def canny(picture: Image.Image) -> Image.Image:
    """White edges on black, "RGB", of the picture's size. Raises RequestError as `opencv` does."""
    import numpy as np

    return Image.fromarray(opencv().Canny(np.asarray(picture.convert("RGB")), LOW, HIGH)).convert("RGB")
