"""LoRA adapters of a pipeline: merged or beside the layers, re-weighted, removed to the bit, on any kind of DiT."""

import itertools
import shutil
import threading

import lora_files as files
import pytest
import tiny
import torch
from lora_files import PROJECTIONS, SHAPES
from safetensors.torch import load_file, save_file

import zimage
from bench import writers
from zimage.errors import CheckpointError, RequestError
from zimage.nn.adapters import AdaptedLinear
from zimage.nn.layers import WideningLinear
from zimage.nn.packed import PackedLinear
from zimage.nn.quant import QuantisedLinear

SETTINGS = {"seed": 1, "steps": 2, "width": 64, "height": 48}
Q = files.ONE
UNTOUCHED = "layers.0.feed_forward.w1.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return files.write_kinds(tmp_path_factory.mktemp("lora"))


@pytest.fixture
def pipe(tiny_folder):
    return zimage.ZImage.load(tiny_folder, device="cpu", dtype="fp32", residency="keep")


@pytest.fixture(scope="session")
def stored(tiny_folder):
    return load_file(tiny_folder / "transformer" / "diffusion_pytorch_model.safetensors")


def pixels(pipe) -> bytes:
    return pipe.generate("a cat", **SETTINGS).images[0].tobytes()


def inputs():
    generator = torch.Generator().manual_seed(94)
    caption = torch.randn(7, tiny.DIT["cap_feat_dim"], generator=generator)
    return torch.randn(1, 16, 4, 6, generator=generator), torch.tensor([0.7]), [caption]


def weights(pipe) -> dict[str, torch.Tensor]:
    return dict(pipe.dit.named_parameters())


def assert_stored_bits(pipe, stored):
    """The weights of the file, and no copies of them: pointers into a mapping of it."""
    found = weights(pipe)
    with open("/proc/self/maps") as maps:
        lines = [
            line.split() for line in maps if line.rstrip().endswith("transformer/diffusion_pytorch_model.safetensors")
        ]
    spans = [[int(end, 16) for end in columns[0].split("-")] for columns in lines]
    assert found.keys() == stored.keys()
    for name, weight in found.items():
        assert torch.equal(weight, stored[name]), name
        assert any(first <= weight.data_ptr() < last for first, last in spans), name


# ------------------------------------------------------------------ merged into float layers


def test_deltas_are_merged_add_up_and_leave_the_original_bits(pipe, folder, stored):
    plain = pixels(pipe)
    style = files.matrices(files.factors(PROJECTIONS))
    other = files.matrices(files.factors(SHAPES, seed=7, size=0.1))
    first = pipe.lora.add(folder / "style.safetensors", scale=0.8)
    merged = weights(pipe)
    assert torch.equal(merged[UNTOUCHED], stored[UNTOUCHED])
    for path, delta in style.items():
        torch.testing.assert_close(merged[f"{path}.weight"], stored[f"{path}.weight"] + 0.8 * delta, rtol=0, atol=1e-6)
    assert pixels(pipe) != plain

    second = pipe.lora.add(folder / "all.safetensors", scale=-0.5)
    both = weights(pipe)
    for path, delta in other.items():
        wanted = stored[f"{path}.weight"] + 0.8 * style.get(path, torch.zeros(())) - 0.5 * delta
        torch.testing.assert_close(both[f"{path}.weight"], wanted, rtol=0, atol=1e-6)

    pipe.lora.remove(second)
    assert all(torch.equal(weight, merged[name]) for name, weight in weights(pipe).items())
    pipe.lora.remove(first)
    assert_stored_bits(pipe, stored)
    assert pixels(pipe) == plain


def test_one_rounding(tiny_folder, folder):
    pipe = zimage.ZImage.load(tiny_folder, device="cpu", dtype="bf16")
    before = pipe.dit.get_submodule(Q).weight.clone()
    pipe.lora.add(folder / "style.safetensors", scale=0.3)
    delta = files.matrices(files.factors([Q]))[Q]
    exact = before.double() + 0.3 * delta.double()
    found = pipe.dit.get_submodule(Q).weight
    assert found.dtype == torch.bfloat16
    assert (found != exact.bfloat16()).float().mean() < 0.01  # fp32 sums that fall on the other side of a tie
    pipe.lora.remove(pipe.lora.list()[0].handle)
    assert torch.equal(pipe.dit.get_submodule(Q).weight, before)


