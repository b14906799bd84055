"""Muon (Jordan et al. 2024): momentum whose every matrix is replaced by its nearest orthogonal one; AdamW for the rest.

On these small models it needs a third of AdamW's steps. Convolution kernels count as (out, in·k·k) matrices.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from zimage.weights.recipe.training import compute_dtype

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic whose iteration drives all singular values towards 1
FOR_ADAMW = ("embed_tokens", "adaLN_modulation", "t_embedder")  # lookups and functions of σ alone


def orthogonalise(m: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrices, roughly, of a batch (N, rows, columns); in bf16 where that is fast."""
    a, b, c = NEWTON_SCHULZ
    tall = m.shape[1] > m.shape[2]
    x = m.mT if tall else m
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(compute_dtype())
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(m.dtype)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised per matrix; equal shapes are stacked so that small ones go in one call."""

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float = 1e-3, momentum: float = 0.95, weight_decay: float = 0.0
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override] # no optimiser of ours takes a closure
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.flatten(1).shape].append(p)
            for params in by_shape.values():
                self._step_stack(params, group)

    def _step_stack(self, params: list[nn.Parameter], group: dict) -> None:
        updates = []
        for p in params:
            assert p.grad is not None  # step() passes no others
            momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
            momentum.lerp_(p.grad, 1 - group["momentum"])
            updates.append(p.grad.lerp(momentum, group["momentum"]).flatten(1))
        stack = orthogonalise(torch.stack(updates))
        scale = max(1.0, stack.shape[1] / stack.shape[2]) ** 0.5
        for p, update in zip(params, stack, strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(update.view_as(p), alpha=-group["lr"] * scale)


def optimisers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for hidden matrices and kernels; AdamW for embeddings, modulation by time, norms, biases and pad tokens."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        is_matrix = p.ndim >= 2 and min(p.flatten(1).shape) > 8 and not any(part in name for part in FOR_ADAMW)
        (matrices if is_matrix else rest).append(p)
    return [
        Muon(matrices),
        torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]
