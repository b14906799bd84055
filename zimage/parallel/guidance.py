"""Guidance on two halves of the ranks: one evaluates the prompts, the other the negative ones, at the same time.

Each half divides its evaluation over its own ranks. Then every rank exchanges its velocity with the rank of the same
place in the other half, and all compute the guided one from the same two, as one rank does. In a step without guidance
both halves evaluate the prompts, and nothing is exchanged.
"""

from typing import NamedTuple

from torch import Tensor

from zimage import flow
from zimage.errors import RequestError
from zimage.parallel.ranks import Ranks
from zimage.render.denoising import Evaluate, Evaluation

KIND = "guidance"  # of traffic


class Halves(NamedTuple):
    """All ranks, this one's half of them, over which the DiT is divided, and whether that has the negative prompts."""

    ranks: Ranks
    own: Ranks
    negative: bool

    @classmethod
    def of(cls, ranks: Ranks) -> "Halves":
        """All ranks call it at once. Raises RequestError where their number is odd."""
        check_even(ranks.size)
        own, which = ranks.halves()
        return cls(ranks, own, bool(which))

    def hook(self, evaluate: Evaluate) -> Evaluate:
        """The innermost hook of a run: what it is given evaluates one of both branches."""

        def guided(e: Evaluation) -> Tensor:
            if e.negative is None or e.scale <= 0:
                return evaluate(e)
            own = evaluate(e._replace(positive=e.negative if self.negative else e.positive, negative=None))
            other = self._swapped(own)
            positive, negative = (other, own) if self.negative else (own, other)
            return flow.guide(positive, negative, e.scale, e.normalization)

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
