"""Guidance on two halves of the ranks: one evaluates the prompts, the other the negative ones, at the same time.

Each half divides its evaluation over its own ranks. Then every rank exchanges its velocity with the rank of the same
place in the other half, and all compute the guided one from the same two, as one rank does. In a step without guidance
both halves evaluate the prompts, and nothing is exchanged; so it is with a third branch, which has no second beside it.
"""

from typing import NamedTuple

from torch import Tensor

from zimage.errors import RequestError
from zimage.parallel.ranks import Ranks
from zimage.render.denoising import Evaluate, Evaluation

KIND = "guidance"  # of traffic


class Halves(NamedTuple):
    """All ranks, this one's half of them, over which the DiT is divided, and whether that is the second one."""

    ranks: Ranks
    own: Ranks
    second: bool

    @classmethod
    def of(cls, ranks: Ranks) -> "Halves":
        """All ranks call it at once. Raises RequestError where their number is odd."""
        check_even(ranks.size)
        own, which = ranks.halves()
        return cls(ranks, own, bool(which))

    def hook(self, evaluate: Evaluate) -> Evaluate:
        """The innermost hook of a run: what it is given evaluates one branch."""

        def guided(e: Evaluation) -> Tensor:
            branches = e.branches
            if len(branches) < 2:
                return evaluate(e)
            velocities = dict[str, Tensor]()
            for k in range(0, len(branches) - 1, 2):
                own, other = branches[k : k + 2][:: -1 if self.second else 1]
                velocities[own] = evaluate(e.alone(own))
                velocities[other] = self._swapped(velocities[own])
            for last in branches[len(velocities) :]:
                velocities[last] = evaluate(e.alone(last))
            return e.guided(velocities)

        return guided

    def _swapped(self, velocity: Tensor) -> Tensor:
        """That of the other half."""
        size = self.ranks.size
        partner, nothing = (self.ranks.rank + size // 2) % size, velocity.new_empty(0)
        parts = [velocity if rank == partner else nothing for rank in range(size)]
        return self.ranks.exchange(KIND, parts, [part.shape for part in parts])[partner]


def check_even(size: int) -> None:
    """Raise RequestError for a number of ranks that has no halves."""
    if size % 2:
        text = f"cfg_parallel needs an even number of ranks, one half for each branch of guidance, and not {size}"
        raise RequestError(text, fields=("cfg_parallel", "gpus"))
