"""Servers for tests: one for all that leave it as it is, and new ones for those that stop or kill it."""

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from running import Server


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """A running server that tests share; they must not stop it, nor clear its history."""
    running = Server(tmp_path_factory.mktemp("server") / "data").start()
    yield running
    assert running.stop() == 0


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
