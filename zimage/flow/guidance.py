"""Guidance: one velocity from those of a prompt and of what is steered away from."""

import torch
from torch import Tensor


def guide(positive: Tensor, negative: Tensor, scale: float, normalization: float = 0.0) -> Tensor:
    """Classifier-free guidance pos + scale·(pos − neg) (Ho & Salimans 2022, counted from 0), in fp32.

    With normalization c > 0, a guided velocity longer than c · ‖pos‖ is scaled back to that length, sample by sample.
    """
    guided = positive + scale * (positive - negative)
    if normalization <= 0:
        return guided
    dims = tuple(range(1, guided.ndim))
    limit = normalization * torch.linalg.vector_norm(positive, dim=dims, keepdim=True)
    length = torch.linalg.vector_norm(guided, dim=dims, keepdim=True)
    return guided * torch.where(length > limit, limit / length, 1.0)


def guidance_at(sigma: Tensor, scale: float, truncation: float = 1.0) -> float:
    """The guidance scale at one noise level σ (): 0 once 1 − σ is past `truncation`.

    1 − σ is taken in thousandths and fp32, as the reference does, so that ties fall the same way.
    """
    return 0.0 if float((1000 - sigma * 1000) / 1000) > truncation else scale
