"""Layers of a GPU's text encoder whose weights stay in their file until something reads them.

Encoding reads neither the last layer nor more than a few rows of the embeddings: 1 of 8 GB. Writing does, and so does a
caption of the last hidden state. A weight that has come stays until `send_back`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zimage.nn.layers import NarrowLinear, TokenEmbedding

STORED = "stored"  # attribute of a weight that has come: its view of the file


class LateEmbedding(TokenEmbedding):
    """Rows are looked up on the host; the whole table comes where it is an output head."""

    def forward(self, ids: Tensor) -> Tensor:
        if STORED in vars(self.weight):
            return super().forward(ids)
        return F.embedding(ids.cpu(), self.weight).to(ids.device)

    def logits(self, x: Tensor) -> Tensor:
        bring(self.weight, x.device)
        return super().logits(x)


class LateLinear(NarrowLinear):
    def forward(self, x: Tensor) -> Tensor:
        bring(self.weight, x.device)
        return super().forward(x)


LATE: dict[type[nn.Module], type[nn.Module]] = {TokenEmbedding: LateEmbedding, NarrowLinear: LateLinear}


def bring(weight: Tensor, device: torch.device) -> None:
    """Load a weight that was left in its file, unless it has come already."""
    if STORED not in vars(weight):
        vars(weight)[STORED] = stored = weight.data
        weight.data = stored.to(device, vars(weight)["wanted"])


def send_back(model: nn.Module) -> None:
    """Leave weights that have come in their file again."""
    for weight in model.parameters():
        if STORED in vars(weight):
            weight.data = vars(weight).pop(STORED)
