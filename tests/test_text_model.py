"""The text encoder alone, without a reference."""

import pytest
import torch
from tiny import QWEN, VOCAB, randomised, relative_error

from zimage.errors import ConfigError, RequestError
from zimage.nn.layers import NarrowLinear
from zimage.text import Qwen3

LAYERS = QWEN["num_hidden_layers"]


@pytest.fixture(scope="module")
def model():
    return randomised(Qwen3.from_config(QWEN), seed=1).eval().requires_grad_(False)


def token_ids(length: int) -> torch.Tensor:
    return torch.randint(VOCAB, (1, length), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("pads", [1, 45])
@pytest.mark.parametrize("pad_id", [0, VOCAB - 1])
def test_right_padding_does_not_change_real_tokens(model, pads, pad_id):
    ids = token_ids(19)
    padded = torch.nn.functional.pad(ids, (0, pads), value=pad_id)
    assert relative_error(model(padded)[:, :19], model(ids)) <= 1e-6


def test_later_tokens_do_change_with_earlier_ones(model):
    """Attention is causal, not absent."""
    ids = token_ids(19)
    other = ids.clone()
    other[0, 3] = (other[0, 3] + 1) % VOCAB
    difference = (model(other) - model(ids)).abs().amax(dim=(0, 2))
    assert (difference[:3] == 0).all()
    assert (difference[3:] > 0).all()


@pytest.mark.parametrize("layer", range(-LAYERS - 1, 0))
def test_only_needed_layers_run(model, layer):
    """Hidden state −2 never touches the last layer, and so on down to the embeddings."""
    ran = []
    hooks = [block.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, block in enumerate(model.model.layers)]
    hooks.append(model.model.norm.register_forward_hook(lambda *_: ran.append("norm")))
    model(token_ids(4), layer=layer)
    for hook in hooks:
        hook.remove()
    assert ran == list(range(LAYERS + 1 + layer)) + (["norm"] if layer == -1 else [])


def test_layers_are_counted_like_the_list_of_hidden_states(model):
    states = list(model.hidden_states(token_ids(7)))
    assert len(states) == LAYERS + 1
    for layer in (*range(-LAYERS - 1, 0), *range(LAYERS + 1)):
        assert torch.equal(model(token_ids(7), layer=layer), states[layer])


@pytest.mark.parametrize("layer", [LAYERS + 1, -LAYERS - 2])
def test_a_layer_that_does_not_exist_is_named(model, layer):
    with pytest.raises(RequestError, match=f"hidden layer {layer} does not exist"):
        model(token_ids(4), layer=layer)


def test_keys_without_prefix_load(model):
    """Files saved from the bare decoder lack `model.`."""
    bare = Qwen3.from_config(QWEN)
    bare.load_state_dict({key.removeprefix("model."): value for key, value in model.state_dict().items()})
    assert torch.equal(bare(token_ids(5)), model(token_ids(5)))


def test_theta_of_either_config_style(model):
    """At the top (transformers 4) or in rope_parameters (5)."""
    plain = {key: value for key, value in QWEN.items() if key != "rope_theta"}
    newer = {**plain, "rope_parameters": {"rope_theta": QWEN["rope_theta"], "rope_type": "default"}}
    assert Qwen3.from_config(newer).config == model.config
    with pytest.raises(ConfigError, match="rope_theta"):
        Qwen3.from_config(plain)


@pytest.mark.parametrize(
    "change",
    [
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        {"rope_parameters": {"rope_theta": 1e6, "rope_type": "yarn"}},
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"attention_bias": True},
        {"hidden_act": "gelu"},
        {"model_type": "qwen2"},
        {"tie_word_embeddings": False},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_is_not_implemented_is_refused(change):
    with pytest.raises(ConfigError, match="implemented"):
        Qwen3.from_config({**QWEN, **change})


def test_every_parameter_gets_a_finite_gradient():
    model = randomised(Qwen3.from_config(QWEN), seed=3)
    model(token_ids(9), layer=-1).square().mean().backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.isfinite().all(), name
        assert weight.grad.any(), name


@pytest.mark.parametrize("rows", [1, 24, 65])
def test_a_narrow_product_is_the_ordinary_one(rows):
    torch.manual_seed(0)
    layer, x = NarrowLinear(96, 80, bias=False).bfloat16(), torch.randn(1, rows, 96).bfloat16()
    exact = x.double() @ layer.weight.double().T
    assert layer(x).shape == exact.shape
    assert torch.allclose(layer(x).double(), exact, rtol=2**-8, atol=2**-8), "one rounding to bf16 of an fp32 sum"
