"""Calls on the hub's socket: what is an answer, what a refusal, what trouble."""

import asyncio

import pytest
from hub_standin import FROZEN, Raw
from tokenbroker_hub.broker import MAX_ANSWER, Broker, BrokerDown, Refused, say, within

CLAIM = {"provider": "keycloak", "handle": "tbh_secret", "user": "alice"}


def call(broker, method="claim", request=CLAIM, timeout=5.0):
    return asyncio.run(Broker(broker.path, timeout).call(method, request))


def test_a_call_brings_the_answer(broker):
    assert call(broker) == {"ref": "1"}
    assert broker.calls == [("/v1/claim", CLAIM)]


@pytest.mark.parametrize("user", ["a b", "a/b", "}{", "Зоя", "用户", "x" * 255, 'a"b\\c', "new\nline", "😀"])
def test_any_user_name_arrives_as_it_is(broker, user):
    call(broker, request={**CLAIM, "user": user})
    assert broker.requests("/v1/claim")[0]["user"] == user


def test_a_refusal_has_code_and_sentence(broker):
    broker.refuse("/v1/claim", 403, "denied", "alice is another person there", "ask it-help@lab.example")
    with pytest.raises(Refused) as e:
        call(broker)
    assert (e.value.status, e.value.code) == (403, "denied")
    assert e.value.sentence == "Alice is another person there. Ask it-help@lab.example. (ref 99)"


def test_a_broker_that_can_not_say_is_down_and_its_sentence_is_kept(broker):
    broker.refuse("/v1/claim", 503, "unavailable", "the store can't be asked", "try again")
    with pytest.raises(BrokerDown) as e:
        call(broker)
    assert e.value.sentence == "The store can't be asked. Try again. (ref 99)"


@pytest.mark.parametrize(
    ("why", "answer"),
    [
        ("malformed JSON", Raw(b"HTTP/1.0 200 OK\r\n\r\n{not json")),
        ("no object", Raw(b"HTTP/1.0 200 OK\r\n\r\n[]")),
        ("HTML", Raw(b"HTTP/1.0 502 Bad\r\n\r\n<html>")),
        ("JSON without a code", (404, {"title": "not found"})),
        ("a code that is no text", (403, {"code": 7})),
        ("cut off by length", Raw(b'HTTP/1.0 200 OK\r\nContent-Length: 99\r\n\r\n{"ref": "1"}')),
        ("cut off in the header", Raw(b"HTTP/1.0 200 OK\r\nContent-Le")),
        ("cut off in JSON", Raw(b'HTTP/1.0 200 OK\r\n\r\n{"ref": ')),
        ("no answer at all", Raw(b"")),
        ("not HTTP", Raw(b"SSH-2.0-x\r\n\r\n")),
        ("a status that is no number", Raw(b"HTTP/1.0 abc\r\n\r\n{}")),
        ("endless", Raw(b"HTTP/1.0 200 OK\r\n\r\n" + b"x" * (MAX_ANSWER + 1))),
        ("not UTF-8", Raw(b'HTTP/1.0 200 OK\r\n\r\n{"ref": "\xff"}')),
    ],
)
def test_a_bad_answer_is_a_broker_that_is_down(broker, why, answer):
    broker.answers["/v1/claim"] = answer
    with pytest.raises(BrokerDown) as e:
        call(broker)
    assert "tbh_secret" not in str(e.value)


def test_a_frozen_broker_is_down(broker):
    broker.answers["/v1/claim"] = FROZEN
    with pytest.raises(BrokerDown, match="no answer to claim within 0.2 s"):
        call(broker, timeout=0.2)


def test_no_socket_and_no_listener_are_a_broker_that_is_down(broker):
    broker.stop()
    with pytest.raises(BrokerDown, match="refused"):
        call(broker)
    broker.path += "-absent"
    with pytest.raises(BrokerDown, match="No such file"):
        call(broker)


def test_a_cancelled_call_ends_at_once_and_closes_its_connection(broker):
    broker.answers["/v1/claim"] = FROZEN

    async def cancel():
        task = asyncio.create_task(Broker(broker.path, 60).call("claim", CLAIM))
        await asyncio.to_thread(broker.wait_for, "/v1/claim")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(cancel())


@pytest.mark.parametrize("turns", range(6))
@pytest.mark.parametrize("error", [None, OSError("gone")])
def test_a_cancellation_is_never_lost_to_an_answer_of_the_same_moment(turns, error):
    async def race():
        answer = asyncio.get_running_loop().create_future()

        async def call():
            return await answer

        waiting = asyncio.create_task(within(60, call()))
        for _ in range(4):
            await asyncio.sleep(0)  # now it waits
        answer.set_exception(error) if error else answer.set_result("answer")
        for _ in range(turns):
            await asyncio.sleep(0)
        if waiting.cancel():
            with pytest.raises(asyncio.CancelledError):
                await waiting

    asyncio.run(race())


def test_what_is_waited_for_has_ended_when_the_time_is_over():
    ended = []

    async def slow():
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    async def wait():
        with pytest.raises(asyncio.TimeoutError):
            await within(0.01, slow())
        assert ended == [True]

    asyncio.run(wait())


@pytest.mark.parametrize(
    "text",
    [None, "{", "[]", '{"hub": "main"}', '{"hub": 1, "servers": "/x"}', '{"hub": "main", "servers": "relative"}'],
)
def test_facts_that_are_absent_or_malformed_are_a_broker_that_is_down(tmp_path, text):
    if text is not None:
        (tmp_path / "hub.json").write_text(text)
    with pytest.raises(BrokerDown):
        Broker(str(tmp_path / "hub.sock")).facts()


def test_facts_are_read_beside_the_socket(tmp_path):
    (tmp_path / "hub.json").write_text('{"hub": "main", "servers": "/var/lib/tokenbroker/servers", "login": "x"}')
    assert Broker(str(tmp_path / "hub.sock")).facts() == ("main", "/var/lib/tokenbroker/servers")


def test_sentences_leave_out_what_is_not_there():
    assert say("", "", "") == ""
    assert say("it broke") == "It broke."
    assert say("it broke.", "", "7") == "It broke. (ref 7)"
