import sys
from pathlib import Path

import pytest

here = Path(__file__).parent
sys.path[:0] = [str(here.parent), str(here)]

from client_standin import StandIn  # noqa: E402


@pytest.fixture
def standin(tmp_path, monkeypatch):
    """A stand-in for the broker on a server's socket, and the way to it."""
    with StandIn(str(tmp_path / "broker.sock")) as it:
        monkeypatch.setenv("TOKENBROKER_SOCKET", it.path)
        monkeypatch.setenv("no_proxy", "*")  # the services of the tests are on this machine
        yield it
