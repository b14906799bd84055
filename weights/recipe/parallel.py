"""Data-parallel training on CPU cores: one single-threaded process per core around one model in shared memory.

Threads inside an operation meet at a barrier hundreds of times per step, and on a busy machine each meeting waits for
the slowest; processes meet twice per step. The update is divided too: each worker steps the parameters it owns.
"""

from collections.abc import Callable

import torch
import torch.multiprocessing as mp
from torch import Tensor, nn


class Team:
    """What one worker knows of the others. Made before the fork; `rank` is set in each worker."""

    def __init__(self, model: nn.Module, workers: int):
        self.rank = 0
        self.workers = workers
        self.params: list[Tensor] = list(model.share_memory().parameters())
        self.gradients = [[torch.zeros_like(p).share_memory_() for p in self.params] for _ in range(workers)]
        self.progress = torch.zeros(1).share_memory_()  # written by the first worker, so that all decide alike
        self._barrier = mp.get_context("fork").Barrier(workers)
        self._by_size = sorted(range(len(self.params)), key=lambda i: -self.params[i].numel())

    def run(self, work: Callable[["Team"], None]) -> None:
        """Call work(team) in every worker; the first is this process."""
        torch.set_num_threads(1)
        others = [
            mp.get_context("fork").Process(target=self._join, args=(rank, work)) for rank in range(1, self.workers)
        ]
        for other in others:
            other.start()
        work(self)
        for other in others:
            other.join()

    def _join(self, rank: int, work: Callable[["Team"], None]) -> None:
        self.rank = rank
        work(self)

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def step(self, worker: nn.Module, optimisers: list[torch.optim.Optimizer], clip: float) -> None:
        """After `worker`'s backward(): average all gradients, update the owned parameters, take over the others'.

        `worker` is this process's own copy of the model, in any dtype; the parameters proper are shared and fp32.
        """
        own: list[Tensor] = list(worker.parameters())
        nn.utils.clip_grad_norm_(own, clip)
        for p, shared in zip(own, self.gradients[self.rank], strict=True):
            shared.copy_(p.grad) if p.grad is not None else shared.zero_()
            p.grad = None
        self._barrier.wait()
        for i in self._by_size[self.rank :: self.workers]:
            self.params[i].grad = torch.stack([gradients[i] for gradients in self.gradients]).mean(dim=0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self._barrier.wait()
        with torch.no_grad():
            torch._foreach_copy_(own, self.params)
