"""The whole pipeline on pretended cards: no tensor strays, and nothing waits inside a step."""

import json
from collections import Counter

import control_nets
import lora_files
import pytest
import torch
from PIL import Image
from pretended import Card, Count, needs_pretended, pretend

import zimage
from zimage.dit import ZImageDiT
from zimage.loading.uploads import STAGED
from zimage.weights import DEMO

pytestmark = [pytest.mark.cuda, needs_pretended]

TWO = ["a cat face on a blue background", "a red apple and a dog face on a white background"]
SMALL = {"width": 32, "height": 32}
PATHS = [f"layers.{i}.attention.{name}" for i in (0, 1) for name in ("to_q", "to_k", "to_out.0")]
PLACES = {
    "one card": {},
    "the second card": {"device": "cuda:1"},
    "two cards": {"text_encoder_device": "cuda:1", "dit_device": "cuda:0", "vae_device": "cuda:1"},
    "DiT elsewhere": {"dit_device": "cuda:1"},
    "encoder on the CPU": {"text_encoder_device": "cpu"},
    "VAE on the CPU": {"vae_device": "cpu"},
    "DiT on the CPU": {"dit_device": "cpu"},
}
REQUESTS = {
    "guided batch of unequal captions": {"prompt": TWO, "batch_size": 2, "guidance": 2.0, "negative": "a dog"},
    "two passes": {"hires": 2.0, "width": 64, "height": 64},
    "exact strips": {"tile_mode": "exact", "tile_size": 64},
    "blended tiles": {"tile_mode": "blend", "tile_size": 64, "tile_overlap": 16},
}
LOADS = {
    "bf16": {},
    "fp32": {"dtype": "fp32"},
    "fp16": {"dtype": "fp16"},
    "int8": {"precision": "int8"},
    "fp8": {"precision": "fp8"},
    "stages in turn": {"residency": "stage"},
}


class Watched:
    """Renders on pretended cards; `steps` is what each evaluation of the DiT did there."""

    def __init__(self) -> None:
        self.steps: list[Count] = []
        self.card: Card | None = None

    def render(self, load: dict, request: dict, adapter=None, **kind) -> Card:
        with pretend(devices=2, **kind) as self.card:
            pipe = zimage.ZImage.load(**load)
            if adapter:
                pipe.lora.add(adapter, 0.5)
            result = pipe.generate(**{"prompt": "a cat", "seed": 1, "steps": 2, **request})
        assert len(result.images) == len(result.seeds) > 0
        assert self.steps
        assert not [line for step in self.steps for line in step.syncs], "the host waits inside a step"
        assert not [copy for step in self.steps for copy in step.copies if not streams(copy)]
        return self.card


def streams(copy) -> bool:
    return copy.line.startswith("zimage/loading/streaming.py") and not copy.waits


@pytest.fixture
def watched(monkeypatch):
    watched, velocity = Watched(), ZImageDiT.velocity

    def counted(self, *arguments):
        with watched.card.count() as step:
            out = velocity(self, *arguments)
        watched.steps.append(step)
        return out

    monkeypatch.setattr(ZImageDiT, "velocity", counted)
    return watched


@pytest.mark.parametrize("places", PLACES)
def test_components_on_any_devices(watched, places):
    card = watched.render(PLACES[places], {"guidance": 2.0})
    indices = {launch.device.index for launch in card.total.launches}
    named = {torch.device(device).index for device in PLACES[places].values()} - {None}
    assert indices == ({1} if places == "the second card" else {0} | named)


@pytest.mark.parametrize("request_", REQUESTS)
def test_every_kind_of_request(watched, request_):
    watched.render({}, REQUESTS[request_])


@pytest.mark.parametrize("load", LOADS)
def test_every_precision_and_residency(watched, load):
    card = watched.render(LOADS[load], {})
    waits = Counter(line.split(":")[0] for line in card.total.syncs)
    stepping = sum(count for file, count in waits.items() if file.startswith("zimage/flow/"))
    assert 0 < stepping <= 2 + 1, "one wait a step, for its noise level, and the start"


@pytest.fixture(scope="module")
def control(tmp_path_factory):
    """A control file for the demo's DiT, and a picture."""
    demo = json.loads((DEMO / "transformer" / "config.json").read_text())
    sizes = {key: demo[key] for key in ("dim", "n_heads", "n_kv_heads", "n_refiner_layers", "norm_eps")}
    places = {"control_layers_places": [0, 2], "control_refiner_layers_places": [0]}
    folder = control_nets.write(tmp_path_factory.mktemp("control"), "2.1", **sizes, **places)
    return [(folder, Image.new("RGB", (40, 40), "red"))]


@pytest.mark.parametrize("load", [{}, {"precision": "int8"}, {"dit_device": "cuda:1"}, {"residency": "stage"}], ids=str)
@pytest.mark.parametrize("flow", ["publisher", "diffusers"])
def test_controls_lie_where_the_dit_does(watched, control, load, flow):
    watched.render(load, {"control": control, "control_flow": flow, "guidance": 2.0, **SMALL})


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6), (9, 0), (12, 0)], ids=str)
def test_every_generation_of_cards(watched, capability):
    watched.render({}, {}, capability=capability)


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_streamed_blocks(watched, tiny_folder, monkeypatch, precision):
    """A card with room for little: blocks come and go, and their kernels find their weights there."""
    # A whole tiny model has less than one segment of the allocator.
    monkeypatch.setattr("zimage.loading.sizes.reserved_bytes", sum)
    with pretend():
        tight = zimage.ZImage.load(tiny_folder, memory=1e-9, precision=precision)
        plan = tight.prepare(zimage.Request("a cat", **SMALL), must_fit=False).plan
    settings = {"path": tiny_folder, "memory": plan.tightest.peak / 1e9 + 1e-5, "precision": precision}
    card = watched.render(settings, SMALL)
    assert set(card.pinned) > {STAGED}, "no block was streamed"


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_adapters(watched, tiny_folder, tmp_path, precision):
    """Merged into float layers, beside quantised ones."""
    file = lora_files.write(tmp_path / "style.safetensors", lora_files.NAMINGS["kohya"](lora_files.factors(PATHS)))
    watched.render({"path": tiny_folder, "precision": precision}, SMALL, adapter=file)
