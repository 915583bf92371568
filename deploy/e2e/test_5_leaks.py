"""No refresh token, and no client secret, is anywhere but in the broker and its sealed store."""

import pytest

from conftest import PLANTED, unix_request
from leaks import Search, without_pids
from people import Browser
from refstack.docker import containers
from refstack.stack import BROKER, OLD_WAY

STORAGE = "/v1/token/keycloak?audience=storage"


def needles(stack, faults, hub):
    """Every refresh token that passed the proxy but those a test itself gave to the hub, and the client's secret."""
    named = {token: f"refresh token {i} of {owner or 'somebody'}"
             for i, (token, owner) in enumerate(sorted(faults.refresh_tokens().items())) if token not in PLANTED}
    named[stack.secret(f"{hub}-client-secret")] = "client secret"
    return named


def test_the_search_finds_the_old_way(stack, old_hub, faults, record_property):
    """The positive control: a search that finds nothing here would prove nothing below."""
    Browser().log_in(old_hub.url, "alice")
    for server in ("", "two"):
        old_hub.spawn("alice", server)
    try:
        found = Search(stack, OLD_WAY, needles(stack, faults, OLD_WAY)).run(old_hub)
    finally:
        for server in ("", "two"):
            old_hub.stop_server("alice", server)
    places = sorted({place for name, place in found.hits if name.startswith("refresh token")})
    print(f"the old way: refresh tokens in {len(places)} of {len(found.places)} places")
    print("\n".join("  " + without_pids(p) for p in places))
    assert len(places) >= 12
    for kind in ("docker inspect", "config.v2.json", "environment of", "auth_state", "memory of hub", "memory of proxy", "hub API"):
        assert any(kind in p for p in places), f"not found in {kind}"


@pytest.fixture
def errors(stack, alice, faults):
    """What the broker says when it is asked for things it must refuse, or the provider makes trouble."""
    hub = stack.dir / "hubs/main/hub.sock"
    said = []
    # A provider that repeats what it was sent: the worst error text there is.
    faults.add(kind="token/refresh_token", status=400, times=1,
               body='{"error":"invalid_request","error_description":"you sent {refresh_token}"}')
    faults.add(kind="token/token-exchange", status=400, times=1, body='{"error":"server_error"}')
    for path in (STORAGE, "/v1/token/nosuch", "/v1/token/keycloak?scope=nosuch", "/v1/token/keycloak?min_ttl=3600"):
        said.append(str(alice.ask(path)))
    for path, body in (
        ("/v1/check-session", {"provider": "keycloak", "handle": "tbh_unknown", "user": "alice", "have_sha256": ""}),
        ("/v1/check-session", {"provider": "nosuch", "handle": "tbh_unknown", "user": "alice", "have_sha256": ""}),
        ("/v1/claim", {"provider": "keycloak", "handle": "tbh_unknown", "user": "alice"}),
        ("/v1/register", {"user": ""}),
        ("/oauth2/token/keycloak", {}),
    ):
        said.append(str(unix_request(hub, "POST", path, body)))
    faults.clear()
    return said


def test_nothing_is_found_with_the_broker(stack, hub, alice, bob, faults, errors):
    assert alice.ask(STORAGE).status in (200, 409)
    Browser().log_in(hub.url, "alice")
    assert alice.ask(STORAGE).status == 200, "a login repairs what the fault broke"
    hub.spawn("alice", "two")
    try:
        named = needles(stack, faults, BROKER)
        search = Search(stack, BROKER, named)
        for i, text in enumerate(errors):
            search.look(f"error answer {i}", text)
        search.run(hub)
    finally:
        hub.stop_server("alice", "two")
    print(f"{len(named)} secrets, {len(search.places)} places, {search.bytes >> 20} MB")
    assert len(named) > 2 and search.bytes > 100 << 20 and len(containers(stack.label)) >= 2
    for kind in ("docker inspect", "config.v2.json", "environment of", "memory of", "auth_state of alice",
                 "hub API", "Redis dump", "file journal", "log/broker.log", "log/audit.jsonl", "log/hub-broker.log", "log/proxy-broker.log"):
        assert any(kind in p for p in search.places), f"did not look at {kind}"
    assert not search.hits, sorted(search.hits)
