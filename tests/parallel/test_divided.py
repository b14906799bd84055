"""Sequence parallelism: an evaluation on several ranks is that of one, to rounding, and its bits are always the same.

fp32: the largest error over the largest value is at most 1e-5. In 16 bits: the RMS error to fp32 over that of one rank
is at most 1.1.
"""

import ast
import contextlib
import functools
from collections.abc import Callable

import control_nets
import loose
import lora_files
import pytest
import renders
import torch
from renders import HEADS, WIDE
from safetensors.torch import load_file, save_file
from tiny import relative_error

from zimage.errors import RequestError
from zimage.loading.plan import Workload
from zimage.loading.work import dit_bytes
from zimage.parallel.divided import divided
from zimage.parallel.layout import shares

SIZES = (2, 3, 4, 5)
LIMIT = 1e-5
RATIO = 1.1


def velocities(
    pool, size: int, settings: renders.Settings, case: dict, draw: Callable = renders.drawn
) -> tuple[torch.Tensor, torch.Tensor]:
    """On several ranks and on one: a run of one step ends at noise − velocity."""
    plain = alone(settings, repr(case))
    first, *others = pool.run(size, draw, settings, case)
    assert all(bits == first[0] for bits, _ in others)  # every rank goes on with the same latents
    found = torch.frombuffer(bytearray(first[0]), dtype=torch.float32).view(plain.shape)
    noise = renders.noise(len(plain), case.get("size", renders.LATENTS))
    return noise - found, noise - plain


@functools.cache
def alone(settings: renders.Settings, case: str) -> torch.Tensor:
    """What one rank draws of a case that is written out."""
    return renders.latents(None, settings, **ast.literal_eval(case))


@pytest.fixture(scope="session")
def model(wide_folder):
    return (("path", str(wide_folder)),)


# ------------------------------------------------------------------ fp32, against one rank

CASES = {
    "one caption": {},
    "two captions of one length": {"lengths": (9, 9)},
    "two captions of unequal lengths": {"lengths": (9, 40)},
    "guidance": {"lengths": (9,), "negative": 40, "guidance": 3.5},
    "guidance of two": {"lengths": (9, 40), "negative": 70, "guidance": 3.5},
    "NAG": {"lengths": (9,), "negative": 40, "nag": 4.0},
    "NAG and guidance of two": {"lengths": (9, 40), "negative": 70, "nag": 4.0, "guidance": 3.5},
    "the least of tokens": {"lengths": (1,), "size": (2, 2)},
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES)
def test_an_evaluation_is_that_of_one_rank(pool, model, size, case):
    assert relative_error(*velocities(pool, size, model, CASES[case])) <= LIMIT


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("flow", ["publisher", "diffusers"])
def test_with_controlnets(pool, model, wide_folder, size, flow):
    """One file of every form, and a second picture for one of them."""
    nets = [(str(wide_folder / "nets" / form), _channels(form)) for form in (*control_nets.FORMS, "2.1")]
    case = {"lengths": (9, 40), "nets": nets, "control_flow": flow}
    assert relative_error(*velocities(pool, size, model, case)) <= LIMIT


def _channels(form: str) -> int:
    return control_nets.FORMS[form]["control_in_dim"]


@pytest.fixture(scope="session")
def lora(tmp_path_factory):
    """Factors for every matrix of every block."""
    tensors, generator = {}, torch.Generator().manual_seed(7)
    for path, (rows, columns) in lora_files.linear_shapes(control_nets.dit(**WIDE)).items():
        if path.startswith(("layers", "noise_refiner")):
            tensors[f"transformer.{path}.lora_A.weight"] = torch.randn(4, columns, generator=generator) / columns**0.5
            tensors[f"transformer.{path}.lora_B.weight"] = torch.randn(rows, 4, generator=generator) / 4
    return lora_files.write(tmp_path_factory.mktemp("loras") / "every.safetensors", tensors)


@pytest.fixture(scope="session")
def packed(wide_folder, tmp_path_factory):
    """The model with matrices in fp8 and scales beside them."""
    folder = tmp_path_factory.mktemp("models") / "packed"
    folder.mkdir()
    for part in wide_folder.iterdir():
        (folder / part.name).symlink_to(part)
    (folder / "transformer").unlink()
    (folder / "transformer").mkdir()
    name = "diffusion_pytorch_model.safetensors"
    (folder / "transformer" / "config.json").symlink_to(wide_folder / "transformer" / "config.json")
    stored, _ = loose.quantised(load_file(wide_folder / "transformer" / name), loose.lightx2v_fp8)
    save_file(stored, folder / "transformer" / name)
    return (("path", str(folder)),)


QUANTISED = [(kind, size) for kind in ("packed", "int8", "beside int8") for size in (3, 5)]


