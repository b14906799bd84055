"""How many evaluations of the DiT a picture takes: in what its time goes, told before anything is loaded.

A step evaluates at the levels that its solver says, and a level evaluates the branches that guidance says; both are
asked here as they are when a picture is drawn.
"""

from collections.abc import Sequence

from torch import Tensor

from zimage import flow
from zimage.errors import RequestError
from zimage.settings.declared import Request
from zimage.settings.fields import either
from zimage.settings.guiding import GuidanceMethod


def guidance_of(request: Request) -> flow.Guidance:
    """How a request is guided."""
    method = GuidanceMethod.parse(either(request.guidance_method, "cfg"))
    return flow.Guidance(either(request.guidance, 0.0), request.cfg_truncation, request.cfg_normalization, *method)


def branches(sampler: str, guidance: flow.Guidance, sigmas: Tensor, first: int) -> list[tuple[str, ...]]:
    """What is evaluated at each level that a pass meets, which begins with step `first`."""
    steps, levels = len(sigmas) - 1, flow.SOLVERS[sampler].levels
    met = (level for i in range(first, steps) for level in levels(i, steps))
    return [guidance.branches(guidance.at(sigmas[level]), level - first, steps - first) for level in met]


def evaluations(sampler: str, guidance: flow.Guidance, sigmas: Tensor, begins: Sequence[int], layers: int) -> int:
    """The evaluations of all passes, which begin with these steps, of a DiT with so many layers.

    Raises RequestError where a method's values leave it nothing to do, or skip layers that are not there.
    """
    passes = [branches(sampler, guidance, sigmas, first) for first in begins]
    if guidance.scale > 0 and (fault := _fault(guidance, passes, layers)):
        raise RequestError(f"guidance_method: {guidance.method} {fault}", fields=("guidance_method",))
    return sum(len(level) for found in passes for level in found)


def _fault(guidance: flow.Guidance, passes: list[list[tuple[str, ...]]], layers: int) -> str:
    """What is wrong with a method's values for these passes, in words; empty where nothing is."""
    if not all(any(found) for found in passes):
        return "would set the velocity of every step to zero; pass fewer zero_init_steps, or more steps"
    if guidance.layers and max(guidance.layers) >= layers:
        return f"skips layer {max(guidance.layers)}, and the DiT has {layers}, counted from 0; pass other layers"
    if guidance.layers and not any(flow.SKIPPED in level for found in passes for level in found):
        start, stop = guidance.values["start"], guidance.values["stop"]
        return f"skips layers in no step with start {start:g} and stop {stop:g}; pass a larger stop, or more steps"
    return ""
