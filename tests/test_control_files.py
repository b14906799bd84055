"""ControlNets in files: recognised by their keys, loaded strictly, quantised, streamed beside, bounded in memory."""

import json
import re
from functools import partial
from pathlib import Path

import control_nets
import loose
import pytest
import tiny
import torch
from control_nets import FORMS, PUBLISHED
from safetensors.torch import load_file
from taped import Tapes
from test_control import SIZE, captions, controlled, evaluate, latents
from tiny import arguments
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import zimage
from zimage.dit import ControlNet, ZImageDiT
from zimage.dit.control import Controlled
from zimage.dit.replay import replay_velocity
from zimage.errors import CheckpointError, ConfigError, RequestError
from zimage.formats.stored import Maps, Stored
from zimage.loading.files import Component
from zimage.loading.infer import architecture
from zimage.loading.plan import Workload
from zimage.loading.registry import CONTROL
from zimage.loading.streaming import stream, streamed_blocks
from zimage.loading.work import control_bytes
from zimage.nn.compile import compile_blocks
from zimage.weights.convert import convert
from zimage.weights.verify import verify

CPU = torch.device("cpu")
COUNTS = {"1.0": 6, "2.0": 15, "2.1": 15, "lite": 3}  # of control layers, by which a loose file is told
PLACES = {form: config["control_layers_places"] for form, config in PUBLISHED.items()}


def loose_config(form: str, **changes):
    """As published, but for its width."""
    return {**FORMS[form], "control_layers_places": PLACES[form], **changes}


def state(form: str, **changes) -> dict[str, torch.Tensor]:
    """The tensors of a file as it is published: 2.0's has a refiner whose projections are zeros."""
    config = loose_config(form, **changes)
    if form == "2.0":
        config = {**config, "add_control_noise_refiner": "control_noise_refiner"}
    tensors = dict(tiny.randomised(ControlNet.from_config(config), 7).state_dict())
    if form == "2.0":
        untrained = [key for key in tensors if re.match(r"control_noise_refiner\.\d\.(before|after)_proj", key)]
        tensors |= {key: torch.zeros_like(tensors[key]) for key in untrained}
    return {key: value.bfloat16() for key, value in tensors.items()}


def used(form: str, tensors):
    return {k: v for k, v in tensors.items() if form != "2.0" or not k.startswith("control_noise_refiner.")}


def same(model: torch.nn.Module, tensors) -> bool:
    ours = model.state_dict()
    return ours.keys() == tensors.keys() and all(torch.equal(ours[key], tensors[key].float()) for key in ours)


def ones(shape: torch.Size, maps: Maps) -> torch.Tensor:
    """What is read of a file of ones, in the memory of one."""
    return torch.ones(1).expand(shape)


# ------------------------------------------------------------------ which file is which


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("naming", "prefix"), [("diffusers", ""), ("native", "model.diffusion_model.")])
def test_loose_files(form, naming, prefix, tmp_path):
    tensors = state(form)
    file = loose.save(loose.renamed("control", naming, tensors, prefix), tmp_path / "control.safetensors")
    model = zimage.load_component(file, "control", dtype="fp32")
    want = {**loose_config(form), "control_refiner_layers_places": FORMS[form]["control_refiner_layers_places"] or []}
    assert model.config == ControlNet.from_config(want).config
    assert same(model, used(form, tensors))


@pytest.mark.parametrize("form", FORMS)
def test_folders(form, tmp_path):
    """Of diffusers; 2.0's has no untrained refiner, but may be given one."""
    tensors = state(form)
    (tmp_path / "config.json").write_text(json.dumps(loose_config(form)))
    for given in (tensors, used(form, tensors)):
        loose.save(given, tmp_path / "diffusion_pytorch_model.safetensors")
        assert same(zimage.load_component(tmp_path, "control", dtype="fp32"), used(form, tensors))


def test_a_converted_2_0_needs_no_untrained_refiner(tmp_path):
    file = loose.save(used("2.0", state("2.0")), tmp_path / "x.safetensors")
    assert zimage.load_component(file, "control").config.add_control_noise_refiner == "control_layers"


