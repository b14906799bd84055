"""Whole runs against diffusers' schedulers, live: every solver that it has, on the same model and the same noise.

Limits, fp32: the largest error over the largest value, at most 1e-5. Where each side has its own DiT, that of whole
runs in `tests/README.md`, 1e-4.
"""

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from tiny import relative_error
from torch import Tensor

from zimage import flow
from zimage.dit import ZImageDiT
from zimage.flow.multistep import NEARLY_ONE

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
import references

pytestmark = pytest.mark.parity

LIMIT = 1e-5
LIMIT_OF_TWO_MODELS = 1e-4
SEEDS = (11, 12)
STEPS, SHIFTS = (4, 8, 30), (1.0, 3.0, 6.0)
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "final_sigmas_type": "zero", "solver_order": 2}
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "euler_ancestral": ("LTXEulerAncestralRFScheduler", {"eta": 1.0}),
    "heun": ("FlowMatchHeunDiscreteScheduler", {}),
    "lcm": ("FlowMatchLCMScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", FLOW),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {**FLOW, "algorithm_type": "sde-dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", FLOW),
}
DRAWING = {name for name, solver in flow.SOLVERS.items() if solver.draws}
Model = Callable[[Tensor, Tensor], Tensor]  # (x, σ) → velocity


def scheduler(name: str, sigmas: Tensor, first: int = 0, **more: Any) -> Any:
    """diffusers' scheduler of a solver, on our noise levels, before step number `first`."""
    kind, settings = SCHEDULERS[name]
    built = getattr(references.diffusers, kind)(**settings, **more)
    built.set_timesteps(len(sigmas) - 1)
    levels = sigmas.clone()
    if name == "unipc" and levels[0] == 1:
        levels[0] = NEARLY_ONE
    if name == "heun":  # which lists the two evaluations of a step one after the other
        levels = torch.cat((levels[:1], levels[1:-1].repeat_interleave(2), levels[-1:]))
    built.sigmas = levels
    built._step_index = built._begin_index = first * (2 if name == "heun" else 1)
    return built


def theirs(name: str, sigmas: Tensor, x: Tensor, model: Model, first: int = 0, **more: Any) -> Tensor:
    """diffusers' end of a run; its generators have drawn the start noise, as ours have."""
    built, steps = scheduler(name, sigmas, first, **more), len(sigmas) - 1
    streams = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    _ = [torch.randn((1, *x.shape[1:]), generator=stream) for stream in streams]
    drawing = {"generator": streams} if name in DRAWING or more else {}
    for i in range(first, steps):
        for k in flow.SOLVERS[name].levels(i, steps):
            x = built.step(model(x, sigmas[k]), torch.tensor(0.0), x, return_dict=False, **drawing)[0]
    return x


def ours(name: str, sigmas: Tensor, x: Tensor, model: Model, first: int = 0) -> Tensor:
    noise, past = flow.StepNoise(SEEDS, x, first), ()
    for i in range(first, len(sigmas) - 1):
        step = flow.SOLVERS[name].step
        x, past = step(x, i, sigmas, lambda x, k: model(x, sigmas[k]), lambda: noise.at(i), past)  # noqa: B023
    return x


@pytest.fixture(scope="module")
def captions():
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(length, tiny.DIT["cap_feat_dim"], generator=generator) for length in (9, 40)]


@pytest.fixture(scope="module")
def model(captions):
    """The tiny DiT on two captions."""
    dit = ZImageDiT.from_config(tiny.DIT)
    tiny.randomised(dit, 1).eval()
    with torch.no_grad():
        context = dit.context(dit.refine(captions), 4, 6)

    @torch.no_grad()
    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        return dit.velocity(x, dit.modulate(sigma[None]), context)

    return velocity


@pytest.fixture(scope="module")
def noise():
    return torch.cat([flow.start_noise(seed, 16, 4, 6) for seed in SEEDS])


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_whole_run(name, steps, shift, model, noise):
    sigmas = flow.sigmas(steps, shift)
    assert relative_error(ours(name, sigmas, noise, model), theirs(name, sigmas, noise, model)) <= LIMIT


@pytest.mark.parametrize("first", [1, 3, 6])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_run_that_begins_later(name, first, model, noise):
    """As image to image does: nothing is known before its first step."""
    sigmas = flow.sigmas(8, 3.0)
    assert relative_error(ours(name, sigmas, noise, model, first), theirs(name, sigmas, noise, model, first)) <= LIMIT


def test_lcm_is_the_stochastic_sampling_of_euler(model, noise):
    sigmas = flow.sigmas(8, 3.0)
    assert relative_error(ours("lcm", sigmas, noise, model), theirs("lcm", sigmas, noise, model)) <= LIMIT
    stochastic = theirs("euler", sigmas, noise, model, stochastic_sampling=True)
    assert relative_error(ours("lcm", sigmas, noise, model), stochastic) <= LIMIT


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_whole_run_through_both_pipelines(name, pipe, tiny_folder, captions, noise):
    """Each side with its own DiT of the same weights."""
    from safetensors.torch import load_file

    dit = references.dit(seed=1)
    dit.load_state_dict(load_file(tiny_folder / "transformer" / "diffusion_pytorch_model.safetensors"))
    sigmas = flow.sigmas(8, 3.0)
    expected = theirs(name, sigmas, noise, lambda x, s: references.velocity(dit, x, s.expand(len(x)), captions))
    found = pipe.denoise(captions, noise, steps=8, shift=3.0, sampler=name, seeds=SEEDS)
    assert relative_error(found, expected) <= LIMIT_OF_TWO_MODELS
