"""The relay: only the hub, only the token endpoint, and never for long."""

import base64
import http.client
import json
import logging
import socket
import subprocess
import sys
import threading
import urllib.parse
from pathlib import Path

import pytest
import tokenbroker_hub
from hub_standin import FROZEN, Raw
from tokenbroker_hub import relay as relay_module
from tokenbroker_hub.relay import DOWN, Relay

PATH = "/oauth2/token/keycloak"
CODE = {
    "grant_type": "authorization_code",
    "code": "the-code",
    "code_verifier": "the-verifier",
    "redirect_uri": "https://hub/cb",
}
REFRESH = {"grant_type": "refresh_token", "refresh_token": "tbh_the-handle"}
TOKENS = {
    "access_token": "the-access-token",
    "token_type": "Bearer",
    "refresh_token": "tbh_the-handle",
    "expires_in": 60,
}


@pytest.fixture
def relay(broker):
    broker.answers[PATH] = TOKENS
    return Relay(broker.path, "keycloak")


def post(relay, form, secret=None, path=None, method="POST", basic=None, headers=None, body=None):
    form = dict(form)
    if secret is not None:
        form.update(client_id="jupyterhub", client_secret=secret)
    headers = {"Content-Type": "application/x-www-form-urlencoded", **(headers or {})}
    if basic is not None:
        headers["Authorization"] = "Basic " + base64.b64encode(basic.encode()).decode()
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(relay.url).netloc, timeout=20)
    connection.request(method, path or PATH, urllib.parse.urlencode(form) if body is None else body, headers)
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    return answer.status, json.loads(text)


def upstream(broker):
    return [dict(urllib.parse.parse_qsl(body)) for body in broker.requests(PATH)]


def test_secret_in_the_body_is_accepted_and_goes_no_further(relay, broker):
    assert post(relay, CODE, relay.secret) == (200, TOKENS)
    assert upstream(broker) == [CODE]


def test_secret_as_basic_is_accepted_and_goes_no_further(relay, broker):
    assert post(relay, CODE, basic="client:with:colons:" + relay.secret) == (200, TOKENS)
    assert upstream(broker) == [CODE]


def test_an_error_of_the_broker_passes_as_it_is(relay, broker):
    broker.answers[PATH] = (400, {"error": "invalid_grant", "error_description": "log in again"})
    assert post(relay, REFRESH, relay.secret) == broker.answers[PATH]


def test_a_doubled_secret_leaves_no_copy(relay, broker):
    form = urllib.parse.urlencode([*REFRESH.items(), ("client_secret", relay.secret), ("client_secret", relay.secret)])
    assert post(relay, {}, body=form)[0] == 200
    assert upstream(broker) == [REFRESH]


@pytest.mark.parametrize(
    ("why", "kwargs"),
    [
        ("none", {}),
        ("wrong", {"secret": "wrong"}),
        ("empty", {"secret": ""}),
        ("not ASCII", {"secret": "é"}),
        ("wrong Basic", {"basic": "jupyterhub:wrong"}),
        ("empty Basic", {"basic": ""}),
        ("another scheme", {"headers": {"Authorization": "Bearer RIGHT"}}),
        ("Basic that is no base64", {"headers": {"Authorization": "Basic RIGHT"}}),
        ("right, and a wrong one beside it", {"secret": "RIGHT", "basic": "jupyterhub:wrong"}),
    ],
)
def test_without_the_secret_nothing_passes(relay, broker, why, kwargs):
    if kwargs.get("secret") == "RIGHT":
        kwargs["secret"] = relay.secret
    if "headers" in kwargs:
        kwargs = {"headers": {"Authorization": kwargs["headers"]["Authorization"].replace("RIGHT", relay.secret)}}
    status, answer = post(relay, CODE, **kwargs)
    assert (status, answer["error"]) == (401, "invalid_client")
    assert broker.calls == []


@pytest.mark.parametrize(
    ("why", "kwargs", "status"),
    [
        ("another path", {"path": "/v1/register"}, 404),
        ("another provider", {"path": "/oauth2/token/github"}, 404),
        ("a longer path", {"path": PATH + "/x"}, 404),
        ("a path with dots", {"path": "/oauth2/token/../token/keycloak"}, 404),
        ("a query", {"path": PATH + "?x=1"}, 404),
        ("an absolute URL", {"path": "http://127.0.0.1" + PATH}, 404),
        ("GET", {"method": "GET"}, 405),
        ("PUT", {"method": "PUT"}, 405),
        ("lower case", {"method": "post"}, 405),
        ("too much", {"body": "x" * ((64 << 10) + 1)}, 413),
        ("a length that is no number", {"headers": {"Content-Length": "-1"}, "body": ""}, 411),
        ("a huge length", {"headers": {"Content-Length": "9" * 5000}, "body": ""}, 413),
        ("chunked", {"headers": {"Transfer-Encoding": "chunked"}, "body": b""}, 411),
        ("JSON", {"headers": {"Content-Type": "application/json"}}, 415),
        ("not ASCII", {"body": b"a=\xff"}, 400),
        ("a thousand fields", {"body": "&".join(["a=1"] * 1000)}, 400),
        ("a long header", {"headers": {"X": "x" * (17 << 10)}}, 431),
    ],
)
def test_what_is_not_a_token_request_is_refused_here(relay, broker, why, kwargs, status):
    got, answer = post(relay, CODE, relay.secret, **kwargs)
    assert (got, answer["error"]) == (status, "invalid_request")
    assert broker.calls == []


def raw(relay, data, shut=True):
    """Sends bytes and reads all there is to read."""
    netloc = urllib.parse.urlsplit(relay.url).netloc.split(":")
    with socket.create_connection((netloc[0], int(netloc[1])), timeout=20) as s:
        s.sendall(data)
        if shut:
            s.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: s.recv(65536), b""))


