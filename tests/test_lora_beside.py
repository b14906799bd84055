"""Adapters that change a layer's weight instead of adding a product, on layers of every kind: against float64."""

import json
from pathlib import Path

import loose
import lora_files as files
import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import Tensor

import zimage
from zimage.errors import CheckpointError
from zimage.formats.lora import LoraFile, read_lora
from zimage.loading.files import Component
from zimage.loading.loras import Adapter, bring
from zimage.nn.adapters import AdaptedLinear, linear_shapes, moved_norms, vector_sizes
from zimage.nn.branches import DenseBranch
from zimage.nn.deltas import Decomposed, LowRank
from zimage.nn.gain import gain
from zimage.nn.layers import WideningLinear
from zimage.nn.packed import PackedLinear, Scaled
from zimage.nn.quant import quantise

CPU = torch.device("cpu")
Q, ADA = "layers.0.attention.to_q", "layers.1.adaLN_modulation.0"  # without and with a bias
TOLERANCE = 1e-5  # fp32, of the largest value
STRENGTH = 0.7

# ------------------------------------------------------------------ the formulas, written out in float64


def low_rank(tensors: dict[str, Tensor]) -> Tensor:
    return tensors["lora_B.weight"].double() @ tensors["lora_A.weight"].double()


def dora(weight: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    moved, magnitude = weight + low_rank(tensors), tensors["dora_scale"].double()
    return magnitude * moved / moved.norm(dim=1 if magnitude.shape[1] == 1 else 0, keepdim=True)


def turned_inputs(weight: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    side, q = 16, torch.zeros(weight.shape[1] // 16, 16, 16, dtype=torch.float64)
    rows, columns = torch.triu_indices(side, side, 1)
    q[:, rows, columns] = tensors["oft_R.weight"].double()
    q = q - q.transpose(1, 2)
    r = torch.eye(side) + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q
    return weight @ torch.block_diag(*r).T


def turned_outputs(weight: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    q = tensors["oft_blocks"].double() - tensors["oft_blocks"].double().transpose(1, 2)
    one = torch.eye(q.shape[1], dtype=torch.float64)
    return tensors["rescale"].double() * (torch.block_diag(*(one + q) @ torch.linalg.inv(one - q)).T @ weight)


FORMULAS = {
    "dora of rows": dora,
    "dora of columns": dora,
    "inputs turned": turned_inputs,
    "outputs turned": turned_outputs,
    "difference": lambda weight, tensors: weight + tensors["diff"].double(),
}


def adapter(kind: str, shape: tuple[int, int], seed: int = 0) -> dict[str, Tensor]:
    (out, into), generator = shape, torch.Generator().manual_seed(seed)

    def random(*sides: int) -> Tensor:
        return torch.randn(sides, generator=generator)

    pair = {"lora_A.weight": random(4, into), "lora_B.weight": random(out, 4) / into**0.5}
    return {
        "dora of rows": pair | {"dora_scale": random(out, 1).abs() + 0.5},
        "dora of columns": pair | {"dora_scale": random(1, into).abs() + 0.5},
        "inputs turned": {"oft_R.weight": 0.1 * random(into // 16, 120)},
        "outputs turned": {"oft_blocks": 0.1 * random(out // 16, 16, 16), "rescale": random(out, 1).abs() + 0.5},
        "difference": {"diff": random(out, into) / into**0.5},
    }[kind]


# ------------------------------------------------------------------ layers of every kind


@pytest.fixture(scope="module")
def component_of(tmp_path_factory):
    """A DiT in a file of some kind, and the numbers that a reader finds in it; each is written once."""
    folder, made = tmp_path_factory.mktemp("kinds"), {}
    state = loose.states()["dit"]

    def call(kind: str) -> tuple[Component, dict[str, Tensor]]:
        if kind not in made:
            file = folder / f"{kind}.{'gguf' if kind.startswith('Q') else 'safetensors'}"
            made[kind] = (file, _write(file, kind, state))
        file, numbers = made[kind]
        return Component.open("dit", file), numbers

    return call


def _write(file: Path, kind: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    if kind == "bf16":
        loose.save(state, file)
        return state
    if kind.startswith("Q"):
        pytest.importorskip("gguf")
        numbers = loose.write_gguf(file, "lumina2", loose.renamed("dit", "native", state), kind, loose.is_matrix)
        return {name: value for key, value in numbers.items() for name, value in _canonical(key, value)}
    tensors, numbers = loose.quantised(state, getattr(loose, kind))
    loose.save(tensors, file)
    return numbers


def _canonical(key: str, value: Tensor) -> list[tuple[str, Tensor]]:
    if key.endswith("qkv.weight"):
        return [(key.replace("qkv", f"to_{part}"), rows) for part, rows in zip("qkv", value.chunk(3), strict=True)]
    key = key.replace("attention.out.", "attention.to_out.0.")
    return [(key.replace("final_layer", "all_final_layer.2-1").replace("x_embedder", "all_x_embedder.2-1"), value)]


def adapted(component: Component, path: str, *tensors: dict[str, Tensor], folder: Path, precision: str = "") -> tuple:
    """The DiT's layer at `path` without and with adapters, each at STRENGTH."""
    model = component.load(CPU, torch.float32, widen_late=precision == "late")
    if precision not in ("", "late"):
        quantise(model, precision)
    base = model.get_submodule(path)
    adapters = tuple(
        Adapter(f"{i}", STRENGTH, f"{i}", "", read(component, path, one, folder)) for i, one in enumerate(tensors)
    )
    bring(model, component, (), adapters, torch.float32, CPU)
    layer = model.get_submodule(path)
    assert isinstance(layer, AdaptedLinear)
    bring(model, component, adapters, (), torch.float32, CPU)
    assert model.get_submodule(path) is base
    return base, layer


def read(component: Component, path: str, tensors: dict[str, Tensor], folder: Path) -> LoraFile:
    file = files.write(folder / "a.safetensors", {f"{path}.{name}": value for name, value in tensors.items()})
    return read_lora(file, linear_shapes(component.skeleton), vector_sizes(component.skeleton))


KINDS = ["bf16", "lightx2v_fp8", "Q8_0", "Q4_0"]
OF_THE_TOOL = ["new_comfy_fp8", "int8_convrot", "nvfp4"]
CASES = [*((kind, Q) for kind in KINDS), ("bf16", ADA)]
CASES += [pytest.param(kind, Q, marks=loose.COMFY) for kind in OF_THE_TOOL]


@pytest.mark.parametrize("form", FORMULAS)
@pytest.mark.parametrize(("kind", "path"), CASES)
def test_beside_a_layer_as_the_formula_has_it(component_of, tmp_path, kind, form, path):
    """y = W′ · x + b with W′ in float64 from the decoded weights: W + s · (form(W) − W)."""
    component, numbers = component_of(kind)
    weight = numbers[f"{path}.weight"].double()
    tensors = adapter(form, weight.shape)
    base, layer = adapted(component, path, tensors, folder=tmp_path, precision="late" if kind == "bf16" else "")
    assert isinstance(base, WideningLinear if kind == "bf16" else PackedLinear)
    x = torch.randn(2, 5, weight.shape[1], generator=torch.Generator().manual_seed(1))
    bias = 0 if base.bias is None else base.bias.double()
    wanted = x.double() @ (weight + STRENGTH * (FORMULAS[form](weight, tensors) - weight)).T + bias
    error = (layer(x).double() - wanted).abs().max() / wanted.abs().max()
    assert error <= TOLERANCE
    assert (base(x).double() - wanted).abs().max() / wanted.abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize(("kind", "path"), [("lightx2v_fp8", Q), ("bf16", ADA)])
def test_all_forms_at_once_add_up(component_of, tmp_path, kind, path):
    component, numbers = component_of(kind)
    weight = numbers[f"{path}.weight"].double()
    every = {form: adapter(form, weight.shape, seed=i) for i, form in enumerate(FORMULAS)}
    late = "late" if kind == "bf16" else ""
    base, layer = adapted(component, path, *every.values(), folder=tmp_path, precision=late)
    total = weight + STRENGTH * sum(FORMULAS[form](weight, tensors) - weight for form, tensors in every.items())
    x = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(1))
    wanted = x.double() @ total.T + (0 if base.bias is None else base.bias.double())
    assert (layer(x).double() - wanted).abs().max() <= TOLERANCE * wanted.abs().max()


@pytest.mark.parametrize("form", FORMULAS)
def test_beside_products_in_int8(component_of, tmp_path, form):
    """The norms are of the file's weight, not of its rounding; what int8 gives for W · x is taken as it is."""
    component, numbers = component_of("bf16")
    weight = numbers[f"{Q}.weight"].double()
    tensors = adapter(form, weight.shape)
    base, layer = adapted(component, Q, tensors, folder=tmp_path, precision="int8")
    x = torch.randn(64, weight.shape[1], generator=torch.Generator().manual_seed(1))
    wanted = x.double() @ (weight + STRENGTH * (FORMULAS[form](weight, tensors) - weight)).T
    rounding = (base(x).double() - x.double() @ weight.T).norm() / wanted.norm()
    assert (layer(x).double() - wanted).norm() / wanted.norm() < 2 * rounding


@pytest.mark.parametrize("form", FORMULAS)
def test_the_gain_of_an_adapted_layer_is_bounded(component_of, tmp_path, form):
    """fp16 relies on it; and the bounds are not far from the norms of the matrix that the formula has."""
    component, numbers = component_of("lightx2v_fp8")
    weight = numbers[f"{Q}.weight"].double()
    tensors = adapter(form, weight.shape)
    _, layer = adapted(component, Q, tensors, folder=tmp_path)
    exact = weight + STRENGTH * (FORMULAS[form](weight, tensors) - weight)
    row, whole = gain(layer, CPU)
    assert exact.norm(dim=1).max() <= row * (1 + 1e-5) <= 64 * exact.norm(dim=1).max()
    assert exact.norm() <= whole * (1 + 1e-5) <= 64 * exact.norm()


def test_norms_are_computed_piece_by_piece(monkeypatch):
    """Whatever the size of the pieces; and no piece of a packed weight is larger than it may be."""
    decode, sizes = Scaled.decode, []
    monkeypatch.setattr(Scaled, "decode", lambda packed: sizes.append(packed.codes.numel()) or decode(packed))
    weight = torch.randn(96, 64, dtype=torch.float64).float()
    down, up = torch.randn(4, 64), torch.randn(96, 4)
    for magnitude in (torch.ones(96, 1), torch.ones(1, 64)):
        delta = Decomposed(LowRank((up, down)), magnitude)
        exact = (weight.double() + up.double() @ down.double()).norm(dim=1 if delta.per_row else 0, keepdim=True)
        for piece in (1, 64, 1000, 1 << 20):
            monkeypatch.setattr("zimage.nn.adapters.PIECE", piece)
            torch.testing.assert_close(moved_norms(weight, delta, CPU).double(), exact, rtol=1e-5, atol=0)
            sizes.clear()
            moved_norms(Scaled(torch.ones(96, 64, dtype=torch.int8), torch.ones(())), delta, CPU)
            assert sum(sizes) == 96 * 64
            assert max(sizes) <= max(piece, 64)
    zero = Decomposed(LowRank((torch.zeros(96, 4), down)), torch.ones(96, 1))
    assert (moved_norms(torch.zeros(96, 64), zero, CPU) > 0).all()


def test_only_a_difference_takes_the_memory_of_a_matrix(component_of, tmp_path):
    component, numbers = component_of("Q8_0")
    size = numbers[f"{Q}.weight"].numel()
    for form in FORMULAS:
        _, layer = adapted(component, Q, adapter(form, numbers[f"{Q}.weight"].shape), folder=tmp_path)
        own = [buffer for part in (layer.before, layer.branches, layer.after) for buffer in part.buffers()]
        dense = any(isinstance(module, DenseBranch) for module in layer.modules())
        assert dense == (form == "difference")
        assert sum(buffer.numel() for buffer in own) <= (size if dense else size / 8)


# ------------------------------------------------------------------ whole pipelines

SETTINGS = {"seed": 1, "steps": 2, "width": 64, "height": 48}


def pixels(pipe) -> bytes:
    return pipe.generate("a cat", **SETTINGS).images[0].tobytes()


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """Differences of every norm and bias, and each form on one layer."""
    tensors = files.differences(files.vectors(files.MODEL))
    for i, form in enumerate(FORMULAS):
        path = f"layers.1.attention.to_{'qkv'[i]}" if i < 3 else f"layers.0.feed_forward.w{i - 2}"
        form = "difference" if files.SHAPES[path][0] % 16 or files.SHAPES[path][1] % 16 else form
        tensors |= {f"{path}.{name}": value for name, value in adapter(form, files.SHAPES[path], seed=i).items()}
    return files.write(tmp_path_factory.mktemp("all") / "everything.safetensors", tensors)


@pytest.fixture
def stored(tiny_folder):
    return load_file(tiny_folder / "transformer" / "diffusion_pytorch_model.safetensors")


def test_vectors_are_merged_and_leave_the_very_parameters(tiny_folder, everything, stored):
    pipe = zimage.ZImage.load(tiny_folder, device="cpu", dtype="fp32", residency="keep")
    plain, before = pixels(pipe), dict(pipe.dit.named_parameters())
    handle = pipe.lora.add(everything, 0.5)
    given = files.vectors(files.MODEL)
    now = dict(pipe.dit.named_parameters())
    assert given.keys() < now.keys()
    for name, difference in given.items():
        assert torch.equal(now[name], stored[name] + 0.5 * difference), name
    assert pixels(pipe) != plain
    pipe.lora.set(handle, -1.5)
    assert torch.equal(pipe.dit.get_parameter("layers.0.attention.norm_q.weight").data, _moved(stored, given, -1.5))
    pipe.lora.remove(handle)
    after = dict(pipe.dit.named_parameters())
    assert all(torch.equal(after[name], stored[name]) for name in stored)
    assert all(after[name] is before[name] for name in given)
    assert pixels(pipe) == plain


def _moved(stored: dict[str, Tensor], given: dict[str, Tensor], strength: float) -> Tensor:
    name = "layers.0.attention.norm_q.weight"
    return stored[name].clone().add_(given[name], alpha=strength)


@pytest.mark.parametrize(
    "load",
    [
        {"precision": "int8"},
        {"precision": "fp8"},
        {"dtype": "bf16"},
        {"dtype": "fp16"},
        {"dtype": "fp16", "precision": "int8"},
        {"precision": "int8", "compile": True},
    ],
    ids=str,
)
def test_everything_on_every_kind_of_pipeline(tiny_folder, everything, load):
    """It changes the picture, is there again after a release, and leaves nothing behind."""
    pipe = zimage.ZImage.load(tiny_folder, **{"device": "cpu", "dtype": "fp32", **load})
    plain = pixels(pipe)
    handle = pipe.lora.add(everything)
    changed = pixels(pipe)
    pipe.release()
    again = pixels(pipe)
    assert changed != plain
    if "compile" not in load:
        assert again == changed
    pipe.lora.remove(handle)
    if "compile" not in load:
        assert pixels(pipe) == plain


def test_streamed_blocks_keep_their_vectors(tiny_folder, everything, monkeypatch):
    """A streamed norm's weight lies in its file: the changed one stays in memory, and the value comes back."""
    usual = zimage.ZImage.load(tiny_folder, device="cpu", dtype="fp32")
    component = usual.model.components["dit"]
    from zimage.loading.streaming import stream

    def picture(streamed: bool, adapters=()) -> Tensor:
        blocks = list(range(4)) if streamed else []
        model = component.load(CPU, torch.float32, streamed=blocks)
        if streamed:
            stream(model, blocks, CPU)
        bring(model, component, (), adapters, torch.float32, CPU)
        first = model(*inputs())
        bring(model, component, adapters, (), torch.float32, CPU)
        return torch.stack((first, model(*inputs())))

    one = Adapter("a", 0.5, "a", "", read_lora(everything, files.SHAPES, files.SIZES))
    plain = picture(streamed=False)
    resident, streamed = picture(False, (one,)), picture(True, (one,))
    assert torch.equal(resident[1], plain[1])
    assert torch.equal(streamed[1], plain[1])
    assert not torch.equal(resident[0], plain[0])
    torch.testing.assert_close(streamed[0], resident[0], rtol=0, atol=1e-4)


def inputs():
    generator = torch.Generator().manual_seed(94)
    caption = torch.randn(7, tiny.DIT["cap_feat_dim"], generator=generator)
    return torch.randn(1, 16, 4, 6, generator=generator), torch.tensor([0.7]), [caption]


def test_the_text_encoders_part_is_left_out_on_request(tiny_folder, tmp_path):
    tensors = {f"{Q}.diff": torch.ones(64, 64), "text_encoder.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(1)}
    file = files.write(tmp_path / "both.safetensors", tensors)
    load = {"device": "cpu", "dtype": "fp32", "lora": [str(file)]}
    with pytest.raises(CheckpointError, match="--lora-skip text_encoder"):
        zimage.ZImage.load(tiny_folder, **load)
    pipe = zimage.ZImage.load(tiny_folder, **load, lora_skip="text_encoder")
    assert list(pipe.lora.list()[0].file.deltas) == [Q]
    job = zimage.Job.from_dict(json.loads(json.dumps(pipe.prepare(zimage.Request(prompt="a", **SETTINGS)).to_dict())))
    assert sum(event.image is not None for event in pipe.run(job)) == 1
