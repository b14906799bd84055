"""ControlNets: against diffusers, against formulas in float64, and what must not change without one."""

import itertools

import control_nets
import pytest
import torch
from control_formulas import Formula, Given
from control_nets import DIT, FORMS
from tiny import arguments, relative_error
from torch import Tensor

from zimage import flow
from zimage.dit.control import Controlled, Flow
from zimage.dit.model import ZImageDiT
from zimage.errors import RequestError

TOLERANCE, RUN_TOLERANCE = 1e-5, 1e-4  # fp32, of the largest value: an evaluation, a whole run
BF16_RATIO = 1.1
SIZE = (6, 10)


@pytest.fixture(scope="module")
def dit() -> ZImageDiT:
    return control_nets.dit()


def captions(lengths=(7, 40), seed: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [3 * torch.randn(n, DIT["cap_feat_dim"], generator=generator) for n in lengths]


def latents(batch: int = 2, seed: int = 4) -> Tensor:
    return torch.randn(batch, 16, *SIZE, generator=torch.Generator().manual_seed(seed))


def controlled(
    dit, form: str, sigma: Tensor, scale: float = 0.8, kind: Flow = "publisher", seed: int = 2, dtype=torch.float32
) -> Controlled:
    """A control of this form at noise levels sigma (B,)."""
    net = control_nets.net(form, seed).to(dtype)
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

    def to(self, dtype: torch.dtype) -> "Theirs":
        self.dit.to(dtype), self.net.to(dtype)
        return self

    @torch.no_grad()
    def __call__(self, x: Tensor, sigma: Tensor, texts: list[Tensor]) -> Tensor:
        dtype = self.dit.dtype
        images, control = (list(batch.to(dtype).unsqueeze(2).unbind()) for batch in (x, self.control))
        texts = [text.to(dtype) for text in texts]
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


@pytest.mark.parity
@torch.no_grad()
def test_bf16():
    """Our RMS error against float64 over the reference's own, all forms together; weights are exact in bf16."""
    ours, theirs = [], []
    for form in FORMS:
        dit, sigma, inputs = control_nets.dit(), torch.tensor([0.75, 0.25]), (latents().bfloat16(), captions())
        exact = Theirs(dit, form, 0.8).to(torch.float64)(inputs[0], sigma.double(), inputs[1])
        other = Theirs(dit, form, 0.8).to(torch.bfloat16)(inputs[0], sigma.double(), inputs[1])
        one = controlled(dit.bfloat16(), form, sigma, kind="diffusers", dtype=torch.bfloat16)
        ours.append(evaluate(dit, inputs[0], sigma, inputs[1], one) - exact)
        theirs.append(other - exact)
    assert torch.cat(ours).square().mean().sqrt() <= BF16_RATIO * torch.cat(theirs).square().mean().sqrt()


# ------------------------------------------------------------------ against formulas


def given(form: str, scale: float, seed: int = 2, batch: int = 1) -> list[Given]:
    """What the formula takes of a control, for each image of a batch."""
    weights, pictures = (
        control_nets.net(form, seed).state_dict(),
        control_nets.control_latents(FORMS[form], batch, *SIZE),
    )
    return [Given(FORMS[form], weights, picture, scale) for picture in pictures]


@pytest.mark.parametrize("form", FORMS)
def test_the_publishers_flow(dit, form):
    """Two images of unequal captions; the formula takes each alone."""
    sigma, (x, texts) = torch.tensor([0.7, 0.3]), (latents(), captions())
    ours = evaluate(dit, x, sigma, texts, controlled(dit, form, sigma))
    formula = Formula(DIT, dit.state_dict())
    for i, one in enumerate(given(form, 0.8, batch=2)):
        assert relative_error(ours[i], formula.velocity(x[i], float(sigma[i]), texts[i], [one])) <= TOLERANCE


def test_controls_add_up(dit):
    """Of different forms and scales, in any order."""
    sigma, (x, texts) = torch.tensor([0.5]), (latents(1), captions((20,)))
    controls = [controlled(dit, form, sigma, scale, seed=seed) for form, scale, seed in MANY]
    want = Formula(DIT, dit.state_dict()).velocity(
        x[0], 0.5, texts[0], [given(form, scale, seed)[0] for form, scale, seed in MANY]
    )
    for order in (controls, controls[::-1]):
        assert relative_error(evaluate(dit, x, sigma, texts, *order)[0], want) <= TOLERANCE


MANY = (("1.0", 0.5, 21), ("2.0", 0.3, 22), ("2.1", 0.7, 23))


@pytest.mark.parametrize("kind", ["publisher", "diffusers"])
@pytest.mark.parametrize("form", FORMS)
def test_scale_0_gives_the_bits_without(dit, form, kind):
    sigma, inputs = torch.tensor([0.7, 0.3]), (latents(), captions())
    x, texts = inputs
    silent = controlled(dit, form, sigma, 0.0, kind)
    assert torch.equal(evaluate(dit, x, sigma, texts, silent), evaluate(dit, x, sigma, texts))
    loud = controlled(dit, "1.0", sigma)
    both, alone = evaluate(dit, x, sigma, texts, silent, loud), evaluate(dit, x, sigma, texts, loud)
    assert torch.equal(both, alone)


def test_the_flows_differ_in_the_refiners_hints_alone(dit):
    """1.0 has none, and one flow."""
    sigma, (x, texts) = torch.tensor([0.5]), (latents(1), captions((20,)))
    for form in FORMS:
        ours, theirs = (
            evaluate(dit, x, sigma, texts, controlled(dit, form, sigma, kind=kind))
            for kind in ("publisher", "diffusers")
        )
        assert torch.equal(ours, theirs) == (form == "1.0")


def test_the_levels_of_a_run_are_those_of_its_steps(dit):
    """Modulated once for all steps, as a run does, then taken one by one."""
    sigmas, (x, texts) = torch.tensor([1.0, 0.6, 0.2]), (latents(1), captions((20,)))
    run, modulation = controlled(dit, "2.1", sigmas), dit.modulate(sigmas)
    run = run._replace(tokens=run.tokens[:1])
    context = dit.context(dit.refine(texts), *SIZE)
    for i in range(3):
        alone = controlled(dit, "2.1", sigmas[i : i + 1])
        want = dit.velocity(x, dit.modulate(sigmas[i : i + 1]), context, [alone._replace(tokens=run.tokens)])
        assert relative_error(dit.velocity(x, modulation.step(i), context, [run.step(i)]), want) <= 1e-6


def test_one_picture_serves_a_batch(dit):
    sigma, (x, texts) = torch.tensor([0.7, 0.3]), (latents(), captions())
    both = controlled(dit, "2.1", sigma)
    one = both._replace(tokens=both.tokens[:1])
    twice = both._replace(tokens=both.tokens[:1].repeat(2, 1, 1))
    assert torch.equal(evaluate(dit, x, sigma, texts, one), evaluate(dit, x, sigma, texts, twice))
    with pytest.raises(RequestError, match=r"do not fit the image's \(2, 32, 64\); it must be of the same size"):
        evaluate(dit, x, sigma, texts, both._replace(tokens=torch.zeros(1, 64, 64)))


def test_gradients_reach_its_weights(dit):
    """Nothing in an evaluation is done in place, so that a ControlNet can be trained."""
    sigma, (x, texts) = torch.tensor([0.7, 0.3]), (latents(), captions())
    net = control_nets.net("2.1").requires_grad_(True)
    tokens = net.embed(control_nets.control_latents(FORMS["2.1"], 2, *SIZE), dit.x_pad_token)
    evaluate(dit, x, sigma, texts, Controlled(net, tokens, net.modulate(dit.time(sigma)))).square().mean().backward()
    silent = [name for name, weight in net.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert silent == []