def test_a_tile_control_is_one_of_these_forms(tmp_path):
    """Its keys are 2.1's; its input's width is read from its embedder."""
    file = loose.save(state("lite", control_in_dim=16), tmp_path / "tile.safetensors")
    assert zimage.load_component(file, "control").config.control_in_dim == 16


def test_a_dit_and_its_control_in_one_file(tmp_path):
    """Each component takes its own tensors, and no others."""
    dit = {**loose.DIT, "dim": 256, "n_heads": 2, "n_kv_heads": 2}
    own = {key: value.bfloat16() for key, value in tiny.randomised(ZImageDiT.from_config(dit), 3).state_dict().items()}
    tensors = state("lite", dim=256, n_heads=2, n_kv_heads=2)
    file = loose.save(own | tensors, tmp_path / "both.safetensors")
    assert same(zimage.load_component(file, "control", dtype="fp32"), tensors)
    assert same(zimage.load_component(file, "dit", dtype="fp32"), own)
    file = loose.save(own | tensors | {"control_extra": torch.ones(2)}, tmp_path / "more.safetensors")
    with pytest.raises(CheckpointError, match="1 tensors unexpected: control_extra"):
        zimage.load_component(file, "control")


@pytest.mark.parity
@pytest.mark.parametrize("form", PUBLISHED)
def test_full_size_key_lists(form):
    """diffusers' model as published, built on meta: its keys and shapes tell our config, and are ours."""
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        theirs = diffusers.ZImageControlNetModel(**arguments(PUBLISHED[form])).state_dict()
        ours = ControlNet.from_config(PUBLISHED[form])
    assert len(theirs) == {"1.0": 136, "2.0": 259, "2.1": 295, "lite": 91}[form]
    ours.load_state_dict(theirs, assign=True)
    entries = {
        key: Stored(tuple(value.shape), "BF16", 2 * value.numel(), partial(ones, value.shape))
        for key, value in theirs.items()
    }
    inferred = architecture(CONTROL, Path("control.safetensors"), entries)
    with torch.device("meta"):
        assert ControlNet.from_config(inferred).config == ours.config


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: {k: v for k, v in t.items() if ".2." not in k}, r"2 control layers; a loose file does not say"),
        (lambda t: t | {"control_layers.3.x": torch.ones(1)}, r"4 control layers; a loose file does not say"),
        (lambda t: {k: v for k, v in t.items() if ".1." not in k}, r"the tensors of control_layers\.1 are missing"),
        (lambda t: {k: v for k, v in t.items() if "1.after_proj.bias" not in k}, r"2 tensors missing: .*1\.after_proj"),
        (lambda t: {k: v for k, v in t.items() if "norm_q" not in k}, r"norm_q.weight, which shows the architecture"),
        (lambda t: t | {"control_all_x_embedder.2-1.weight": torch.ones(64, 130)}, r"130 should be a multiple of 4"),
        (
            lambda t: t | {"control_noise_refiner.0.before_proj.weight": torch.zeros(64)},
            r"of the wrong shape: control_n",
        ),
        (lambda t: t | {"extra": torch.zeros(1)}, r"1 tensors unexpected: extra"),
    ],
)
def test_damage_is_named(change, words, tmp_path):
    file = loose.save(change(state("lite")), tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=words) as error:
        zimage.load_component(file, "control")
    assert "\n" not in str(error.value)


