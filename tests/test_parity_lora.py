"""Ring 2 for LoRA: files written by PEFT and diffusers, and files of other trainers as diffusers reads them."""

import lora_files as files
import pytest
import tiny
import torch
from lora_files import PROJECTIONS, SHAPES
from safetensors.torch import load_file

import zimage

pytest.importorskip("diffusers")
pytest.importorskip("peft")
import peft
import references

pytestmark = pytest.mark.parity

TOLERANCE = 1e-5  # fp32, of the largest value
TARGETS = list(SHAPES)  # every linear layer
SCALE = 0.7


@pytest.fixture
def reference(tiny_folder):
    """diffusers' model with the weights of the tiny folder."""
    model = references.dit(seed=1)
    model.load_state_dict(load_file(tiny_folder / "transformer" / "diffusion_pytorch_model.safetensors"))
    return model


@pytest.fixture
def pipe(tiny_folder):
    return zimage.ZImage.load(tiny_folder, device="cpu", dtype="fp32")


def inputs():
    generator = torch.Generator().manual_seed(96)
    captions = [torch.randn(n, tiny.DIT["cap_feat_dim"], generator=generator) for n in (7, 40)]
    return torch.randn(2, 16, 6, 10, generator=generator), torch.tensor([0.7, 0.2]), captions


def fill(model) -> None:
    """Random values where training would start at zero."""
    generator = torch.Generator().manual_seed(97)
    for name, weight in model.named_parameters():
        if "oft_R" in name:
            weight.data = 0.05 * torch.randn(weight.shape, generator=generator)
        elif "lora_" in name or "lokr_" in name or "hada_" in name:
            offset = 1.0 if "magnitude" in name else 0.0
            weight.data = offset + 0.2 * torch.randn(weight.shape, generator=generator)


def assert_same(pipe, path, reference, scale=1.0):
    plain = pipe.dit(*inputs())
    theirs = references.velocity(reference, *inputs())
    handle = pipe.lora.add(path, scale)
    ours = pipe.dit(*inputs())
    assert tiny.relative_error(ours, theirs) <= TOLERANCE
    assert tiny.relative_error(plain, theirs) > 100 * TOLERANCE, "the adapter changes something"
    pipe.lora.remove(handle)
    assert torch.equal(pipe.dit(*inputs()), plain)


CONFIGS = {
    "plain": peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS),
    "rank-stabilised": peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, use_rslora=True),
    "patterns": peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=TARGETS,
        rank_pattern={"to_q": 8, r"layers\.1\.feed_forward\.w1": 2},
        alpha_pattern={"to_q": 4, "^layers.0.attention.to_k": 12},
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_by_a_diffusers_model(pipe, reference, tmp_path, name):
    """Alpha stands in the file's header."""
    reference.add_adapter(CONFIGS[name])
    fill(reference)
    reference.save_lora_adapter(tmp_path)
    assert_same(pipe, tmp_path / "pytorch_lora_weights.safetensors", reference)


def test_saved_by_a_diffusers_pipeline(pipe, reference, tmp_path):
    reference.add_adapter(CONFIGS["patterns"])
    fill(reference)
    config = {k: list(v) if isinstance(v, set) else v for k, v in reference.peft_config["default"].to_dict().items()}
    references.diffusers.ZImagePipeline.save_lora_weights(
        tmp_path, peft.get_peft_model_state_dict(reference), transformer_lora_adapter_metadata=config
    )
    (file,) = tmp_path.glob("*.safetensors")
    assert_same(pipe, file, reference)


SAVED = {
    **CONFIGS,
    "of all but the last blocks": peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=TARGETS,
        alpha_pattern={r"(noise|context)_refiner\..*": 3, r"layers\.\d+\.attention\.to_[qk]": 9},
    ),
    "dora": peft.LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "w2"], use_dora=True),
    "loha": peft.LoHaConfig(r=4, alpha=6, target_modules=TARGETS),
    "lokr": peft.LoKrConfig(r=4, alpha=6, target_modules=TARGETS),
    "lokr of products": peft.LoKrConfig(r=2, alpha=6, target_modules=TARGETS, decompose_both=True),
    "lokr of whole matrices": peft.LoKrConfig(r=64, alpha=6, target_modules=["to_q", "w1"]),
}


