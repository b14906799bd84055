"""Weights on their way to a GPU, when they are loaded and when they are streamed."""

import contextlib

import pytest
import tiny
import torch
from pretended import needs_pretended, pretend
from safetensors.torch import load_file, save_file
from streams import LateCuda
from torch import nn

import zimage
from bench import writers
from zimage.loading import residency, streaming, uploads, weights
from zimage.loading.files import Component
from zimage.loading.planner import CONTEXT_BYTES
from zimage.loading.registry import ROWS
from zimage.loading.weights import Arrivals, load_weights
from zimage.nn import ggml
from zimage.nn.late import STORED, send_back
from zimage.nn.packed import NVFP4, Int4, Scaled
from zimage.nn.quant import QuantisedLinear
from zimage.settings.rewriting import RewriteSettings
from zimage.text.qwen3 import KVCache

pytestmark = pytest.mark.cuda
CPU = torch.device("cpu")
SMALL = {"width": 32, "height": 32, "steps": 2, "seed": 1}


def pageable(size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8)


# ------------------------------------------------------------------ loading


@pytest.fixture
def staged(monkeypatch):
    """Uploads through buffers of 64 bytes, on streams that run late."""
    monkeypatch.setattr(uploads, "STAGED", 64)
    with LateCuda() as cuda:
        yield cuda, uploads.Uploads(CPU, cuda, pageable)


def test_weights_go_through_two_buffers_in_turn_and_are_cast_on_the_way(staged):
    """A buffer that was filled before it had been copied from, or a weight used before it had come, would differ."""
    cuda, upload = staged
    stored = [torch.randn(7, 9).to(kind) for kind in (torch.float32, torch.bfloat16, torch.float16)] * 3
    stored += [torch.randn(()), torch.randn(3), torch.randn(40, 4)[::2], torch.arange(200, dtype=torch.uint8)]
    placed = [upload(t, torch.bfloat16 if t.is_floating_point() else t.dtype) for t in stored]
    assert not all(torch.equal(t, s.to(t.dtype)) for t, s in zip(placed, stored, strict=True)), "nothing has run yet"
    cuda.main.run()
    assert all(torch.equal(t, s.to(t.dtype)) for t, s in zip(placed, stored, strict=True))
    assert upload.stream.waits == 0, "the host never waits for a whole weight"


def test_memory_that_kernels_still_read_is_not_written(staged, monkeypatch):
    """The allocator hands freed memory out again at once: on one stream that is safe, on two it must be said."""
    cuda, upload = staged
    freed, seen = torch.arange(16.0), []
    cuda.main.work.append(("kernel", lambda: seen.append(freed.clone())))
    monkeypatch.setattr(torch, "empty", lambda *_, **__: freed)
    placed = upload(torch.zeros(16), torch.float32)
    upload.stream.run()  # as early as it may
    cuda.main.run()
    assert torch.equal(seen[0], torch.arange(16.0))
    assert not placed.any()


def test_packed_matrices_keep_their_form(staged):
    cuda, upload = staged
    matrices = [
        Scaled(torch.randint(-127, 127, (4, 32), dtype=torch.int8), torch.rand(4, 1)),
        Int4(torch.randint(0, 255, (4, 16), dtype=torch.uint8), torch.rand(4, 1), 4),
        NVFP4(
            torch.randint(0, 255, (4, 8), dtype=torch.uint8), torch.rand(4, 1).to(torch.float8_e4m3fn), torch.rand(())
        ),
        ggml.GGML(torch.randint(0, 255, (4, 34), dtype=torch.uint8), "Q8_0"),
    ]
    placed = [upload.packed(matrix) for matrix in matrices]
    cuda.main.run()
    for ours, matrix in zip(placed, matrices, strict=True):
        assert type(ours) is type(matrix)
        assert all(torch.equal(a, b) for a, b in zip(ours.tensors(), matrix.tensors(), strict=True))


# ------------------------------------------------------------------ streaming


