"""Rank processes that all tests of a pytest process share, and a model with heads enough for five of them."""

import control_nets
import pytest
import tiny
from pool import Pools
from renders import WIDE

from zimage.text import Qwen3
from zimage.vae import AutoencoderKL


@pytest.fixture(scope="session")
def pool():
    running = Pools()
    yield running
    running.close()


@pytest.fixture(scope="session")
def wide_folder(tmp_path_factory):
    """A model of six heads, with ControlNets of every form beside it in `nets`."""
    folder = tmp_path_factory.mktemp("models") / "wide"
    parts = (Qwen3.from_config(tiny.QWEN), AutoencoderKL.from_config(tiny.KL))
    encoder, vae = (tiny.randomised(part, seed).state_dict() for seed, part in enumerate(parts))
    dit = control_nets.dit(**WIDE).state_dict()
    tiny.write_model(folder, encoder, dit, vae, tiny.KL, dit_config={**control_nets.DIT, **WIDE})
    sizes = {key: WIDE[key] for key in ("dim", "n_heads", "n_kv_heads")}
    for seed, form in enumerate(control_nets.FORMS, 2):
        control_nets.write(folder / "nets" / form, form, seed, **sizes)
    return folder
