"""Options of the suite: `--full` adds full-size models and what takes long. Off a GPU, kernels are interpreted.

Settings of whoever runs the tests are kept away from them.
"""

import dataclasses
import os
import signal

import emulate  # noqa: F401 - before anything that imports zimage
import pytest
import tiny
import torch

import zimage
from zimage.dit import ZImageDiT
from zimage.settings.merging import ALL_SETTINGS
from zimage.text import Qwen3, Qwen3VL
from zimage.vae import AutoencoderKL


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="also run the tests marked `full`")
    parser.addoption("--cases", type=int, default=20_000, help="mutated inputs of `-m fuzz`, of all kinds together")
    parser.addoption("--seed", type=int, default=1, help="from which they are made")


def pytest_xdist_auto_num_workers(config):
    """The whole suite takes two processes; for single files starting them would take longer than it saves."""
    return min(os.cpu_count() or 1, 2) if config.args == config.getini("testpaths") else 0


def pytest_configure(config):
    variables = [field.metadata["env"] for settings in ALL_SETTINGS for field in dataclasses.fields(settings)]
    for name in (*filter(None, variables), "ZIMAGE_PROFILE"):
        os.environ.pop(name, None)
    os.environ["ZIMAGE_CONFIG"] = os.devnull
    # A shell's background job ignores Ctrl-C, and so would every command that a test starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)  # tiny models: a second thread costs more than it gives, most of all on busy cores


def pytest_collection_modifyitems(config, items):
    reasons = {}
    if not config.getoption("--full"):
        reasons["full"] = "full-size models and what takes long are opt-in: --full"
    if "fuzz" not in config.option.markexpr:
        reasons["fuzz"] = "thousands of mutated inputs are opt-in: -m fuzz"
    for item in items:
        for name, reason in reasons.items():
            if item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A whole random model in the published layout; tests that change files copy it first."""
    parts = (Qwen3.from_config(tiny.QWEN), ZImageDiT.from_config(tiny.DIT), AutoencoderKL.from_config(tiny.KL))
    states = [tiny.randomised(part, seed).state_dict() for seed, part in enumerate(parts)]
    return tiny.write_model(tmp_path_factory.mktemp("models") / "tiny", *states, tiny.KL)


@pytest.fixture(scope="session")
def seeing_folder(tmp_path_factory):
    """The same with a text encoder that has tokens for pictures, and in its folder `vision` a model that sees them."""
    parts = (Qwen3.from_config(tiny.SEEING_QWEN), ZImageDiT.from_config(tiny.DIT), AutoencoderKL.from_config(tiny.KL))
    states = [tiny.randomised(part, seed).state_dict() for seed, part in enumerate(parts)]
    folder = tmp_path_factory.mktemp("models") / "seeing"
    tiny.write_model(folder, *states, tiny.KL, text_config=tiny.SEEING_QWEN)
    tiny.write_vision(folder / "vision", tiny.randomised(Qwen3VL.from_config(tiny.SEEING), 3).state_dict())
    return folder


@pytest.fixture(scope="session")
def pipe(tiny_folder):
    return zimage.ZImage.load(tiny_folder, device="cpu", dtype="fp32")