def test_scale_can_be_set_and_zero_is_the_original(pipe, folder, stored):
    handle = pipe.lora.add(folder / "style.safetensors")
    pipe.lora.set(handle, 0.25)
    wanted = stored[f"{Q}.weight"] + 0.25 * files.matrices(files.factors([Q]))[Q]
    torch.testing.assert_close(weights(pipe)[f"{Q}.weight"], wanted, rtol=0, atol=1e-6)
    pipe.lora.set(handle, 0)
    assert_stored_bits(pipe, stored)
    assert [a.scale for a in pipe.lora.list()] == [0.0]


def test_the_same_file_twice_counts_twice(pipe, folder, stored):
    handles = [pipe.lora.add(folder / "style.safetensors", 0.5) for _ in range(2)]
    once = zimage.ZImage.load(pipe.model.origin, device="cpu", dtype="fp32")
    once.lora.add(folder / "style.safetensors", 1.0)
    torch.testing.assert_close(weights(pipe)[f"{Q}.weight"], weights(once)[f"{Q}.weight"], rtol=0, atol=1e-6)
    pipe.lora.remove(handles[0])
    assert [a.name for a in pipe.lora.list()] == ["style.safetensors"]
    pipe.lora.remove(handles[1])
    assert_stored_bits(pipe, stored)


def test_before_loading_after_it_and_after_a_release(tiny_folder, folder, stored):
    early = zimage.ZImage.load(tiny_folder, device="cpu", dtype="fp32", residency="stage")
    late = zimage.ZImage.load(tiny_folder, device="cpu", dtype="fp32", residency="keep")
    assert not early.loaded
    handle = early.lora.add(folder / "style.safetensors", 0.8)
    assert not early.loaded
    assert late.dit is not None
    late.lora.add(folder / "style.safetensors", 0.8)
    assert pixels(early) == pixels(late)
    late.release()
    assert pixels(early) == pixels(late)
    assert not early.loaded
    early.lora.remove(handle)
    assert_stored_bits(early, stored)


@pytest.mark.parametrize("kind", ["kron", "hadamard", "dora"])
def test_other_forms_are_merged(pipe, folder, stored, kind):
    handle = pipe.lora.add(folder / f"{kind}.safetensors", 0.5)
    delta = pipe.lora.list()[0].file.deltas[Q]
    wanted = stored[f"{Q}.weight"] + 0.5 * delta.change(stored[f"{Q}.weight"])
    torch.testing.assert_close(weights(pipe)[f"{Q}.weight"], wanted, rtol=0, atol=1e-6)
    pipe.lora.remove(handle)
    assert_stored_bits(pipe, stored)


# ------------------------------------------------------------------ beside layers of other kinds


@pytest.fixture
def widened(tiny_folder, tmp_path, monkeypatch):
    """A DiT of bf16 matrices that are widened to fp32 when used, as on a machine where nothing fits."""
    path = shutil.copytree(tiny_folder, tmp_path / "model") / "transformer" / "diffusion_pytorch_model.safetensors"
    files.write(path, {name: weight.bfloat16() for name, weight in load_file(path).items()})
    monkeypatch.setattr("zimage.loading.planner.KEEP_SHARE", 0.0)
    return zimage.ZImage.load(tmp_path / "model", device="cpu", dtype="fp32")


@pytest.fixture
def coarse(tiny_folder):
    return zimage.ZImage.load(tiny_folder, device="cpu", dtype="fp32", precision="int8", residency="keep")


@pytest.fixture
def packed(tiny_folder, tmp_path):
    """A checkpoint whose matrices are fp8 already."""
    model = shutil.copytree(tiny_folder, tmp_path / "packed")
    weights = next((model / "transformer").glob("*.safetensors"))
    save_file(writers.quantised(load_file(weights), writers.lightx2v_fp8)[0], weights)
    return zimage.ZImage.load(model, device="cpu", dtype="fp32", residency="keep")


