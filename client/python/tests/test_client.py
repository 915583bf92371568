"""token(), providers() and waiting, against a stand-in on a real Unix socket."""

import ast
import copy
import hashlib
import json
import os
import pickle
import socket
import sys
import threading
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
import tokenbroker
from client_standin import TOKEN, problem

SECRET = TOKEN["access_token"]


def test_a_token_is_a_str_and_knows_what_it_is(standin):
    got = tokenbroker.token()
    assert got == SECRET and isinstance(got, str)
    assert (got.provider, got.audience, got.scopes, got.ref) == ("keycloak", "storage", ("read", "write"), "42")
    assert got.expires_at == datetime(2026, 11, 25, 13, 0, tzinfo=timezone.utc)
    assert 0 < got.expires_in <= 290
    assert "Bearer " + got == f"Bearer {got}" == "Bearer the-token"
    assert standin.asked == [("/v1/token", {})]


def test_a_token_hides_where_it_is_shown_unasked(standin):
    got = tokenbroker.token()
    for shown in (repr(got), repr([got]), repr({"token": got}), f"{got!r}"):
        assert SECRET not in shown
    assert "keycloak" in repr(got)


def test_a_token_survives_copy_and_pickle(standin):
    got = tokenbroker.token()
    for other in (copy.copy(got), copy.deepcopy(got), pickle.loads(pickle.dumps(got))):
        assert other == got and other.ref == "42" and SECRET not in repr(other)


def test_an_ended_token_has_no_time_left(standin, monkeypatch):
    got = tokenbroker.token()
    now = tokenbroker.time.monotonic()
    monkeypatch.setattr(tokenbroker.time, "monotonic", lambda: now + 1000)
    assert got.expires_in == 0


@pytest.mark.parametrize(
    ("kwargs", "path", "query"),
    [
        ({"provider": "keycloak"}, "/v1/token/keycloak", {}),
        ({"provider": "a/b ü?x=1"}, "/v1/token/a%2Fb%20%C3%BC%3Fx%3D1", {}),
        ({"audience": "storage"}, "/v1/token", {"audience": "storage"}),
        ({"audience": "https://s3.example/?a=b&c"}, "/v1/token", {"audience": "https://s3.example/?a=b&c"}),
        ({"scopes": ["read", "write"]}, "/v1/token", {"scope": "read write"}),
        ({"scopes": "read write"}, "/v1/token", {"scope": "read write"}),
        ({"scopes": (s for s in ["read"])}, "/v1/token", {"scope": "read"}),
        ({"min_ttl": 60}, "/v1/token", {"min_ttl": "60"}),
        ({"min_ttl": 0.5}, "/v1/token", {"min_ttl": "1"}),
        ({"min_ttl": timedelta(minutes=5)}, "/v1/token", {"min_ttl": "300"}),
        ({"provider": "", "audience": "", "scopes": [], "min_ttl": 0}, "/v1/token", {}),
    ],
)
def test_what_is_asked_for_arrives(standin, kwargs, path, query):
    tokenbroker.token(**kwargs)
    assert standin.asked == [(path, query)]


def test_providers_are_listed(standin):
    entry = {"name": "keycloak", "login": True, "state": "live", "audiences": ["storage"], "scopes": ["read"]}
    standin.answer = (200, {"providers": [entry, {"name": "github", "state": "none"}], "ref": "1"}, {})
    assert tokenbroker.providers() == [
        tokenbroker.Provider("keycloak", True, "live", ("storage",), ("read",)),
        tokenbroker.Provider("github"),
    ]
    assert standin.asked == [("/v1/providers", {})]


@pytest.mark.parametrize("answer", [{}, {"providers": None}, {"providers": [None, 7, {}, {"name": ""}]}])
def test_strange_lists_of_providers_are_empty(standin, answer):
    standin.answer = (200, answer, {})
    assert tokenbroker.providers() == []


CODES = {
    "pending": (tokenbroker.Pending, 503),
    "unknown_peer": (tokenbroker.UnknownPeer, 401),
    "denied": (tokenbroker.Denied, 403),
    "login_required": (tokenbroker.LoginRequired, 409),
    "revoked": (tokenbroker.Revoked, 403),
    "invalid": (tokenbroker.Invalid, 400),
    "unsatisfiable": (tokenbroker.Unsatisfiable, 422),
    "provider_down": (tokenbroker.ProviderDown, 503),
    "unavailable": (tokenbroker.Unavailable, 503),
    "limited": (tokenbroker.Limited, 429),
    "internal": (tokenbroker.Internal, 500),
}


@pytest.mark.parametrize("code", CODES)
def test_each_code_has_an_exception_of_its_own(standin, code):
    cls, status = CODES[code]
    standin.answer = problem(status, code, retry_after=3)
    with pytest.raises(tokenbroker.TokenBrokerError) as e:
        tokenbroker.token()
    error = e.value
    assert type(error) is cls
    assert (error.code, error.sentence, error.next, error.ref, error.retry_after) == (
        code,
        "this happened",
        "do that",
        "7",
        3,
    )
    assert str(error) == "this happened; do that (ref 7)"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_a_code_that_is_not_known_yet_is_kept(standin):
    standin.answer = problem(418, "teapot")
    with pytest.raises(tokenbroker.Internal) as e:
        tokenbroker.token()
    assert e.value.code == "teapot"