def test_two_buffers_take_turns_and_every_block_sees_its_own_weights():
    """Kernels are queued on the main stream and run late; only events keep copies from overtaking them."""
    torch.manual_seed(0)
    layers = [nn.Linear(8, 8 + i, bias=False).requires_grad_(False) for i in range(5)]
    expected = [layer.weight.clone() for layer in layers]
    for layer in layers:
        layer.weight.wanted = torch.float32
    with LateCuda() as cuda:
        carrier = streaming.CopiedBlocks([[layer.weight] for layer in layers], CPU, cuda)
        for buffer in carrier.buffers:
            buffer.values.fill_(255)
        turns, seen = streaming.Streaming(carrier, len(layers)), []
        for _ in range(3):
            for i, layer in enumerate(layers):
                with turns.turn(i):
                    assert sum(buffer.block is not None for buffer in carrier.buffers) == 2
                    used = layer.weight.data
                    cuda.main.work.append(("kernel", lambda used=used, i=i: seen.append((i, used.clone()))))
        cuda.main.run()
        turns.stop()
    assert [i for i, _ in seen] == [*range(5)] * 3
    assert all(torch.equal(values, expected[i]) for i, values in seen)
    assert all(torch.equal(layer.weight, e) for layer, e in zip(layers, expected, strict=True)), "host copies remain"
    fetched = sum(1 for kind, *_ in carrier.copies.work if kind == "copy")
    assert fetched <= 16, "each block is copied once per turn, and the one announced last"


class AtOnce(LateCuda):
    """Copies are done at once."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        return op(*args, **(kwargs or {}))


@pytest.fixture
def copied(monkeypatch):
    """The code path of a GPU on CPU tensors; how many tensors each streamed block had."""
    counts, stream = [], streaming.stream

    def copied(model, indices, device):
        blocks = list(model.blocks())
        tensors = [streaming.on_the_host(blocks[i][0]) for i in indices]
        counts.extend(map(len, tensors))
        carrier = streaming.CopiedBlocks(tensors, device, AtOnce())
        monkeypatch.setattr(streaming, "MappedBlocks", lambda *_: carrier)
        stream(model, indices, device)

    monkeypatch.setattr(residency, "stream", copied)
    return counts


def stored_as(folder, target, write):
    """A copy of a model folder whose DiT's matrices another tool has quantised."""
    import shutil

    shutil.copytree(folder, target)
    for file in target.glob("transformer/*.safetensors"):
        state = {key: value.bfloat16() for key, value in load_file(file).items()}
        save_file(writers.quantised(state, write)[0] if write else state, file)
    return target


def component(folder, name: str = "dit") -> Component:
    return Component.open(name, folder / ROWS[name].folder)


def on_gpu(*arguments) -> Arrivals:
    """Loading to a GPU, whose memory is the host's here."""
    found = Arrivals(*arguments)
    found.uploads = uploads.Uploads(CPU, AtOnce(), pageable)
    return found


def velocity(dit) -> torch.Tensor:
    generator = torch.Generator().manual_seed(82)
    caption = torch.randn(7, tiny.DIT["cap_feat_dim"], generator=generator).bfloat16()
    with torch.no_grad():
        return dit(torch.randn(1, 16, 4, 6, generator=generator), torch.tensor([0.7]), [caption])


@pytest.mark.parametrize("write", [None, writers.lightx2v_fp8], ids=["plain", "packed"])
@pytest.mark.parametrize("precision", ["bf16", "int8", "fp8"])
def test_blocks_of_every_form_come_and_go(tiny_folder, tmp_path, copied, monkeypatch, write, precision):
    """Quantised matrices as codes and scales, packed ones as they are; the same bits as resident ones."""
    dit = component(stored_as(tiny_folder, tmp_path / "model", write))
    expected = velocity(dit.load(CPU, torch.bfloat16, precision=precision))
    monkeypatch.setattr(weights, "Arrivals", on_gpu)
    streamed = dit.load(CPU, torch.bfloat16, streamed=(0, 2, 3), precision=precision)
    residency.stream(streamed, (0, 2, 3), CPU)
    for _ in range(2):
        assert torch.equal(velocity(streamed), expected)
    assert min(copied) >= 7, "seven matrices a block, and their scales"
    assert any(isinstance(m, QuantisedLinear) for m in streamed.modules()) == (precision != "bf16")
    left = [t for block, _ in streamed.blocks() for t in streaming.on_the_host(block)]
    assert len(left) == sum(copied)


# ------------------------------------------------------------------ what encoding does not read


def test_what_stays_in_its_file_is_not_read_ahead(tiny_folder, monkeypatch):
    encoder, ahead = component(tiny_folder, "text_encoder"), []
    monkeypatch.setattr(Arrivals, "read_ahead", lambda _, values: contextlib.nullcontext(ahead.extend(values)))
    late = encoder.late_weights(model := encoder._build())
    load_weights(model, encoder.checkpoint, torch.float32, CPU, late=late)
    assert len(ahead) == len(encoder.checkpoint.entries) - len(late) > 0


