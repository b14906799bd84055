"""ControlNets: against diffusers, against formulas in float64, and what must not change without one."""

import itertools

import control_nets
import pytest
import torch
from control_nets import DIT, FORMS
from tiny import arguments, relative_error
from torch import Tensor

from zimage import flow
from zimage.dit.control import Controlled, Flow
from zimage.dit.model import ZImageDiT

TOLERANCE, RUN_TOLERANCE = 1e-5, 1e-4  # fp32, of the largest value: an evaluation, a whole run
SIZE = (6, 10)


@pytest.fixture(scope="module")
def dit() -> ZImageDiT:
    return control_nets.dit()


def captions(lengths=(7, 40), seed: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [3 * torch.randn(n, DIT["cap_feat_dim"], generator=generator) for n in lengths]


def latents(batch: int = 2, seed: int = 4) -> Tensor:
    return torch.randn(batch, 16, *SIZE, generator=torch.Generator().manual_seed(seed))


def controlled(dit, form: str, sigma: Tensor, scale: float = 0.8, kind: Flow = "publisher", **others) -> Controlled:
    """A control of this form at noise levels sigma (B,)."""
    net = control_nets.net(form, **others)
    tokens = net.embed(control_nets.control_latents(FORMS[form], len(sigma), *SIZE), dit.x_pad_token)
    return Controlled(net, tokens, net.modulate(dit.time(sigma)), scale, kind)


def evaluate(dit, x: Tensor, sigma: Tensor, texts: list[Tensor], *controls: Controlled) -> Tensor:
    """One evaluation of a batch, whose captions may be of unequal length."""
    return dit.velocity(x, dit.modulate(sigma), dit.context(dit.refine(texts), *x.shape[-2:]), controls)


# ------------------------------------------------------------------ against diffusers


class Theirs:
    """diffusers' transformer and ControlNet, with the weights of ours."""

    def __init__(self, dit: ZImageDiT, form: str, scale: float):
        diffusers = pytest.importorskip("diffusers")
        net, self.scale = control_nets.net(form), scale
        self.dit = diffusers.ZImageTransformer2DModel(**arguments(DIT)).eval()
        self.net = diffusers.ZImageControlNetModel(**arguments(FORMS[form])).eval()
        self.dit.load_state_dict(dit.state_dict())
        self.net.load_state_dict(net.state_dict())
        type(self.net).from_transformer(self.net, self.dit)
        self.control = control_nets.control_latents(FORMS[form], 2, *SIZE)

    @torch.no_grad()
    def __call__(self, x: Tensor, sigma: Tensor, texts: list[Tensor]) -> Tensor:
        images, control = (list(batch.unsqueeze(2).unbind()) for batch in (x, self.control))
        hints = self.net(images, 1 - sigma, texts, control, conditioning_scale=self.scale)
        out = self.dit(images, 1 - sigma, texts, return_dict=False, controlnet_block_samples=hints)[0]
        return -torch.stack(out).squeeze(2)


@pytest.mark.parity
@pytest.mark.parametrize("form", FORMS)
def test_an_evaluation(dit, form):
    """Two images of unequal captions, each at its own noise level."""
    sigma = torch.tensor([0.7, 0.3])
    inputs = latents(), sigma, captions()
    ours = evaluate(dit, *inputs, controlled(dit, form, sigma, kind="diffusers"))
    assert relative_error(ours, Theirs(dit, form, 0.8)(*inputs)) <= TOLERANCE
    assert relative_error(ours, evaluate(dit, *inputs)) > 0.1  # it does something


@pytest.mark.parity
@pytest.mark.parametrize("form", FORMS)
def test_whole_runs_with_guidance(dit, form):
    """Six Euler steps; the control acts in both branches."""
    theirs, sigmas = Theirs(dit, form, 0.6), flow.sigmas(6, 3.0)
    positive, negative = captions(), captions((33, 2), seed=8)
    ours = others = latents()
    for sigma, following in itertools.pairwise(sigmas):
        level = sigma.expand(2)
        control = controlled(dit, form, level, 0.6, "diffusers")
        velocities = (evaluate(dit, ours, level, texts, control) for texts in (positive, negative))
        ours = flow.euler_step(ours, flow.guide(*velocities, 3.5, 0.0), sigma, following)
        velocities = (theirs(others, level, texts) for texts in (positive, negative))
        others = flow.euler_step(others, flow.guide(*velocities, 3.5, 0.0), sigma, following)
    assert relative_error(ours, others) <= RUN_TOLERANCE