@pytest.mark.parametrize(
    ("answer", "want"),
    [
        (problem(503, "pending", header="2"), 2),
        (problem(503, "pending", header="2", retry_after=5), 5),
        (problem(503, "pending", header="soon"), None),
        (problem(503, "pending", retry_after="nan"), None),
        (problem(503, "pending", retry_after=-1), None),
        (problem(503, "pending", retry_after=True), None),
    ],
)
def test_when_to_ask_again_is_read_from_body_or_header(standin, answer, want):
    standin.answer = answer
    with pytest.raises(tokenbroker.Pending) as e:
        tokenbroker.token()
    assert e.value.retry_after == want


@pytest.mark.parametrize(
    ("why", "answer"),
    [
        ("malformed JSON", (200, b"{oops", {})),
        ("no object", (200, [], {})),
        ("HTML", (502, b"<html>", {"Content-Type": "text/html"})),
        (
            "cut off",
            b'HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n{"access_token": "the-token", "expires_in": 1}'[:-1],
        ),
        ("cut off in the header", b"HTTP/1.1 200 OK\r\nConte"),
        ("nothing", b""),
        ("not HTTP", b"SSH-2.0\r\n\r\n"),
        ("no token", (200, {"expires_in": 3}, {})),
        ("a number for a token", (200, {"access_token": 7}, {})),
        ("an empty token", (200, {"access_token": ""}, {})),
        ("a header in the token", (200, {"access_token": "a\r\nX: y"}, {})),
        ("spaces in the token", (200, {"access_token": "a b"}, {})),
        ("endless", (200, b'{"access_token": "' + b"x" * (2 << 20) + b'"}', {})),
    ],
)
def test_a_bad_answer_is_a_broker_that_is_down(standin, why, answer):
    standin.answer = answer
    with pytest.raises(tokenbroker.BrokerDown) as e:
        tokenbroker.token()
    assert SECRET not in str(e.value)


@pytest.mark.parametrize("at", ["2026-11-25T13:00:00Z", "2026-11-25T15:00:00+02:00", "2026-11-25T13:00:00.5Z"])
def test_every_form_of_time_is_read(standin, at):
    standin.answer = (200, {**TOKEN, "expires_at": at}, {})
    assert tokenbroker.token().expires_at == datetime(2026, 11, 25, 13, 0, tzinfo=timezone.utc)


@pytest.mark.parametrize("at", [None, "", "tomorrow", 7])
def test_without_a_time_it_follows_from_the_seconds(standin, at):
    standin.answer = (200, {**TOKEN, "expires_at": at}, {})
    left = tokenbroker.token().expires_at - datetime.now(timezone.utc)
    assert timedelta(0) < left <= timedelta(seconds=290)


# --- no broker ---


def test_a_socket_nobody_listens_on_is_a_broker_that_restarts(standin):
    standin.__exit__()
    with pytest.raises(tokenbroker.BrokerDown, match="restarting, nothing is lost") as e:
        tokenbroker.token()
    assert e.value.retry_after


def test_no_socket_is_a_broker_that_is_down(standin, monkeypatch):
    monkeypatch.setenv("TOKENBROKER_SOCKET", standin.path + "-absent")
    with pytest.raises(tokenbroker.BrokerDown, match="there is no token broker at"):
        tokenbroker.token()


def test_without_a_variable_the_usual_place_is_asked(standin, monkeypatch):
    monkeypatch.setattr(tokenbroker, "DEFAULT_SOCKET", standin.path)
    for value in (None, ""):
        monkeypatch.delenv("TOKENBROKER_SOCKET", raising=False)
        if value is not None:
            monkeypatch.setenv("TOKENBROKER_SOCKET", value)
        assert tokenbroker.token() == SECRET


def test_a_path_that_is_too_long_is_named(monkeypatch):
    monkeypatch.setenv("TOKENBROKER_SOCKET", "/" + "x" * 200)
    with pytest.raises(tokenbroker.Invalid, match="too long"):
        tokenbroker.token(wait=True)


def test_a_socket_that_may_not_be_opened_is_not_waited_for(monkeypatch):
    error = tokenbroker._unreachable("/x", PermissionError(13, "Permission denied"))
    assert isinstance(error, tokenbroker.UnknownPeer) and not error.waits


def test_a_frozen_broker_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenbroker, "TIMEOUT", 0.2)
    monkeypatch.setenv("TOKENBROKER_SOCKET", str(tmp_path / "frozen"))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "frozen"))
        listener.listen()
        with pytest.raises(tokenbroker.BrokerDown, match="did not answer"):
            tokenbroker.token()


# --- waiting ---


