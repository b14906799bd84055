"""The gated activation of both transformers' feed-forward halves."""

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, elementwise (Shazeer 2020); shapes equal."""
    return F.silu(gate) * up
