"""Which rows of every map are in this process: all of them, unless the maps are divided over several.

A walk in strips (`zimage.vae.walk`) asks a share wherever it needs rows, moments or queries that another process may
have. What is computed does not depend on the share: strips are the same, and each lies in one process as a whole.

Shapes: C channels, H × W positions, G groups, L = H·W tokens, N blocks. Maps are (1, C, H, W).
"""

from collections.abc import Sequence

from torch import Tensor

from zimage.nn.attention import attention

Bounds = tuple[int, ...]  # the first row of every rank, in their order, and the end


class Share:
    """One process has everything."""

    rank, size = 0, 1

    def bounds(self, height: int, step: int) -> Bounds:
        """Which of `height` rows each rank has: whole strips of `step` rows, as near to equal parts as they allow."""
        ideal = ((2 * height * rank + self.size * step) // (2 * self.size * step) for rank in range(self.size))
        return (*(min(strips * step, height) for strips in ideal), height)

    def moved(self, values: Tensor, have: Bounds | None, want: Bounds) -> Tensor:
        """This rank's rows by `want` of a map divided by `have`; by None, every rank has all of it."""
        return values

    def edges(self, values: Tensor, bounds: Bounds | None) -> tuple[Tensor | None, Tensor | None]:
        """The rows (1, C, 1, W) above and below this rank's; None beyond the map, and where the rank has no rows."""
        return None, None

    def whole(self, values: Tensor, have: Bounds | None) -> Tensor:
        """The map (1, C, H, W) on every rank."""
        return values

    def gathered(self, moments: Tensor, blocks: Sequence[int]) -> Tensor:
        """The moments (3, G, N) of all ranks in their order; rank r has those of blocks[r]."""
        return moments

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """softmax(q·kᵀ/√C)·v over a whole map's tokens (1, L, 1, C), which every rank has."""
        return attention(q, k, v)


ALONE = Share()
