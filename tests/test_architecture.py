"""Values of config.json: each has a kind and bounds, checked before anything of that size is built."""

import json
import shutil
import time

import pytest
import tiny

import zimage
from zimage.dit import ContextRefiner, ZImageDiT
from zimage.errors import CheckpointError, ConfigError
from zimage.loading.finding import SchedulerConfig, read_shift
from zimage.loading.weights import on_meta
from zimage.nn.config import read_architecture
from zimage.text import Qwen3
from zimage.vae import AutoencoderKL, AutoencoderKLWan

MODELS = {
    "qwen": (Qwen3, tiny.QWEN),
    "dit": (ZImageDiT, tiny.DIT),
    "refiner": (ContextRefiner, tiny.DIT),
    "kl": (AutoencoderKL, tiny.KL),
    "wan": (AutoencoderKLWan, tiny.WAN),
}
ODD = (
    None, True, "8", "", 0, -1, 7.5, 2**63, 10**30, 1e308, float("nan"), float("inf"), [], [8, "x"], [[8]], [None] * 3,
    [1] * 1000, [10**9] * 3, {}, {"a": [1]}, "x" * 100_000,
)  # fmt: skip
PUBLISHED = {
    "Qwen3-235B": {"hidden_size": 4096, "intermediate_size": 12_288, "num_hidden_layers": 94, "head_dim": 128,
                   "num_attention_heads": 64, "num_key_value_heads": 4, "vocab_size": 151_936},
    "Qwen3-32B": {"hidden_size": 5120, "intermediate_size": 25_600, "num_hidden_layers": 64, "head_dim": 128,
                  "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 151_936},
}  # fmt: skip


def complaint(cls, config):
    """What building it says, or None where it can be built."""
    try:
        with on_meta():
            cls.from_config(config)
    except ConfigError as error:
        return str(error)
    return None


@pytest.mark.parametrize("kind", MODELS)
def test_every_value_of_another_kind_or_size_is_named(kind):
    """Every key of every config with every odd value: it builds within a second, or the line names the key."""
    cls, config = MODELS[kind]
    for key in config:
        for value in ODD:
            begun, said = time.perf_counter(), complaint(cls, {**config, key: value})
            assert said is None or (key in said and len(said) < 400), (key, value)
            assert time.perf_counter() - begun < 3, (key, value)  # 0.3 s for the largest on an idle core


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("dit", {"axes_dims": [None, 48, 48]}, "axes_dims = [None, 48, 48] should be a list of 3 values of type int"),
        ("dit", {"n_refiner_layers": 10**9}, "n_refiner_layers = 1000000000 should be of type int, from 1 to 32"),
        ("dit", {"n_heads": 0}, "n_heads = 0 should be of type int, from 1"),
        ("dit", {"axes_dims": [8, 12, 13]}, "a multiple of 2"),
        ("dit", {"axes_dims": [8, 12, 14]}, "must add up to dim / n_heads"),
        ("dit", {"axes_lens": [33, 64, 64]}, "axes_lens"),
        ("dit", {"norm_eps": float("nan")}, "norm_eps = nan should be of type float"),
        ("qwen", {"num_key_value_heads": 3}, "num_attention_heads = 4 must be a multiple of num_key_value_heads = 3"),
        ("qwen", {"head_dim": 7}, "head_dim = 7 should be of type int, from 2 to 4,096, a multiple of 2"),
        ("qwen", {"layer_types": 5}, "layer_types = 5"),
        ("qwen", {"layer_types": [["full_attention"]]}, "only 'full_attention' is implemented"),
        ("qwen", {"rope_parameters": "default"}, "rope_parameters = 'default' should be an object"),
        ("qwen", {"rope_parameters": {"rope_type": ["default"]}}, "rope_type = ['default'] is not implemented"),
        ("qwen", {"rope_parameters": {"rope_theta": "1e6"}}, "rope_theta = '1e6' should be of type float"),
        ("kl", {"block_out_channels": "8"}, "block_out_channels = '8' should be a list of 1 to 4 values of type int"),
        ("kl", {"block_out_channels": [8, 16, 18]}, "norm_num_groups = 4 must divide block_out_channels = [8, 16, 18]"),
        ("kl", {"sample_size": 30}, "sample_size = 30 should be of type int, from 16 to 65,536, a multiple of 16"),
        ("kl", {"out_channels": 4}, "out_channels = 4 should be of type int, 3"),
        ("wan", {"latents_std": [0.0] * 16}, "latents_std"),
        ("wan", {"temperal_downsample": [0, 1, 1]}, "temperal_downsample = [0, 1, 1] should be a list"),
        ("wan", {"_class_name": ["AutoencoderKLWan"]}, "_class_name = ['AutoencoderKLWan'] is not implemented"),
    ],
)  # fmt: skip
def test_what_would_be_right_is_said(kind, change, words):
    cls, config = MODELS[kind]
    with pytest.raises(ConfigError) as error:
        cls.from_config({**config, **change})
    assert words in str(error.value)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_are_within_bounds(name):
    with on_meta():
        Qwen3.from_config({**tiny.QWEN, **PUBLISHED[name]})


@pytest.mark.parametrize("shift", [0, -3.0, "3", None, True, [3.0], float("inf"), 10**9])
def test_the_schedule_is_checked_like_an_architecture(tmp_path, shift):
    (tmp_path / "scheduler").mkdir()
    file = tmp_path / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**tiny.SCHEDULER, "shift": shift}))
    with pytest.raises(ConfigError, match=r"shift = .* should be of type float, from 0.001 to 100") as error:
        read_shift(tmp_path)
    assert str(file) in str(error.value)
    assert read_architecture(SchedulerConfig, tiny.SCHEDULER, SchedulerConfig.IMPLEMENTED).shift == 3.0


@pytest.mark.parametrize("value", [["x"], 5, {"a": 1}])
@pytest.mark.parametrize(
    ("part", "name", "key"),
    [
        ("transformer", "dit", "_class_name"),
        ("transformer", "context_refiner", "_class_name"),
        ("text_encoder", "text_encoder", "model_type"),
        ("vae", "vae", "_class_name"),
    ],
)
def test_the_file_is_named(tiny_folder, tmp_path, part, name, key, value):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    path = folder / part / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(CheckpointError, match=f"{key} = .* is not implemented") as error:
        zimage.load_component(folder, name)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("kind", [["AutoencoderKL"], {"a": 1}, 7])
def test_a_component_folder_of_another_kind(tiny_folder, tmp_path, kind):
    from zimage.weights.components import find_components

    folder = shutil.copytree(tiny_folder / "vae", tmp_path / "vae")
    (folder / "config.json").write_text(json.dumps({**tiny.KL, "_class_name": kind}))
    with pytest.raises(CheckpointError, match=r"config\.json describes"):
        find_components(folder)