@pytest.mark.parametrize(
    ("kind", "size"), [*((kind, size) for kind in ("merged", "beside packed") for size in SIZES), *QUANTISED]
)
def test_with_adapters_and_quantised_layers(pool, model, packed, lora, size, kind):
    settings = packed if "packed" in kind else model
    if "int8" in kind:
        settings += (("precision", "int8"),)
    if kind == "merged" or "beside" in kind:
        settings += (("lora", (f"{lora}:0.7",)),)
    case = {"lengths": (9, 40)}
    ours, plain = velocities(pool, size, settings, case)
    assert relative_error(ours, plain) <= LIMIT
    assert relative_error(plain, renders.noise(2) - renders.latents(None, model, **case)) > 1e-3  # it does something


@pytest.mark.parametrize("size", [3, 5])
def test_whole_runs(pool, model, wide_folder, size):
    assert relative_error(*velocities(pool, size, model, whole_run(wide_folder))) <= LIMIT


def whole_run(wide_folder) -> dict:
    """Six steps with guidance that ends before the run does, normalised, and a ControlNet that has a say in some."""
    return {
        "lengths": (9, 40),
        "negative": 12,
        "steps": 6,
        "guidance": 3.0,
        "cfg_truncation": 0.7,
        "cfg_normalization": 1.0,
        "nets": [(str(wide_folder / "nets" / "2.1"), 33)],
        "control_end": 0.6,
    }


# ------------------------------------------------------------------ guidance on two halves of the ranks

GUIDED = {
    "one": {"lengths": (9,), "negative": 40, "guidance": 3.5},
    "two, normalised": {"lengths": (9, 40), "negative": 70, "guidance": 3.5, "cfg_normalization": 0.5},
    "projected": {
        **{"lengths": (9, 40), "negative": 12, "guidance": 3.5, "steps": 4, "cfg_truncation": 0.6},
        "guidance_method": "apg:threshold=3,momentum=0.5",
    },
    "from zero": {"lengths": (9,), "negative": 40, "guidance": 3.5, "steps": 3, "guidance_method": "cfg_zero"},
    "with layers skipped": {
        **{"lengths": (9, 40), "negative": 12, "guidance": 3.5, "steps": 4, "cfg_truncation": 0.6},
        "guidance_method": "slg:layers=1,start=0,stop=1",
    },
    "off": {"lengths": (9, 40)},
}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("case", GUIDED)
def test_guidance_on_halves(pool, model, size, case):
    assert relative_error(*velocities(pool, size, model, GUIDED[case], renders.drawn_in_halves)) <= LIMIT


@pytest.mark.parametrize("size", [2, 4])
def test_whole_runs_on_halves(pool, model, wide_folder, size):
    run = whole_run(wide_folder)
    assert relative_error(*velocities(pool, size, model, run, renders.drawn_in_halves)) <= LIMIT


def test_halves_of_one_rank_give_its_bits(pool, model):
    case = {"lengths": (9,), "negative": 40, "guidance": 3.5, "steps": 3}
    ours, plain = velocities(pool, 2, model, case, renders.drawn_in_halves)
    assert torch.equal(ours, plain)


def test_bytes_on_halves(pool, model):
    """Three steps, guided but for the last, in which both halves evaluate the prompt and exchange nothing."""
    case = {"lengths": (9,), "negative": 40, "guidance": 2.0, "steps": 3, "cfg_truncation": 0.3}
    answers = pool.run(4, renders.drawn_in_halves, model, case)
    found = {kind: sum(counts.get(kind, 0) for _, counts in answers) for kind in ("attention", "patches", "guidance")}
    positive, negative = (sent(2, 4, 1, [(64,)] * 2 + [(64, caption)] * 5, 35) for caption in (32, 64))
    expected = {kind: 4 * positive[kind] + 2 * negative[kind] for kind in positive}
    assert found == {**expected, "guidance": 4 * 2 * 16 * 10 * 14 * 4}


def test_an_odd_number_of_ranks_has_no_halves(pool, model):
    with pytest.raises(RequestError, match=r"even number of ranks.* not 3"):
        pool.run(3, renders.drawn_in_halves, model, GUIDED["one"])


# ------------------------------------------------------------------ 16 bits


@pytest.mark.parametrize("size", [2, 5])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_in_16_bits_it_is_as_near_as_one_rank(pool, model, size, dtype):
    case = {"lengths": (9, 40)}
    ours, plain = velocities(pool, size, (*model, ("dtype", dtype)), case)
    exact = renders.noise(2) - renders.latents(None, model, **case)
    assert (ours - exact).norm() <= RATIO * (plain - exact).norm()


# ------------------------------------------------------------------ the same bits, whatever the timing


def test_bits_do_not_depend_on_timing(pool, model, wide_folder):
    case = {"lengths": (9, 40), "negative": 12, "guidance": 3.0, "nets": [(str(wide_folder / "nets" / "2.0"), 33)]}
    for size, draw in ((3, renders.drawn), (5, renders.drawn), (4, renders.drawn_in_halves)):
        runs = [pool.run(size, draw, model, case, delays) for delays in (0, 1, 2)[: 3 if size == 3 else 2]]
        assert all(bits == runs[0][0][0] for run in runs for bits, _ in run)


# ------------------------------------------------------------------ bytes


