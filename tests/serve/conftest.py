"""Servers for tests: one for all that leave it as it is, and new ones for those that stop or kill it."""

import json

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from running import Server


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """A running server that tests share; they must not stop it, nor clear its history."""
    running = Server(tmp_path_factory.mktemp("server") / "data").start()
    yield running
    assert running.stop() == 0


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A model whose DiT has as many layers as the ControlNets count."""
    import control_nets
    import tiny

    from zimage.dit import ZImageDiT
    from zimage.text import Qwen3
    from zimage.vae import AutoencoderKL

    parts = (Qwen3.from_config(tiny.QWEN), ZImageDiT.from_config(control_nets.DIT), AutoencoderKL.from_config(tiny.KL))
    states = [tiny.randomised(part, seed).state_dict() for seed, part in enumerate(parts)]
    return tiny.write_model(tmp_path_factory.mktemp("models") / "five", *states, tiny.KL, control_nets.DIT)


@pytest.fixture(scope="session")
def controls(tmp_path_factory):
    """A folder of control files: one loose, one as a component."""
    import control_nets
    from safetensors.torch import save_file

    root = tmp_path_factory.mktemp("controls")
    (root / "lite").mkdir()
    (root / "lite" / "config.json").write_text(json.dumps(control_nets.FORMS["lite"]))
    save_file(control_nets.net("lite").state_dict(), root / "lite" / "diffusion_pytorch_model.safetensors")
    (root / "lite-damaged.safetensors").write_bytes(b"x")
    return root


@pytest.fixture(scope="module")
def browser():
    from browsing import chromium  # which skips where playwright is absent

    with chromium() as one:
        yield one


@pytest.fixture
def new_server(tmp_path):
    """Makes servers, which are killed at the end of the test."""
    made = []

    def make(*options, name="data", environment=None):
        made.append(Server(tmp_path / name, *options, environment=environment))
        return made[-1]

    yield make
    for one in made:
        if one.process is not None and one.process.poll() is None:
            one.kill()
