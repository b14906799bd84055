"""The table of solvers: `SOLVERS[name]` is what takes a run from a noise level to the next."""

from collections.abc import Callable
from typing import NamedTuple

from zimage.flow.multistep import dpmpp_2m, dpmpp_2m_sde, er_sde, res_multistep, unipc
from zimage.flow.steps import Step, euler, euler_ancestral, heun, lcm


def _once(i: int, steps: int) -> tuple[int, ...]:
    return (i,)


def _twice(i: int, steps: int) -> tuple[int, ...]:
    return (i, i + 1) if i + 1 < steps else (i,)


class Solver(NamedTuple):
    """A row of the table: the step, and `levels(i, N)`: the noise levels at which step i of N evaluates the model."""

    step: Step
    levels: Callable[[int, int], tuple[int, ...]] = _once
    draws: bool = False  # whether it adds noise
    memory: int = 0  # the most tensors that it wants to see again

    def leaves(self, steps: int) -> int:
        """How many tensors the next step sees again after so many, unless these were all."""
        return min(steps, self.memory)


SOLVERS: dict[str, Solver] = {
    "euler": Solver(euler),
    "euler_ancestral": Solver(euler_ancestral, draws=True),
    "heun": Solver(heun, _twice),
    "lcm": Solver(lcm, draws=True),
    "dpmpp_2m": Solver(dpmpp_2m, memory=1),
    "dpmpp_2m_sde": Solver(dpmpp_2m_sde, draws=True, memory=1),
    "unipc": Solver(unipc, memory=2),
    "res_multistep": Solver(res_multistep, memory=1),
    "er_sde": Solver(er_sde, draws=True, memory=2),
}