@pytest.fixture
def clock(monkeypatch):
    """Time passes only by sleeping. Keeps how long was slept."""

    class Clock:
        now = 1000.0
        slept = []

        def monotonic(self):
            return self.now

        def sleep(self, seconds):
            self.slept = [*self.slept, seconds]
            self.now += seconds

    clock = Clock()
    monkeypatch.setattr(tokenbroker, "time", clock)
    return clock


WAITS = ["pending", "provider_down", "unavailable", "limited", "login_required"]


@pytest.mark.parametrize("code", WAITS)
def test_waiting_ends_with_the_token(standin, clock, code):
    status = CODES[code][1]
    standin.next_answers = [problem(status, code)] * 3
    assert tokenbroker.token(wait=True) == SECRET
    assert len(clock.slept) == 3


@pytest.mark.parametrize("code", sorted(set(CODES) - set(WAITS)))
def test_what_no_waiting_ends_is_raised_at_once(standin, clock, code):
    standin.answer = problem(CODES[code][1], code, retry_after=1)
    with pytest.raises(CODES[code][0]):
        tokenbroker.token(wait=True)
    assert clock.slept == []


def test_waiting_goes_through_a_restart_of_the_broker(standin, clock, monkeypatch):
    path = standin.path
    standin.__exit__()

    def back_after(seconds, sleep=clock.sleep):
        sleep(seconds)
        if len(clock.slept) == 2:
            os.unlink(path)
        if len(clock.slept) == 4:
            standin.__enter__()

    monkeypatch.setattr(clock, "sleep", back_after)
    assert tokenbroker.token(wait=True) == SECRET
    assert len(clock.slept) == 4  # refused, refused, absent, absent


def test_waiting_does_as_the_broker_says(standin, clock):
    standin.next_answers = [problem(503, "pending", retry_after=7), problem(503, "provider_down", header="9")]
    tokenbroker.token(wait=True)
    assert 7 <= clock.slept[0] <= 9 and 9 <= clock.slept[1] <= 12


def test_waiting_does_not_hammer(standin, clock):
    standin.next_answers = [problem(503, "pending", retry_after=0)] * 100
    tokenbroker.token(wait=True)
    assert min(clock.slept) >= 0.25 and clock.slept[-1] >= 5


def test_a_login_is_looked_for_now_and_then(standin, clock):
    standin.next_answers = [problem(409, "login_required")] * 2
    tokenbroker.token(wait=True)
    assert min(clock.slept) >= 15


def test_no_single_pause_is_longer_than_about_a_minute(standin, clock):
    standin.next_answers = [problem(503, "pending", retry_after=86400)]
    tokenbroker.token(wait=True)
    assert clock.slept[0] <= 75


def test_waiting_has_an_end_if_one_is_given(standin, clock):
    standin.answer = problem(503, "pending", retry_after=1)
    with pytest.raises(tokenbroker.Pending):
        tokenbroker.token(wait=10)
    assert sum(clock.slept) == pytest.approx(10)


@pytest.mark.parametrize("wait", [False, 0, 0.0])
def test_without_waiting_it_is_raised_at_once(standin, clock, wait):
    standin.answer = problem(503, "pending", retry_after=1)
    with pytest.raises(tokenbroker.Pending):
        tokenbroker.token(wait=wait)
    assert clock.slept == []


def test_who_waits_says_so_once(standin, clock, caplog):
    standin.next_answers = [problem(503, "pending")] * 3 + [problem(503, "provider_down")] * 3
    tokenbroker.token(wait=True)
    assert [record.getMessage() for record in caplog.records] == [
        "waiting for a token: this happened; do that (ref 7)"
    ] * 2


def test_providers_can_be_waited_for(standin, clock):
    standin.next_answers = [problem(503, "pending")]
    standin.answer = (200, {"providers": []}, {})
    assert tokenbroker.providers(wait=True) == []


# --- many at once ---


def test_threads_need_no_care(standin):
    got = []
    threads = [threading.Thread(target=lambda: got.append(tokenbroker.token())) for _ in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [SECRET] * 32


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_needs_no_care(standin):
    tokenbroker.token()
    pid = os.fork()
    if pid == 0:
        os._exit(0 if tokenbroker.token() == SECRET else 1)
    assert os.waitpid(pid, 0)[1] == 0


# --- the package itself ---


def test_only_the_standard_library_is_imported():
    tree = ast.parse(Path(tokenbroker.__file__).read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    known = getattr(sys, "stdlib_module_names", None)
    assert known is None or {name.split(".")[0] for name in names} <= set(known)  # Python 3.10


def test_all_names_are_there_and_documented():
    for name in tokenbroker.__all__:
        assert getattr(tokenbroker, name).__doc__


def test_a_rejected_token_is_named_by_its_fingerprint_only(standin):
    tokenbroker._token(None, None, None, None, False, rejected=SECRET)
    want = hashlib.sha256(SECRET.encode()).hexdigest()
    assert standin.asked == [("/v1/token", {"rejected_sha256": want})]
    assert SECRET not in json.dumps(standin.asked)
