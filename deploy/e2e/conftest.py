"""The stack that the tests of this directory share, and how they ask it things."""

import http.client
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from notebook import Notebook  # noqa: E402
from people import Browser, Hub, Keycloak, Server  # noqa: E402
from refstack.stack import BROKER, OLD_WAY, STATE, Stack  # noqa: E402

TOKEN_LIFE = 20  # seconds, of Keycloak's access tokens
REFRESH_AGE = 1  # seconds after which the hub asks about a user again
PLANTED = set()  # refresh tokens that a test itself gave to the hub


@pytest.fixture(scope="session")
def stack():
    """The whole stack, with a hub of the old way beside the broker's.

    With KEEP_STACK set it stays, for the next run while a test is written.
    """
    stack = Stack(STATE / "e2e")
    keep = bool(os.environ.get("KEEP_STACK"))
    if stack.settings and not keep:  # a run that was killed left it
        stack.down()
    if not stack.settings:
        race = bool(os.environ.get("RACE"))
        stack.up(hubs=(BROKER, OLD_WAY), token_life=TOKEN_LIFE, refresh_age=REFRESH_AGE, race=race)
    yield stack
    if not keep:
        stack.down(keep_logs=True)


@pytest.fixture(scope="session")
def hub(stack):
    return Hub(stack, BROKER)


@pytest.fixture(scope="session")
def old_hub(stack):
    return Hub(stack, OLD_WAY)


@pytest.fixture(scope="session")
def keycloak(stack):
    return Keycloak(stack)


@pytest.fixture(scope="session")
def alice(hub):
    """Alice's running server. She is a researcher."""
    return logged_in(hub, "alice")


@pytest.fixture(scope="session")
def bob(hub):
    """Bob's running server. He is a student."""
    return logged_in(hub, "bob")


@pytest.fixture(scope="session")
def carol(hub, keycloak):
    """Carol's notebook, which asks all the time. She is a researcher.

    From then on tokens live long, or their end alone would show a change; so tests that wait for the end of tokens
    come before those that use her.
    """
    keycloak.token_life(290)
    carol = Notebook(hub, keycloak)
    try:
        carol.wait_for_long_tokens()
        yield carol
    finally:
        keycloak.token_life(TOKEN_LIFE)
        carol.stop()


def logged_in(hub, user):
    """A new login, and the user's server; one from the run before, if the stack was kept."""
    Browser().log_in(hub.url, user)
    return Server(hub, user) if hub.ready(user) else hub.spawn(user)


@pytest.fixture(scope="session")
def admin(stack):
    """The administrator's commands; returns their JSON."""

    def run(*args):
        done = subprocess.run([STATE / "bin/tokenbroker", *args, "-o", "json", "--socket", stack.dir / "admin.sock"],
                              stdin=subprocess.DEVNULL, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


@pytest.fixture(scope="session")
def audit(stack):
    """Finds audit lines by what they hold."""

    def lines(text):
        assert text
        return [line for line in (stack.dir / "log/audit.jsonl").read_text().splitlines() if text in line]

    return lines


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path, timeout=60):
        super().__init__("localhost", timeout=timeout)
        self.path = str(path)

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.path)


def unix_request(path, method, url, body=None):
    """One request; returns (status, decoded JSON or None)."""
    connection = UnixConnection(path)
    try:
        connection.request(method, url, json.dumps(body) if body is not None else None,
                           {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read()
        return response.status, json.loads(text) if text else None
    finally:
        connection.close()


CLIENT_GONE = 499  # status of a call whose client left while a fault delayed it


class Faults:
    """The counting proxy in front of Keycloak."""

    def __init__(self, stack):
        self.socket = stack.dir / "faultproxy.sock"

    def _ask(self, method, path, body=None):
        status, answer = unix_request(self.socket, method, path, body)
        assert status in (200, 204), answer
        return answer

    def count(self, kind, user=None, status=None):
        """How many calls of a kind have come in so far, or were answered so."""
        return sum(
            c["kind"] == kind and user in (None, c.get("user")) and status in (None, c["status"])
            for c in self._ask("GET", "/calls")["calls"] or [])

    def refresh_tokens(self):
        """{refresh token: whose}: all that ever passed."""
        return self._ask("GET", "/refresh-tokens")

    def add(self, **fault):
        self._ask("POST", "/faults", fault)

    def clear(self):
        self._ask("DELETE", "/faults")


@pytest.fixture
def faults(stack):
    faults = Faults(stack)
    yield faults
    faults.clear()


def pytest_configure(config):
    config.addinivalue_line("markers", "long: takes minutes; LONG=1 in the environment runs it")


def pytest_collection_modifyitems(config, items):
    if not os.environ.get("LONG"):
        long = [item for item in items if item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]
    real_parts(items)


def real_parts(items):
    """Without the real parts there is nothing to test: a laptop may skip, CI fails."""
    if os.geteuid() == 0 and (STATE / "image").exists():
        return
    if os.environ.get("CI"):
        raise pytest.UsageError("the end-to-end tests need root and deploy/setup")
    for item in items:
        item.add_marker(pytest.mark.skip(reason="needs root and deploy/setup"))
