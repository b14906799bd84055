"""Edges of a picture by Canny's method (1986), as ControlNets were trained on them. The only file that needs OpenCV."""

from PIL import Image

from zimage.errors import RequestError, install_hint

LOW, HIGH = 100, 200  # of the gradient in levels: edges begin above `HIGH`, and go on above `LOW`


def canny(picture: Image.Image) -> Image.Image:
    """White edges on black, "RGB", of the picture's size. Raises RequestError where OpenCV is missing."""
    try:
        import cv2
    except ImportError as error:
        text = f"control_preprocess canny needs OpenCV ({error}): {install_hint('canny')}"
        raise RequestError(text, fields=("control_preprocess",)) from None
    import numpy as np

    return Image.fromarray(cv2.Canny(np.asarray(picture.convert("RGB")), LOW, HIGH)).convert("RGB")