def test_a_control_is_no_dit(tmp_path):
    file = loose.save(state("lite"), tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="holds no dit; it holds control"):
        zimage.load_component(file, "dit")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"control_layers_places": [1, 2]}, r"control_layers_places = \[1, 2\] must begin with 0 and ascend"),
        ({"control_layers_places": [0, 2, 2]}, "must begin with 0 and ascend"),
        ({"control_layers_places": []}, "should be a list of 1 to 256 values"),
        ({"control_layers_places": "all"}, "should be a list of 1 to 256 values"),
        ({"control_refiner_layers_places": [0, 1, 2]}, r"names more places than there are blocks \(2\)"),
        ({"add_control_noise_refiner": "both"}, "should be 'control_layers' or 'control_noise_refiner' or null"),
        ({"add_control_noise_refiner": True}, "should be 'control_layers' or"),
        ({"n_kv_heads": 1}, "n_kv_heads = 1 must equal n_heads = 2"),
        ({"n_heads": 3, "n_kv_heads": 3}, "dim = 64 must be a multiple of n_heads = 3"),
        ({"qk_norm": False}, "qk_norm = False is not implemented"),
        ({"all_patch_size": [4]}, r"all_patch_size = \[4\] is not implemented"),
        ({"control_in_dim": None}, "control_in_dim = None should be of type int"),
    ],
)
def test_configs_that_are_not_implemented(changes, words):
    with pytest.raises(ConfigError, match=words):
        ControlNet.from_config({**FORMS["2.1"], **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dim": 128, "axes_dims": [16, 24, 24]}, "is for a DiT of width 64; this one has 128"),
        ({"n_heads": 4, "n_kv_heads": 4, "axes_dims": [4, 6, 6]}, "of heads 2; this one has 4"),
        ({"n_layers": 4}, "of at least 5 layers; this one has 4"),
        ({"n_refiner_layers": 1}, "of at least 2 noise refiner layers; this one has 1"),
    ],
)
def test_dits_that_a_control_is_not_for(changes, words):
    config = ControlNet.from_config(FORMS["2.1"]).config
    config.check_beside(ZImageDiT.from_config(control_nets.DIT).config)
    with pytest.raises(ConfigError, match=words):
        config.check_beside(ZImageDiT.from_config({**control_nets.DIT, **changes}).config)


# ------------------------------------------------------------------ quantised

WIDE = {key: loose.DIT[key] for key in ("dim", "n_heads", "n_kv_heads")}  # GGUF's blocks of 256 divide its matrices
BLOCKS = 5  # of lite, one after another: independent errors of their products add up as squares do

PRODUCTS = {"int8": 0.06, "fp8": 0.2}  # activations are rounded too: the limits of a whole DiT in `test_precision.py`


def worst(ours: ControlNet, theirs: ControlNet) -> float:
    """The largest relative RMS error of a hint."""
    pairs = list(zip(control_nets.hints(ours), control_nets.hints(theirs), strict=True))
    assert len(pairs) == len(ours.config.control_layers_places) + 2
    return max(rms_error(*pair) for pair in pairs)


def rms_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).square().mean().sqrt() / theirs.square().mean().sqrt())


def rounded(numbers, tensors) -> float:
    """The relative RMS error of a file's quantised matrices."""
    pairs = [
        (numbers[key].float().flatten(), tensors[key].float().flatten()) for key in tensors if loose.is_matrix(key)
    ]
    return rms_error(*(torch.cat(part) for part in zip(*pairs, strict=True)))


@pytest.fixture(scope="module")
def wide_state():
    return state("lite", **WIDE)


def loaded(tensors, file: Path) -> ControlNet:
    return zimage.load_component(loose.save(tensors, file), "control", dtype="fp32")


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_packed_files(kind, wide_state, tmp_path):
    """A packed file acts as the numbers that it holds, which are near the plain file's."""
    quantise = {"fp8": loose.lightx2v_fp8, "int8": loose.int8_rows}[kind]
    packed, numbers = loose.quantised(wide_state, quantise)
    ours = loaded(packed, tmp_path / "packed.safetensors")
    held = loaded({k: v.float() for k, v in numbers.items()}, tmp_path / "numbers.safetensors")
    assert worst(ours, held) <= 1e-5
    limit = BLOCKS**0.5 * rounded(numbers, wide_state)
    assert 0 < worst(ours, loaded(wide_state, tmp_path / "plain.safetensors")) <= limit


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K"])
def test_gguf_files(kind, wide_state, tmp_path):
    pytest.importorskip("gguf")
    native = loose.renamed("control", "native", wide_state)
    numbers = loose.write_gguf(tmp_path / "control.gguf", "lumina2", native, kind, loose.is_matrix)
    packed = zimage.load_component(tmp_path / "control.gguf", "control", dtype="fp32")
    limit = BLOCKS**0.5 * rounded(numbers, native)
    assert 0 < worst(packed, loaded(wide_state, tmp_path / "plain.safetensors")) <= limit


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_products(precision, wide_state, tmp_path):
    """`--precision` of a DiT serves its ControlNets: matrices of blocks are quantised, projections are not."""
    file = loose.save(wide_state, tmp_path / "control.safetensors")
    component = Component.open(CONTROL, file)
    net, plain = (component.load(CPU, torch.float32, precision=how) for how in (precision, "bf16"))
    changed = {name for name, module in net.named_modules() if type(module).__name__ == "QuantisedLinear"}
    assert len(changed) == 5 * 7
    assert not any("proj" in name or "embedder" in name or "adaLN" in name for name in changed)
    assert 0 < worst(net, plain) <= PRODUCTS[precision]


