"""Normalised attention guidance: against its formula in float64, alone and in every way in which a DiT runs."""

import control_formulas
import control_nets
import pytest
import torch
from test_dit_model import inputs
from tiny import DIT, relative_error
from torch import Tensor

from zimage.dit.control import Controlled

LIMIT = 1e-5
WIDTH = DIT["cap_feat_dim"]


# ------------------------------------------------------------------ the formula


class Formula(control_formulas.Formula):
    """Where images see captions, z = s·z⁺ − (s − 1)·z⁻, cut at τ·‖z⁺‖₁, then α·z + (1 − α)·z⁺ for their tokens."""

    def __init__(self, config, weights, negative: Tensor, scale: float):
        super().__init__(config, weights)
        self.negative, self.scale, self.cut, self.rows = negative, scale, 0, 0

    def _text(self, caption):
        """Both captions; the negative one ends where the other does."""
        (text, turn, place), (away, _, _) = super()._text(caption), super()._text(self.negative)
        self.words, self.others = len(text), len(away)
        behind = self._turn([(place - len(away) + i, 0, 0) for i in range(len(away))])
        return torch.cat((text, away)), torch.cat((turn, behind)), place

    def _attention(self, w, name, x, turn):
        if not name.startswith(("layers", "control_layers")):
            return super()._attention(w, name, x, turn)
        joint = len(x) - self.others
        n = joint - self.words
        unprojected = {**w, f"{name}.to_out.0.weight": torch.eye(x.shape[-1], dtype=torch.float64)}
        toward = super()._attention(unprojected, name, x[:joint], turn[:joint])
        without = [*range(n), *range(joint, len(x))]
        away = super()._attention(unprojected, name, x[without], turn[without])
        image = [self._guided(*rows) for rows in zip(toward[:n], away[:n], strict=True)]
        return torch.cat((torch.stack(image), toward[n:], away[n:])) @ w[f"{name}.to_out.0.weight"].T

    def _guided(self, positive: Tensor, negative: Tensor) -> Tensor:
        z = self.scale * positive - (self.scale - 1) * negative
        length, limit = float(z.abs().sum()), 3.5 * float(positive.abs().sum())
        self.rows, self.cut = self.rows + 1, self.cut + (length > limit)
        return 0.5 * (z * limit / length if length > limit else z) + 0.5 * positive


def captions(*lengths: int, seed: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, WIDTH, generator=generator) for n in lengths]


def steered(dit, latents, sigma, prompts: list[Tensor], away: list[Tensor], scale: float, controls=()) -> Tensor:
    with torch.no_grad():
        context = dit.context_away(dit.refine(prompts), dit.refine(away), scale, *latents.shape[-2:])
        return dit.velocity(latents, dit.modulate(sigma), context, controls)


def plain(dit, latents: Tensor, sigma: Tensor, prompts: list[Tensor]) -> Tensor:
    with torch.no_grad():
        return dit.velocity(latents, dit.modulate(sigma), dit.context(dit.refine(prompts), *latents.shape[-2:]))


@pytest.fixture(scope="module")
def dit():
    return control_nets.dit()


@pytest.mark.parametrize("scale", [1.0, 2.0, 4.0, 30.0])
@pytest.mark.parametrize(("own", "other"), [(7, 40), (40, 7), (33, 64)], ids=str)
@pytest.mark.parametrize("size", [(6, 10), (8, 16)], ids=str)
def test_a_velocity_is_that_of_the_formula(dit, scale, own, other, size):
    """Captions of other padded lengths, images with pads and without, rows that are cut at τ and rows that are not."""
    (latents, sigma, _), (prompt, away) = inputs((7,), size), captions(own, other)
    formula = Formula(control_nets.DIT, dit.state_dict(), away, scale)
    wanted = formula.velocity(latents[0], float(sigma), prompt)
    assert relative_error(steered(dit, latents, sigma, [prompt], [away], scale)[0], wanted) <= LIMIT
    assert formula.cut in {1.0: (0,), 2.0: (0,), 30.0: (formula.rows,)}.get(scale, range(formula.rows))


@pytest.mark.parametrize("form", ["1.0", "2.1"])
def test_controlnets_see_what_the_layers_see(dit, form):
    (latents, sigma, _), (prompt, away) = inputs((7,)), captions(7, 40)
    net, shown = control_nets.net(form), torch.randn(1, control_nets.FORMS[form]["control_in_dim"], 6, 10)
    given = control_formulas.Given(control_nets.FORMS[form], net.state_dict(), shown[0], 0.7)
    wanted = Formula(control_nets.DIT, dit.state_dict(), away, 4.0).velocity(latents[0], float(sigma), prompt, [given])
    control = Controlled(net, net.embed(shown, dit.x_pad_token), net.modulate(dit.time(sigma)), 0.7)
    found = steered(dit, latents, sigma, [prompt], [away], 4.0, [control])
    assert relative_error(found[0], wanted) <= LIMIT
