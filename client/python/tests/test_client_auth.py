"""auth() in requests and httpx, against a real service and a stand-in broker."""

import io
import os

import pytest
import requests
import tokenbroker
from client_standin import TOKEN, Service, problem


def issue(*tokens):
    return [(200, {**TOKEN, "access_token": token}, {}) for token in tokens]


def test_each_request_carries_a_token(standin):
    standin.next_answers = issue("one", "two")
    with Service("one", "two") as service, requests.Session() as session:
        session.auth = tokenbroker.auth("keycloak", audience="storage", scopes=iter(["read"]))
        assert session.get(service.url).ok and session.get(service.url).ok
        assert [authorization for _, authorization, _ in service.seen] == ["Bearer one", "Bearer two"]
    assert standin.asked == [("/v1/token/keycloak", {"audience": "storage", "scope": "read"})] * 2


def test_a_refused_token_is_replaced_once(standin):
    standin.next_answers = issue("old", "new")
    with Service("new") as service:
        answer = requests.post(service.url, data="body", auth=tokenbroker.auth())
        assert answer.status_code == 200 and answer.json() == {"echo": "body"}
        assert [old.status_code for old in answer.history] == [401]
    assert "rejected_sha256" in standin.asked[1][1] and "rejected_sha256" not in standin.asked[0][1]


def test_a_service_that_refuses_every_token_is_asked_twice(standin):
    standin.next_answers = issue("one", "two", "three")
    with Service() as service:
        assert requests.get(service.url, auth=tokenbroker.auth()).status_code == 401
        assert len(service.seen) == 2


def test_the_same_token_again_is_not_sent_again(standin):
    with Service() as service:
        assert requests.get(service.url, auth=tokenbroker.auth()).status_code == 401
        assert len(service.seen) == 1


def test_a_file_is_sent_again_from_where_it_started(standin):
    standin.next_answers = issue("old", "new")
    body = io.BytesIO(b"skipped, sent")
    body.seek(9)
    with Service("new") as service:
        assert requests.post(service.url, data=body, auth=tokenbroker.auth()).json() == {"echo": "sent"}


def test_a_stream_is_not_sent_again(standin):
    stream = requests.Request("POST", "http://localhost", data=(b for b in [b"x"])).prepare()
    assert tokenbroker._can_resend(stream.body, None) is False


def test_no_token_follows_a_redirect_to_another_host(standin):
    with Service("the-token") as service, Service() as other:
        service.elsewhere = other.url.replace("127.0.0.1", "localhost") + "/x"
        answer = requests.get(service.url + "/away", auth=tokenbroker.auth())
        assert answer.status_code == 401
        assert [authorization for _, authorization, _ in other.seen] == [None]
    assert len(standin.asked) == 1


@pytest.mark.parametrize(("code", "status"), [("provider_down", 503), ("limited", 429)])
def test_with_no_new_token_to_be_had_the_services_answer_stands(standin, code, status):
    standin.next_answers = issue("old") + [problem(status, code)]
    with Service() as service:
        assert requests.get(service.url, auth=tokenbroker.auth()).status_code == 401


@pytest.mark.parametrize(("code", "status"), [("login_required", 409), ("revoked", 403)])
def test_why_there_is_no_new_token_is_raised(standin, code, status):
    standin.next_answers = issue("old") + [problem(status, code)]
    with Service() as service, pytest.raises(tokenbroker.TokenBrokerError) as e:
        requests.get(service.url, auth=tokenbroker.auth())
    assert e.value.code == code


def test_httpx_takes_it_too(standin):
    if not os.environ.get("CI"):
        pytest.importorskip("httpx", reason="httpx is not installed; requirements-test.txt names it")
    import httpx

    with Service("the-token") as service:
        assert httpx.get(service.url, auth=tokenbroker.auth(), trust_env=False).status_code == 200