INNER = ["to_q", "to_k", "to_out.0", "w1", "t_embedder.mlp.0", "cap_embedder.1"]
OFTS = {
    "defaults": {"oft_block_size": 8},
    "blocks by their number": {"r": 4, "oft_block_size": 0},
    "one block": {"oft_block_size": 64},
    "shared": {"oft_block_size": 16, "block_share": True},
    "exact": {"oft_block_size": 8, "use_cayley_neumann": False},
    "exact and shared": {"oft_block_size": 8, "use_cayley_neumann": False, "block_share": True},
    **{f"{n} terms": {"oft_block_size": 8, "num_cayley_neumann_terms": n} for n in (1, 2, 3, 4, 6, 9)},
    "constrained": {"oft_block_size": 8, "coft": True, "eps": 0.3},
    "constrained, exact and shared": {
        **{"oft_block_size": 8, "coft": True, "eps": 0.05},
        **{"use_cayley_neumann": False, "block_share": True},
    },
}


@pytest.mark.parametrize("name", OFTS)
def test_an_oft_saved_by_peft(pipe, reference, tmp_path, name):
    """The merged weights of each layer, and the velocity of the whole model."""
    model = peft.get_peft_model(reference, peft.OFTConfig(target_modules=INNER, **OFTS[name]))
    fill(model)
    model.save_pretrained(tmp_path)
    pipe.lora.add(tmp_path)
    ours = dict(pipe.dit.named_parameters())
    model.merge_adapter()
    merged = {key.replace(".base_layer", ""): value for key, value in reference.state_dict().items()}
    turned = [path for path in SHAPES if path.endswith(tuple(INNER))]
    assert sorted(pipe.lora.list()[0].file.deltas) == sorted(turned)
    for path in turned:
        assert tiny.relative_error(ours[f"{path}.weight"], merged[f"{path}.weight"]) <= TOLERANCE
    model.unmerge_adapter()
    if name != "1 terms":  # which turns nothing
        pipe.lora.remove(pipe.lora.list()[0].handle)
        assert_same(pipe, tmp_path, reference)


@pytest.mark.parametrize("name", SAVED)
def test_saved_by_peft(pipe, reference, tmp_path, name):
    """Alpha stands in adapter_config.json beside the file."""
    model = peft.get_peft_model(reference, SAVED[name])
    fill(model)
    model.save_pretrained(tmp_path)
    assert_same(pipe, tmp_path / "adapter_model.safetensors", reference)


READ_BY_DIFFUSERS = [
    "diffusers",
    "ai-toolkit",
    "ai-toolkit with alpha",
    "kohya",
    "kohya fused",
    "onetrainer bare",
    "dotted with duplicates",
    "diffsynth",
]


@pytest.mark.parametrize("name", READ_BY_DIFFUSERS)
def test_read_by_diffusers(pipe, reference, tmp_path, name):
    """The namings that diffusers knows, at a scale."""
    file = files.write(tmp_path / "lora.safetensors", files.NAMINGS[name](files.factors(PROJECTIONS)))
    attach(reference, file)
    assert_same(pipe, file, reference, SCALE)


@pytest.mark.parametrize("low", ["", "w2", "w1 w2"])
def test_lokr_read_by_diffusers(pipe, reference, tmp_path, low):
    layers = [path for path in SHAPES if ".attention." in path]
    tensors = {
        f"diffusion_model.{path}.{name}": value
        for path in layers
        for name, value in {**files.lokr(path, 8, 8, low, rank=2), "alpha": torch.tensor(files.ALPHA)}.items()
    }
    file = files.write(tmp_path / "lora.safetensors", tensors)
    attach(reference, file)
    assert_same(pipe, file, reference, SCALE)


def attach(reference, file):
    scheduler = references.diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = references.diffusers.ZImagePipeline(scheduler, None, None, None, transformer=reference)
    pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name="style")
    pipe.set_adapters("style", SCALE)
