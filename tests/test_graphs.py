"""CUDA graphs, replayed from tapes: the plain run's bits, nothing that a GPU could not capture or would not see."""

import contextlib
import gc
import itertools
import weakref
from dataclasses import fields
from types import SimpleNamespace

import lora_files
import pytest
import torch
from taped import StaleMemory, Tapes, storage
from test_dit_model import build, inputs
from test_generate import GREEDY, tokens_of
from test_text_model import token_ids
from tiny import QWEN, randomised, relative_error, talkative
from torch import Tensor

import zimage
from zimage.dit import reach, replay
from zimage.dit.context import Context
from zimage.dit.model import Modulation
from zimage.dit.replay import forget_graphs, most_tokens, replay_velocity
from zimage.loading import graphs as giving
from zimage.nn import graphs
from zimage.nn.graphs import Captured, captured, use_graphs
from zimage.text import Qwen3
from zimage.text.generate import Sampling
from zimage.text.qwen3 import KVCache, PlacedCache

REQUEST = {"prompt": "a cat", "seed": 3, "width": 32, "height": 32, "steps": 3}


@pytest.fixture
def tapes(monkeypatch):
    """Pipelines on the CPU use tapes as a GPU would use graphs."""
    made: list[Tapes] = []
    monkeypatch.setattr(giving, "_obstacle", lambda *_: None)
    monkeypatch.setattr(giving, "CudaGraphs", lambda device: made.append(Tapes()) or made[-1])
    return made


def replays(made: list[Tapes]) -> list[int]:
    """How often each graph was replayed."""
    return [tape.replays for each in made for tape in each.tapes]


# ------------------------------------------------------------------ pictures


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        ({}, [3]),
        ({"guidance": 2.0, "negative": "a dog"}, [6]),
        ({"nag": 4.0, "negative": "a dog"}, [3]),
        ({"nag": 4.0, "negative": "a dog", "guidance": 2.0}, [3, 3]),
        ({"nag": 4.0, "prompt": ["a cat", "a cat " * 40], "batch_size": 2}, []),
        ({"guidance": 2.0, "guidance_method": "slg:layers=1,start=0,stop=1"}, [6, 2]),
        ({"prompt": ["a cat", "a dog"], "batch_size": 1}, [6]),
        ({"prompt": ["a cat", "a dog"], "batch_size": 2}, [3]),
        ({"prompt": ["a cat", "a cat " * 40], "batch_size": 1}, [3, 3]),
        ({"hires": 2.0, "width": 64, "height": 64}, [3, 2]),
    ],
    ids=str,
)
def test_a_render_is_the_same_bits(tiny_folder, tapes, request_, expected):
    """One graph for all steps, prompts and guidance of one shape."""
    plain, replayed = (zimage.ZImage.load(tiny_folder, device="cpu", cuda_graphs=on) for on in (False, True))
    wanted, found = (pipe.generate(**{**REQUEST, **request_}).images for pipe in (plain, replayed))
    assert [image.tobytes() for image in found] == [image.tobytes() for image in wanted]
    assert replays(tapes) == expected


def test_a_render_in_fp16_keeps_its_units(tiny_folder, tapes):
    load = {"path": tiny_folder, "device": "cpu", "dtype": "fp16"}
    plain, replayed = (zimage.ZImage.load(**load, cuda_graphs=on) for on in (False, True))
    assert replayed.generate(**REQUEST).images[0].tobytes() == plain.generate(**REQUEST).images[0].tobytes()
    assert replays(tapes) == [3]


def test_the_units_of_fp16_are_a_graphs_own(tiny_folder, tapes, monkeypatch):
    """They are constants of the kernels, so that with others another graph is captured."""
    found = []
    for on in (False, True):
        pipe = zimage.ZImage.load(tiny_folder, device="cpu", dtype="fp16", residency="keep", cuda_graphs=on)
        for limit in (2.0**15, 2.0**5):
            monkeypatch.setattr(reach, "LIMIT", limit)
            found.append(pipe.generate(**REQUEST).images[0].tobytes())
    assert found[:2] == found[2:]
    assert replays(tapes) == [3, 3]


