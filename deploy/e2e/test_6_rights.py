"""The other ways in: the administrator's command, the hub's groups, its users, and what happens beyond a refusal."""

import time

import pytest

from notebook import BY_EVENTS, MARGIN, STORAGE
from people import claims, since_1970
from refstack.docker import docker
from refstack.process import wait_for

# Carol has storage by the hub's group or by her role; without either her server has no purpose.
POLICY = """\
  - {users: [carol], groups: [staff], provider: keycloak, audiences: [storage], scopes: [storage], max_ttl: 5m}
  - {users: [carol], roles: [researcher], provider: keycloak, audiences: [storage], scopes: [storage], max_ttl: 5m, on_role_lost: stop_server}
  - {users: [alice, bob], provider: keycloak, scopes: [openid, profile], max_ttl: 5m}
"""


@pytest.fixture(scope="module", autouse=True)
def policy(stack, carol):
    stack.configure(policy=POLICY)
    yield
    stack.configure()
    carol.log_in()


def test_a_user_disconnected(carol, admin, keycloak):
    token = carol.server.ask(STORAGE).token
    said = {}

    def disconnect():
        (said["of"],) = admin("users", "disconnect", "carol")["disconnected"]

    carol.has_tokens()
    began = time.time()
    disconnect()
    answered = time.time()
    code, _, last = carol.until("!= 'token'", began, MARGIN)
    stopped = since_1970(said["of"]["issuing_stopped_at"])
    print(f"users disconnect → the last token {last:.2f} s after the command began, {began + last - stopped:+.2f} s from "
          f"issuing_stopped_at; the command answered after {answered - began:.2f} s")
    assert code == "revoked" and began + last < stopped + 1 + MARGIN
    # What the answer says is so.
    assert int(since_1970(said["of"]["outstanding_until"])) >= claims(token)["exp"] - 1, said
    wait_for("its revocation", lambda: not keycloak.introspect(token)["active"])
    carol.log_in()


def test_a_group_of_the_hub(hub, carol, audit):
    """The hub tells at its next refresh of the user, here her next request, and at the start of a server."""
    hub.api("POST", "/groups/staff")

    def staff(yes):
        response = hub.api("POST" if yes else "DELETE", "/groups/staff/users", json={"users": ["carol"]})
        assert response.status_code == 200, response.text

    def heard(before):
        assert hub.api("GET", "/user", carol.server.token).status_code == 200
        return len(audit('"action":"groups"')) > before

    def tell(yes):
        before = len(audit('"action":"groups"'))
        staff(yes)
        wait_for("the hub's word", lambda: heard(before))

    tell(True)
    try:
        seen(audit, lambda: carol.has_role(False))
        carol.has_tokens()
        assert carol.refused("left a group of the hub, from the hub's word", lambda: tell(False), within=1) == "denied"
        staff(True)
        carol.served("joined it again, from the start of another server", lambda: hub.spawn("carol", "second"), within=1)
        hub.stop_server("carol", "second")
    finally:
        seen(audit, lambda: carol.has_role(True))
        tell(False)
        hub.api("DELETE", "/groups/staff")


def test_a_server_that_lost_its_purpose_is_stopped(hub, carol, audit):
    carol.has_tokens()
    stops = len(audit('"action":"stop_server"'))
    carol.has_role(False)
    since = time.time()
    try:
        wait_for("the end of the container", lambda: not docker(
            "ps", "--quiet", "--filter", f"name=^{carol.server.container}$"), BY_EVENTS + MARGIN + 30)
        print(f"role removed, on_role_lost: stop_server → the container is gone after {time.time() - since:.1f} s")
        wait_for("the audit line", lambda: len(audit('"action":"stop_server"')) > stops)
        assert '"by":"policy: a role was lost"' in audit('"action":"stop_server"')[-1]
        wait_for("its end at the hub", lambda: not hub.ready("carol"))
    finally:
        seen(audit, lambda: carol.has_role(True))
    carol.start()
    carol.has_tokens()


def seen(audit, do):
    """Changes somebody's roles and waits until the broker has seen it."""
    before = len(audit('"action":"roles"'))
    do()
    wait_for("the change of roles", lambda: len(audit('"action":"roles"')) > before)
