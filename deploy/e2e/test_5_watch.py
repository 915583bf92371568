"""What the Python client's watch() and on_change() tell in a real notebook."""

import json
import time

import pytest

import notebook
from notebook import BY_EVENTS, MARGIN
from people import Browser
from refstack.process import wait_for

WATCH = """
import json, threading, time
import tokenbroker

iterated, called_back = [], []

def note(to):
    def one(told):
        token = isinstance(told, tokenbroker.Token)
        to.append((type(told).__name__, time.time(), time.time() + told.expires_in if token else 0, "" if token else told.next))
    return one

def iterate():
    one = note(iterated)
    for told in tokenbroker.watch("keycloak", audience="storage"):
        one(told)

threading.Thread(target=iterate, daemon=True).start()
watcher = tokenbroker.on_change(note(called_back), "keycloak", audience="storage")
"""


class Watch:
    """Alice's, all of whose tokens live for 20 s."""

    def __init__(self, server):
        self.server = server
        server.run(notebook.python_client(server) + WATCH)

    def told(self, how="iterated"):
        """[(class, when, until when it is valid, next step)]"""
        return json.loads(self.server.run(f"print(json.dumps({how}))"))

    def tells(self, kind, do, within):
        """Both are told, so soon after something was done; returns the next step."""
        before = {how: len(self.told(how)) for how in ("iterated", "called_back")}
        do()
        since = time.time()

        def last(how):
            return next((t for t in self.told(how)[before[how]:] if t[0] == kind), None)

        for how in before:
            wait_for(f"{kind}, {how}", lambda how=how: last(how), within + 5 + MARGIN)
        took = last("iterated")[1] - since
        print(f"watch() tells {kind} {took:.1f} s after it was so")
        return last("iterated")[3]


@pytest.fixture(scope="module")
def watch(alice):
    return Watch(alice)


def test_the_next_token_comes_before_the_one_before_ends(watch):
    def tokens(how):
        told = watch.told(how)
        assert {t[0] for t in told} <= {"Token"}, told
        return told

    for how in ("iterated", "called_back"):
        told = wait_for(f"three tokens, {how}", lambda how=how: len(tokens(how)) >= 3 and tokens(how), 60)
        early = [before[2] - after[1] for before, after in zip(told, told[1:])]
        print(f"{how}: each next token came {', '.join(f'{s:.1f} s' for s in early)} before the end")
        assert min(early) > 0, told


def test_a_role_that_goes_and_comes_back(watch, keycloak):
    role = keycloak.admin("GET", "/roles/researcher").json()
    mapping = f"/users/{keycloak.admin('GET', '/users?username=alice&exact=true').json()[0]['id']}/role-mappings/realm"
    try:
        step = watch.tells("RoleLost", lambda: keycloak.admin("DELETE", mapping, json=[role]), BY_EVENTS)
        assert "ask" in step, step
    finally:
        back = lambda: keycloak.admin("POST", mapping, json=[role])  # noqa: E731
        watch.tells("Token", back, BY_EVENTS)


def test_a_user_who_is_cut_off_and_logs_in_again(watch, hub, admin):
    step = watch.tells("Revoked", lambda: admin("users", "disconnect", "alice"), 1)
    assert "ask" in step, step
    watch.tells("Token", lambda: Browser().log_in(hub.url, "alice"), 1)


def test_a_session_that_ends_and_a_login(watch, hub, keycloak):
    step = watch.tells("LoginRequired", lambda: keycloak.end_sessions("alice"), BY_EVENTS)
    assert "log in" in step, step
    watch.tells("Token", lambda: Browser().log_in(hub.url, "alice"), 1)


def test_a_restart_of_the_broker_waits_for_no_watch(watch, stack):
    """The watches are opened again, and go on."""
    log = stack.dir / "log/broker.log"
    before, told = len(log.read_text()), len(watch.told("iterated"))
    stack.restart("broker")
    assert "requests were cut off" not in log.read_text()[before:]
    since = time.time()
    for how in ("iterated", "called_back"):
        wait_for(f"the next token, {how}", lambda how=how: (last := watch.told(how)[-1])[0] == "Token" and last[1] > since)
    assert {t[0] for t in watch.told("iterated")[told:]} <= {"Unavailable", "Token"}