def test_one_graph_serves_every_scale_of_nag(tiny_folder, tapes):
    plain, replayed = (
        zimage.ZImage.load(tiny_folder, device="cpu", residency="keep", cuda_graphs=on) for on in (False, True)
    )
    for nag in (4.0, 2.5, 30.0):
        wanted, found = (pipe.generate(**REQUEST, negative="a dog", nag=nag).images[0] for pipe in (plain, replayed))
        assert found.tobytes() == wanted.tobytes()
    assert replays(tapes) == [9]


def test_what_does_not_pay_runs_as_ever(tiny_folder, tapes, monkeypatch):
    """Many tokens, unequal captions in a batch, and gradients."""
    pipe = zimage.ZImage.load(tiny_folder, device="cpu", cuda_graphs=True)
    pipe.generate(**{**REQUEST, "prompt": ["a cat", "a cat " * 40], "batch_size": 2})
    dit = pipe.dit
    dit(*inputs()).sum()
    monkeypatch.setattr(replay, "LARGEST", 1.0)
    pipe.generate(**REQUEST)
    assert replays(tapes) == []


def test_the_published_model_pays_up_to_256_pixels_and_the_demo_always():
    from bench.weights import COMPONENTS
    from zimage.dit.model import ZImageDiTConfig

    published = ZImageDiTConfig.read(COMPONENTS["transformer"][1])
    assert 1024 + 128 <= most_tokens(published) < 2304, "512 × 512 with its caption, not 768 × 768"
    assert most_tokens(zimage.ZImage.load(device="cpu").model.config("dit")) > 100 * 1024


def test_adapters_are_seen(tiny_folder, tapes, tmp_path):
    """Merging exchanges weights, whose addresses a graph would go on reading."""
    factors = lora_files.factors([f"layers.{i}.attention.to_q" for i in (0, 1)])
    file = lora_files.write(tmp_path / "style.safetensors", lora_files.NAMINGS["kohya"](factors))
    plain, replayed = (zimage.ZImage.load(tiny_folder, device="cpu", cuda_graphs=on) for on in (False, True))

    def picture(pipe: zimage.ZImage) -> bytes:
        return pipe.generate(**REQUEST).images[0].tobytes()

    handles = []
    for pipe in (plain, replayed):
        pipe.generate(**REQUEST)
        handles.append((pipe, pipe.lora.add(file, 3.0)))
    styled = picture(plain)
    assert picture(replayed) == styled
    for pipe, handle in handles:
        pipe.lora.remove(handle)
    assert picture(replayed) == picture(plain) != styled


def test_graphs_go_with_their_component(tiny_folder, tapes):
    pipe = zimage.ZImage.load(tiny_folder, device="cpu", cuda_graphs=True)
    pipe.generate(**REQUEST)
    (tape,) = [weakref.ref(tape) for each in tapes for tape in each.tapes]
    tapes.clear()
    pipe.release()
    gc.collect()
    assert tape() is None


def test_few_shapes_are_kept(monkeypatch):
    dit, made = build(), Tapes()
    replay_velocity(dit, made)
    with torch.no_grad():
        for side in (4, 6, 8, 4, 6, 8):
            monkeypatch.setattr(replay, "KEPT", 2)
            latents = torch.randn(1, 16, side, side)
            context = dit.context(dit.refine([torch.randn(5, dit.config.cap_feat_dim)]), side, side)
            modulation = dit.modulate(torch.tensor([0.5]))
            wanted = type(dit).velocity(dit, latents, modulation, context)
            assert torch.equal(dit.velocity(latents, modulation, context), wanted)
            assert len(vars(dit)["velocity"].captured) <= 2
    assert len(made.tapes) == 6
    forget_graphs(dit)
    assert not vars(dit)["velocity"].captured


def test_a_velocity_reads_its_inputs_and_weights_alone():
    dit, made = build(), Tapes()
    replay_velocity(dit, made)
    with torch.no_grad():
        latents, sigma, captions = inputs()
        context = dit.context(dit.refine(captions[:1]), *latents.shape[2:])
        dit.velocity(latents[:1], dit.modulate(sigma[:1]), context)
    weights = {storage(x) for x in dit.state_dict().values()}
    assert {storage(x) for x in made.tapes[0].read.values()} <= weights


