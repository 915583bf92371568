"""The straight line: a person logs in, starts a server, and code in it gets tokens."""

import hashlib
import time
from pathlib import Path

import pytest

import notebook
from leaks import auth_states
from people import Browser, Refused, claims
from refstack.docker import inspect
from refstack.process import wait_for
from refstack.stack import BROKER, go_build


def test_the_hub_holds_a_handle_and_no_refresh_token(stack, alice):
    state = auth_states(stack, BROKER)["alice"]
    assert state["refresh_token"].startswith("tbh_")
    assert state["token_response"]["refresh_token"] == state["refresh_token"]
    assert claims(state["access_token"])["preferred_username"] == "alice"


def test_the_hubs_own_token_carries_the_hubs_scopes_and_a_containers_its_own(stack, alice):
    own = claims(auth_states(stack, BROKER)["alice"]["access_token"])
    assert set(own["scope"].split()) == {"openid", "profile"} and "aud" not in own
    containers = claims(alice.ask("/v1/token/keycloak?audience=storage").token)
    assert "storage" in containers["scope"].split() and containers["aud"] == "storage"


def test_the_server_has_one_read_only_directory_and_no_token_in_its_environment(alice):
    container = inspect(alice.container)[0]
    mounts = {m["Destination"]: m for m in container["Mounts"]}
    assert not mounts["/run/tokenbroker"]["RW"]
    assert not mounts["/usr/local/bin/access-token"]["RW"]
    assert not [e for e in container["Config"]["Env"] if "eyJ" in e or "tbh_" in e]


def test_the_helper_prints_a_token_that_keycloak_takes(alice, keycloak):
    code, out = alice.sh("access-token keycloak --audience storage")
    assert code == 0, out
    seen = keycloak.introspect(out.strip())
    assert seen["active"] and seen["username"] == "alice" and "storage" in seen["aud"]


def test_a_token_is_narrowed_to_its_audience_and_scopes(alice):
    for audience in ("storage", "compute"):
        answer = alice.ask(f"/v1/token/keycloak?audience={audience}")
        assert answer.status == 200, answer
        assert answer.body["audience"] == audience and audience in answer.body["scopes"]
        assert claims(answer.token)["aud"] == audience


def test_a_token_opens_userinfo(alice, keycloak):
    answer = alice.ask("/v1/token/keycloak?scope=openid+profile")
    assert answer.status == 200, answer
    info = keycloak.userinfo(answer.token)
    assert info.status_code == 200 and info.json()["preferred_username"] == "alice"


def test_an_answer_says_how_long_and_under_which_number_it_is_recorded(alice, audit):
    answer = alice.ask("/v1/token/keycloak?audience=storage")
    assert 0 < answer.body["expires_in"] <= 300
    assert abs(claims(answer.token)["exp"] - time.time() - answer.body["expires_in"]) < 5
    lines = audit(answer.body["ref"])
    assert len(lines) == 1 and '"alice"' in lines[0]
    assert answer.token not in lines[0]


def test_the_same_token_is_answered_again(alice, faults):
    first = alice.ask("/v1/token/keycloak?audience=storage&min_ttl=1")
    before = faults.count("token/refresh_token") + faults.count("token/token-exchange")
    second = alice.ask("/v1/token/keycloak?audience=storage&min_ttl=1")
    after = faults.count("token/refresh_token") + faults.count("token/token-exchange")
    assert second.token == first.token and after == before


@pytest.fixture(scope="session")
def python_client(alice):
    return notebook.python_client(alice)


def test_the_python_client_gets_a_token(alice, python_client, keycloak):
    token = alice.run(python_client + "import tokenbroker; print(tokenbroker.token('keycloak', audience='storage'))")
    assert keycloak.introspect(token.strip())["active"]


def test_the_python_client_raises_what_the_broker_says(alice, python_client):
    out = alice.run(python_client + """
import tokenbroker
try:
    tokenbroker.token('nosuch')
except tokenbroker.TokenBrokerError as e:
    print(type(e).__name__, '|', e)
""")
    assert "nosuch" in out, out


@pytest.fixture(scope="session")
def go_client(alice):
    """A Go program in alice's home that asks over gRPC."""
    path = go_build("deploy/e2e/ask")
    alice.put_bytes("ask", path.read_bytes())
    alice.sh("chmod 755 ask")
    return "./ask"


def test_the_go_client_gets_the_same_token_over_grpc(alice, go_client):
    json_token = alice.ask("/v1/token/keycloak?audience=storage").token
    code, out = alice.sh(f"{go_client} storage")
    assert code == 0, out
    assert out.strip() == json_token or claims(out.strip())["iat"] > claims(json_token)["iat"]


