"""Normalised attention guidance: against its formula in float64, alone and in every way in which a DiT runs."""

import functools

import control_formulas
import control_nets
import lora_files
import numpy as np
import pytest
import torch
from PIL import Image
from test_control_files import peak_of
from test_dit_model import inputs
from tiny import DIT, relative_error
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import zimage
from bench.weights import COMPONENTS
from zimage.dit import ZImageDiT
from zimage.dit.control import Controlled
from zimage.dit.nag import Nag, guided, unit_of
from zimage.errors import RequestError
from zimage.loading.plan import Workload
from zimage.loading.work import dit_bytes
from zimage.nn.attention import attention, use_attention
from zimage.nn.compile import compile_blocks
from zimage.pictures.image import to_pil
from zimage.render.state import RenderState
from zimage.weights.recipe.judge import find

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


# ------------------------------------------------------------------ what must hold of it


def test_scale_one_is_the_velocity_without(dit):
    """By the same path: z = z⁺, which no norm cuts."""
    (latents, sigma, _), (prompt, away) = inputs((7,)), captions(7, 40)
    found = steered(dit, latents, sigma, [prompt], [away], 1.0)
    assert relative_error(found, plain(dit, latents, sigma, [prompt])) <= 1e-6


@pytest.mark.parametrize("scale", [4.0, 100.0])
def test_nothing_leads_away_from_the_prompt_itself(dit, scale):
    (latents, sigma, _), (prompt,) = inputs((7,)), captions(40)
    found = steered(dit, latents, sigma, [prompt], [prompt], scale)
    assert relative_error(found, plain(dit, latents, sigma, [prompt])) <= LIMIT


@pytest.mark.parametrize(("own", "other"), [(7, 40), (70, 7)], ids=str)
def test_the_negative_caption_stands_where_it_would_alone(own, other):
    """In the first layer its attention, and the image's to it, are those of an evaluation of its own."""
    dit, (latents, sigma, _), given = control_nets.dit(n_layers=1), inputs((7,), (8, 16)), captions(own, other)
    seen: list[Tensor] = []

    def watched(q: Tensor, k: Tensor, v: Tensor, padding=None) -> Tensor:
        seen.append(attention(q, k, v, padding))
        return seen[-1]

    use_attention(dit.layers, watched)
    steered(dit, latents, sigma, given[:1], given[1:], 4.0)
    for caption in given:
        plain(dit, latents, sigma, [caption])
    away, toward, alone, other_alone = seen
    assert relative_error(toward, alone) <= LIMIT
    assert relative_error(away, other_alone) <= LIMIT


LENGTHS = {"unequal": ((7, 40, 90), (40, 7, 64)), "of one length, other": ((7, 9, 11), (40, 7, 70))}
LENGTHS |= {"negative ones of one length": ((7, 40, 90), (5, 5, 9)), "all of one length": ((7, 9, 11), (5, 5, 9))}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_a_batch_gives_what_each_gives_alone(dit, lengths):
    own, others = lengths
    (latents, sigma, _), prompts, away = inputs(own), captions(*own), captions(*others, seed=6)
    together = steered(dit, latents, sigma, prompts, away, 4.0)
    for i in range(len(own)):
        one = slice(i, i + 1)
        alone = steered(dit, latents[one], sigma[one], prompts[one], away[one], 4.0)
        assert relative_error(together[one], alone) <= LIMIT


def test_a_token_whose_attention_is_zero_stays_so():
    assert torch.equal(guided(torch.zeros(1, 3), torch.zeros(1, 3), torch.tensor(4.0)), torch.zeros(1, 3))


def test_sixteen_bits_are_guided_in_fp32():
    positive, negative = torch.randn(2, 64, 96).bfloat16()
    scale = torch.tensor(8.0)
    found = guided(positive, negative, scale)
    assert found.dtype == torch.float32
    assert relative_error(found, guided(positive.double(), negative.double(), scale)) <= 1e-6