def test_a_graph_is_given_all_that_an_evaluation_reads():
    """A field that is added to these must be passed through `_tensors` and `_evaluated`, or belong to the key."""
    assert [field.name for field in fields(Modulation)] == ["noise_refiner", "layers", "final", "units"]
    assert [field.name for field in fields(Context)] == ["tokens", "image_rotation", "rotation", "seen"]


# ------------------------------------------------------------------ writing


@pytest.fixture
def writer():
    return talkative(randomised(Qwen3.from_config(QWEN), seed=4)).eval().requires_grad_(False)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(), Sampling(temperature=0.0, presence_penalty=2.0)], ids=str)
def test_a_text_is_the_same(writer, sampling, monkeypatch):
    """One graph for every token of a window, and one for each window."""
    monkeypatch.setattr("zimage.text.replay.LEAST_WINDOW", 16)
    wanted, made = tokens_of(writer, sampling=sampling), Tapes()
    use_graphs(writer, made)
    assert tokens_of(writer, sampling=sampling) == wanted
    assert [tape.replays for tape in made.tapes] == [13, 16, 10], "places 3 to 15, 16 to 31, 32 to 41"


@torch.no_grad()
def test_logits_are_the_bits_of_the_same_step_without_a_graph(writer):
    """And those of the growing cache up to rounding, for every place in the window."""
    ids, made = token_ids(30), Tapes()
    growing, eager, replayed = (KVCache(writer.config, 32, writer.model.norm.weight) for _ in range(3))
    for cache in (growing, eager, replayed):
        for layer in cache.layers:
            layer.keys.zero_(), layer.values.zero_()
        writer.next_logits(ids[:, :4], cache)

    def step(cache: KVCache, token: Tensor, position: Tensor) -> Tensor:
        return writer.next_logits(token, PlacedCache(cache, position, 32))

    graph = None
    for place in range(4, 30):
        token, position = ids[:, place : place + 1], torch.tensor([place])
        graph = graph or Captured(lambda *a: step(replayed, *a), (token, position), made)
        found = graph(token, position)
        assert torch.equal(found, step(eager, token, position))
        assert relative_error(found, writer.next_logits(token, growing)) <= 1e-5
    weights = {storage(x) for x in writer.state_dict().values()}
    caches = {storage(x) for layer in replayed.layers for x in (layer.keys, layer.values)}
    assert {storage(x) for x in made.tapes[0].read.values()} <= weights | caches


# ------------------------------------------------------------------ what cannot be


@pytest.mark.parametrize(
    ("device", "attention", "streamed", "says"),
    [
        ("cpu", "sdpa", False, "its device is cpu"),
        ("mps", "sdpa", False, "its device is mps"),
        ("cuda", "sdpa", True, "blocks are streamed"),
        ("cuda", "sage", False, "attention 'sage' may wait"),
        ("cuda", "xformers", False, "attention 'xformers' may wait"),
    ],
)
def test_where_there_are_none_one_line_says_why(caplog, device, attention, streamed, says):
    dit = build()
    giving.give_graphs("dit", dit, torch.device(device), attention, streamed)
    (line,) = caplog.messages
    assert line.startswith("DiT runs without CUDA graphs, since")
    assert says in line
    assert "velocity" not in vars(dit)


def waits(x: Tensor) -> Tensor:
    return x * float(x.sum())


def depends(x: Tensor) -> Tensor:
    return x[x > 0]


def draws(x: Tensor) -> Tensor:
    return x + torch.randn(3)


@pytest.mark.parametrize("function", [waits, depends, draws])
def test_what_cannot_be_captured_runs_as_it_is(caplog, function):
    x = torch.tensor([1.0, -2.0, 3.0])
    assert captured(function, (x,), Tapes()) is function
    assert "work that a CUDA graph cannot hold is launched as ever" in caplog.messages[0]


def test_a_full_card_is_not_hidden():
    def fail(run):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    with pytest.raises(torch.OutOfMemoryError):
        captured(waits, (torch.ones(3),), SimpleNamespace(capture=fail))


