"""References on a pretended GPU: no tensor is on the wrong device, wherever the components are."""

import pytest
import torch
from PIL import Image
from pretended import needs_pretended, pretend

import zimage
from zimage.text.sight import Sight

pytestmark = [pytest.mark.cuda, needs_pretended]
PLACES = {
    "one GPU": {},
    "the text encoder on the CPU": {"text_encoder_device": "cpu"},
    "two GPUs": {"text_encoder_device": "cuda:1"},
}


@pytest.fixture
def regardless_of_ids(monkeypatch):
    """What depends on the values of ids, which a pretended GPU does not have, as if no token were a picture's."""

    def positions(ids, cache, sight):
        running = torch.arange(ids.shape[1], dtype=torch.float32, device=ids.device)
        return running.expand(3, -1) if sight else running

    monkeypatch.setattr("zimage.text.qwen3._positions", positions)
    monkeypatch.setattr(Sight, "shown", lambda self, x, places: x + self.tokens.to(x.device, x.dtype).sum())
    monkeypatch.setattr(Sight, "deepened", lambda self, x, places, layer: x)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("mode", ["full", "tower"])
def test_a_reference_is_seen_and_mixed_in(seeing_folder, regardless_of_ids, mode, place):
    seen = {"reference": [Image.new("RGB", (96, 72))], "vision_layer": -1, "vision_tokens": "all"}
    vision = {"vision_model": seeing_folder / "vision", "vision_mode": mode}
    with pretend(devices=2) as card:
        pipe = zimage.ZImage.load(seeing_folder, **vision, **PLACES[place])
        job = pipe.prepare(zimage.Request("a cat", seed=1, steps=1, width=64, height=64, **seen))
        where = job.plan.stages[pipe.vision.component].device
        assert where == str(pipe.places["text_encoder"].device)
        assert [event.image for event in pipe.run(job)][-1] is not None
        assert pipe.vision.component not in pipe.loaded
    assert card.total.launches