@pytest.mark.parametrize(
    ("kind", "layer"), [("widened", WideningLinear), ("coarse", QuantisedLinear), ("packed", PackedLinear)]
)
def test_beside_a_layer_the_branch_adds_the_same_product(kind, layer, folder, request):
    """Low rank (two files as one branch), Kronecker and Hadamard."""
    pipe = request.getfixturevalue(kind)
    base = pipe.dit.get_submodule(Q)
    assert type(base) is layer
    x = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(95))
    plain = base(x)
    handles = [
        pipe.lora.add(folder / f"{n}.safetensors", s)
        for n, s in (("style", 0.8), ("all", -0.5), ("kron", 2), ("hadamard", 1))
    ]
    wrapped = pipe.dit.get_submodule(Q)
    assert isinstance(wrapped, AdaptedLinear)
    assert len(wrapped.branches) == 3
    assert wrapped.bias is base.bias
    delta = sum(a.scale * a.file.deltas[Q].matrix(x) for a in pipe.lora.list())
    torch.testing.assert_close(wrapped(x), plain + x @ delta.T, rtol=1e-5, atol=1e-5)
    pipe.lora.set(handles[0], 0)
    delta = sum(a.scale * a.file.deltas[Q].matrix(x) for a in pipe.lora.list())
    torch.testing.assert_close(pipe.dit.get_submodule(Q)(x), plain + x @ delta.T, rtol=1e-5, atol=1e-5)
    for handle in handles:
        pipe.lora.remove(handle)
    assert pipe.dit.get_submodule(Q) is base
    assert not [m for m in pipe.dit.modules() if isinstance(m, AdaptedLinear)]


@pytest.mark.parametrize("kind", ["widened", "coarse", "packed"])
def test_every_layer_may_have_a_branch_and_the_pixels_come_back(kind, folder, request):
    pipe = request.getfixturevalue(kind)
    plain = pixels(pipe)
    handle = pipe.lora.add(folder / "all.safetensors")
    assert pixels(pipe) != plain
    pipe.release()
    changed = pixels(pipe)
    pipe.lora.remove(handle)
    assert pixels(pipe) == plain
    assert changed != plain


def test_a_branch_comes_near_the_merged_model(coarse, pipe, folder):
    pipe.lora.add(folder / "style.safetensors")
    exact = pipe.dit(*inputs())
    far = coarse.dit(*inputs())
    coarse.lora.add(folder / "style.safetensors")
    near = coarse.dit(*inputs())
    assert (near - exact).norm() < 0.2 * (far - exact).norm()


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_compiled_blocks_see_what_changes(tiny_folder, folder, precision):
    """Added, re-weighted and removed after compiling; another strength compiles nothing anew."""
    load = {"device": "cpu", "dtype": "fp32", "precision": precision, "residency": "keep"}
    plain, compiled = (zimage.ZImage.load(tiny_folder, **load, compile=c) for c in (False, True))

    def same():
        ours, exact = compiled.dit(*inputs()), plain.dit(*inputs())
        limit = 1e-5 if precision == "bf16" else 0.03  # where a sum differs in its last bit, int8 may round to another
        assert (ours - exact).norm() < limit * exact.norm()
        return ours

    first = same()
    handles = [pipe.lora.add(folder / "style.safetensors") for pipe in (plain, compiled)]
    second = same()
    for pipe, handle in zip((plain, compiled), handles, strict=True):
        pipe.lora.set(handle, -1)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    third = same()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    more = [[pipe.lora.add(folder / f"{n}.safetensors") for n in ("kron", "hadamard")] for pipe in (plain, compiled)]
    fourth = same()
    for one, other in itertools.combinations((first, second, third, fourth), 2):
        assert (one - other).norm() > 0.05 * one.norm()
    for pipe, handle, others in zip((plain, compiled), handles, more, strict=True):
        for added in (handle, *others):
            pipe.lora.remove(added)
    assert torch.equal(same(), first)