def test_a_scale_is_not_rounded_to_sixteen_bits():
    """Of bfloat16 the nearest one is 4.09375."""
    refined = torch.zeros(32, 8, dtype=torch.bfloat16)
    model = control_nets.dit(dim=8, n_heads=1, n_kv_heads=1, axes_dims=[4, 2, 2]).bfloat16()
    assert model.context_away([refined], [refined], 4.1, 6, 10).seen.scale == torch.tensor(4.1)


def test_fp16_holds_the_output_in_a_unit():
    """τ lets it be 2.25 times as long as what each attention gives, which reaches ±30,000 here."""
    n, heads = 32, (1, 32)
    v = torch.cat([value * torch.ones(1, n, *heads) for value in (0.0, 30_000.0, -30_000.0)], dim=1).half()
    q, k = torch.ones_like(v), torch.ones_like(v)
    k[:, :n] = -4  # the image sees captions only
    scale, unit = torch.tensor(8.0), unit_of(8.0)
    found = Nag(scale, n, n, None, None, unit).attend(attention, q, k, v)
    assert relative_error(found[:, :n].float() * unit, torch.full((1, n, 32), 2.25 * 30_000)) <= 1e-3
    assert found[:, n:].mul(unit).abs().float().allclose(torch.tensor(30_000.0), rtol=1e-3)
    assert Nag(scale, n, n, None, None).attend(attention, q, k, v)[:, :n].isinf().all()


def test_a_backend_may_write_over_its_inputs(dit):
    """As SageAttention does: the image's keys are needed twice."""
    (latents, sigma, _), (prompt, away) = inputs((7,)), captions(7, 40)
    wanted, other = steered(dit, latents, sigma, [prompt], [away], 4.0), control_nets.dit()

    def greedy(q: Tensor, k: Tensor, v: Tensor, padding=None) -> Tensor:
        out = attention(q, k, v, padding).clone()
        for given in (q, k, v):
            given.fill_(torch.nan)
        return out

    use_attention(other.layers, greedy)
    assert torch.equal(steered(other, latents, sigma, [prompt], [away], 4.0), wanted)