@pytest.mark.parametrize(
    ("why", "data", "status"),
    [
        ("nothing", b"", 400),
        ("half a header", b"POST " + PATH.encode(), 400),
        ("half a body", b"POST " + PATH.encode() + b" HTTP/1.1\r\nContent-Length: 9\r\n\r\na=1", 400),
        ("not HTTP", b"\x16\x03\x01\r\n\r\n", 400),
        (
            "two lengths",
            b"POST " + PATH.encode() + b" HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
            400,
        ),
        ("a header without a colon", b"POST " + PATH.encode() + b" HTTP/1.1\r\nnonsense\r\n\r\n", 400),
    ],
)
def test_what_is_not_a_request_is_refused(relay, broker, why, data, status):
    assert raw(relay, data).split(b" ")[1] == b"%d" % status
    assert broker.calls == []


def test_a_slow_client_is_cut_off(relay, broker, monkeypatch):
    monkeypatch.setattr(relay_module, "REQUEST_SECONDS", 0.2)
    assert b" 408 " in raw(relay, b"POST " + PATH.encode() + b" HTTP/1.1\r\n", shut=False)
    assert broker.calls == []


def test_a_login_while_the_broker_is_down_says_so_to_the_user(relay, broker):
    broker.stop()
    status, answer = post(relay, CODE, relay.secret)
    assert (status, answer["error_description"]) == (200, DOWN)
    assert "access_token" not in answer


def test_a_refresh_while_the_broker_is_down_is_not_the_end_of_the_session(relay, broker):
    broker.stop()
    status, answer = post(relay, REFRESH, relay.secret)
    assert (status, answer["error"]) == (503, "temporarily_unavailable")


@pytest.mark.parametrize(
    ("why", "answer"),
    [
        ("dies in the body", Raw(b'HTTP/1.0 200 OK\r\nContent-Length: 999\r\n\r\n{"access_token": "half')),
        ("dies in the body, no length", Raw(b'HTTP/1.0 200 OK\r\n\r\n{"access_token": "half')),
        ("dies in the header", Raw(b"HTTP/1.0 200 O")),
        ("answers nothing", Raw(b"")),
        ("answers HTML", Raw(b"HTTP/1.0 502 Bad Gateway\r\n\r\n<html>half")),
        ("freezes", FROZEN),
    ],
)
def test_a_broker_in_trouble_is_a_broker_that_is_down(relay, broker, monkeypatch, caplog, why, answer):
    monkeypatch.setattr(relay_module, "BROKER_SECONDS", 0.3)
    broker.answers[PATH] = answer
    assert post(relay, CODE, relay.secret)[1]["error_description"] == DOWN
    assert post(relay, REFRESH, relay.secret)[0] == 503
    assert "half" not in caplog.text


def test_64_requests_at_once_all_pass(relay, broker):
    gate = threading.Barrier(64, timeout=20)

    def all_together(form):
        gate.wait()  # nobody is answered before all have arrived
        return TOKENS

    broker.answers[PATH] = all_together
    results = []
    threads = [threading.Thread(target=lambda: results.append(post(relay, REFRESH, relay.secret))) for _ in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [(200, TOKENS)] * 64


def test_one_more_than_64_is_told_to_come_back(relay, broker):
    broker.answers[PATH] = FROZEN
    threads = [threading.Thread(target=post, args=(relay, REFRESH, relay.secret)) for _ in range(64)]
    for thread in threads:
        thread.start()
    broker.wait_for(PATH, 64)
    assert post(relay, REFRESH, relay.secret) == (
        503,
        {"error": "temporarily_unavailable", "error_description": "too many requests at once"},
    )
    broker.thaw.set()
    for thread in threads:
        thread.join()
    broker.answers[PATH] = TOKENS
    assert post(relay, REFRESH, relay.secret)[0] == 200


def test_no_secret_is_ever_logged(relay, broker, caplog):
    caplog.set_level(logging.DEBUG)
    post(relay, CODE, relay.secret)
    post(relay, CODE, "wrong-secret")
    broker.answers[PATH] = Raw(b'HTTP/1.0 200 OK\r\n\r\n{"access_token": "the-access-token')
    post(relay, CODE, relay.secret)
    broker.stop()
    post(relay, REFRESH, relay.secret)
    for secret in (relay.secret, "wrong-secret", "the-code", "the-verifier", "tbh_the-handle", "the-access-token"):
        assert secret not in caplog.text
    assert "Connection refused" in caplog.text


def test_a_provider_with_a_strange_name_has_a_path_of_its_own(broker):
    relay = Relay(broker.path, "a/b ü?")
    assert relay.path == "/oauth2/token/a%2Fb%20%C3%BC%3F"
    broker.answers[relay.path] = TOKENS
    assert post(relay, REFRESH, relay.secret, path=relay.path)[0] == 200


def test_one_relay_for_a_socket_and_provider(broker):
    first = relay_module.start(broker.path, "keycloak")
    assert relay_module.start(broker.path, "keycloak") is first
    assert relay_module.start(broker.path, "github").url != first.url


def test_the_relay_listens_on_loopback_only(relay):
    assert urllib.parse.urlsplit(relay.url).hostname == "127.0.0.1"


def test_the_process_ends_without_waiting_for_its_relay(tmp_path):
    program = f"from tokenbroker_hub.relay import Relay; Relay({str(tmp_path / 'hub.sock')!r}, 'x')"
    path = {"PYTHONPATH": str(Path(tokenbroker_hub.__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", program], timeout=60, capture_output=True, env=path)
    assert (done.returncode, done.stderr) == (0, b"")
