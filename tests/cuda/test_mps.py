"""A pretended Mac: every op of a render has a kernel on its GPU, and nothing is float64 or page-locked."""

import loose
import lora_files
import numpy as np
import pytest
import tiny
import torch
from mac import has_kernel, pretend_mac
from PIL import Image
from pretended import needs_pretended

import zimage
from zimage.errors import RequestError
from zimage.nn import ggml
from zimage.nn.attention import attention
from zimage.nn.packed import PackedLinear
from zimage.settings.rewriting import RewriteSettings
from zimage.vae import AutoencoderKLWan

BY_COMFY = {
    "int8": [pytest.param(kind, marks=loose.COMFY) for kind in (loose.int8_convrot, loose.int4_convrot)],
    "fp8": [pytest.param(kind, marks=loose.COMFY) for kind in (loose.nvfp4, loose.mxfp8)],
}
pytestmark = [pytest.mark.cuda, needs_pretended]
TWO = ["a cat face on a blue background", "a red apple and a dog face on a white background"]
PICTURE, MASK = (Image.fromarray(np.full((64, 64, 3), 90 + 80 * i, np.uint8)) for i in range(2))
PATHS = [f"layers.{i}.attention.{name}" for i in (0, 1) for name in ("to_q", "to_k", "to_out.0")]
GUIDED = {"guidance": 2.0, "negative": "a dog", "cfg_normalization": 1.0, "cfg_truncation": 0.5}
REQUESTS = {
    "guided batch of unequal captions": {"prompt": TWO, "batch_size": 2, "steps": 2, **GUIDED},
    "two passes of blended layers": {"hires": 2.0, "layer_weights": "-2:1,-3:0.5"},
    "inpainting": {"image": PICTURE, "mask": MASK},
    "a long prompt, in tiles": {
        **{"prompt": "a cat " * 300, "long_prompt": "interpolate"},
        **{"tile_mode": "blend", "tile_size": 32, "tile_overlap": 16},
    },
    "exact strips": {"tile_mode": "exact", "tile_size": 32},
    "image to image in strips": {"image": PICTURE, "tile_mode": "exact", "tile_size": 32},
}


def rendered(pipe, mac, request) -> None:
    result = pipe.generate(**{"prompt": "a cat", "seed": 1, "steps": 1, "width": 64, "height": 64, **request})
    assert len(result.images) == len(result.seeds) > 0
    assert "convolution" in mac.ops
    assert not mac.card.pinned


@pytest.fixture
def mac():
    with torch.no_grad(), pretend_mac() as mac:
        yield mac


@pytest.mark.parametrize("name", REQUESTS)
def test_every_kind_of_request(tiny_folder, mac, name):
    pipe = zimage.ZImage.load(tiny_folder)
    assert {place.device.type for place in pipe.places.values()} == {"mps"}
    rendered(pipe, mac, REQUESTS[name])


def test_fp32_with_stages_in_turn(tiny_folder, mac):
    rendered(zimage.ZImage.load(tiny_folder, residency="stage", dtype="fp32"), mac, {})


def test_bf16_is_the_default():
    with pretend_mac():
        assert {place.dtype for place in zimage.ZImage.load().places.values()} == {torch.bfloat16}


def test_adapters(tiny_folder, tmp_path, mac):
    file = lora_files.write(tmp_path / "style.safetensors", lora_files.NAMINGS["kohya"](lora_files.factors(PATHS)))
    rendered(zimage.ZImage.load(tiny_folder, lora=[f"{file}:0.5"]), mac, {})


def test_writing(tiny_folder, mac):
    list(zimage.ZImage.load(tiny_folder).rewriter.pieces("a cat", RewriteSettings(max_tokens=3, rewrite_seed=1)))
    assert {"mm", "addmm"} & mac.ops


@pytest.fixture(scope="module")
def states():
    return loose.states()


@pytest.fixture(scope="module")
def folder(states, tmp_path_factory):
    return loose.write_folder(tmp_path_factory.mktemp("loose") / "model", states)


@pytest.mark.parametrize("quantise", [loose.int8_whole, *BY_COMFY["int8"]])
def test_what_stays_packed_is_widened_there(states, tmp_path, mac, quantise):
    file = loose.save(loose.quantised(states["dit"], quantise)[0], tmp_path / "dit.safetensors")
    one_layer(file)


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_0"])
def test_gguf(states, tmp_path, mac, kind):
    native = loose.renamed("dit", "native", states["dit"])
    loose.write_gguf(tmp_path / "dit.gguf", "lumina2", native, kind, loose.is_matrix)
    one_layer(tmp_path / "dit.gguf")


def one_layer(file):
    w1 = zimage.load_component(file, "dit", device="mps").layers[0].feed_forward.w1
    assert isinstance(w1, PackedLinear)
    assert w1(torch.zeros(1, 2, w1.in_features, device="mps", dtype=torch.bfloat16)).device.type == "mps"


@pytest.mark.parametrize("kind", ggml.BYTES)
def test_every_kind_of_ggml_is_decoded_there(mac, kind):
    codes = torch.zeros(2, 3 * ggml.BYTES[kind], dtype=torch.uint8, device="mps")
    assert ggml.GGML(codes, kind).decode().shape == (2, 3 * ggml.NUMBERS[kind])


@pytest.mark.parametrize("quantise", [loose.cast_fp8, loose.lightx2v_fp8, *BY_COMFY["fp8"]])
def test_fp8_is_refused(states, folder, tmp_path, quantise):
    """PyTorch raises a TypeError when the first tensor of such numbers is brought to a Mac's GPU."""
    file = loose.save(loose.quantised(states["dit"], quantise)[0], tmp_path / "dit.safetensors")
    with pretend_mac(), pytest.raises(RequestError, match=r"dit\.safetensors holds .*, and a Mac's GPU has no fp8"):
        zimage.ZImage.load(folder, dit=file)


@pytest.mark.parametrize(
    "shape", [(1, 16416, 30, 128), (1, 4128, 30, 128), (2, 300, 8, 64), (1, 65536, 1, 512)], ids=str
)
@pytest.mark.parametrize("causal", [False, True])
def test_attention_never_has_all_scores_of_a_large_picture(mac, shape, causal):
    """30 heads of 16416 tokens (2048 × 2048) are 16 GB of scores, where 4 GB end the process."""
    q = torch.zeros(shape, device="mps", dtype=torch.bfloat16)
    assert attention(q, q, q, causal=causal).shape == q.shape


def test_a_render_that_does_not_fit_is_not_streamed(tiny_folder):
    with pretend_mac(memory=10_000), pytest.raises(RequestError, match="free on mps"):
        zimage.ZImage.load(tiny_folder).generate("a cat", width=32, height=32)


def test_the_list_of_kernels_is_read_right():
    for name in ("add.Tensor", "mm", "convolution", "native_group_norm", "rsqrt", "_softmax", "linalg_vector_norm"):
        assert has_kernel(name), name
    for name in ("_int_mm", "_scaled_mm", "batch_norm_update_stats"):
        assert not has_kernel(name), name


def test_no_copy_to_a_mac_is_left_under_way(mac, monkeypatch):
    """PyTorch there reads the host's memory later, and does not keep it so long."""
    copies, to = [], torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *a, **k: copies.append(k) or to(x, *a, **k))
    vae = AutoencoderKLWan.from_config(tiny.WAN)
    vae._statistics(torch.empty((), device="mps"))
    assert copies
    assert not any(named.get("non_blocking") for named in copies)
