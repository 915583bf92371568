"""Rights that change at Keycloak are seen by its events: from the administrator's answer to the last token that a
notebook gets. It comes late: tokens of its long life would keep other tests waiting for their end."""

import json
import subprocess
import time

import pytest
import requests

from notebook import MARGIN, Notebook
from people import Browser, since_1970
from refstack.process import wait_for
from refstack.stack import CHECKOUT

CODE = "token/authorization_code"


@pytest.fixture
def untold(keycloak):
    """Keycloak tells of no logouts, so that only its events do."""
    client = keycloak.admin("GET", "/clients?clientId=jupyterhub").json()[0]
    url = client["attributes"]["backchannel.logout.url"]

    def tell(url):
        keycloak.admin("PUT", f"/clients/{client['id']}", json={
            **client, "attributes": {**client["attributes"], "backchannel.logout.url": url}})

    tell("")
    yield
    tell(url)


@pytest.fixture(scope="module", autouse=True)
def dave(hub, keycloak):
    """A user who works, and is then deleted at the hub. Returns when that was.

    It is long ago when the last test asks what came of it: the broker asks the hub once a minute, and believes it the
    second time.
    """
    dave = Notebook(hub, keycloak, "dave")
    dave.has_tokens()
    assert hub.api("DELETE", "/users/dave").status_code == 204
    return time.time()


def seen_by(audit, cause):
    assert [line for line in audit('"roles"') if f"seen by: {cause}" in line], cause


def test_a_role_removed_and_given_back(carol, faults, audit):
    codes = faults.count(CODE)
    assert carol.refused("role removed", lambda: carol.has_role(False)) == "denied"
    carol.served("role given back", lambda: carol.has_role(True))
    assert faults.count(CODE) == codes, "no login was needed"
    seen_by(audit, "admin event DELETE REALM_ROLE_MAPPING")
    seen_by(audit, "admin event CREATE REALM_ROLE_MAPPING")


def test_a_group_left(carol, keycloak):
    keycloak.admin("POST", "/groups", json={"name": "events-lab"})
    group = keycloak.admin("GET", "/groups?search=events-lab&exact=true").json()[0]["id"]
    keycloak.admin("POST", f"/groups/{group}/role-mappings/realm", json=[carol.role])
    try:
        carol.admin("PUT", f"/groups/{group}")
        carol.has_role(False)
        assert carol.refused("group left", lambda: carol.admin("DELETE", f"/groups/{group}")) == "denied"
        carol.served("group joined again", lambda: carol.admin("PUT", f"/groups/{group}"))
        assert carol.refused("the group's role removed, for all of it", lambda: keycloak.admin(
            "DELETE", f"/groups/{group}/role-mappings/realm", json=[carol.role])) == "denied"
    finally:
        carol.has_role(True)
        keycloak.admin("DELETE", f"/groups/{group}")


def test_a_composite_role_edited_and_a_role_deleted(carol, keycloak):
    keycloak.admin("POST", "/roles", json={"name": "staff"})
    keycloak.admin("POST", "/roles/staff/composites", json=[carol.role])
    carol.has_role(True, keycloak.admin("GET", "/roles/staff").json())
    carol.has_role(False)
    try:
        assert carol.refused("composite role loses a part", lambda: keycloak.admin(
            "DELETE", "/roles/staff/composites", json=[carol.role])) == "denied"
        carol.served("composite role gets it back", lambda: keycloak.admin("POST", "/roles/staff/composites", json=[carol.role]))
        assert carol.refused("the role deleted, for everybody", lambda: keycloak.admin("DELETE", "/roles/staff")) == "denied"
    finally:
        carol.has_role(True)


def test_a_user_switched_off_and_on_again(carol, faults):
    codes = faults.count(CODE)
    carol.refused("user disabled", lambda: carol.admin("PUT", "", json={"enabled": False}))
    carol.served("user enabled", lambda: carol.admin("PUT", "", json={"enabled": True}))
    assert faults.count(CODE) == codes, "no login was needed"


def test_sessions_ended_by_an_administrator(carol, keycloak, untold):
    def end_each():
        for session in carol.admin("GET", "/sessions").json():
            keycloak.admin("DELETE", f"/sessions/{session['id']}")

    assert carol.refused("session deleted", end_each) == "login_required"
    carol.log_in()
    assert carol.refused("logged out by an administrator", lambda: keycloak.end_sessions("carol")) == "login_required"
    carol.log_in()


def test_the_users_own_logout_at_keycloak(stack, hub, carol, untold):
    browser = Browser()
    browser.log_in(hub.url, "carol")
    assert carol.refused("the user's own logout", lambda: browser.log_out(stack.issuer)) == "login_required"
    carol.log_in()