def test_the_last_layer_and_the_embeddings_come_when_they_are_read(tiny_folder):
    """Rows of the embeddings are looked up on the host; an output head and the last hidden state need the rest."""
    encoder = component(tiny_folder, "text_encoder")
    plain, lean = encoder.load(CPU, torch.float32), encoder._build()
    late = encoder.late_weights(lean)
    load_weights(lean, encoder.checkpoint, torch.float32, CPU, late=late)
    assert {name.split(".")[1] for name in late} == {"embed_tokens", "layers"}
    assert {name.split(".")[2] for name in late if "layers" in name} == {str(tiny.QWEN["num_hidden_layers"] - 1)}

    def come() -> set[str]:
        return {name for name, weight in lean.named_parameters() if STORED in vars(weight)}

    ids = torch.arange(7)[None]
    for layer, arrived in ((0, set()), (-2, set()), (-1, late - {"model.embed_tokens.weight"})):
        assert torch.equal(lean(ids, layer), plain(ids, layer))
        assert come() == arrived, layer
    expected = plain.next_logits(ids, KVCache(plain.config, 8, plain.model.norm.weight))
    assert torch.equal(lean.next_logits(ids, KVCache(lean.config, 8, lean.model.norm.weight)), expected)
    assert come() == late
    send_back(lean)
    assert not come()
    assert torch.equal(lean(ids, -1), plain(ids, -1))


@needs_pretended
def test_a_gpu_is_not_sent_what_encoding_does_not_read():
    with pretend() as card:
        pipe = zimage.ZImage.load()
        late = pipe.model.components["text_encoder"].late_weights(pipe.model.skeleton("text_encoder"))
        sizes = {name: 2 * w.numel() for name, w in pipe.model.skeleton("text_encoder").named_parameters()}
        pipe.encode("a cat")
        without = card.live[0]
        assert without <= 1.01 * sum(size for name, size in sizes.items() if name not in late) + 4096
        pipe.encode("a cat", hidden_layer=-1)
        assert card.live[0] <= without + 4096, "it goes back to its file at once"
        written = pipe.rewriter.pieces("a cat", RewriteSettings.from_mapping({"max_tokens": 3, "rewrite_seed": 1}))
        next(written)
        assert card.live[0] >= without + sum(sizes[name] for name in late)
        written.close()
        assert card.live[0] <= without + 4096


@needs_pretended
def test_a_session_on_a_card_that_is_too_small_for_all_loads_only_the_text_encoder_again(monkeypatch):
    """And that only for a new prompt: known captions need none."""
    size = {"width": 512, "height": 512, "steps": 1}

    def sent(prompt: str, seed: int) -> tuple[int, set[str]]:
        with card.count() as count:
            loads = {e.detail for e in pipe.run(zimage.Request(prompt, seed=seed, **size)) if e.stage == "load"}
        return sum(copy.bytes for copy in count.copies if "uploads" in copy.line), loads

    with pretend() as card:
        pipe = zimage.ZImage.load()
        roomy = pipe.prepare(zimage.Request("a cat", **size)).plan
        short = roomy.stages["vae"].peak - CONTEXT_BYTES - 1  # one byte
        monkeypatch.setattr("zimage.loading.planner.available_memory", lambda device: short - card.live[0])
        plan = pipe.prepare(zimage.Request("a cat", **size)).plan
        assert (roomy.kept, plan.kept) == ({"text_encoder", "dit", "vae"}, {"dit", "vae"})
        first, again, other = sent("a cat", 1), sent("a cat", 2), sent("a dog", 1)
        assert set(pipe.loaded) == plan.kept
    assert again == (0, {"dit", "vae"}), "a stage begins, and nothing is sent"
    assert other[0] == first[0] - sum(pipe.planner.sizes[name].copied for name in plan.kept)


@needs_pretended
def test_page_locked_memory_goes_back_with_what_needed_it(tiny_folder):
    with pretend() as card:
        pipe = zimage.ZImage.load(tiny_folder, residency="stage")
        pipe.generate("a cat", **SMALL)
    assert card.pinned
    assert card.returned[-1] == len(card.pinned)
