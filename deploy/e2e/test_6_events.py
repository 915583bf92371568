"""Rights that change at Keycloak are seen by its events: from the administrator's answer to the last token that a
notebook gets. It comes late: tokens of its long life would keep other tests waiting for their end."""

import html
import json
import re
import time
from urllib.parse import urljoin

import pytest
import requests

from people import Browser, claims
from refstack.process import wait_for
from refstack.stack import EVENTS_EVERY

STORAGE = "/v1/token/keycloak?audience=storage"
CODE = "token/authorization_code"
WITHIN = EVENTS_EVERY + 1  # what is promised
MARGIN = 4  # what two busy cores may take on top

# What runs in the notebook: it asks for a token ten times a second, all the time.
ASK = """
import http.client, json, socket, threading, time

class Broker(http.client.HTTPConnection):
    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect("/run/tokenbroker/broker.sock")

answers = [(time.time(), "nothing yet")]

def ask():
    while True:
        broker = Broker("localhost")
        try:
            broker.request("GET", "/v1/token/keycloak?audience=storage")
            answers.append((time.time(), json.loads(broker.getresponse().read()).get("code", "token")))
        except OSError:
            answers.append((time.time(), "broker_down"))
        broker.close()
        time.sleep(0.1)

threading.Thread(target=ask, daemon=True).start()

def until(good, since, seconds):
    while time.time() < since + seconds:
        ours = [(at - since, code) for at, code in list(answers) if at > since]
        for i, (at, code) in enumerate(ours):
            if good(code):
                return code, at, max([0.0] + [t for t, c in ours[:i] if c == "token"])
        time.sleep(0.05)
    return ours[-1][1] + ", still", seconds, seconds
"""


class Notebook:
    """Carol's, while something is done to her."""

    def __init__(self, hub, keycloak):
        self.hub, self.keycloak = hub, keycloak
        Browser().log_in(hub.url, "carol")
        self.server = hub.spawn("carol")
        self.id = keycloak.admin("GET", "/users?username=carol&exact=true").json()[0]["id"]
        self.role = keycloak.admin("GET", "/roles/researcher").json()
        # Tokens must outlive what is measured, or their end alone would show the change.
        wait_for("a token of the new life", lambda: claims(self.server.ask(STORAGE).token)["exp"] - time.time() > 200, 90)
        self.server.run(ASK)

    def until(self, good, since, within=WITHIN):
        """(code, first such answer, last token before it), in seconds after since."""
        return json.loads(self.server.run(
            f"print(json.dumps(until(lambda code: code {good}, {since}, {within + MARGIN})))"))

    def has_tokens(self):
        code, after, _ = self.until("== 'token'", time.time())
        assert code == "token", (code, after)

    def refused(self, what, do):
        """What the notebook is told after something was done."""
        self.has_tokens()
        do()
        code, _, last = self.until("!= 'token'", time.time())
        print(f"{what} → the last token {last:.1f} s later, then {code}")
        assert code in ("denied", "login_required", "revoked"), code
        return code

    def served(self, what, do, within=WITHIN):
        """The notebook gets tokens again, without a login or a restart."""
        do()
        code, first, _ = self.until("== 'token'", time.time(), within)
        print(f"{what} → a token {first:.1f} s later")
        assert code == "token", code

    def admin(self, method, path, **kwargs):
        return self.keycloak.admin(method, f"/users/{self.id}{path}", **kwargs)

    def has_role(self, yes, role=None):
        self.admin("POST" if yes else "DELETE", "/role-mappings/realm", json=[role or self.role])

    def log_in(self):
        Browser().log_in(self.hub.url, "carol")
        self.has_tokens()


@pytest.fixture(scope="module")
def carol(hub, keycloak):
    life = keycloak.admin("GET", "").json()["accessTokenLifespan"]
    set_life = lambda seconds: keycloak.admin("PUT", "", json={**keycloak.admin("GET", "").json(), "accessTokenLifespan": seconds})  # noqa: E731
    set_life(290)
    try:
        yield Notebook(hub, keycloak)
    finally:
        set_life(life)
        hub.stop_server("carol")


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
    # What is seen of an account that is switched off is asked again after half a minute.
    carol.served("user enabled", lambda: carol.admin("PUT", "", json={"enabled": True}), 30)
    assert faults.count(CODE) == codes, "no login was needed"


def test_sessions_ended_by_an_administrator(carol, keycloak):
    def end_each():
        for session in carol.admin("GET", "/sessions").json():
            keycloak.admin("DELETE", f"/sessions/{session['id']}")

    assert carol.refused("session deleted", end_each) == "login_required"
    carol.log_in()
    assert carol.refused("logged out by an administrator", lambda: carol.admin("POST", "/logout")) == "login_required"
    carol.log_in()


def test_the_users_own_logout_at_keycloak(stack, hub, carol):
    browser = Browser()
    browser.log_in(hub.url, "carol")
    def log_out():
        page = browser.open(f"{stack.issuer}/protocol/openid-connect/logout")
        form = urljoin(page.url, html.unescape(re.search(r'<form[^>]*action="([^"]+)"', page.text)[1]))
        code = re.search(r'name="session_code" value="([^"]*)"', page.text)[1]
        assert browser.open(form, {"session_code": code, "confirmLogout": "Logout"}).status_code == 200

    assert carol.refused("the user's own logout", log_out) == "login_required"
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


def test_what_changed_while_no_broker_ran(stack, carol):
    carol.has_tokens()
    stack.stop("broker")
    carol.has_role(False)
    since = time.time()
    stack.start("broker")
    code, first, last = carol.until("== 'denied'", since)
    print(f"role removed while no broker ran → denied {first:.1f} s after its start, the last token {last:.1f} s after it")
    assert code == "denied"
    carol.served("role given back", lambda: carol.has_role(True))


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
