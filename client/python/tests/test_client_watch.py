"""watch() and on_change(), against a stand-in on a real Unix socket."""

import json
import queue

import pytest
import tokenbroker
from client_standin import TOKEN, problem


def stream(*events):
    """An answer of server-sent events, after which the connection ends."""
    text = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
    for name, data in events:
        text += f"event: {name}\ndata: {json.dumps(data)}\n\n"
    return text.encode()


def token(text):
    return "token", {**TOKEN, "access_token": text}


def refusal(code, name=None):
    return name or code, problem(403, code)[1]


END = problem(400, "invalid")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(tokenbroker, "_pause", lambda e, tries: 0)


def test_watch_yields_tokens_and_why_there_is_none(standin):
    standin.next_answers = [stream(token("one"), refusal("denied", "role_lost"), token("two"), refusal("revoked"))]
    standin.answer = END
    got = []
    with pytest.raises(tokenbroker.Invalid):
        for told in tokenbroker.watch("keycloak", audience="storage", scopes=["read"], min_ttl=60):
            got.append(told)
    assert got[0] == "one" and got[0].provider == "keycloak" and got[2] == "two"
    assert type(got[1]) is tokenbroker.RoleLost and isinstance(got[1], tokenbroker.Denied)
    assert got[1].code == "denied" and got[1].next == "do that" and got[1].ref == "7"
    assert type(got[3]) is tokenbroker.Revoked
    assert standin.asked == [("/v1/watch/keycloak", {"audience": "storage", "scope": "read", "min_ttl": "60"})] * 2


def test_watch_opens_a_stream_that_ended_again_and_says_nothing_twice(standin):
    standin.next_answers = [
        stream(token("one")),
        problem(503, "unavailable"),
        stream(token("one"), token("two"), refusal("login_required")),
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\nevent: tok",
        stream(refusal("login_required"), token("three")),
    ]
    standin.answer = END
    got = []
    with pytest.raises(tokenbroker.Invalid):
        collect(got, tokenbroker.watch())
    assert [str(told) if isinstance(told, tokenbroker.Token) else told.code for told in got] == [
        "one",
        "two",
        "login_required",
        "three",
    ]


def collect(got, events):
    for told in events:
        got.append(told)


def test_watch_waits_for_a_broker_that_is_not_there(standin, tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENBROKER_SOCKET", str(tmp_path / "none.sock"))
    tries = []

    def pause(e, n):
        tries.append(e.code)
        if len(tries) == 3:
            monkeypatch.setenv("TOKENBROKER_SOCKET", standin.path)
        return 0

    monkeypatch.setattr(tokenbroker, "_pause", pause)
    standin.next_answers = [stream(token("one"))]
    assert next(tokenbroker.watch()) == "one"
    assert tries == ["broker_down"] * 3


def test_watch_closes_its_connection_when_it_is_left(standin):
    standin.next_answers = [stream(token("one"), token("two"))]
    events = tokenbroker.watch()
    assert next(events) == "one"
    events.close()
    with pytest.raises(StopIteration):
        next(events)


def test_on_change_calls_back_and_outlives_a_callback_that_fails(standin):
    standin.next_answers = [stream(token("one"), refusal("denied", "role_lost"))]
    standin.answer = END
    told = queue.Queue()

    def callback(event):
        told.put(event)
        raise RuntimeError("of the user's own")

    tokenbroker.on_change(callback, "keycloak")
    assert told.get(timeout=10) == "one"
    assert isinstance(told.get(timeout=10), tokenbroker.RoleLost)
    assert isinstance(told.get(timeout=10), tokenbroker.Invalid)


def test_a_stopped_watcher_calls_back_no_more(standin):
    told = queue.Queue()
    first = True

    def answer(_):
        nonlocal first
        if first:
            first = False
            return stream(token("one"))
        watcher.stop()
        return stream(token("two"))

    standin.answer = answer
    watcher = tokenbroker.on_change(told.put)
    assert told.get(timeout=10) == "one"
    watcher._thread.join(10)
    assert not watcher._thread.is_alive() and told.empty()
