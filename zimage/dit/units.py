"""fp16 without overflow: the units in which the DiT's activations are held, and why nothing leaves its range.

fp16 has 11 significant bits, 3 more than bf16, and ends at 65,504; activations of the published model reach 344,000.
Every value that is stored or summed in fp16 is therefore held in a unit, a power of two, which changes no bit of it:

    value                     held as              because
    residual stream x         x / stream           |x| ≤ |embedding| + Σ √dim · max|w₂|: a gate is a tanh, and rows
                                                   of √dim · w₂ are what the norm of a branch can add at most
    input a of the products   a / input            ‖a‖ ≤ √dim · max|w₁ · scale|, and each partial sum of a product
    that follow a norm                             is at most ‖a‖ · ‖row of W‖ (Cauchy-Schwarz)
    q, k, v, attention, and   … / input            products of a; attention mixes v with weights that add up to 1, so
    the attention's branch                         that its norm is at most ‖W_v‖_F · ‖a‖
    gate and up               … / input            products of a
    hidden row silu(gate)·up  a unit per row       such that its norm is at most `hidden`, LIMIT / ‖row of W₂‖
    its product, the branch   the same             a product of the hidden row

The bounds are those of `reach.py`. Whatever follows is a norm, and rms_norm(y / s; eps / s²) = rms_norm(y; eps), or
knows the unit. The embedders, the modulation and the final layer compute in fp32.
"""

from typing import NamedTuple

from torch import Tensor


class Units(NamedTuple):
    """Powers of two; see the table above."""

    stream: float = 1.0
    input: float = 1.0
    hidden: float | None = None  # None: nothing is held in units

    def enter(self, x: Tensor) -> Tensor:
        """x as the blocks' stream."""
        return x if self.hidden is None else (x * (1 / self.stream)).half()

    def leave(self, x: Tensor) -> Tensor:
        """A stream as it was before `enter`, in fp32 if it was held in units."""
        return x if self.hidden is None else x.float().mul_(self.stream)


PLAIN = Units()