# ------------------------------------------------------------------ handles, scales, failures


def test_handles_are_known_by_their_own_pipeline_only(pipe, folder):
    handle = pipe.lora.add(folder / "style.safetensors")
    other = zimage.ZImage.load(pipe.model.origin, device="cpu", dtype="fp32")
    for call in (lambda h: other.lora.remove(h), lambda h: other.lora.set(h, 1.0)):
        with pytest.raises(RequestError, match="there is no lora with the handle"):
            call(handle)
    pipe.lora.remove(handle)
    for wrong in (handle, None, "style.safetensors", [], 0):
        with pytest.raises(RequestError, match="there is no lora with the handle"):
            pipe.lora.remove(wrong)
        with pytest.raises(RequestError, match="there is no lora with the handle"):
            pipe.lora.set(wrong, 1.0)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -float("inf"), 1e6, -101, 10**400, "1", True, [1]])
def test_scales_that_cannot_be_meant_are_refused(pipe, folder, scale):
    handle = pipe.lora.add(folder / "style.safetensors", 0.5)
    with pytest.raises(RequestError, match="lora scale"):
        pipe.lora.add(folder / "style.safetensors", scale)
    for wrong in (scale, None):  # a file that is added without one has its usual scale
        with pytest.raises(RequestError, match="lora scale"):
            pipe.lora.set(handle, wrong)
    assert [a.scale for a in pipe.lora.list()] == [0.5]


@pytest.mark.parametrize("path", [None, 3, b"style.safetensors", ["style.safetensors"]])
def test_paths_of_other_types_are_refused(pipe, path):
    with pytest.raises(RequestError, match="it should be the path of a file"):
        pipe.lora.add(path)


def test_a_file_that_cannot_be_used_changes_nothing(pipe, folder, tmp_path, stored):
    (tmp_path / "bad.safetensors").write_bytes(b"")
    for path in (tmp_path / "bad.safetensors", tmp_path / "absent.safetensors"):
        with pytest.raises(CheckpointError, match="LoRA"):
            pipe.lora.add(path)
    with pytest.raises(RequestError, match="there is no such home folder"):
        pipe.lora.add("~nobody-of-this-name/x.safetensors")
    assert not pipe.lora.list()
    assert_stored_bits(pipe, stored)


def test_the_file_may_be_written_anew_meanwhile(pipe, folder, tmp_path):
    """The deltas are copies: a trainer that saves over its file changes nothing, and stops no process."""
    path = shutil.copy(folder / "style.safetensors", tmp_path)
    pipe.lora.add(path)
    before = pixels(pipe)
    with open(path, "r+b") as stream:
        stream.truncate(10)
    pipe.release()
    assert pixels(pipe) == before


def test_a_change_that_fails_halfway_is_undone(pipe, folder, stored, monkeypatch):
    import zimage.loading.loras as loras

    handle = pipe.lora.add(folder / "style.safetensors", 0.8)
    before = pixels(pipe)
    calls = iter([loras.adapt] * 5)
    monkeypatch.setattr(loras, "adapt", lambda *a: next(calls)(*a))
    with pytest.raises(StopIteration):
        pipe.lora.set(handle, -2)
    monkeypatch.undo()
    assert [a.scale for a in pipe.lora.list()] == [0.8]
    assert pixels(pipe) == before
    pipe.lora.remove(handle)
    assert_stored_bits(pipe, stored)


def test_threads_may_add_remove_and_render_at_once(pipe, folder, stored):
    plain, failures = pixels(pipe), []

    def work(name):
        try:
            for _ in range(8):
                handle = pipe.lora.add(folder / f"{name}.safetensors", 0.3)
                pipe.lora.set(handle, 0.1)
                pipe.lora.list()
                pipe.generate("a", steps=1, width=32, height=32, seed=1)
                pipe.lora.remove(handle)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("style", "all", "kron", "style")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert not pipe.lora.list()
    assert_stored_bits(pipe, stored)
    assert pixels(pipe) == plain
