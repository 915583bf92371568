import sys
from pathlib import Path

import pytest

here = Path(__file__).parent
sys.path[:0] = [str(here.parent), str(here)]

from hub_standin import StandIn  # noqa: E402


@pytest.fixture
def broker(tmp_path):
    """A stand-in for the broker, on a hub's socket of its own."""
    with StandIn(tmp_path / "hub.sock") as standin:
        yield standin