def test_a_tape_sees_what_a_gpu_would_miss():
    weight, count, x = torch.ones(3), [1], torch.ones(3)
    graph = Captured(lambda x: x * weight * count[0], (x,), Tapes())
    count[0] = 2
    assert graph(2 * x).tolist() == [2, 2, 2], "a number of Python's is that of the capture"
    weight.mul_(2)
    with pytest.raises(StaleMemory, match=r"shapes \[\(3,\)\] changed"):
        graph(x)


def test_results_are_tensors_of_their_own():
    graph = Captured(lambda x: x + 1, (torch.zeros(2),), Tapes())
    first, second = graph(torch.zeros(2)), graph(torch.ones(2))
    assert (first.tolist(), second.tolist()) == ([1, 1], [2, 2])


@pytest.fixture
def asked(monkeypatch):
    """What is asked of torch.cuda, in order."""
    did = []

    @contextlib.contextmanager
    def note(*what):
        did.append(what)
        yield

    class Stream:
        def __init__(self, device=None):
            self.device = device

        def wait_stream(self, other):
            did.append(("wait",))

    class Graph:
        def replay(self):
            did.append(("replay",))

        def pool(self):
            return next(what[1] for what in did if what[0] == "capture")

    pools = itertools.count(7)
    cuda = {
        "graph_pool_handle": lambda: (0, next(pools)),
        "device": lambda device: note("device", device),
        "current_stream": Stream,
        "Stream": Stream,
        "stream": lambda stream: note("aside", stream.device),
        "set_stream": lambda stream: did.append(("stream",)),
        "current_device": lambda: 1,
        "CUDAGraph": Graph,
        "graph": lambda graph, pool, stream, capture_error_mode: note(
            "capture", pool, stream.device, capture_error_mode
        ),
    }
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *what: did.append(("end", *what)), raising=False)
    return did


def test_cuda_is_asked_in_order(asked):
    """A warm-up on another stream, whose libraries allocate what they keep; the capture on that stream, too."""
    card = torch.device("cuda", 1)
    graph = Captured(lambda x: asked.append(("run",)) or x + 1, (torch.zeros(2),), graphs.CudaGraphs(card))
    graph(torch.zeros(2))
    warm_up = [("wait",), ("aside", card), ("run",), ("wait",)]
    assert asked == [("device", card), *warm_up, ("capture", (0, 7), card, "thread_local"), ("run",), ("replay",)]


def test_a_capture_that_fails_leaves_cuda_as_it_was(asked, caplog):
    def run(x: Tensor) -> Tensor:
        if any(what[0] == "capture" for what in asked):
            raise RuntimeError("operation not permitted when stream is capturing")
        return x

    assert captured(run, (torch.zeros(2),), graphs.CudaGraphs(torch.device("cuda", 1))) is run
    assert asked[-2:] == [("stream",), ("end", 1, (0, 7))]
    assert "as ever (operation not permitted" in caplog.messages[0]


def test_a_pool_whose_graphs_are_gone_is_not_used_again(asked):
    """PyTorch asserts that a pool has graphs, unless all of its memory is free; cuBLAS keeps a workspace in it."""
    made = graphs.CudaGraphs(torch.device("cuda", 1))
    kept = Captured(lambda x: x + 1, (torch.zeros(2),), made)
    Captured(lambda x: x + 2, (torch.zeros(2),), made)
    del kept
    Captured(lambda x: x + 3, (torch.zeros(2),), made)
    assert [what[1] for what in asked if what[0] == "capture"] == [(0, 7), (0, 7), (0, 8)]


def test_a_capture_whose_pool_has_been_left_says_what_failed(asked, monkeypatch):
    """Where Python alone fails, as for want of memory, PyTorch ends the capture by itself."""

    def ended(*_):
        raise RuntimeError("endAllocatePool: not currently recording to mempool_id")

    def run(x: Tensor) -> Tensor:
        if any(what[0] == "capture" for what in asked):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return x

    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", ended)
    with pytest.raises(torch.OutOfMemoryError):
        captured(run, (torch.zeros(2),), graphs.CudaGraphs(torch.device("cuda", 1)))
