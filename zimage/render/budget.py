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
from zimage.settings.sampling import SamplingSettings


def guidance_of(request: SamplingSettings) -> flow.Guidance:
    """How a request is guided."""
    method = GuidanceMethod.parse(either(request.guidance_method, "cfg"))
    return flow.Guidance(either(request.guidance, 0.0), request.cfg_truncation, request.cfg_normalization, *method)


def branches(guidance: flow.Guidance, sigmas: Tensor, first: int, level: int) -> tuple[str, ...]:
    """What is evaluated at a noise level of a run that begins with step `first`."""
    return guidance.branches(guidance.at(sigmas[level]), level - first, len(sigmas) - 1 - first)


def evaluations(request: Request, sigmas: Tensor, begins: Sequence[int]) -> int:
    """Those of all passes, which begin with these steps, of a request with nothing left open."""
    guidance, steps = guidance_of(request), len(sigmas) - 1
    levels = flow.SOLVERS[request.solver].levels
    met = [(first, level) for first in begins for i in range(first, steps) for level in levels(i, steps)]
    return sum(len(branches(guidance, sigmas, first, level)) for first, level in met)


def check_guidance(guidance: flow.Guidance, sigmas: Tensor, begins: Sequence[int], layers: int) -> None:
    """Raise RequestError where a method's values leave it nothing to do, or skip layers that the DiT does not have.

    `layers` is how many it has.
    """
    if guidance.scale <= 0 or not guidance.is_partial:
        return
    steps = len(sigmas) - 1
    passes = [[branches(guidance, sigmas, first, level) for level in range(first, steps)] for first in begins]
    if fault := _fault(guidance, passes, layers):
        raise RequestError(f"guidance_method: {guidance.method} {fault}", fields=("guidance_method",))


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
