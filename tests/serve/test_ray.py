"""`serve --address`: workers on the machines of a Ray cluster, with the demo model, files that travel, and deaths."""

import importlib.util

import pytest

if importlib.util.find_spec("ray") is None:
    pytest.skip("the extra ray is not installed", allow_module_level=True)

from ray_cluster import Cluster
from running import Server

from zimage.cli import main


@pytest.fixture(scope="module")
def machines():
    one = Cluster()
    yield one
    one.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ray")


@pytest.fixture(scope="module")
def there(machines, folder):
    """A server whose two workers are on the cluster; tests leave it as it is."""
    options = ("--address", machines.address, "--workers", "2")
    running = Server(folder / "data", *options, environment=machines.environment).start()
    yield running
    assert running.stop() == 0


def test_bits_and_settings_are_those_of_a_run_here(there, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    asked = ["gen", "a cat face on a blue background", "--seed", "4", "-n", "2", "-q", "-o"]
    assert main([*asked, "there-{index}.png", "--server", there.url]) == 0
    assert main([*asked, "here-{index}.png"]) == 0
    for index in (1, 2):
        there_, here = (tmp_path / f"{name}-{index}.png" for name in ("there", "here"))
        assert there_.read_bytes() == here.read_bytes()