def test_the_go_client_is_told_the_same_code_over_grpc(alice, go_client):
    code, out = alice.sh(f"{go_client} nowhere")
    assert code == 1 and "code denied" in out, out


def test_what_the_image_lacks_is_not_needed(alice):
    """The helper is the only thing of ours in the container."""
    code, out = alice.sh("pip list 2>/dev/null | grep -i tokenbroker; ls /run/tokenbroker; command -v access-token")
    assert (code, out.split()) == (0, ["broker.sock", "/usr/local/bin/access-token"])


def test_a_list_says_what_there_is(alice):
    answer = alice.ask("/v1/providers")
    (entry,) = answer.body["providers"]
    assert entry["name"] == "keycloak" and entry["login"] and entry["state"] == "live"
    assert {"storage", "compute"} <= set(entry["audiences"])


def test_a_second_user_gets_his_own_tokens_and_is_denied_what_his_roles_lack(bob, audit):
    own = bob.ask("/v1/token/keycloak?scope=openid+profile")
    assert claims(own.token)["preferred_username"] == "bob"
    denied = bob.ask("/v1/token/keycloak?audience=storage")
    assert (denied.status, denied.code) == (403, "denied")
    assert "researcher" in denied.body["detail"]
    assert audit(denied.body["ref"])


@pytest.mark.parametrize("path, status, code, names", [
    ("/v1/token/nosuch", 400, "invalid", "nosuch"),
    ("/v1/token/keycloak?scope=a%22b", 400, "invalid", "scope"),
    ("/v1/token/keycloak?audience=nowhere", 403, "denied", "nowhere"),
    ("/v1/token/keycloak?min_ttl=soon", 400, "invalid", "min_ttl"),
    ("/v1/nothing", 404, "invalid", ""),
])
def test_a_wrong_request_is_told_what_is_wrong(alice, path, status, code, names):
    answer = alice.ask(path)
    assert (answer.status, answer.code) == (status, code), answer
    assert names in answer.body["detail"]
    assert answer.body["next"] and answer.body["ref"]


def test_a_named_server_is_a_server_of_its_own(hub, alice, audit, admin):
    named = hub.spawn("alice", "gpu")
    try:
        answer = named.ask("/v1/token/keycloak?audience=storage")
        assert claims(answer.token)["preferred_username"] == "alice"
        assert '"gpu"' in audit(answer.body["ref"])[0]
        assert directory_of(named) != directory_of(alice)
        states = {r.get("server", ""): r["state"] for r in admin("sessions", "list", "--user", "alice")["registrations"]}
        assert states[""] == "bound" and states["gpu"] == "bound"
    finally:
        hub.stop_server("alice", "gpu")


def test_a_stopped_server_is_unregistered(hub, bob, admin):
    named = hub.spawn("bob", "short")
    directory = directory_of(named)
    assert (directory / "broker.sock").exists()
    hub.stop_server("bob", "short")

    def states():
        registered = admin("sessions", "list", "--user", "bob").get("registrations", [])
        return {r["state"] for r in registered if r.get("server") == "short"}

    wait_for("the registration's end", lambda: states() <= {"stopped", "gone"})
    assert not (directory / "broker.sock").exists()
    assert bob.ask("/v1/token/keycloak?scope=openid").status == 200, "the user's other server goes on"


def test_a_login_that_the_hub_refuses_leaves_no_grant(stack, hub, faults, admin):
    before = faults.count("token/authorization_code")
    with pytest.raises(Refused, match="not currently authorized"):
        Browser().log_in(hub.url, "mallory")
    assert faults.count("token/authorization_code") == before + 1, "the code was exchanged"
    assert "mallory" not in auth_states(stack, BROKER)
    grants = admin("sessions", "list").get("grants", [])
    assert {g.get("user") for g in grants if g["state"] == "GRANT_STATE_LIVE"} <= {"alice", "bob", "carol", "dave"}
    assert not [g for g in grants if g.get("user") == "mallory"]


def directory_of(server):
    """The server's directory on the host."""
    mounts = inspect(server.container)[0]["Mounts"]
    return Path(next(m["Source"] for m in mounts if m["Destination"] == "/run/tokenbroker"))


def test_the_directory_is_the_same_for_every_start(stack, alice):
    parts = b"".join(b"%d:%s" % (len(p), p) for p in (b"main", b"alice", b""))
    assert directory_of(alice) == stack.dir / "servers" / hashlib.sha256(parts).hexdigest()[:32]