def sent(size: int, element: int, batch: int, blocks: list[tuple[int, ...]], image: int) -> dict[str, int]:
    """What all ranks send in an evaluation: by the segments of each block, and the image tokens without pads."""
    heads, width = shares(HEADS, size), WIDE["dim"] // HEADS
    moved = 0
    for segments in blocks:
        for rank in range(size):
            tokens = sum(shares(segment, size)[rank] for segment in segments)
            moved += 4 * batch * width * tokens * (HEADS - heads[rank])
    return {"attention": moved * element, "patches": (size - 1) * batch * image * 64 * element}


@pytest.mark.parametrize(("dtype", "element", "size"), [*(("fp32", 4, n) for n in (1, *SIZES)), ("bf16", 2, 5)])
def test_bytes_are_those_of_the_formula(pool, model, size, dtype, element):
    """Two blocks of the noise refiner and five joint ones; two images of 35 tokens, or 64 with pads, and captions."""
    answers = pool.run(size, renders.drawn, (*model, ("dtype", dtype)), {"lengths": (9, 40)})
    found = {kind: sum(counts.get(kind, 0) for _, counts in answers) for kind in ("attention", "patches")}
    assert found == sent(size, element, 2, [(64,)] * 2 + [(64, 64)] * 5, 35)


def test_bytes_with_guidance_and_a_controlnet(pool, model, wide_folder):
    """Form 2.1 has two blocks along the noise refiner and three along the layers, in both evaluations of a step."""
    nets = [(str(wide_folder / "nets" / "2.1"), 33)]
    case = {"lengths": (9,), "negative": 40, "guidance": 2.0, "steps": 3, "nets": nets}
    answers = pool.run(4, renders.drawn, model, case)
    found = {kind: sum(counts.get(kind, 0) for _, counts in answers) for kind in ("attention", "patches")}
    branches = [sent(4, 4, 1, [(64,)] * 4 + [(64, caption)] * 8, 35) for caption in (32, 64)]
    assert found == {kind: 3 * sum(branch[kind] for branch in branches) for kind in found}


# ------------------------------------------------------------------ work


@pytest.mark.parametrize("size", SIZES)
def test_nothing_is_computed_twice(pool, model, size):
    settings = (*model, ("attention", "sdpa-math"))  # whose products can be counted
    whole, parts = renders.operations(None, settings), pool.run(size, renders.operations, settings)
    assert sum(parts) == whole
    assert max(parts) <= 1.3 * whole / size


@pytest.mark.parametrize("size", [2, 3])
def test_memory_is_shared(pool, model, wide_folder, size):
    """What a rank holds in an evaluation is its share, as that of the heads is, and no more than the plan expects."""
    file, side, tokens = str(wide_folder / "nets" / "2.1"), 64, 100
    alone = renders.peak(None, model, file, side, tokens)
    found = max(pool.run(size, renders.peak, model, file, side, tokens))
    config, work = control_nets.dit(**WIDE).config, Workload(8 * side, 8 * side, tokens, ranks=size, control_streams=1)
    own = (side // 2) ** 2 * config.dim * 4  # the control's tokens were there before
    assert found <= 1.05 * alone / size
    assert found <= dit_bytes(config, work, torch.float32) - own


# ------------------------------------------------------------------ before and afterwards


def replayed(*arguments):
    raise AssertionError("CUDA graphs cannot wait for other ranks")


def put_back(ranks, settings) -> None:
    """Whatever happens in an evaluation, the module is what it was: its own attention, CUDA graphs if it has any."""
    pipe = renders.pipeline(settings)
    dit, text = pipe.dit, renders.captions(64, (9,))
    vars(dit)["velocity"] = replayed
    before = [dict(vars(module)) for module in dit.modules()]
    for size in ((4, 4), (5, 4)):  # an odd side is refused inside
        with divided(ranks, "dit", dit), contextlib.suppress(RequestError):
            dit(torch.zeros(1, 16, *size), torch.ones(1), text)
    assert [dict(vars(module)) for module in dit.modules()] == before
    with pytest.raises(AssertionError, match="CUDA graphs"):
        dit(torch.zeros(1, 16, 4, 4), torch.ones(1), text)
    del vars(dit)["velocity"]


def test_afterwards_the_module_is_what_it_was(pool, model):
    pool.run(2, put_back, model)


def told_apart(ranks, settings) -> bool:
    dit = renders.pipeline(settings).dit
    with divided(ranks, "dit", dit):
        return "velocity" in vars(dit)


def test_a_single_rank_is_left_as_it_is(pool, model):
    assert pool.run(1, told_apart, model) == [False]
    assert pool.run(2, told_apart, model) == [True, True]


# ------------------------------------------------------------------ too many ranks


def test_more_ranks_than_heads(pool, tiny_folder):
    with pytest.raises(RequestError, match=r"has 2 heads .* over 3 ranks; use at most 2") as caught:
        pool.run(3, renders.drawn, (("path", str(tiny_folder)),), {})
    assert caught.value.fields == ("gpus",)
