"""Ring 1: committed outputs of the reference implementations, without them installed. See make_goldens.py."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import DIT, KL, QWEN, WAN, relative_error, write_model

from zimage import ZImage
from zimage.dit import ZImageDiT
from zimage.loading.files import load_component
from zimage.text import Qwen3
from zimage.vae import AutoencoderKL, AutoencoderKLWan

TOLERANCE = 1e-5  # fp32, of the largest value
SIGMAS = (1.0, 0.6429, 0.3)
RUNS = {  # name → settings of a whole denoising run
    "plain": {"guidance": 0.0},
    "half_guidance": {"guidance": 0.5},
    "guidance": {"guidance": 3.5},
    "truncated": {"guidance": 3.5, "cfg_truncation": 0.3},
    "normalised": {"guidance": 3.5, "cfg_normalization": 1.0},
    "both": {"guidance": 3.5, "cfg_truncation": 0.3, "cfg_normalization": 0.8},
}


def golden(name: str) -> tuple[dict, dict]:
    """(weights, inputs and outputs) of one model."""
    tensors = load_file(Path(__file__).parent / "goldens" / f"{name}.safetensors")
    weights = {key.removeprefix("weights."): value.float() for key, value in tensors.items() if key[:8] == "weights."}
    return weights, {key: value for key, value in tensors.items() if key[:8] != "weights."}


@pytest.fixture(scope="module")
def dit():
    weights, tensors = golden("dit")
    model = ZImageDiT.from_config(DIT)
    model.load_state_dict(weights)
    return model, tensors, [tensors["caption.0"], tensors["caption.1"]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    parts = (golden(name)[0] for name in ("text_encoder", "dit", "wan"))
    return write_model(tmp_path_factory.mktemp("golden") / "model", *parts, vae_config=WAN)


@pytest.fixture(scope="module")
def pipe(folder):
    return ZImage.load(folder, device="cpu", dtype="fp32")


@torch.no_grad()
def test_text_encoder_gives_every_hidden_state():
    """All n + 1 states, embeddings and the final norm included."""
    weights, tensors = golden("text_encoder")
    model = Qwen3.from_config(QWEN)
    model.load_state_dict(weights)
    for i, state in enumerate(model.hidden_states(tensors["ids"])):
        assert relative_error(state, tensors[f"hidden.{i}"]) <= TOLERANCE, f"hidden state {i}"
    assert i == QWEN["num_hidden_layers"]


@pytest.mark.parametrize("sigma", SIGMAS)
@torch.no_grad()
def test_dit_gives_the_velocity(dit, sigma):
    """Unequal captions in one batch, learned pads in captions and image, a non-square image."""
    model, tensors, captions = dit
    velocity = model(tensors["latents"], torch.full((2,), sigma), captions)
    assert relative_error(velocity, tensors[f"velocity.{sigma}"]) <= TOLERANCE


@pytest.mark.parametrize("sigma", SIGMAS)
@torch.no_grad()
def test_dit_gives_the_same_from_its_prepared_parts(dit, sigma):
    """Refined captions, context and modulation computed ahead agree with the reference too."""
    model, tensors, captions = dit
    latents = tensors["latents"]
    context = model.context(model.refine(captions), *latents.shape[-2:])
    modulation = model.modulate(torch.tensor(SIGMAS)).step(SIGMAS.index(sigma))
    assert relative_error(model.velocity(latents, modulation, context), tensors[f"velocity.{sigma}"]) <= TOLERANCE


@pytest.mark.parametrize("run", RUNS)
def test_denoise_gives_the_latents_of_the_reference_pipeline(pipe, run):
    """Eight whole Euler steps: guidance off, weak and strong, truncated and normalised, from a loaded model folder."""
    _, tensors = golden("dit")
    captions, negative = ([tensors[f"{kind}.{i}"] for i in range(2)] for kind in ("caption", "negative"))
    latents = pipe.denoise(captions, tensors["latents"], steps=8, shift=3.0, negative=negative, **RUNS[run])
    assert relative_error(latents, tensors[f"denoised.{run}"]) <= TOLERANCE


def test_runs_differ():
    """Each setting of the runs above changes the picture, so that none can be ignored unseen."""
    _, tensors = golden("dit")
    results = [tensors[f"denoised.{run}"] for run in RUNS]
    for i, first in enumerate(results):
        for second in results[:i]:
            assert relative_error(first, second) > 0.01


@pytest.mark.parametrize("name", ["kl", "wan"])
@torch.no_grad()
def test_vae_encodes_and_decodes(name):
    """Two non-square images each way, scaled latents, the posterior's mode."""
    weights, tensors = golden(name)
    model = AutoencoderKL.from_config(KL) if name == "kl" else AutoencoderKLWan.from_config(WAN)
    if name == "wan":
        weights = dict(filter(None, (model.fold(key, value) for key, value in weights.items())))
    model.load_state_dict(weights)
    assert relative_error(model.encode(tensors["images"]), tensors["encoded"]) <= TOLERANCE
    assert relative_error(model.decode(tensors["latents"]), tensors["decoded"]) <= TOLERANCE


@torch.no_grad()
def test_loaded_wan_vae_decodes_the_same(folder):
    """The checkpoint loader folds the published 3-D weights."""
    _, tensors = golden("wan")
    vae = load_component(folder, "vae", dtype="fp32")
    assert relative_error(vae.decode(tensors["latents"]), tensors["decoded"]) <= TOLERANCE
