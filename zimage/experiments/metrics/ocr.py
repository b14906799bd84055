"""Whether a picture shows the text that its prompt quotes, as a recogniser reads it. The only file with rapidocr."""

import re
import unicodedata
from typing import Any

import torch
from PIL import Image

from zimage.errors import RequestError, install_hint

QUOTED = re.compile(r'"([^"\n]+)"|“([^”\n]+)”|„([^“”\n]+)[“”]|«([^»\n]+)»|「([^」\n]+)」|‘([^’\n]+)’')


class Reader:
    """Reads pictures by the models that the package rapidocr brings; nothing is fetched."""

    def __init__(self) -> None:
        self._engine = _engine()

    def lines(self, picture: Image.Image) -> list[str]:
        """The lines of text in an "RGB" picture, from the top."""
        import numpy as np

        found = self._engine(np.asarray(picture)[:, :, ::-1])  # it takes BGR
        return list(found.txts or ())

    def score(self, picture: Image.Image, prompt: str) -> float | None:
        """How well the texts that the prompt quotes can be read, 0 to 1, on average; None where it quotes nothing."""
        wanted = quoted_texts(prompt)
        if not wanted:
            return None
        seen = plain(" ".join(self.lines(picture)))
        return sum(similarity(plain(text), seen) for text in wanted) / len(wanted)


def _engine() -> Any:
    try:
        import onnxruntime  # noqa: F401 - rapidocr asks for it when it reads the first picture
        from rapidocr import RapidOCR
    except ImportError as error:
        text = f"the metric ocr needs rapidocr and onnxruntime ({error}): {install_hint('metrics')}"
        raise RequestError(text, fields=("metric",)) from None
    threads = torch.get_num_threads()  # as many as everything else here takes
    return RapidOCR(params={"Global.log_level": "critical", "EngineConfig.onnxruntime.intra_op_num_threads": threads})


def quoted_texts(prompt: str) -> list[str]:
    """What stands in quotation marks, without texts that have neither letters nor digits."""
    found = ["".join(groups) for groups in QUOTED.findall(prompt)]
    return [text for text in found if plain(text)]


def plain(text: str) -> str:
    """Letters and digits alone, small, without their width: recognisers guess spaces and marks."""
    return "".join(c for c in unicodedata.normalize("NFKC", text).casefold() if c.isalnum())


def similarity(wanted: str, seen: str) -> float:
    """1 − edits / length, at least 0: the fewest edits that turn some part of what is seen into what is wanted.

    Source: Sellers, "The theory and computation of evolutionary distances", 1980: an alignment with free ends.
    """
    row = [0] * (len(seen) + 1)  # edits of the best part that ends at each place
    for i, letter in enumerate(wanted, 1):
        above, row = row, [i]
        for j, other in enumerate(seen, 1):
            row.append(min(above[j - 1] + (letter != other), above[j] + 1, row[j - 1] + 1))
    return max(0.0, 1 - min(row) / len(wanted))
