"""An evaluation without some layers, as skip-layer guidance asks for it.

With streamed blocks: `test_memory.py`; from CUDA graphs: `test_graphs.py`.
"""

import control_nets
import pytest
import torch
from test_control import captions, controlled, latents

import zimage

SIGMA = torch.tensor([0.7])
REQUEST = {"prompt": "a cat", "seed": 1, "width": 64, "height": 48, "steps": 3, "guidance": 2.0}
SKIP = {"guidance_method": "slg:layers=1,start=0,stop=1"}


def silenced(dit, layers):
    """A copy in which these layers add nothing: their last products are zero."""
    other = control_nets.dit(n_layers=len(dit.layers))
    other.load_state_dict(dit.state_dict())
    for i in layers:
        for last in (other.layers[i].attention.to_out[0], other.layers[i].feed_forward.w2):
            last.weight.data.zero_()
    return other


@pytest.mark.parametrize("layers", [(0,), (1, 2), (0, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("form", [None, "1.0", "2.1"])
@torch.no_grad()
def test_it_is_a_model_whose_layers_add_nothing(layers, form):
    """To the bit, also beside a ControlNet, whose hints stay at their places."""
    dit = control_nets.dit(n_layers=4)
    x, texts = latents(1), captions((7,))
    found = []
    for model, skipped in ((dit, layers), (silenced(dit, layers), ()), (dit, ())):
        controls = [controlled(model, form, SIGMA)] if form else []
        context = model.context(model.refine(texts), *x.shape[-2:])
        found.append(model.velocity(x, model.modulate(SIGMA), context, controls, skipped))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def picture(folder, **load) -> bytes:
    pipe = zimage.ZImage.load(folder, device="cpu", **load)
    (image,) = pipe.generate(**REQUEST, **SKIP).images
    return image.tobytes()


@pytest.mark.parametrize("load", [{"dtype": "fp16"}, {"dtype": "bf16"}, {"precision": "int8"}], ids=str)
def test_other_dtypes(tiny_folder, load):
    assert picture(tiny_folder, **load) != picture(tiny_folder, dtype="fp32")