def test_compiled_blocks_serve_other_lengths_and_scales(monkeypatch):
    """Sizes and captions of other lengths are symbols after the second of them; a scale is an input."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    model, compiled = control_nets.dit(), control_nets.dit()
    compile_blocks(compiled)
    counted, graphs = torch._dynamo.utils.counters, []
    counted.clear()
    for own, other, size, scale in ((7, 40, (6, 10), 4.0), (40, 7, (10, 16), 4.0), (70, 100, (8, 8), 2.5)):
        (latents, sigma, _), (prompt, away) = inputs((7,), size), captions(own, other)
        found = steered(compiled, latents, sigma, [prompt], [away], scale)
        assert relative_error(found, steered(model, latents, sigma, [prompt], [away], scale)) <= LIMIT
        graphs.append(counted["stats"]["unique_graphs"])
    assert graphs[1] == graphs[2]
    assert not counted["graph_break"]


# ------------------------------------------------------------------ cost


def flops(dit: ZImageDiT, side: int, tokens: int, away: int) -> int:
    """Of products in one evaluation at side × side pixels; nothing is computed."""
    latents, sigma = (torch.zeros(size, device="meta") for size in ((1, 16, side // 8, side // 8), (1,)))
    prompt, negative = (torch.zeros(n, dit.config.dim, device="meta") for n in (tokens, away))
    context = dit.context([prompt], *latents.shape[2:])
    if away:
        context = dit.context_away([prompt], [negative], 4.0, *latents.shape[2:])
    with FlopCounterMode(display=False) as counter:
        dit.velocity(latents, dit.modulate(sigma), context)
    return counter.get_total_flops()


def test_a_step_of_the_published_model_costs_less_than_a_third_more():
    """At 1024 × 1024, where guidance costs as much again."""
    with torch.device("meta"):
        dit = ZImageDiT.from_config(COMPONENTS["transformer"][1])
    assert 1.1 < flops(dit, 1024, 96, 64) / flops(dit, 1024, 96, 0) <= 1.2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("batch", "side", "own", "other"), [(1, 48, 32, 32), (2, 16, 100, 200)])
@torch.no_grad()
def test_the_memory_is_planned(dtype, batch, side, own, other):
    dit = control_nets.dit(dim=384, n_heads=3, n_kv_heads=3, axes_dims=[32, 48, 48]).to(dtype)
    latents, modulation = torch.randn(batch, 16, side, side), dit.modulate(torch.tensor([0.7]))
    refined = [[torch.randn(-(-n // 32) * 32, 384).to(dtype)] * batch for n in (own, other)]
    context = dit.context_away(*refined, 4.0, side, side)
    work = Workload(8 * side, 8 * side, own, batch, nag_tokens=other)
    planned, peak = dit_bytes(dit.config, work, dtype), peak_of(lambda: dit.velocity(latents, modulation, context))
    assert peak <= planned <= 1.2 * peak


# ------------------------------------------------------------------ whole renders

SMALL = {"prompt": "a cat", "seed": 1, "width": 64, "height": 48, "steps": 3}
AWAY = {**SMALL, "nag": 4.0, "negative": "a dog, or two " * 6}
KINDS = {
    "guidance": {"guidance": 3.0, "cfg_truncation": 0.6},
    "unequal captions": {"prompt": ["a cat", "a cat " * 20], "images": 2, "batch_size": 3},
    "from a picture": {"image": Image.new("RGB", (64, 48), "teal"), "strength": 0.7},
    "behind a mask": {"image": Image.new("RGB", (64, 48), "teal"), "mask": Image.new("L", (64, 48), 255)},
    "two passes": {"hires": 1.5, "strength": 0.7},
    "variety": {"variety": 1.0},
    "another sampler": {"sampler": "heun"},
}


def bits(result) -> list[bytes]:
    return [image.tobytes() for image in result.images]


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_it_acts_in_renders_of_every_kind(pipe, kind):
    found, without = pipe.generate(**{**AWAY, **kind}), pipe.generate(**{**SMALL, **kind})
    assert all(a != b for a, b in zip(bits(found), bits(without), strict=True))
    assert found.metadata[0]["request"]["nag"] == 4.0


def test_off_it_builds_nothing_and_changes_no_bit(pipe, monkeypatch):
    usual = bits(pipe.generate(**SMALL))
    monkeypatch.setattr(ZImageDiT, "context_away", None)
    assert bits(pipe.generate(**SMALL, nag=1.0)) == usual
    job = pipe.prepare(zimage.Request.from_mapping({**SMALL, "nag": 1.0}))
    assert (job.negative_texts, job.plan.work.nag_tokens) == ((), 0)


def test_a_negative_prompt_needs_it_or_guidance(pipe):
    with pytest.raises(RequestError, match="pass a guidance above 0 or a nag above 1, or leave it out") as caught:
        pipe.prepare(zimage.Request.from_mapping({**SMALL, "negative": "a dog", "nag": 1.0}))
    assert caught.value.fields == ("negative", "guidance", "nag")
    job = pipe.prepare(zimage.Request.from_mapping(AWAY))
    assert job.plan.work.nag_tokens == len(job.token_ids[job.negative_texts[0]])
    empty = pipe.prepare(zimage.Request.from_mapping({**SMALL, "nag": 4.0}))
    assert empty.request.negative == ""
    assert bits(pipe.generate(**AWAY)) != bits(pipe.generate(**SMALL, nag=4.0))


def test_stages_by_themselves(pipe):
    caption, away = pipe.encode(["a cat", AWAY["negative"]])
    noise = zimage.flow.start_noise(1, 16, 6, 8)
    image = pipe.decode(pipe.denoise([caption], noise, steps=3, nag=4.0, negative=[away]))
    (expected,) = pipe.generate(**AWAY).images
    assert expected.tobytes() == to_pil(image)[0].tobytes()
    empty = pipe.denoise([caption], noise, steps=3, nag=4.0)
    assert torch.equal(empty, pipe.denoise([caption], noise, steps=3, nag=4.0, negative=pipe.encode([""])))
    with pytest.raises(RequestError, match=r"as many negative captions \(2\) as captions \(1\)"):
        pipe.denoise([caption], noise, nag=4.0, negative=[away, away])
    with pytest.raises(RequestError, match="nag"):
        pipe.denoise([caption], noise, nag=0.5)


@pytest.mark.parametrize("step", [1, 2])
def test_a_run_goes_on_to_the_same_bits(pipe, step):
    job, state = pipe.prepare(zimage.Request.from_mapping(AWAY)), RenderState()
    for event in pipe.run(job):
        state.update(event)
        if event.stage == "denoise" and event.step == step:
            break
    (image,) = [event.image for event in pipe.run(job, state) if event.image is not None]
    assert [image.tobytes()] == bits(pipe.generate(**AWAY))


def test_streamed_blocks_give_the_same_bits(tiny_folder, pipe, monkeypatch):
    for name in ("_held_bytes", "_base_bytes"):
        monkeypatch.setattr(f"zimage.loading.planner.{name}", lambda device: 0)
    request = zimage.Request.from_mapping(AWAY)
    load = {"path": tiny_folder, "device": "cpu", "dtype": "fp32"}
    least = zimage.ZImage.load(**load, memory=1e-9).prepare(request, must_fit=False).plan.tightest.peak
    low = zimage.ZImage.load(**load, memory=1.05 * least / 1e9)
    assert low.prepare(request).plan.stages["dit"].streamed
    assert bits(low.generate(**AWAY)) == bits(pipe.generate(**AWAY))


def test_int8_products_and_adapters(tiny_folder, tmp_path):
    """Quantised, it stays nearer its own picture than the one without; an adapter acts in it, and is gone again."""
    plain, coarse = (zimage.ZImage.load(tiny_folder, device="cpu", dtype="fp32", precision=p) for p in ("bf16", "int8"))
    caption, away = plain.encode(["a cat", AWAY["negative"]])

    def latents(pipe: zimage.ZImage, nag: float = 4.0) -> Tensor:
        return pipe.denoise([caption], zimage.flow.start_noise(1, 16, 6, 8), steps=3, nag=nag, negative=[away])

    wanted = latents(plain)
    assert (latents(coarse) - wanted).norm() * 3 < (latents(plain, 1.0) - wanted).norm()
    factors = lora_files.factors([f"layers.{i}.attention.{name}" for i in (0, 1) for name in ("to_q", "to_out.0")])
    handle = plain.lora.add(lora_files.write(tmp_path / "style.safetensors", lora_files.NAMINGS["kohya"](factors)))
    assert not torch.equal(latents(plain), wanted)
    plain.lora.remove(handle)
    assert torch.equal(latents(plain), wanted)


def test_the_demo_gives_up_the_background_that_is_named():
    """What a prompt leaves open and its seed decides; the object stays."""
    pipe, seen = zimage.ZImage.load(device="cpu"), {1.0: [], 2.0: []}
    for k, name in enumerate(("cat", "dog", "banana", "owl")):
        drawn = {"prompt": f"{'an' if name == 'owl' else 'a'} {name}", "seed": 50 + k, "steps": 8}
        for nag in seen:
            away = {"nag": nag, "negative": f"a {seen[1.0][-1].background} background"} if nag > 1 else {}
            pixels = torch.from_numpy(np.array(pipe.generate(**drawn, **away).images[0]))
            seen[nag].append(find(pixels.permute(2, 0, 1) / 127.5 - 1, 1))
    plain, steered = seen.values()
    assert all(finding.clean for finding in plain)
    assert sum(a.background == b.background for a, b in zip(plain, steered, strict=True)) <= 1
    assert sum(a.objects[0].name == b.objects[0].name for a, b in zip(plain, steered, strict=True)) >= 3