def test_a_token_revoked_at_keycloak_by_somebody_else(stack, carol, keycloak, faults):
    """RFC 7009 by whoever has the client's secret; Keycloak tells nobody but by the event."""
    def revoke():
        # All of hers, because logins and refreshes of the tests before are among them; one that has ended is no error.
        mine = [t for t, user in faults.refresh_tokens().items() if user == "carol"]
        answers = [requests.post(f"{keycloak.realm}/revoke", data={"token": t}, timeout=30,
                                 auth=("jupyterhub", stack.secret("broker-client-secret"))) for t in reversed(mine)]
        assert any(a.ok for a in answers)

    assert carol.refused("refresh token revoked", revoke) == "login_required"
    carol.log_in()


def test_a_user_deleted(carol, keycloak):
    user = carol.admin("GET", "").json()
    try:
        assert carol.refused("user deleted", lambda: carol.admin("DELETE", "")) == "login_required"
    finally:
        # The same user again, for the tests that follow.
        keycloak.admin("POST", "/partialImport", json={"ifResourceExists": "OVERWRITE", "users": [{
            **{k: user[k] for k in ("id", "username", "email", "firstName", "lastName", "emailVerified")}, "enabled": True,
            "credentials": [{"type": "password", "value": "carol-pw"}], "realmRoles": ["default-roles-lab", "researcher"]}]})
    assert carol.admin("GET", "").json()["username"] == "carol"
    carol.log_in()


def test_the_service_account_may_read_events_and_nothing_else(stack, keycloak):
    token = requests.post(f"{keycloak.realm}/token", data={"grant_type": "client_credentials"}, timeout=30,
                          auth=("tokenbroker-events", stack.secret("tokenbroker-events-secret"))).json()["access_token"]

    def status(path):
        return requests.get(f"{keycloak.base}/admin/realms/lab{path}", timeout=30,
                            headers={"Authorization": f"Bearer {token}"}).status_code

    assert {path: status(path) for path in ("/admin-events", "/events", "/events/config")} == {
        "/admin-events": 200, "/events": 200, "/events/config": 200}
    assert {status(path) for path in ("/users", "/groups", "/roles", "/clients")} == {403}


def test_a_service_account_without_its_role_is_named_and_changes_nothing(stack, hub, carol, keycloak, admin):
    account = keycloak.admin("GET", "/users?username=service-account-tokenbroker-events").json()[0]["id"]
    client = keycloak.admin("GET", "/clients?clientId=realm-management").json()[0]["id"]
    mapping = f"/users/{account}/role-mappings/clients/{client}"
    role = keycloak.admin("GET", f"/clients/{client}/roles/view-events").json()

    def part():
        (provider,) = [p for p in admin("status")["providers"] if p["name"] == "keycloak"]
        return provider

    assert part()["ok"], part()
    keycloak.admin("DELETE", mapping, json=[role])
    try:
        wait_for("the trouble in the status", lambda: "lacks the role view-events" in part().get("detail", ""), 75)
        carol.has_tokens()
    finally:
        keycloak.admin("POST", mapping, json=[role])
    wait_for("its end", lambda: part().get("ok"), 75)


def test_the_timeline_that_deploy_stack_prints(stack, alice):
    done = subprocess.run([CHECKOUT / "deploy/stack", "timeline", stack.link], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    told = [line.split(" s  ")[1] for line in done.stdout.splitlines()[:-1]]
    expected = ["notebook  gets a token", "Keycloak  role researcher removed", "broker    gone: keycloak:roles/researcher",
                "notebook  refused: ", "Keycloak  role researcher given back", "broker    gained: keycloak:roles/researcher",
                "notebook  gets a token"]
    assert [line[:len(start)] for line, start in zip(told, expected)] == expected, done.stdout


def test_a_user_deleted_at_the_hub(hub, dave, admin, audit):
    """Nothing of Keycloak's, but the tests before take the time that it takes."""
    def lines(action):
        return [line for line in map(json.loads, audit(f'"action":"{action}"'))
                if line.get("user") == "dave" and line["outcome"] == "done"]

    def after(line):
        return since_1970(line["time"]) - dave

    ended = wait_for("the end of his grant", lambda: lines("disconnect"), 120 + MARGIN)[0]
    print(f"user deleted at the hub → the last token {after(lines('token')[-1]):+.1f} s from the answer (the hub itself stops his "
          f"server), his session ended {after(ended):.1f} s after it; promised 120 s")
    assert after(lines("token")[-1]) < 1 and after(ended) < 120 + MARGIN
    assert ended["by"] == "hub main: it has no such user any more"
    wait_for("its end at Keycloak", lambda: not live(admin, "dave"))


def live(admin, user):
    return [g for g in admin("sessions", "list", "--user", user).get("grants", []) if g["state"] == "GRANT_STATE_LIVE"]