# ------------------------------------------------------------------ memory


class Live(TorchDispatchMode):
    """Counts the bytes of what ops have made and something still holds, and their peak."""

    def __init__(self):
        super().__init__()
        self._held: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self._held = {key: (ref, size) for key, (ref, size) in self._held.items() if not ref.expired()}
        read = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(out):
            if storage._cdata not in read:  # a view of a weight is nothing new
                self._held.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.peak = max(self.peak, sum(size for _, size in self._held.values()))
        return out


def _storages(values: object) -> list[torch.UntypedStorage]:
    return [value.untyped_storage() for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def peak_of(run) -> int:
    with Live() as live:
        run()
    return live.peak


@pytest.mark.parametrize("kind", ["publisher", "diffusers"])
@pytest.mark.parametrize("form", ["2.0", "2.1"])
def test_hints_are_never_held_all_at_once(form, kind):
    """With 15 places the peak is one stream of tokens higher: hints, and diffusers' copy, take less than a block."""
    dit, sigma = control_nets.dit(n_layers=30), torch.tensor([0.7])
    net = control_nets.net(form, control_layers_places=PLACES[form])
    side, x = 32, torch.randn(1, 16, 32, 32)
    context = dit.context(dit.refine(captions((100,))), side, side)
    tokens = net.embed(control_nets.control_latents(FORMS[form], 1, side, side), dit.x_pad_token)
    one, m = Controlled(net, tokens, net.modulate(dit.time(sigma)), 0.8, kind), dit.modulate(sigma)
    alone, beside = (peak_of(lambda c=c: dit.velocity(x, m, context, c)) for c in ([], [one]))
    stream_bytes = context.rotation.cos.shape[1] * dit.config.dim * 4
    assert 0.95 * stream_bytes < beside - alone <= 1.05 * stream_bytes
    work = Workload(8 * side, 8 * side, tokens=100)
    assert beside - alone + tokens.nbytes <= control_bytes(net.config, work, torch.float32)


# ------------------------------------------------------------------ beside what else a DiT can do


@pytest.mark.parametrize("kind", ["publisher", "diffusers"])
def test_blocks_of_the_dit_may_be_streamed(kind, tmp_path):
    """Equal bits; in diffusers' flow the noise refiner runs twice."""
    dit, sigma = control_nets.dit(), torch.tensor([0.7, 0.3])
    (tmp_path / "config.json").write_text(json.dumps(control_nets.DIT))
    loose.save({k: v.bfloat16() for k, v in dit.state_dict().items()}, tmp_path / "diffusion_pytorch_model.safetensors")
    component, every = Component.open("dit", tmp_path), range(len(list(dit.blocks())))
    away = component.load(CPU, torch.float32, streamed=every)
    stream(away, every, CPU)
    assert streamed_blocks(away) == len(every)
    for form in FORMS:
        inputs = latents(), sigma, captions(), controlled(dit, form, sigma, kind=kind)
        assert torch.equal(evaluate(away, *inputs), evaluate(dit, *inputs))


def test_bf16_files_may_be_widened_late(wide_state, tmp_path):
    """Matrices stay as stored in a model that computes in fp32."""
    component = Component.open(CONTROL, loose.save(wide_state, tmp_path / "control.safetensors"))
    late, plain = (component.load(CPU, torch.float32, widen_late=late) for late in (True, False))
    assert late.get_parameter("control_layers.0.after_proj.weight").dtype is torch.bfloat16
    assert worst(late, plain) <= 1e-6


def test_its_own_blocks_may_be_streamed(tmp_path):
    """2.0's run twice in an evaluation."""
    dit, sigma = control_nets.dit(n_layers=30), torch.tensor([0.7, 0.3])
    for form in FORMS:
        file = loose.save(state(form), tmp_path / f"{form}.safetensors")
        component = Component.open(CONTROL, file)
        plain, every = component.load(CPU, torch.float32), range(len(list(component.skeleton.blocks())))
        away = component.load(CPU, torch.float32, streamed=every)
        stream(away, every, CPU)
        one = controlled(dit, form, sigma)
        x, texts = latents(), captions()
        ours, theirs = (one._replace(net=net, modulation=net.modulate(dit.time(sigma))) for net in (away, plain))
        assert torch.equal(evaluate(dit, x, sigma, texts, ours), evaluate(dit, x, sigma, texts, theirs))


def test_fp16_is_refused():
    dit, sigma = control_nets.dit(), torch.tensor([0.7, 0.3])
    one, context = controlled(dit, "2.1", sigma), dit.context(dit.refine(captions()), *SIZE)
    dit.in_half = True
    with pytest.raises(RequestError, match="does not run in dtype fp16; use bf16 or fp32") as error:
        dit.velocity(latents(), dit.modulate(sigma), context, [one])
    assert error.value.fields == ("control", "dtype")


@pytest.mark.parametrize("shape", [(1, 16, 6, 10), (1, 33, 5, 10)], ids=str)
def test_control_latents_that_do_not_fit(shape):
    with pytest.raises(RequestError, match="they must have 33 channels and even sides"):
        control_nets.net("2.1").embed(torch.zeros(shape), torch.zeros(1, 64))


def test_blocks_are_compiled_as_the_dits(monkeypatch):
    """Every block's forward, once each, and nothing of a control beside."""
    seen = []

    def compiled(forward, fullgraph):
        return lambda block, *args: seen.append(block) or forward(block, *args)

    dit, sigma = control_nets.dit(), torch.tensor([0.7, 0.3])
    inputs, one = (latents(), sigma, captions()), controlled(dit, "2.1", sigma)
    want = evaluate(dit, *inputs, one)
    monkeypatch.setattr(torch, "compile", compiled)
    compile_blocks(one.net)
    assert torch.equal(evaluate(dit, *inputs, one), want)
    assert seen == [*one.net.control_noise_refiner, *one.net.control_layers]


def test_an_evaluation_with_controls_is_not_captured():
    """Nor replayed from the graph of one without; those without are captured as before."""
    dit, sigma, made = control_nets.dit(), torch.tensor([0.7]), Tapes()
    inputs, one = (latents(1), sigma, captions((20,))), controlled(dit, "2.1", sigma)
    plain, want = evaluate(dit, *inputs), evaluate(dit, *inputs, one)
    replay_velocity(dit, made)
    with torch.no_grad():
        assert torch.equal(evaluate(dit, *inputs), plain)
        assert torch.equal(evaluate(dit, *inputs, one), want)
        assert torch.equal(evaluate(dit, *inputs), plain)
    assert len(made.tapes) == 1


@pytest.mark.parametrize("form", FORMS)
def test_conversion_and_verification(form, tmp_path):
    """To ComfyUI's names, to a folder, and back: the same tensors but those that are not used."""
    tensors = state(form)
    first = loose.save(tensors, tmp_path / "control.safetensors")
    native, folder = tmp_path / "native.safetensors", tmp_path / "folder"
    convert(first, native, to="native")
    assert "control_layers.0.attention.qkv.weight" in load_file(native)
    convert(native, folder, to="diffusers")
    written = load_file(folder / "diffusion_pytorch_model.safetensors")
    assert written.keys() == used(form, tensors).keys()
    assert all(torch.equal(written[key], tensors[key]) for key in written)
    assert all(report.problems == [] for path in (first, native, folder) for report in verify(path))
